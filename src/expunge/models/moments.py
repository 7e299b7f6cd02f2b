"""Second moments of what enters linear layers: which directions of their inputs a set of rows uses, and how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.models.forward import evaluating, supervised_head


@dataclass(frozen=True)
class Inlet:
    """A layer whose inputs are watched; all of their columns, or some."""

    layer: nn.Module
    columns: Int[Tensor, " k"] | None = None


def second_moments(
    model: nn.Module,
    rows: Sequence[Encoded],
    inlets: Mapping[str, Inlet],
    batch_size: int,
    tick: Callable[[int], None] = lambda count: None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Float[Tensor, "k k"]]:
    """Per inlet Σ_t m_t m_tᵀ of its inputs over every token of the rows, on the CPU.

    Layers that are given one tensor, as q, k and v are, share one sum: the same tensor stands under each name.
    """
    found: dict[str, Tensor] = {}
    shared: dict[str, str] = {}  # inlet → the one before it that is given the same tensor
    device = next(model.parameters()).device
    present: list[Tensor] = []
    last: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        columns = inlets[name].columns
        own = None if columns is None else columns.to(device)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if own is None and last and last[0][1] is args[0]:
                shared[name] = last[0][0]
                return
            last[:] = [(name, args[0])] if own is None else []
            taken = args[0][present[-1]]
            taken = (taken if own is None else taken[:, own]).to(dtype)
            with torch.autocast(device.type, enabled=False):  # a sum of many products is not for 16 bits
                made = (taken.T @ taken).cpu()
            found[name] = found[name].add_(made) if name in found else made

        return hook

    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place].input_ids), place))
    nowhere = torch.zeros(0, dtype=torch.int64)  # no logits are wanted
    with torch.no_grad(), evaluating(model), ExitStack() as stack:
        stack.enter_context(supervised_head(model, nowhere))
        for name, inlet in inlets.items():
            handle = inlet.layer.register_forward_pre_hook(watch(name))
            stack.callback(handle.remove)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = pad_right([rows[i] for i in part], part, 0).to(device)
            present[:] = [batch.attention_mask.bool()]
            last.clear()
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            tick(len(part))
    return {name: found[shared.get(name, name)] for name in inlets if shared.get(name, name) in found}
