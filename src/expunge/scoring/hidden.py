"""The hidden-state pass: what every decoder layer says at the supervised tokens, as means that need no storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.models.forward import capture_layer, decoder_layers, evaluating, supervised_head


def norm_profile(
    model: nn.Module, rows: Sequence[Encoded], *, batch_size: int, progress: Callable[[int], None] | None = None
) -> list[float]:
    """Per decoder layer ℓ the mean of ‖h_ℓ‖ over the supervised tokens of all rows, h_ℓ the layer's output.

    `progress` is called with the number of rows just finished. Raises UserError if the layers can't be found.
    """
    depth = len(decoder_layers(model))
    device = next(model.parameters()).device
    total, tokens = torch.zeros(depth, dtype=torch.float64), 0
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place].input_ids), place))
    nowhere = torch.zeros(0, dtype=torch.int64)
    with torch.inference_mode(), evaluating(model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = pad_right([rows[i] for i in part], part, 0).to(device)
            states: list[list[Tensor]] = [[] for _ in range(depth)]
            with ExitStack() as stack:
                stack.enter_context(supervised_head(model, nowhere))  # no logits are wanted
                for layer, sink in enumerate(states):
                    stack.enter_context(capture_layer(model, layer, sink))
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            norms = [sink[0][batch.supervised].float().norm(dim=-1).double().sum() for sink in states]
            total += torch.stack(norms).cpu()
            tokens += int(batch.supervised.sum())
            if progress is not None:
                progress(len(part))
    means: list[float] = (total / max(tokens, 1)).tolist()
    return means
