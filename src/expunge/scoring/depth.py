"""How deep forgetting goes: hidden states of a model beside the target's and the reference's, layer by layer.

One model is in memory at a time. The states of the reference and of the model in question are kept at the tokens that
carry the answer; then the target is run with its own states replaced by theirs (activation patching).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.data.collate import Batch, pad_right
from expunge.data.encode import Encoded
from expunge.models.forward import decoder_layers, evaluating, first_tensor, resumed, supervised_head
from expunge.models.token_logprobs import token_logprobs
from expunge.scoring.tables import LAYERS

_BATCH = 8

#: bool [supervised tokens] per row: the tokens that carry the answer.
Masks = Sequence[np.ndarray]


def answer_masks(rows: Sequence[Encoded], entities: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The tokens of the entities that a row names, or else all of its answer's tokens."""
    masks = []
    for row, entity in zip(rows, entities, strict=True):
        answer = np.arange(row.supervised_tokens) < row.answer_tokens
        masks.append(entity & answer if len(entity) and (entity & answer).any() else answer)
    return masks


def layer_states(model: nn.Module, rows: Sequence[Encoded], masks: Masks) -> Float[Tensor, "L N d"]:
    """Output of every decoder layer where it predicts a chosen token, float32, on the CPU, row after row."""
    depth = len(decoder_layers(model))
    parts: list[list[Tensor]] = [[] for _ in range(depth)]
    with torch.inference_mode(), evaluating(model):
        for batch, chosen in _batches(model, rows, masks):
            raw = _outputs(model, batch)
            for layer, output in enumerate(raw):
                parts[layer].append(first_tensor(output)[batch.supervised][chosen].float().cpu())
    return torch.stack([torch.cat(part) for part in parts])


def patched_falls(
    model: nn.Module, rows: Sequence[Encoded], masks: Masks, sources: Mapping[str, Float[Tensor, "L N d"]]
) -> dict[str, Float[Tensor, "rows L"]]:
    """Per row, layer and source: by how much the mean log-prob of the chosen tokens falls in the target (`model`) when
    its states of that layer are replaced by the source's, at the places that predict those tokens (arXiv:2605.24614).
    """
    depth = len(decoder_layers(model))
    falls = {name: torch.zeros(len(rows), depth) for name in sources}
    row = token = 0
    with torch.inference_mode(), evaluating(model):
        for batch, chosen in _batches(model, rows, masks):
            raw = _outputs(model, batch)
            count, size = int(chosen.sum()), len(batch)
            own = _means(_logprobs(model, batch)[chosen], batch.row[chosen], size)
            for name, states in sources.items():
                for layer, output in enumerate(raw):
                    patched = _replaced(output, batch, chosen, states[layer, token : token + count])
                    with resumed(model, layer + 1, patched):
                        said = _logprobs(model, batch)[chosen]
                    falls[name][row : row + size, layer] = (own - _means(said, batch.row[chosen], size)).cpu()
            row, token = row + size, token + count
    return falls


def answer_logits(model: nn.Module, rows: Sequence[Encoded], masks: Masks) -> list[Float[Tensor, "n V"]]:
    """Logits of the chosen tokens, per row, float32, on the CPU."""
    found: list[Tensor] = []
    with torch.inference_mode(), evaluating(model):
        for batch, chosen in _batches(model, rows, masks):
            logits = _logits(model, batch)[chosen].float().cpu()
            found += logits.split(torch.bincount(batch.row[chosen].cpu(), minlength=len(batch)).tolist())
    return found


def logit_errors(
    model: nn.Module, rows: Sequence[Encoded], masks: Masks, target: Sequence[Float[Tensor, "n V"]]
) -> Float[Tensor, " rows"]:
    """Mean squared difference between a model's logits of the chosen tokens and the target's, per row."""
    own = answer_logits(model, rows, masks)
    return torch.stack([(mine - other).square().mean() for mine, other in zip(own, target, strict=True)])


def linear_cka(one: Float[Tensor, "N d"], two: Float[Tensor, "N d"]) -> float:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) on column-centred states, in float64 (arXiv:1905.00414); NaN without spread.

    Over N × N products where there are fewer tokens than dimensions.
    """
    x, y = (states.double() - states.double().mean(0) for states in (one, two))
    if len(x) < x.shape[1]:
        x, y = x @ x.T, y @ y.T
        both, own, other = (x * y).sum(), x.norm(), y.norm()
    else:
        both, own, other = (y.T @ x).square().sum(), (x.T @ x).norm(), (y.T @ y).norm()
    return float(both / (own * other)) if own > 0 and other > 0 else float("nan")


@contextmanager
def restored_window(model: nn.Module, layers: range, target: Callable[[str], Tensor]) -> Iterator[None]:
    """Within it, the MLP's last matrices (value vectors) of these decoder layers are the target's."""
    own = decoder_layers(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    changed = []
    with torch.no_grad():
        for layer in layers:
            for name, parameter in own[layer].named_parameters():
                if name.endswith("down_proj.weight"):
                    changed.append((parameter, parameter.detach().clone()))
                    parameter.copy_(target(names[id(parameter)]).to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in changed:
                parameter.copy_(before)


def layers_table(
    ids: Sequence[str], measures: Mapping[str, Float[Tensor, "rows L"]], whole: Mapping[str, Sequence[float]]
) -> pa.Table:
    """The LAYERS table of measures per row and layer, and of those that are about all rows together (under no id)."""
    columns: dict[str, list[Any]] = {name: [] for name in LAYERS.names}
    rows = [(name, example, values[i].tolist()) for name, values in measures.items() for i, example in enumerate(ids)]
    for measure, example, values in [*rows, *((name, "", values) for name, values in whole.items())]:
        for layer, value in enumerate(values):
            if np.isfinite(value):
                for name, cell in zip(LAYERS.names, (example, layer, measure, value), strict=True):
                    columns[name].append(cell)
    return pa.Table.from_pydict(columns, schema=LAYERS)


def _batches(model: nn.Module, rows: Sequence[Encoded], masks: Masks) -> Iterator[tuple[Batch, Tensor]]:
    """Batches in the order of rows, and which of their supervised tokens are chosen."""
    device = next(model.parameters()).device
    for start in range(0, len(rows), _BATCH):
        part = range(start, min(start + _BATCH, len(rows)))
        batch = pad_right([rows[i] for i in part], list(part), 0).to(device)
        yield batch, torch.from_numpy(np.concatenate([masks[i] for i in part])).to(device)


def _outputs(model: nn.Module, batch: Batch) -> list[Any]:
    """What every decoder layer returns."""
    found: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(supervised_head(model, torch.zeros(0, dtype=torch.int64)))
        for layer in decoder_layers(model):
            handle = layer.register_forward_hook(lambda _, __, output: found.append(output))
            stack.callback(handle.remove)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return found


def _replaced(output: Any, batch: Batch, chosen: Tensor, states: Tensor) -> Any:
    """A layer's output with other states where chosen tokens are predicted."""
    hidden = first_tensor(output).clone()
    rows, places = (index[chosen] for index in batch.supervised.nonzero(as_tuple=True))
    hidden[rows, places] = states.to(hidden)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _logits(model: nn.Module, batch: Batch) -> Float[Tensor, "N V"]:
    with supervised_head(model, batch.supervised):
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits: Tensor = model(**given, use_cache=False).logits[0]
    return logits


def _logprobs(model: nn.Module, batch: Batch) -> Float[Tensor, " N"]:
    return token_logprobs(_logits(model, batch), batch.targets).float()


def _means(values: Float[Tensor, " n"], row: Tensor, rows: int) -> Float[Tensor, " B"]:
    total = torch.zeros(rows, device=values.device).index_add_(0, row, values)
    return total / torch.zeros(rows, device=values.device).index_add_(0, row, torch.ones_like(values)).clamp(min=1)
