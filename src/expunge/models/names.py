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
