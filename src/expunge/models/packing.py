"""Rows laid end to end in a few lines: little is padding, and attention stays short."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

#: How much slower a multiply-add of attention runs than one of a matrix product (measured in bfloat16 on a CPU).
ATTENTION_SLOWNESS = 7


@dataclass(frozen=True)
class Lines:
    """K lines of W tokens that hold the rows of a batch; what is left of a line is padding."""

    input_ids: Int[Tensor, "K W"]
    position_ids: Int[Tensor, "K W"]  # start again at each row, which keeps the rows of a line apart
    place: Int[Tensor, " T"]  # where each token of the batch, row by row, stands in the flattened lines


def pack_rows(input_ids: Int[Tensor, "B L"], present: Bool[Tensor, "B L"], hidden_size: int) -> Lines | None:
    """The rows in the number of lines that costs least; None if that is a line for each row, as padding has it."""
    lengths = present.sum(1).tolist()
    best = min(_candidates(len(lengths)), key=lambda count: _cost(_deal(lengths, count)[1], count, hidden_size))
    if best == len(lengths):
        return None
    starts, width = _deal(lengths, best)
    device = input_ids.device
    columns = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)[present]
    place = torch.repeat_interleave(torch.tensor(starts, device=device), present.sum(1)) + columns
    ids = torch.zeros(best * width, dtype=input_ids.dtype, device=device)
    positions = torch.zeros_like(ids)
    ids[place], positions[place] = input_ids[present], columns
    return Lines(ids.view(best, width), positions.view(best, width), place)


@torch.no_grad()
def supports_packing(model: nn.Module) -> bool:
    """Whether restarting position ids keep the rows of a line apart in this architecture: tried on two short rows."""
    device = next(model.parameters()).device
    first, second = torch.tensor([[5, 6, 7]], device=device), torch.tensor([[8, 9, 10, 11]], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device)
    try:
        line = torch.cat([first, second], 1)
        together = model(input_ids=line, position_ids=positions, use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError):
        return False
    apart = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in (first, second)])
    if not torch.isfinite(apart).all():  # broken weights: the first step says so
        return False
    return bool(torch.allclose(together.float(), apart.float(), rtol=1e-2, atol=1e-2 * float(apart.abs().max())))


def _candidates(rows: int) -> list[int]:
    return sorted({1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, rows} & set(range(1, rows + 1)))


def _deal(lengths: list[int], count: int) -> tuple[list[int], int]:
    """Flat position at which each row starts, and the width of the lines: longest rows first, to the emptiest line."""
    filled, at = [0] * count, [(0, 0)] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        line = min(range(count), key=filled.__getitem__)
        at[row] = (line, filled[line])
        filled[line] += lengths[row]
    width = max(filled)
    return [line * width + start for line, start in at], width


def _cost(width: int, count: int, hidden_size: int) -> float:
    """Work of `count` lines: matrix products grow with tokens, attention with tokens × width."""
    return count * width * (6 * hidden_size / ATTENTION_SLOWNESS + width)
