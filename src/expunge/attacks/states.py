"""What attacks on hidden states share: the states of chosen positions at chosen layers, read once for one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from expunge.attacks.base import World
from expunge.data.collate import Batch, pad_right
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.drift import weights_digest
from expunge.models.forward import (
    capture_layer,
    decoder_layers,
    evaluating,
    first_tensor,
    pick_positions,
    supervised_head,
)

T = TypeVar("T")
_BATCH = 8


def remembered(owner: Any, model: nn.Module, world: World, make: Callable[[], T]) -> T:
    """What `make` reads of a model, kept on a frozen `owner` for its other points while world and weights stay."""
    digest = weights_digest(model)
    kept = getattr(owner, "_remembered", None)
    if kept is None or kept[0] is not world or kept[1] != digest:
        object.__setattr__(owner, "_remembered", None)  # let go of the old one before the new one is made
        kept = (world, digest, make())
        object.__setattr__(owner, "_remembered", kept)
    value: T = kept[2]
    return value


class States(NamedTuple):
    """Outputs of decoder layers at N positions, whatever rows these are of."""

    layers: list[Float[Tensor, "N d"]]
    following: Int[Tensor, " N"]  # the token after each position
    supervised: Bool[Tensor, " N"]  # whether that is a supervised one


def all_but_first(batch: Batch) -> Tensor:
    """Bool [B, L]: every token but the first, on which many models park attention, and the last, which predicts
    nothing; of a row's first token only if its answer begins there."""
    inside = batch.attention_mask.bool() & (batch.attention_mask.roll(-1, 1).bool())
    inside[:, -1] = False
    inside[:, 0] = batch.supervised[:, 0]
    return inside


def last_of_prompt(batch: Batch) -> Tensor:
    """Bool [B, L]: the last token before the answer."""
    return batch.supervised & (batch.supervised.cumsum(1) == 1)


def prompt(batch: Batch) -> Tensor:
    """Bool [B, L]: tokens before the answer but the first, unless it is the only one."""
    return all_but_first(batch) & (batch.supervised.cumsum(1) - batch.supervised.long() == 0)


def layer_states(
    model: nn.Module, rows: Sequence[Encoded], layers: Sequence[int], where: Callable[[Batch], Tensor]
) -> States:
    """Outputs of decoder layers at the chosen positions of the rows, one pass for all layers, longest rows first.

    Raises UserError if no row has an answer, or if the architecture has no list of layers.
    """
    order = sorted((row for row in rows if row.supervised_tokens), key=lambda row: -len(row.input_ids))
    if not order:
        raise UserError("there is no row with an answer to read hidden states at", "give a split with answers")
    device = next(model.parameters()).device
    kept: list[list[Tensor]] = [[] for _ in layers]
    following: list[Tensor] = []
    supervised: list[Tensor] = []
    with gradients_allowed(), torch.no_grad(), evaluating(model):
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            batch = pad_right(part, range(len(part)), 0).to(device)
            chosen = where(batch)
            for sink, states in zip(kept, read_layers(model, batch, layers), strict=True):
                sink.append(pick_positions(states, chosen))
            following.append(batch.input_ids.roll(-1, 1)[chosen])
            supervised.append(batch.supervised[chosen])
    return States([torch.cat(parts) for parts in kept], torch.cat(following), torch.cat(supervised))


def read_layers(model: nn.Module, batch: Batch, layers: Sequence[int]) -> list[Float[Tensor, "B L d"]]:
    """Outputs of decoder layers for a batch; no logits are computed."""
    sinks: list[list[Tensor]] = [[] for _ in layers]
    with ExitStack() as stack:
        stack.enter_context(supervised_head(model, torch.zeros(0, dtype=torch.int64)))
        for layer, sink in zip(layers, sinks, strict=True):
            stack.enter_context(capture_layer(model, layer, sink))
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return [sink[0] for sink in sinks]


@contextmanager
def replaced_states(model: nn.Module, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within it, the output h of each given decoder layer (0-based) is `changes[layer](h)`."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def changed(_: nn.Module, __: Any, output: Any) -> Any:
            states = change(first_tensor(output))
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return changed

    layers = decoder_layers(model)
    handles = [layers[layer].register_forward_hook(hook(change)) for layer, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradients_allowed() -> Iterator[None]:
    """Within it, tensors that are made may take part in training, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
