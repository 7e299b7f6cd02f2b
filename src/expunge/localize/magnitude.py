"""Magnitude: large weights first, whatever the rows are; a baseline of WAGLE (arXiv 2410.17509)."""

from __future__ import annotations

from expunge.localize.base import Attribution, Saliency, attribution
from expunge.localize.evidence import Evidence


@attribution(name="magnitude", idea="large weights, whatever the rows are", formula="|θ|", paper="2410.17509")
class Magnitude(Attribution):
    """It reads no rows: what it finds is what the model is made of, not what it knows."""

    def saliency(self, evidence: Evidence) -> Saliency:
        """Absolute weights."""
        return {name: parameter.detach().float().abs() for name, parameter in evidence.parameters.items()}
