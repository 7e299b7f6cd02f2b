"""Useful FLOPs of a training step, and the rate of the machine's own matrix products at the shapes of that step."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import synchronize
from expunge.models.forward import unwrap

FORMULA = """useful FLOPs of a step =
  Σ over linear layers that run: 2·n·in·out for the output
                               + 2·n·in·out for the gradient of the weight, where it is trained
                               + 2·n·in·out for the gradient of the input, where something below is trained
      n = real tokens (no padding); in the output embedding only the supervised ones
+ Σ over attention layers that run, Σ over rows of t tokens: 2·t·(t+1)·heads·head_dim   (causal: half of the square)
                               + twice that, where queries, keys or values have gradients
Recomputation, norms, softmax, the optimizer and the pass of the start model count as nothing."""

#: The output projection of attention: its input is as wide as all heads together.
ATTENTION_OUTPUT = re.compile(r"\.o_proj(\.base_layer)?$")

#: Kinds of a product: the output, the gradient of the weight, the gradient of the input.
KINDS = ("forward", "weight gradients", "input gradients")


@dataclass(frozen=True)
class Product:
    """A matrix product with a weight of [outputs, inputs]."""

    kind: str
    inputs: int
    outputs: int
    head: bool = False  # of the output embedding


@dataclass
class Work:
    """The products of a step, whatever its rows are."""

    products: Counter[Product] = field(default_factory=Counter)
    attention: Counter[int] = field(default_factory=Counter)  # width × (1, or 3 with gradients) → layers
    positions: int = 0  # that the step which was looked at runs, padding included

    def flops(self, lengths: Sequence[int], supervised: int) -> dict[str, float]:
        """Useful FLOPs by part, of a step with rows of these lengths."""
        parts: Counter[str] = Counter()
        for product, count in self.products.items():
            tokens = supervised if product.head else sum(lengths)
            part = f"head, {product.kind}" if product.head else product.kind
            parts[part] += count * 2 * tokens * product.inputs * product.outputs
        causal = sum(2 * length * (length + 1) for length in lengths)
        parts["attention"] = sum(width * count * causal for width, count in self.attention.items())
        return dict(parts)


@contextmanager
def observed(model: nn.Module) -> Iterator[Work]:
    """Within it, a forward fills the work: what runs, and of what autograd will want the gradient."""
    work, inner = Work(), unwrap(model)
    head = inner.get_output_embeddings()  # type: ignore[operator]

    def see(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
            states = args[0]
            if not states.numel():  # the head of a pass that wants no logits
                return
            wanted = (True, module.weight.requires_grad, states.requires_grad)
            for kind in (kind for kind, want in zip(KINDS, wanted, strict=True) if want):
                work.products[Product(kind, module.in_features, module.out_features, module is head)] += 1
            if ATTENTION_OUTPUT.search(name):
                work.attention[module.in_features * (3 if states.requires_grad else 1)] += 1
            if module is not head:
                work.positions = max(work.positions, states.shape[:-1].numel())

        return hook

    linear = [(name, module) for name, module in inner.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(see(name)) for name, module in linear]
    embeddings = inner.get_input_embeddings()  # type: ignore[operator]
    if not embeddings.weight.requires_grad:  # gradient checkpointing pretends that their output has a gradient
        handles.append(embeddings.register_forward_hook(lambda _, __, output: output.detach()))
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()
    if not work.attention:
        raise SystemExit("the output projections of attention are not called o_proj: its FLOPs can't be counted")


def executed(step: Callable[[], object]) -> int:
    """FLOPs of the matrix products that a step really runs, with padding and recomputation, attention left out."""
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    names = {"mm", "addmm", "bmm", "baddbmm"}
    return sum(count for operation, count in counts.items() if str(operation).rpartition(".")[2] in names)


class Peak:
    """The best rates at which this machine multiplies matrices of given shapes."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.square_size = 8192 if device.type == "cuda" else 2048
        self.rates: dict[tuple[Product, int], float] = {}

    def square(self) -> float:
        """FLOP/s of a large square product."""
        return self._rate(Product("forward", self.square_size, self.square_size), self.square_size)

    def own(self, work: Work, tokens: int, supervised: int) -> float:
        """FLOP/s of the step's own products one after another: all their FLOPs by the sum of their best times."""
        flops = seconds = 0.0
        for product, count in work.products.items():
            rows = supervised if product.head else tokens
            once = 2 * rows * product.inputs * product.outputs
            flops += count * once
            seconds += count * once / self._rate(product, rows)
        return flops / seconds

    def again(self) -> None:
        """Measure everything once more and keep the better: a neighbour may have disturbed it."""
        for (product, rows), rate in list(self.rates.items()):
            self.rates[product, rows] = max(rate, self._measure(product, rows))

    def _rate(self, product: Product, rows: int) -> float:
        if (product, rows) not in self.rates:
            self.rates[product, rows] = self._measure(product, rows)
        return self.rates[product, rows]

    def _measure(self, product: Product, rows: int) -> float:
        def matrix(first: int, second: int) -> Tensor:
            return torch.randn(first, second, device=self.device, dtype=self.dtype)

        states, weight = matrix(rows, product.inputs), matrix(product.outputs, product.inputs)
        slopes = matrix(rows, product.outputs)
        multiply = {
            "forward": lambda: states @ weight.t(),
            "weight gradients": lambda: slopes.t() @ states,
            "input gradients": lambda: slopes @ weight,
        }[product.kind]
        repeat = max(1, int(0.02 / self._seconds(multiply, 2)))
        best = min(self._seconds(multiply, repeat) for _ in range(5))
        return 2 * rows * product.inputs * product.outputs / best

    def _seconds(self, work: Callable[[], object], repeat: int) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(repeat):
            work()
        synchronize(self.device)
        return (time.perf_counter() - began) / repeat
