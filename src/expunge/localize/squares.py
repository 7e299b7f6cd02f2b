"""Σ over rows of squared per-row gradients, exactly, without one gradient per row in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.models.forward import unwrap
from expunge.models.passes import Forward

if TYPE_CHECKING:
    from expunge.localize.evidence import Evidence

#: Entries of a row's gradient that exist at once: on a CPU they stay in its cache, on a GPU launches are what costs.
BLOCK = {"cpu": 1 << 17}
LARGE_BLOCK = 1 << 26

#: Flat positions at which the tokens of a row begin and end.
Span = tuple[int, int]


class _Unfit(Exception):
    """A layer did not see every token once, so that its inputs do not give the gradients of rows."""


def sum_of_squares(evidence: Evidence, split: str) -> dict[str, Tensor]:
    """Parameter name → Σ over rows of (∂ of the row's loss / ∂ entry)², float32. The model stays as it was.

    A linear layer's gradient for a row is δᵀx over the row's tokens: as many multiplications as the gradient of the
    batch takes, so rows share the passes, and only the squares cost extra. Where other parameters (norms, experts in
    one tensor, convolutions) belong to units, or a layer is not run once per token, each row has a pass of its own:
    that is exact for any architecture, and nearly as fast on a CPU, where one row fills the processor.
    """
    owners = _owners(evidence)
    if owners is not None:
        try:
            return _by_layer(evidence, split, owners)
        except _Unfit:
            del owners  # with half of the sums
    return _by_row(evidence, split)


@dataclass
class _Owner:
    """A linear layer whose parameters are asked for, and what is added up for them."""

    module: nn.Module
    transposed: bool  # its weight is stored as [in, out]
    weight: Tensor | None = None
    bias: Tensor | None = None
    seen: int = field(default=0)  # forward passes of the current batch


def _owners(evidence: Evidence) -> list[_Owner] | None:
    """The linear layers that own all the parameters; None if anything else owns one, or two layers share one."""
    from transformers.pytorch_utils import Conv1D

    left = {id(parameter) for parameter in evidence.parameters.values()}
    wanted = frozenset(left)
    owners: list[_Owner] = []
    for module in unwrap(evidence.model).modules():
        own = {name: value for name, value in module.named_parameters(recurse=False) if id(value) in wanted}
        if not own:
            continue
        if type(module) not in (nn.Linear, Conv1D) or any(id(value) not in left for value in own.values()):
            return None
        left -= {id(value) for value in own.values()}
        sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in own.items()}
        owners.append(_Owner(module, isinstance(module, Conv1D), sums.get("weight"), sums.get("bias")))
    return owners


def _by_layer(evidence: Evidence, split: str, owners: list[_Owner]) -> dict[str, Tensor]:
    # nothing is trained here: autograd computes the gradients of activations alone, and those of weights are ours
    with evidence.only(()):
        for forward in evidence.batches(split):
            with _watched(owners, forward):
                evidence.loss(forward).backward()
    sums = {id(getattr(o.module, name)): getattr(o, name) for o in owners for name in ("weight", "bias")}
    return {name: sums[id(parameter)] for name, parameter in evidence.parameters.items()}


@contextmanager
def _watched(owners: list[_Owner], forward: Forward) -> Iterator[None]:
    """Within it, the backward pass of this batch adds to the sums of every layer."""
    spans = _spans(forward)

    def keep(owner: _Owner, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        owner.seen += 1
        if owner.seen > 1 or not args or args[0].shape[:-1] != forward.shape:
            raise _Unfit
        if not output.requires_grad:
            output.requires_grad_()  # the lowest layers: below them nothing asks for a gradient
        inputs = args[0].detach()
        output.register_hook(lambda gradient: _add(owner, inputs, gradient, spans))

    handles = []
    for owner in owners:
        owner.seen = 0
        handles.append(owner.module.register_forward_hook(partial(keep, owner)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spans(forward: Forward) -> list[Span]:
    """Where the tokens of each row stand in the flattened lines."""
    lengths = forward.batch.attention_mask.sum(1)
    firsts = forward.place[lengths.cumsum(0) - lengths].tolist()
    return [(first, first + length) for first, length in zip(firsts, lengths.tolist(), strict=True)]


@torch.no_grad()
def _add(owner: _Owner, inputs: Tensor, gradient: Tensor, spans: list[Span]) -> None:
    """Add the squares of each row's gradients, from a layer's inputs [K, W, in] and its output gradient [K, W, out]."""
    with torch.autocast(gradient.device.type, enabled=False):
        slopes = gradient.flatten(0, 1).float()
        if owner.bias is not None:
            for start, end in spans:
                owner.bias += slopes[start:end].sum(0).square_()
        if owner.weight is None:
            return
        values = inputs.flatten(0, 1).float()
        left, right = (values, slopes) if owner.transposed else (slopes, values)
        step = max(1, BLOCK.get(gradient.device.type, LARGE_BLOCK) // right.shape[1])
        for low in range(0, left.shape[1], step):
            block = owner.weight[low : low + step]
            scratch = torch.empty_like(block)
            for start, end in spans:
                torch.mm(left[start:end, low : low + step].T, right[start:end], out=scratch)
                block.addcmul_(scratch, scratch)


def _by_row(evidence: Evidence, split: str) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in evidence.parameters.items()}

    def add(name: str, parameter: Tensor) -> None:
        gradient: Any = parameter.grad
        parameter.grad = None  # at once: no more than one parameter's gradient of a row is in memory
        wide = gradient.float()
        sums[name].addcmul_(wide, wide)

    with evidence.only(evidence.parameters.values()):
        hooks = [
            value.register_post_accumulate_grad_hook(partial(add, name)) for name, value in evidence.parameters.items()
        ]
        try:
            for forward in evidence.batches(split, batch_size=1):
                evidence.loss(forward).backward()
        finally:
            for hook in hooks:
                hook.remove()
    return sums
