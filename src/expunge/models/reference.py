"""What the start model says of the rows, computed once before training, so that no second model is held in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.forward import unwrap
from expunge.models.passes import Forward
from expunge.models.prefix import Prefix
from expunge.models.storage import allocate
from expunge.models.token_logprobs import token_logprobs


@dataclass(frozen=True)
class Needs:
    """Numbers of the rows of which the start model's log-probs, whole distributions or hidden states are wanted."""

    logprobs: Collection[int] = ()
    distributions: Collection[int] = ()
    hidden: Collection[int] = ()
    layer: int | None = None  # decoder layer of `hidden`
    temperature: float = 1.0  # of `logprobs`


class Kept:
    """One value (or vector) per supervised token of some rows, in one tensor."""

    def __init__(self, rows: Sequence[Encoded], chosen: Sequence[int], file: Path | None = None) -> None:
        self.file = file
        self.values: Tensor | None = None
        self.spans: dict[int, tuple[int, int]] = {}
        self.total = 0
        for row in chosen:
            count = rows[row].supervised_tokens
            self.spans[row] = (self.total, self.total + count)
            self.total += count

    def put(self, rows: Sequence[int], values: Tensor) -> None:
        """Keep the values of the supervised tokens of these rows, one row after another."""
        if self.values is None:
            self.values = allocate((self.total, *values.shape[1:]), values.dtype, self.file)
        start = 0
        for row in rows:
            first, last = self.spans[row]
            self.values[first:last] = values[start : start + last - first].to(self.values.device)
            start += last - first

    def take(self, rows: Int[Tensor, " B"]) -> Tensor:
        """The values of the supervised tokens of these rows, in order."""
        assert self.values is not None, "nothing was kept"
        spans = [self.spans[row] for row in rows.tolist()]
        return torch.cat([self.values[start:stop] for start, stop in spans]) if spans else self.values[:0]


class ReferenceCache:
    """Log-probs, head inputs or hidden states of the start model at the supervised tokens of chosen rows.

    A KL term needs the start model's whole distribution at each token: V numbers. The vector that enters the head is
    d numbers and gives the same logits, so that is what is kept; the head itself is copied only if it is trained.
    """

    def __init__(self, rows: Sequence[Encoded] = (), needs: Needs = Needs(), file: Path | None = None) -> None:
        def beside(name: str) -> Path | None:
            return None if file is None else file.with_name(f"{file.name}.{name}")

        self._logprobs = Kept(rows, sorted(needs.logprobs))
        self._vectors = Kept(rows, sorted(needs.distributions), beside("head"))
        self._hidden = Kept(rows, sorted(needs.hidden), beside("hidden"))
        self._head: Head | None = None

    def logprobs(self, rows: Int[Tensor, " B"], device: torch.device) -> Float[Tensor, " N"]:
        """log p(token) of the supervised tokens of the rows, in order."""
        return self._logprobs.take(rows).to(device)

    def head_inputs(self, rows: Int[Tensor, " B"], device: torch.device) -> Float[Tensor, "N d"]:
        """The vectors that enter the output embedding."""
        return self._vectors.take(rows).to(device)

    def hidden(self, rows: Int[Tensor, " B"], device: torch.device) -> Float[Tensor, "N d"]:
        """Outputs of the chosen decoder layer."""
        return self._hidden.take(rows).to(device)

    def head_logits(self, vectors: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """The start model's logits from its head inputs."""
        assert self._head is not None
        return self._head(vectors)


@torch.no_grad()
def build_reference(
    model: nn.Module,
    rows: Sequence[Encoded],
    needs: Needs,
    *,
    packs: bool = False,
    prefix: Prefix | None = None,
    batch_size: int = 16,
    file: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReferenceCache:
    """One pass of the start model over the rows that are needed, longest first; large tensors go beside `file`."""
    cache = ReferenceCache(rows, needs, file)
    with_logits = {*needs.logprobs, *needs.distributions}
    groups = [(with_logits, True), ({*needs.hidden} - with_logits, False)]
    device = next(model.parameters()).device
    if needs.distributions:
        cache._head = Head.of(model)
    model.eval()
    for wanted, logits in groups:
        order = sorted(wanted, key=lambda i: (-len(rows[i].input_ids), i))
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            batch = pad_right([rows[i] for i in picked], picked, 0).to(device)
            layer = needs.layer if needs.hidden else None
            forward = Forward(model, batch, layer, logits, packs, prefix, head_inputs=logits)
            _keep(cache, forward, picked, needs, check=start == 0)
            if progress is not None:
                progress(len(picked))
    return cache


def _keep(cache: ReferenceCache, forward: Forward, picked: Sequence[int], needs: Needs, check: bool) -> None:
    row = forward.batch.row

    def among(chosen: Collection[int]) -> tuple[list[int], Tensor]:
        """Rows of the batch that are wanted, and a mask over its supervised tokens."""
        wanted = set(chosen)
        inside = torch.tensor([number in wanted for number in picked], device=row.device)
        return [number for number in picked if number in wanted], inside[row]

    if forward.with_logits:
        numbers, mask = among(needs.logprobs)
        if numbers:
            values = token_logprobs(forward.logits, forward.batch.targets, needs.temperature)
            cache._logprobs.put(numbers, values[mask])
        numbers, mask = among(needs.distributions)
        if numbers:
            if check:
                _check_head(cache, forward.head_inputs, forward.logits)
            cache._vectors.put(numbers, forward.head_inputs[mask])
    numbers, mask = among(needs.hidden)
    if numbers:
        cache._hidden.put(numbers, forward.hidden[mask])


@dataclass(frozen=True)
class Head:
    """Head inputs → logits as a model makes them."""

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None  # of soft capping

    @classmethod
    def of(cls, model: nn.Module, *, copied: bool | None = None) -> Head:
        """A model's head; unless said otherwise, weights are copied if training would change them."""
        inner: Any = unwrap(model)
        embedding, config = inner.get_output_embeddings(), inner.config.get_text_config()
        weight, bias = embedding.weight.detach(), getattr(embedding, "bias", None)
        bias = None if bias is None else bias.detach()
        if embedding.weight.requires_grad if copied is None else copied:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        times = getattr(config, "logit_scale", None) or 1.0
        over = getattr(config, "logits_scaling", None) or 1.0
        return cls(weight, bias, times / over, getattr(config, "final_logit_softcapping", None))

    def __call__(self, vectors: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        raw = nn.functional.linear(vectors.to(self.weight.dtype), self.weight, self.bias) * self.scale
        return torch.tanh(raw / self.cap) * self.cap if self.cap else raw

    def gives(self, vectors: Float[Tensor, "N d"], logits: Float[Tensor, "N V"]) -> bool:
        """Whether these are the model's own logits: if not, the architecture does something to them unknown here."""
        return torch.allclose(self(vectors[:64]).float(), logits[:64].float(), rtol=0.02, atol=0.05)


def _check_head(cache: ReferenceCache, vectors: Tensor, logits: Tensor) -> None:
    """The head must give what the model itself gave, or KL terms would be silently wrong."""
    assert cache._head is not None
    if not torch.isfinite(logits).all():
        raise UserError(
            "the start model gives numbers that are not finite",
            "look at its weights, or set train.precision=float32 if it is whole",
        )
    if not cache._head.gives(vectors, logits):
        raise UserError(
            "this architecture changes its logits after the output embedding in a way that the KL term does not know",
            "leave the term out: --set unlearn.0.retain.kl=0",
        )
