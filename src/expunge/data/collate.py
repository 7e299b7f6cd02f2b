"""Encoded rows as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from expunge.data.encode import Encoded


@dataclass
class Batch:
    """B rows padded on the right to L tokens, N of them supervised."""

    input_ids: Tensor  # int64 [B, L]
    attention_mask: Tensor  # int64 [B, L], from lengths: a pad id may also be a token of the text
    supervised: Tensor  # bool [B, L]: the logits at this position predict a supervised token (the next one)
    targets: Tensor  # int64 [N]: the supervised tokens, in the row-major order of `supervised`
    row: Tensor  # int64 [N]: row of the batch that each target belongs to
    lengths: Tensor  # int64 [B]: supervised tokens per row
    index: Tensor  # int64 [B]: index of each row in its dataset
    seen: Tensor  # int64 [B, L]: attention_mask without the tokens that a convention hides from attention

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def __len__(self) -> int:
        return len(self.input_ids)


def pad_right(rows: Sequence[Encoded], index: Sequence[int], pad_id: int) -> Batch:
    """A batch for training and scoring. Raises ValueError if there is no row, or not one index for each."""
    if not rows or len(rows) != len(index):
        raise ValueError(f"{len(rows)} rows with {len(index)} indices make no batch")
    sizes = torch.tensor([len(row.input_ids) for row in rows])
    starts = torch.tensor([row.prompt_tokens for row in rows])
    places = torch.arange(int(sizes.max()))
    present = places < sizes[:, None]
    input_ids = torch.full(present.shape, pad_id, dtype=torch.int64)
    input_ids[present] = torch.cat([torch.from_numpy(row.input_ids) for row in rows]).to(torch.int64)
    # The logits of position p predict token p + 1.
    supervised = (places >= starts[:, None] - 1) & (places < sizes[:, None] - 1)
    batch_row, place = supervised.nonzero(as_tuple=True)
    seen = present.to(torch.int64)
    for i, row in enumerate(rows):
        if row.hidden is not None:
            seen[i, : len(row.hidden)] = torch.from_numpy(~row.hidden)
    return Batch(
        input_ids=input_ids,
        attention_mask=present.to(torch.int64),
        supervised=supervised,
        targets=input_ids[batch_row, place + 1],
        row=batch_row,
        lengths=sizes - starts,
        index=torch.tensor(list(index), dtype=torch.int64),
        seen=seen,
    )


def pad_left_prompts(rows: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts for generation: `input_ids` and `attention_mask`, int64 [B, L], padded on the left."""
    width = max(row.prompt_tokens for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, width - row.prompt_tokens :] = torch.from_numpy(row.input_ids[: row.prompt_tokens])
        given = slice(0, row.prompt_tokens)
        attention_mask[i, width - row.prompt_tokens :] = (
            1 if row.hidden is None else torch.from_numpy(~row.hidden[given])
        )
    return input_ids, attention_mask
