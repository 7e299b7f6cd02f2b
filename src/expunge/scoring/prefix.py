"""The beginning that all rows share (a chat template's system turn, the shots of a prompt), computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expunge.data.encode import Encoded
from expunge.models.forward import supervised_head

#: A shorter beginning is not worth a forward of its own.
_WORTH_IT = 8

_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of the first `tokens` tokens of every row; 0 tokens when nothing is shared."""

    tokens: int = 0
    cache: Any = None

    def inputs(self, batch_size: int) -> dict[str, Any]:
        """Keyword arguments that put the beginning before a batch of what follows it."""
        if self.cache is None:
            return {"use_cache": False}
        # a forward appends to the cache it is given: each gets its own copy
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(batch_size)
        return {"use_cache": True, "past_key_values": cache}


def shared_prefix(model: nn.Module, rows: Sequence[Encoded], device: torch.device | str) -> SharedPrefix:
    """What `rows` have in common before their first supervised token, if it is long enough and the model has an
    ordinary key–value cache (others, such as state-space models, score whole rows)."""
    tokens = common_tokens(rows)
    if len(rows) < 2 or tokens < _WORTH_IT:
        return SharedPrefix()
    input_ids = torch.from_numpy(rows[0].input_ids[:tokens].astype(np.int64))[None].to(device)
    with supervised_head(model, torch.zeros_like(input_ids, dtype=torch.bool)):
        cache: Any = getattr(model(input_ids=input_ids, use_cache=True), "past_key_values", None)
    plain = type(cache) is DynamicCache and all(type(layer) in _PLAIN_LAYERS for layer in cache.layers)
    return SharedPrefix(tokens, cache) if plain else SharedPrefix()


def common_tokens(rows: Sequence[Encoded]) -> int:
    """Tokens with which all rows begin; each row's last prompt token is left out, because it predicts."""
    if not rows:
        return 0
    limit = min(row.prompt_tokens for row in rows) - 1
    first = rows[0].input_ids[:limit]
    for row in rows:
        same = first == row.input_ids[: len(first)]
        first = first[: len(same) if same.all() else int(same.argmin())]
    return len(first)
