"""Units: the parts of a model that are chosen as a whole, from single weights to decoder layers.

Units of one kind stand in families, one per matrix, MLP, attention or layer. A unit is never materialised: slabs say
which stretch of which parameter is its own. Embeddings and the output embedding are no part of any unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from expunge.errors import UserError, did_you_mean
from expunge.models.forward import unwrap
from expunge.models.names import layer_of, split_at_layer
from expunge.models.quantization import linear_weights
from expunge.recipe import Unit

#: `Slab.axis` where every element of the parameter is a unit, in the order of its flattened storage.
FLAT = -1

#: The matrix whose columns are the value vectors, and the matrices beside it whose rows make the coefficients.
_MLP: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("down_proj", ("gate_proj", "up_proj")),
    ("down_proj", ("gate_up_proj",)),  # one matrix: all rows of the gate, then all rows of up
    ("down_proj", ("up_proj",)),
    ("c_proj", ("c_fc",)),
    ("fc2", ("fc1",)),
    ("fc_out", ("fc_in",)),
    ("dense_4h_to_h", ("dense_h_to_4h",)),
    ("w2", ("w1", "w3")),
)
_QUERY = ("q_proj", "q_b_proj")
_KEY_VALUE = ("k_proj", "v_proj")
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
#: Queries, keys and values in one matrix, by model type: all queries first, or head after head.
_QUERIES_FIRST = {"gpt2": "c_attn", "phi3": "qkv_proj", "mpt": "Wqkv"}
_HEAD_AFTER_HEAD = {"gpt_neox": "query_key_value", "bloom": "query_key_value", "persimmon": "query_key_value"}


@dataclass(frozen=True)
class Slab:
    """A stretch of one parameter that is cut into units: unit i owns entries [start + i·size, start + (i + 1)·size)
    along `axis` of the parameter as it is stored (`shape`).

    Axis None: the family's only unit owns the whole parameter. FLAT: every element is a unit.
    """

    parameter: str
    axis: int | None
    size: int
    start: int = 0
    shape: tuple[int, ...] = field(kw_only=True)

    @property
    def weights(self) -> int:
        """Weights that one unit owns here."""
        if self.axis is None or self.axis == FLAT:
            return math.prod(self.shape) if self.axis is None else 1
        return self.size * (math.prod(self.shape) // self.shape[self.axis])


@dataclass(frozen=True)
class Family:
    """`count` units of one kind that stand side by side in a model: the value vectors of an MLP, the heads of a layer.

    `module` is the place within the decoder layer, e.g. mlp.down_proj; `name` is the place in the model.
    """

    name: str
    layer: int | None
    module: str
    count: int
    slabs: tuple[Slab, ...]

    @property
    def weights(self) -> int:
        """Weights that one unit owns."""
        return sum(slab.weights for slab in self.slabs)


@dataclass(frozen=True)
class _Linear:
    """A linear layer as it is stored: [out, in], or [in, out] where it is transposed (Conv1D of GPT-2)."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    bias: bool

    @property
    def outputs(self) -> int:
        return self.shape[1 if self.transposed else 0]

    @property
    def inputs(self) -> int:
        return self.shape[0 if self.transposed else 1]

    def rows(self, size: int, start: int = 0) -> list[Slab]:
        """What makes outputs, `size` per unit, from output `start` on; their biases are part of it."""
        made = [Slab(f"{self.name}.weight", 1 if self.transposed else 0, size, start, shape=self.shape)]
        return [*made, Slab(f"{self.name}.bias", 0, size, start, shape=(self.outputs,))] if self.bias else made

    def columns(self, size: int) -> Slab:
        """What takes inputs, `size` per unit. The bias belongs to no input."""
        return Slab(f"{self.name}.weight", 0 if self.transposed else 1, size, shape=self.shape)


@dataclass(frozen=True)
class _Parts:
    """What families are made from: the model, and its linear layers by parent module and by own name."""

    model: nn.Module
    linears: Mapping[str, Mapping[str, _Linear]]

    @property
    def config(self) -> Any:
        config: Any = self.model.config
        return config.get_text_config()


def units_of(model: nn.Module, unit: Unit) -> list[Family]:
    """The units of this kind, family by family in the model's order; no two own the same weight.

    weight: an element of a linear layer's weight. value_vector: a column of an MLP's last matrix (arXiv:2012.14913).
    neuron: its row of the gate, row of up and value vector, with their biases. head: a query head: the rows that make
    its query and the columns that take its output; its key and value too unless query heads share them. module: a
    linear layer. layer: a decoder layer, norms included.
    Raises UserError for a unit that the architecture lacks, for an unknown unit, and for open adapters.
    """
    if unit not in get_args(Unit):
        raise UserError(f"unknown unit '{unit}'", did_you_mean(unit, get_args(Unit)))
    parts = _parts(unwrap(model))
    found = list(_FAMILIES[unit](parts))
    if not found:
        there = [name for name, families in _FAMILIES.items() if any(True for _ in families(parts))]
        raise UserError(
            f"{type(parts.model).__name__} has no units of the kind {unit} that can be told apart",
            f"units of this model: {', '.join(there)}",
        )
    return found


def _parts(model: nn.Module) -> _Parts:
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise UserError("a model with open adapters has no units of its own", "fold them: merge_and_unload()")
    try:
        weights = linear_weights(model)
    except UserError as error:
        raise UserError(error.message, "localize in a checkpoint in 16 or 32 bits") from None
    linears: dict[str, dict[str, _Linear]] = {}
    for name, linear in weights.items():
        module = name.removesuffix(".weight")
        parent, _, own = module.rpartition(".")
        has_bias = isinstance(getattr(linear.module, "bias", None), nn.Parameter)
        shape = tuple(linear.weight.shape)
        linears.setdefault(parent, {})[own] = _Linear(module, shape, linear.transposed, has_bias)
    return _Parts(model, linears)


def _family(name: str, count: int, slabs: list[Slab]) -> Family:
    return Family(name, layer_of(f"{name}."), split_at_layer(name)[1], count, tuple(slabs))


def _weights(parts: _Parts) -> Iterator[Family]:
    for siblings in parts.linears.values():
        for linear in siblings.values():
            name = f"{linear.name}.weight"
            slab = Slab(name, FLAT, 1, shape=linear.shape)
            yield Family(name, layer_of(name), split_at_layer(linear.name)[1], math.prod(linear.shape), (slab,))


def _modules(parts: _Parts) -> Iterator[Family]:
    for siblings in parts.linears.values():
        for linear in siblings.values():
            slabs = [_whole(f"{linear.name}.weight", linear.shape)]
            if linear.bias:
                slabs.append(_whole(f"{linear.name}.bias", (linear.outputs,)))
            yield _family(linear.name, 1, slabs)


def _layers(parts: _Parts) -> Iterator[Family]:
    slabs: dict[str, list[Slab]] = {}
    for name, parameter in parts.model.named_parameters():
        prefix, _ = split_at_layer(name)
        if prefix and parameter.is_floating_point():
            slabs.setdefault(prefix, []).append(_whole(name, tuple(parameter.shape)))
    for prefix, owned in slabs.items():
        yield Family(prefix, layer_of(f"{prefix}."), "layer", 1, tuple(owned))


def _whole(name: str, shape: tuple[int, ...]) -> Slab:
    return Slab(name, None, math.prod(shape), shape=shape)


def _value_vectors(parts: _Parts) -> Iterator[Family]:
    for _, down, _ in _mlps(parts):
        yield _family(down.name, down.inputs, [down.columns(1)])


def _neurons(parts: _Parts) -> Iterator[Family]:
    for parent, down, ups in _mlps(parts):
        slabs = [slab for up in ups for start in range(0, up.outputs, down.inputs) for slab in up.rows(1, start)]
        # OPT has its MLP in the layer itself
        yield _family(parent if split_at_layer(f"{parent}.")[1] else down.name, down.inputs, [*slabs, down.columns(1)])


def _mlps(parts: _Parts) -> Iterator[tuple[str, _Linear, list[_Linear]]]:
    """(Parent, last matrix, matrices before it) of each MLP; nothing if experts lie in tensors that have no columns of
    their own: a choice that passes over most of the model would be none."""
    if any(_is_expert(name, parameter) for name, parameter in parts.model.named_parameters()):
        return
    for parent, siblings in parts.linears.items():
        for last, first in _MLP:
            if last not in siblings or any(own not in siblings for own in first):
                continue
            down, ups = siblings[last], [siblings[own] for own in first]
            if all(up.outputs == down.inputs for up in ups) or _is_fused(down, ups):
                yield parent, down, ups
                break


def _is_fused(down: _Linear, ups: list[_Linear]) -> bool:
    return len(ups) == 1 and ups[0].name.endswith("gate_up_proj") and ups[0].outputs == 2 * down.inputs


def _is_expert(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 3 and "expert" in name


def _heads(parts: _Parts) -> Iterator[Family]:
    heads = getattr(parts.config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return
    for parent, siblings in parts.linears.items():
        output = next((siblings[own] for own in _OUTPUT if own in siblings), None)
        if output is None or output.inputs % heads:
            continue
        slabs = _query_slabs(parts, siblings, heads, output.inputs // heads)
        if slabs:
            yield _family(parent, heads, [*slabs, output.columns(output.inputs // heads)])


def _query_slabs(parts: _Parts, siblings: Mapping[str, _Linear], heads: int, size: int) -> list[Slab]:
    """The rows that belong to the query heads of an attention; empty if their order is not known."""
    groups = getattr(parts.config, "num_key_value_heads", None) or heads
    kind = parts.config.model_type
    if (fused := siblings.get(_HEAD_AFTER_HEAD.get(kind, ""))) is not None:
        return fused.rows(3 * size) if fused.outputs == 3 * heads * size else []
    if (fused := siblings.get(_QUERIES_FIRST.get(kind, ""))) is not None:
        whole = heads * size
        if fused.outputs != whole + 2 * groups * size:
            return []
        starts = range(0, 3 * whole, whole) if groups == heads else (0,)
        return [slab for start in starts for slab in fused.rows(size, start)]
    query = next((siblings[own] for own in _QUERY if own in siblings), None)
    if query is None or query.outputs % heads:
        return []
    own = [siblings[name] for name in _KEY_VALUE if name in siblings] if groups == heads else []
    # keys and values that come from one latent vector are laid out head after head (arXiv:2405.04434)
    own += [siblings["kv_b_proj"]] if "kv_b_proj" in siblings else []
    if any(linear.outputs % heads for linear in own):
        return []
    return [slab for linear in (query, *own) for slab in linear.rows(linear.outputs // heads)]


_FAMILIES: dict[Unit, Callable[[_Parts], Iterator[Family]]] = {
    "weight": _weights,
    "value_vector": _value_vectors,
    "neuron": _neurons,
    "head": _heads,
    "module": _modules,
    "layer": _layers,
}
