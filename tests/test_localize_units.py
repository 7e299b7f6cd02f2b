"""Units of every kind on many architectures: what they own, what depends on it, and what an architecture lacks."""

from __future__ import annotations

import pytest
import torch
import transformers

from expunge.errors import UserError
from expunge.localize.units import FLAT, Family, units_of
from expunge.models.forward import decoder_layers
from expunge.models.quantization import linear_weights
from expunge.models.tiny import build_tiny
from localize_models import SETTINGS, architecture

UNITS = ("weight", "value_vector", "neuron", "head", "module", "layer")
LACKS = {
    "Mixtral": {"value_vector", "neuron"},
    "Falcon": {"head"},
    "Mamba": {"value_vector", "neuron", "head"},
}
MLP_UNITS = [kind for kind in SETTINGS if "neuron" not in LACKS.get(kind, ())]
HEAD_UNITS = [kind for kind in SETTINGS if "head" not in LACKS.get(kind, ())]
TOKENS = torch.arange(1, 13).reshape(2, 6)


def owner(model, families: list[Family]) -> dict[str, torch.Tensor]:
    """Per parameter the number of the unit that owns each weight, counted over all families; -1 for nobody."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = {name: torch.full(shape, -1) for name, shape in shapes.items()}
    before = 0
    for family in families:
        for slab in family.slabs:
            assert slab.shape == tuple(shapes[slab.parameter])
            for unit in range(1 if slab.axis == FLAT else family.count):
                own = found[slab.parameter]
                if slab.axis == FLAT:
                    own, number = own.view(-1), torch.arange(family.count) + before
                else:
                    number = torch.tensor(unit + before)
                    if slab.axis is not None:
                        own = own.narrow(slab.axis, slab.start + unit * slab.size, slab.size)
                assert (own == -1).all(), f"two units own weights of {slab.parameter}"
                own.copy_(number)
        before += family.count
    return found


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_no_weight_has_two_owners_and_every_unit_owns_as_many_as_it_says(kind, unit):
    model = architecture(kind)
    if unit in LACKS.get(kind, ()):
        with pytest.raises(UserError, match="has no units of the kind") as error:
            units_of(model, unit)
        there = set(UNITS) - LACKS[kind]
        assert set(error.value.hint.removeprefix("units of this model: ").split(", ")) == there
        return
    families = units_of(model, unit)
    owned = owner(model, families)
    expected = torch.cat([torch.full((family.count,), family.weights) for family in families])
    numbers = torch.cat([own.reshape(-1) for own in owned.values()])
    assert torch.equal(torch.bincount(numbers[numbers >= 0], minlength=len(expected)), expected)
    embeddings = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for name, parameter in model.named_parameters():
        if any(parameter is embedding for embedding in embeddings):
            assert (owned[name] == -1).all()
    assert len({family.name for family in families}) == len(families)
    assert {family.layer for family in families} == {0, 1}
    assert all(family.name.endswith(family.module) or unit in ("weight", "layer") for family in families)
    assert sorted(families, key=lambda family: family.layer) == families


@pytest.mark.parametrize("kind", SETTINGS)
def test_weights_modules_and_layers_own_all_that_is_theirs(kind):
    model = architecture(kind)
    linears = linear_weights(model)
    weights = owner(model, units_of(model, "weight"))
    assert {name for name, own in weights.items() if (own >= 0).any()} == set(linears)
    assert all((weights[name] >= 0).all() for name in linears)
    modules = units_of(model, "module")
    assert {slab.parameter for family in modules for slab in family.slabs} == {
        f"{name.removesuffix('.weight')}.{own}"
        for name, linear in linears.items()
        for own, _ in linear.module.named_parameters()
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for family, layer in zip(units_of(model, "layer"), decoder_layers(model), strict=True):
        assert [slab.parameter for slab in family.slabs] == [names[id(own)] for own in layer.parameters()]
        assert family.weights == sum(parameter.numel() for parameter in layer.parameters())


def inputs_of(model, name: str) -> torch.Tensor:
    """What enters a linear layer."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    return found[0].flatten(0, -2)


def changed_inputs(model, family: Family, unit: int, last: str) -> torch.Tensor:
    """Entries that enter `last` and that change when what the unit owns elsewhere changes."""
    before, kept = inputs_of(model, last), {}
    with torch.no_grad():
        for slab in family.slabs:
            parameter = model.get_parameter(slab.parameter)
            kept.setdefault(slab.parameter, parameter.clone())
            if slab.parameter != f"{last}.weight":
                parameter.narrow(slab.axis, slab.start + unit * slab.size, slab.size).add_(0.5)
        after = inputs_of(model, last)
        for name, values in kept.items():
            model.get_parameter(name).copy_(values)
    return (before != after).any(0).nonzero().flatten()


@pytest.mark.parametrize("kind", MLP_UNITS)
def test_a_neuron_makes_the_coefficient_of_its_value_vector_and_no_other(kind):
    model = architecture(kind)
    for family, vectors in zip(units_of(model, "neuron"), units_of(model, "value_vector"), strict=True):
        assert (family.count, family.layer) == (vectors.count, vectors.layer)
        assert family.slabs[-1] == vectors.slabs[0]
        assert len(vectors.slabs) == 1
        assert vectors.weights == 32  # the hidden size
        touched = {slab.parameter: slab.shape for slab in family.slabs}
        assert family.weights * family.count == sum(torch.Size(shape).numel() for shape in touched.values())
        mlp = model.get_submodule(vectors.name.rpartition(".")[0])
        gated = hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj")
        biases = sum(len(shape) == 1 for shape in touched.values())
        assert family.weights == 32 * (3 if gated else 2) + biases
        assert biases == 0 or mlp.get_submodule(vectors.name.rpartition(".")[2]).bias is not None
        for unit in (0, 5, family.count - 1):
            assert changed_inputs(model, family, unit, vectors.name).tolist() == [unit]


@pytest.mark.parametrize("kind", MLP_UNITS)
def test_a_value_vector_is_what_its_coefficient_is_multiplied_with(kind):
    model = architecture(kind)
    (vectors, _) = units_of(model, "value_vector")
    (slab,) = vectors.slabs
    module = model.get_submodule(vectors.name)
    coefficients = torch.eye(vectors.count)[[3, vectors.count - 1]]
    bias = 0 if module.bias is None else module.bias
    own = module.weight.index_select(slab.axis, torch.tensor([3, vectors.count - 1]))
    given = own if slab.axis == 0 else own.T
    torch.testing.assert_close(module(coefficients), given + bias)


@pytest.mark.parametrize("kind", HEAD_UNITS)
def test_a_head_makes_its_own_part_of_what_the_output_projection_reads(kind):
    model = architecture(kind)
    for family in units_of(model, "head"):
        columns = family.slabs[-1]
        last = columns.parameter.removesuffix(".weight")
        assert family.count == 4
        assert columns.start == 0
        assert columns.size * 4 == columns.shape[columns.axis]
        for unit in range(4):
            changed = changed_inputs(model, family, unit, last)
            assert changed.tolist() == list(range(unit * columns.size, (unit + 1) * columns.size))


@pytest.mark.parametrize("kind", HEAD_UNITS)
def test_keys_and_values_belong_to_a_head_that_does_not_share_them(kind):
    model = architecture(kind)
    (family, _) = units_of(model, "head")
    grouped = getattr(model.config, "num_key_value_heads", None) == 2
    size = family.slabs[-1].size
    width = 32  # of what the attention reads
    matrices = sum(slab.weights for slab in family.slabs[:-1] if len(slab.shape) == 2)
    assert matrices == (1 if grouped else 3) * size * width
    assert family.slabs[-1].weights == size * width
    with_bias = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    owned = {slab.parameter for slab in family.slabs}
    rows = {name for name in owned if name.endswith(".weight") and name != family.slabs[-1].parameter}
    assert {name.replace(".weight", ".bias") for name in rows} & with_bias == owned & with_bias


def test_tiny_has_the_units_that_its_config_says():
    model, _ = build_tiny()
    named = {unit: units_of(model, unit) for unit in UNITS}
    assert [family.name for family in named["value_vector"]] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert [family.count for family in named["neuron"]] == [384, 384]
    assert [(family.module, family.count) for family in named["head"]] == [("self_attn", 4)] * 2
    assert [family.module for family in named["layer"]] == ["layer", "layer"]
    assert len(named["module"]) == 14
    assert all(family.count == 1 for family in named["module"])
    assert sum(family.count for family in named["weight"]) == sum(family.weights for family in named["module"])
    assert named["neuron"][0].weights == 3 * 128
    assert named["head"][0].weights == 2 * 32 * 128  # grouped: query and output alone


def test_units_of_a_7b_model_need_none_of_its_weights():
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    assert sum(family.count for family in units_of(model, "value_vector")) == 32 * 11008
    assert sum(family.count for family in units_of(model, "head")) == 32 * 32
    assert sum(family.count for family in units_of(model, "weight")) == 6_476_005_376


def test_wrappers_of_a_model_do_not_hide_its_units():
    model = architecture("Llama")
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert units_of(wrapper, "head") == units_of(model, "head")


def test_an_unknown_unit_and_open_adapters_are_refused():
    from peft import LoraConfig, get_peft_model

    model = architecture("Llama")
    with pytest.raises(UserError, match="unknown unit 'neurons'") as error:
        units_of(model, "neurons")
    assert error.value.hint == "did you mean 'neuron'?"
    with pytest.raises(UserError, match="open adapters"):
        units_of(get_peft_model(model, LoraConfig(target_modules="all-linear")), "value_vector")
