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
def supervised_head(model: nn.Module, mask: Bool[Tensor, "B L"]) -> Iterator[None]:
    """Within it, `model(...).logits` is [1, N, V]: the N True positions of `mask`, in row-major order.

    A pre-hook on the output embedding picks the positions, so whatever the architecture does after its head
    (soft capping, scaling) still happens, and wrappers such as DDP see an ordinary forward.
    """
    head = unwrap(model).get_output_embeddings()  # type: ignore[operator]

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[mask.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


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


@contextmanager
def capture_layer(model: nn.Module, layer: int, sink: list[Float[Tensor, "B L d"]]) -> Iterator[None]:
    """Within it, every forward appends the output of decoder layer `layer` (0-based) to `sink`."""

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        sink.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[layer].register_forward_hook(keep)
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


def hidden_states(model: nn.Module, layer: int, input_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L d"]:
    """The output of decoder layer `layer`; neither the layers above it nor logits are computed."""
    sink: list[Tensor] = []
    nowhere = torch.zeros(input_ids.shape, dtype=torch.bool)
    with capture_layer(model, layer, sink), truncated(model, layer), supervised_head(model, nowhere):
        model(input_ids=input_ids, use_cache=False)
    return sink[0]


def packing_pays(present: Bool[Tensor, "B L"], width: int) -> bool:
    """Whether rows laid end to end cost less than padded ones; attention over T tokens costs T / 6d of the matmuls."""
    batch, length = present.shape
    total = int(present.sum())
    return total * (6 * width + total) < 0.95 * batch * length * (6 * width + length)


def pack(input_ids: Int[Tensor, "B L"], present: Bool[Tensor, "B L"]) -> tuple[Int[Tensor, "1 T"], Int[Tensor, "1 T"]]:
    """Rows end to end without padding, and their position ids, which start again at each row."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return input_ids[present].unsqueeze(0), positions[present].unsqueeze(0)


@torch.no_grad()
def supports_packing(model: nn.Module) -> bool:
    """Whether restarting position ids keep packed rows apart in this architecture: tried on two short rows."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 8, device=device).unsqueeze(0)
    present = torch.tensor([[True] * 3 + [False], [True] * 4], device=device)
    rows = torch.zeros(2, 4, dtype=torch.long, device=device)
    rows[present] = ids[0]
    packed, positions = pack(rows, present)
    try:
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError):
        return False
    apart = model(input_ids=rows, use_cache=False).logits[present]
    if not torch.isfinite(apart).all():  # broken weights: the first step says so
        return False
    return bool(torch.allclose(together.float(), apart.float(), rtol=1e-2, atol=1e-2 * float(apart.abs().max())))


def log_softmax_at(logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
    """log p(target) per position in float32, without a second [N, V] tensor being kept for backward."""
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
