"""What the name of a parameter says of its place in the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The decoder layer of a parameter by its name; None for embeddings, the last norm and the head."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def layers_in(names: Sequence[str]) -> int:
    """How many decoder layers the parameters of a model have."""
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)


def split_at_layer(name: str) -> tuple[str, str]:
    """("model.layers.3", "mlp.down_proj.weight") for a name in a decoder layer; ("", the name) for any other."""
    match = _LAYER.search(name)
    return ("", name) if match is None else (name[: match.end() - 1], name[match.end() :])


def module_of(name: str) -> str:
    """What a parameter belongs to: inside its decoder layer (self_attn.q_proj), or alone outside (embed_tokens, norm).

    The experts of a mixture count as one module.
    """
    prefix, place = split_at_layer(name)
    path, _, leaf = place.rpartition(".")
    parts = (path if path and leaf in ("weight", "bias") else place).split(".")
    return ".".join(part for part in parts if not part.isdigit()) if prefix else parts[-1]
