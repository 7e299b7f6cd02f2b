"""What the start model says of the rows, computed once before training, so that no second model is held in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.forward import capture_head_input, hidden_states, log_softmax_at, supervised_head, unwrap

#: Vectors beyond this many bytes go to a memory-mapped file instead of RAM.
RAM_LIMIT = 1 << 30


class ReferenceCache:
    """Log-probs, head inputs or hidden states of the start model at the supervised tokens of chosen rows.

    A KL term needs the start model's whole distribution at each token: V numbers. The vector that enters the head is
    d numbers and gives the same logits, so that is what is kept; the head itself is copied only if it is trained.
    """

    def __init__(self) -> None:
        self._offsets: dict[int, tuple[int, int]] = {}
        self._logprobs: Tensor | None = None
        self._vectors: Tensor | None = None
        self._head: Callable[[Tensor], Tensor] | None = None

    def logprobs(self, rows: Int[Tensor, " B"], device: torch.device) -> Float[Tensor, " N"]:
        """log p(token) of the supervised tokens of the rows, in order."""
        assert self._logprobs is not None, "log-probs were not asked for"
        return self._take(self._logprobs, rows).to(device)

    def head_inputs(self, rows: Int[Tensor, " B"], device: torch.device) -> Float[Tensor, "N d"]:
        """The vectors that enter the output embedding."""
        assert self._vectors is not None, "head inputs were not asked for"
        return self._take(self._vectors, rows).to(device)

    def hidden(self, rows: Int[Tensor, " B"], device: torch.device) -> Float[Tensor, "N d"]:
        """Outputs of the chosen decoder layer."""
        assert self._vectors is not None, "hidden states were not asked for"
        return self._take(self._vectors, rows).to(device)

    def head_logits(self, vectors: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """The start model's logits from its head inputs."""
        assert self._head is not None
        return self._head(vectors)

    def _take(self, values: Tensor, rows: Tensor) -> Tensor:
        spans = [self._offsets[row] for row in rows.tolist()]
        return torch.cat([values[start:stop] for start, stop in spans]) if spans else values[:0]


@torch.no_grad()
def build_reference(
    model: nn.Module,
    rows: Sequence[Encoded],
    chosen: Sequence[int],
    *,
    logprobs: bool = False,
    head: bool = False,
    layer: int | None = None,
    batch_size: int = 16,
    file: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReferenceCache:
    """One pass of the start model over the chosen rows, longest first; vectors beyond RAM_LIMIT go to `file`."""
    cache = ReferenceCache()
    order = sorted(set(chosen), key=lambda i: (-len(rows[i].input_ids), i))
    total = 0
    for i in order:
        count = len(rows[i].input_ids) - rows[i].prompt_tokens
        cache._offsets[i] = (total, total + count)
        total += count
    if not order or not (logprobs or head or layer is not None):
        return cache
    device = next(model.parameters()).device
    if logprobs:
        cache._logprobs = torch.empty(total)
    if head:
        cache._head = _head_function(model)
    model.eval()
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = pad_right([rows[i] for i in picked], picked, 0).to(device)
        span = slice(cache._offsets[picked[0]][0], cache._offsets[picked[-1]][1])
        if layer is not None:
            vectors = hidden_states(model, layer, batch.input_ids)[batch.supervised]
        else:
            sink: list[Tensor] = []
            with supervised_head(model, batch.supervised), capture_head_input(model, sink):
                logits = model(input_ids=batch.input_ids, use_cache=False).logits[0]
            vectors = sink[0][0]
            if cache._logprobs is not None:
                cache._logprobs[span] = log_softmax_at(logits, batch.targets).cpu()
            if head and start == 0:
                _check_head(cache, vectors, logits)
        if head or layer is not None:
            if cache._vectors is None:
                cache._vectors = _allocate(total, vectors, file)
            cache._vectors[span] = vectors.to(cache._vectors.device)
        if progress is not None:
            progress(len(picked))
    return cache


def _allocate(total: int, like: Tensor, file: Path | None) -> Tensor:
    width = like.shape[-1]
    if file is None or total * width * like.element_size() <= RAM_LIMIT:
        return torch.empty(total, width, dtype=like.dtype)
    flat = torch.from_file(str(file), shared=True, size=total * width, dtype=like.dtype)
    return flat.view(total, width)


def _head_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Head inputs → logits as the start model makes them; weights are copied if training would change them."""
    inner: Any = unwrap(model)
    embedding, config = inner.get_output_embeddings(), inner.config.get_text_config()
    weight, bias = embedding.weight, getattr(embedding, "bias", None)
    if weight.requires_grad:
        weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    cap = getattr(config, "final_logit_softcapping", None)
    times = getattr(config, "logit_scale", None) or 1.0
    over = getattr(config, "logits_scaling", None) or 1.0

    def logits(vectors: Tensor) -> Tensor:
        raw = nn.functional.linear(vectors.to(weight.dtype), weight, bias) * (times / over)
        return torch.tanh(raw / cap) * cap if cap else raw

    return logits


def _check_head(cache: ReferenceCache, vectors: Tensor, logits: Tensor) -> None:
    """The head function must give what the model itself gave, or KL terms would be silently wrong."""
    again = cache.head_logits(vectors[:64]).float()
    if not torch.allclose(again, logits[:64].float(), rtol=0.02, atol=0.05):
        raise UserError(
            "this architecture changes its logits after the output embedding in a way that the KL term does not know",
            "leave the term out: --set unlearn.0.retain.kl=0",
        )
