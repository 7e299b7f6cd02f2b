"""Forward passes that compute no more than is asked for: logits at chosen positions, layers up to a chosen one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from expunge.errors import UserError


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode (no dropout); afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def supervised_head(model: nn.Module, where: Bool[Tensor, "B L"] | Int[Tensor, " N"]) -> Iterator[None]:
    """Within it, `model(...).logits` is [1, N, V]: the True positions, row by row, or the given flat positions.

    A pre-hook on the output embedding picks the positions, so whatever the architecture does after its head
    (soft capping, scaling) still happens, and wrappers such as DDP see an ordinary forward.
    """
    head = unwrap(model).get_output_embeddings()  # type: ignore[operator]

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (pick_positions(args[0], where).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def pick_positions(
    hidden: Float[Tensor, "B L d"], where: Bool[Tensor, "B L"] | Int[Tensor, " N"]
) -> Float[Tensor, "N d"]:
    """The vectors at the True positions, row by row, or at the given flat positions."""
    where = where.to(hidden.device)
    return hidden[where] if where.dtype == torch.bool else hidden.flatten(0, 1)[where]


@contextmanager
def capture_head_input(model: nn.Module, sink: list[Tensor]) -> Iterator[None]:
    """Within it, every forward appends the tensor that enters the output embedding to `sink`."""
    head = unwrap(model).get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: sink.append(args[0]))
    try:
        yield
    finally:
        handle.remove()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers. Raises UserError if the architecture has no such list."""
    inner: Any = unwrap(model)
    depth = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(
        f"the decoder layers of {type(inner).__name__} can't be found",
        "methods that steer hidden states need one list of decoder layers; choose another method, e.g. npo",
    )


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns: a tensor, or a tuple that begins with it."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def capture_layer(model: nn.Module, layer: int, sink: list[Float[Tensor, "B L d"]]) -> Iterator[None]:
    """Within it, every forward appends the output of decoder layer `layer` (0-based) to `sink`."""

    handle = decoder_layers(model)[layer].register_forward_hook(lambda _, __, output: sink.append(first_tensor(output)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def truncated(model: nn.Module, layer: int) -> Iterator[None]:
    """Within it, a forward ends after decoder layer `layer`: the layers above it do not run.

    The list of layers is exchanged for its beginning, so the forward ends as an ordinary one (wrappers that act
    after a forward, such as DDP, keep working).
    """
    layers = decoder_layers(model)
    for parent in unwrap(model).modules():
        for name, child in parent.named_children():
            if child is layers:
                setattr(parent, name, nn.ModuleList(list(layers)[: layer + 1]))
                try:
                    yield
                finally:
                    setattr(parent, name, layers)
                return
    raise AssertionError("decoder_layers found a list that has no parent")


@contextmanager
def resumed(model: nn.Module, depth: int, output: Any) -> Iterator[None]:
    """Within it, a forward starts at decoder layer `depth` with this output of the one below: those below do not run.

    The layers stay in their places, so that what a model keeps per layer number (masks, rotations) is not shifted.
    """
    skipped: list[Any] = list(decoder_layers(model))[:depth]
    for layer in skipped:
        layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward
