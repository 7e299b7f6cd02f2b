"""The registry of attacks. No attack is in this version; `expunge list attacks` says so."""

from __future__ import annotations

from expunge.registry import Described, Registry

ATTACKS: Registry[Described] = Registry("attack", "expunge.attacks")
