"""The beginning that all rows share (a chat template's system turn, the shots of a prompt), computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expunge.data.encode import Encoded
from expunge.models.forward import supervised_head, unwrap

#: A shorter beginning is not worth a forward of its own.
WORTH_IT = 8

_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class Beginning(Protocol):
    """What a key–value cache holds of the beginning of rows, so that the model is given only what follows."""

    def held(self, row: int) -> int:
        """How many of the row's first tokens the cache holds."""
        ...

    def before(self, index: Sequence[int], width: int, device: torch.device | str) -> tuple[dict[str, Any], Tensor]:
        """What puts the beginnings of these rows before `width` more tokens of each: keyword arguments of the model,
        and the mask [B, W] over the columns that the cache holds."""
        ...


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of the first `tokens` tokens of every row; 0 tokens when nothing is shared."""

    tokens: int = 0
    cache: Any = None
    seen: Tensor | None = None  # int64 [1, tokens]: whether attention sees them

    def held(self, row: int) -> int:
        """The same of every row."""
        return self.tokens

    def before(self, index: Sequence[int], width: int, device: torch.device | str) -> tuple[dict[str, Any], Tensor]:
        """See Beginning."""
        if self.cache is None or self.seen is None:
            return {"use_cache": False}, torch.zeros(len(index), 0, dtype=torch.int64, device=device)
        return {"use_cache": True, "past_key_values": self.repeated(len(index))}, self.seen.expand(len(index), -1)

    def repeated(self, count: int) -> Any:
        """The cache for `count` rows; None without a prefix. The rows share their memory until they grow."""
        if self.cache is None:
            return None
        repeated = _shallow(self.cache)
        for layer in repeated.layers:
            if layer.get_seq_length() > 0:
                layer.keys = layer.keys.expand(count, -1, -1, -1)
                layer.values = layer.values.expand(count, -1, -1, -1)
        return repeated


def shared_prefix(model: nn.Module, rows: Sequence[Encoded], device: torch.device | str) -> SharedPrefix:
    """What `rows` have in common before their first supervised token, if it is long enough and the model has an
    ordinary key–value cache (others, such as state-space models, score whole rows)."""
    tokens = common_tokens(rows)
    if len(rows) < 2 or tokens < WORTH_IT:
        return SharedPrefix()
    input_ids = torch.from_numpy(rows[0].input_ids[:tokens].astype(np.int64))[None].to(device)
    hidden = rows[0].hidden
    seen = torch.ones_like(input_ids) if hidden is None else torch.from_numpy(~hidden[None, :tokens]).to(input_ids)
    with supervised_head(model, torch.zeros_like(input_ids, dtype=torch.bool)):
        output = model(input_ids=input_ids, attention_mask=seen, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    return SharedPrefix(tokens, cache, seen) if is_plain(cache) else SharedPrefix()


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


def is_plain(cache: Any) -> bool:
    """Whether it is a key–value cache of growing layers, which can be repeated and taken apart by rows."""
    return type(cache) is DynamicCache and all(type(layer) in _PLAIN_LAYERS for layer in cache.layers)


def picked(cache: Any, rows: Tensor) -> Any:
    """The cache of the given rows, as often as they are named; the given one stays as it is."""
    chosen = _shallow(cache)
    chosen.batch_select_indices(rows)
    return chosen


def window(model: nn.Module) -> int | None:
    """Tokens that the model's narrowest attention looks back on; None if it is never cut off."""
    config: Any = unwrap(model).config.get_text_config()  # type: ignore[union-attr, operator]
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if size is not None), default=None)


def _shallow(cache: Any) -> Any:
    # a forward appends to the layers of the cache that it is given: it makes new tensors and leaves the old ones
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made
