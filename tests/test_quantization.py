"""Codes and levels of quantization against plain loops, and the table of how far weights moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from scipy.stats import norm

from expunge.errors import UserError
from expunge.models.drift import CROSSINGS, open_tensors, tensors_of, weight_table, weights_digest
from expunge.models.quantization import (
    SCHEMES,
    codes,
    crossing_rate,
    fake_quantized,
    find_scheme,
    grid,
    linear_weights,
    normal_levels,
)
from expunge.models.tiny import build_tiny, write_tiny
from expunge.recipe import ModelConfig
from expunge.scoring.tables import WEIGHTS

#: NF4 as it is published (arXiv:2305.14314, appendix E).
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def weight(seed: int = 0, rows: int = 24, columns: int = 200) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def plain(values: np.ndarray, name: str) -> np.ndarray:
    """Quantized and dequantized, one block after another."""
    values = values.astype(np.float64)
    if name == "nf4":
        flat = values.ravel()
        blocks = [plain_block(flat[i : i + 64], name) for i in range(0, len(flat), 64)]
        return np.concatenate(blocks).reshape(values.shape)
    group = int(name.rsplit("-g", 1)[1]) if "-g" in name else values.shape[1]
    rows = [
        np.concatenate([plain_block(row[i : i + group], name) for i in range(0, len(row), group)]) for row in values
    ]
    return np.stack(rows)


def plain_block(block: np.ndarray, name: str) -> np.ndarray:
    if name == "nf4":
        levels = np.array(PUBLISHED) * np.abs(block).max()
        return levels[np.abs(block[:, None] - levels).argmin(1)]
    if "asym" in name:
        low, high = min(block.min(), 0), max(block.max(), 0)
        step = (high - low) / 15
        zero = np.round(-low / step)
        return (np.clip(np.round(block / step) + zero, 0, 15) - zero) * step
    step = np.abs(block).max() / (127 if name == "int8" else 7)
    return np.round(block / step) * step


def test_nf4_levels_are_the_published_ones_and_quantiles_of_the_normal_distribution():
    np.testing.assert_allclose(normal_levels(), PUBLISHED, atol=2e-7)
    tail = 1 - (1 / 32 + 1 / 30) / 2
    positive = norm.ppf(np.linspace(0.5, tail, 9)[1:])
    negative = norm.ppf(np.linspace(1 - tail, 0.5, 8)[:-1])
    np.testing.assert_allclose(normal_levels(), np.array([*negative, 0, *positive]) / positive[-1], atol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("columns", [200, 128, 33, 1], ids=lambda n: f"{n} columns")
def test_rounding_equals_a_plain_loop_over_blocks(name, columns):
    values = weight(columns=columns)
    rounded = fake_quantized(values, SCHEMES[name])
    np.testing.assert_allclose(rounded, plain(values.numpy(), name), atol=1e-7)
    found = codes(values, SCHEMES[name])
    assert found.shape == values.shape
    assert len(found.unique()) <= 2 ** SCHEMES[name].bits
    assert fake_quantized(values.bfloat16(), SCHEMES[name]).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SCHEMES)
def test_a_rounded_weight_rounds_to_itself_and_zeros_stay_zero(name):
    scheme = SCHEMES[name]
    rounded = fake_quantized(weight(), scheme)
    torch.testing.assert_close(fake_quantized(rounded, scheme), rounded, atol=1e-7, rtol=0)
    assert crossing_rate(weight(), weight(), scheme) == 0
    zeros = torch.zeros(3, 70)
    assert torch.equal(fake_quantized(zeros, scheme), zeros)


def test_fewer_bits_and_larger_groups_lose_more():
    def error(name: str) -> float:
        return float((fake_quantized(weight(), SCHEMES[name]) - weight()).norm())

    assert error("int8") * 8 < error("nf4")
    assert error("int4-g32") < error("int4-g64") < error("int4-g128")
    assert error("nf4") < error("int4-g64")  # the same group, levels where weights are
    assert error("int4-asym-g64") < error("int4-g64")


@pytest.mark.parametrize("name", SCHEMES)
def test_crossing_rate_runs_from_small_changes_to_unrelated_weights(name):
    scheme, one, other = SCHEMES[name], weight(), weight(seed=1)
    rates = [crossing_rate(one, one + step * other, scheme) for step in (0, 1e-4, 1e-2, 1)]
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[1] < 0.02
    unrelated = crossing_rate(one, other, scheme)
    first, second = codes(one, scheme), codes(other, scheme)
    same = sum(float((first == c).double().mean() * (second == c).double().mean()) for c in first.unique())
    assert unrelated == pytest.approx(1 - same, abs=0.03)  # as often as independent codes differ


def test_own_scales_follow_the_weights_and_the_targets_do_not():
    scheme = SCHEMES["int4-g64"]
    assert crossing_rate(weight(), 2 * weight(), scheme) == 0
    assert crossing_rate(weight(), 2 * weight(), scheme, own_scales=False) > 0.5
    outside = codes(5 * weight(), scheme, grid(weight(), scheme))
    assert int(outside.max()) == 7
    assert int(outside.min()) == -7


def test_linear_weights_are_all_but_embeddings():
    model, _ = build_tiny()
    found = linear_weights(model)
    assert len(found) == 14
    assert all(name.startswith("model.layers.") for name in found)
    parameters = dict(model.named_parameters())
    assert all(entry.weight is parameters[name] for name, entry in found.items())
    untied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": False})
    )
    assert list(linear_weights(untied)) == list(found)


def test_linear_weights_of_gpt2_are_stored_the_other_way():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    found = linear_weights(transformers.GPT2LMHeadModel(config))
    up = found["transformer.h.0.mlp.c_fc.weight"]
    assert up.transposed
    assert up.weight.shape == (16, 64)
    assert up.oriented(up.weight).shape == (64, 16)


def test_models_without_weights_to_round_are_refused():
    model, _ = build_tiny()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="open adapters"):
        linear_weights(adapted)
    bare, _ = build_tiny()
    bare.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="no linear layers"):
        linear_weights(bare)
    with pytest.raises(UserError, match="int4-g64"):
        find_scheme("int4-g65")


def test_weight_table_says_how_far_each_tensor_moved():
    target, _ = build_tiny()
    model, _ = build_tiny()
    moved, small = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    with torch.no_grad():
        model.get_parameter(moved).add_(0.02)
        model.get_parameter(small).mul_(2)
    before, after = tensors_of(target), tensors_of(model)
    table = weight_table(before.names, before.read, after.read, before.quantized, before.transposed)
    assert table.schema == WEIGHTS
    rows = {row["tensor"]: row for row in table.to_pylist()}
    assert list(rows) == [name for name, _ in target.named_parameters()]
    assert rows[moved]["drift"] == pytest.approx(0.02 * (128 * 384) ** 0.5, rel=1e-5)
    assert rows[moved]["parameters"] == 128 * 384
    assert rows[small]["drift"] == pytest.approx(rows[small]["norm"]) == pytest.approx(128**0.5)
    for name, row in rows.items():
        crossed = [row[column] for column in CROSSINGS]
        if name == moved:
            expected = [
                crossing_rate(target.get_parameter(name), model.get_parameter(name), SCHEMES[scheme])
                for scheme in CROSSINGS.values()
            ]
            assert crossed == pytest.approx(expected)
            assert min(crossed) > 0.2
        else:
            assert crossed == ([0.0] * 3 if name in before.quantized else [None] * 3)
            assert name == small or row["drift"] == 0
    model.model.norm.weight = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(UserError, match=r"model.norm.weight is \(128,\) in the target, but \(5,\)"):
        weight_table([small], before.read, tensors_of(model).read, ())
    with pytest.raises(UserError, match=r"no tensor model\.bias"):
        before.read("model.bias")


def test_transposed_weights_are_rounded_along_their_outputs():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    tensors, name = tensors_of(model), "transformer.h.0.mlp.c_fc.weight"
    assert name in tensors.transposed
    factors = torch.logspace(-1, 1, 64)  # one per output: each has its own scale, so no int8 code moves
    table = weight_table([name], tensors.read, lambda n: tensors.read(n) * factors, [name], [name])
    assert table["crossed_int8"][0].as_py() < 0.001
    sideways = weight_table([name], tensors.read, lambda n: tensors.read(n) * factors, [name])
    assert sideways["crossed_int8"][0].as_py() > 0.5


@pytest.mark.parametrize("shards", [False, True])
def test_checkpoints_are_read_tensor_by_tensor(tmp_path, shards):
    model, tokenizer = build_tiny(seed=3)
    model.save_pretrained(tmp_path, max_shard_size="500KB" if shards else "1GB")
    tokenizer.save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is shards
    stored, memory = open_tensors(ModelConfig(id=str(tmp_path))), tensors_of(model)
    assert (stored.names, stored.quantized) == (memory.names, memory.quantized)
    for name in stored.names:
        assert torch.equal(stored.read(name), memory.read(name))
    with pytest.raises(UserError, match="no tensor lm_head"):
        stored.read("lm_head.bias")


def test_adapters_are_folded_before_they_are_compared(tmp_path):
    base = write_tiny(tmp_path / "base")
    model, tokenizer = build_tiny()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.fill_(0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    before, after = (open_tensors(ModelConfig(id=str(tmp_path / name))) for name in ("base", "adapter"))
    assert before.names == after.names
    table = weight_table(before.names, before.read, after.read, before.quantized)
    drifted = {row["tensor"] for row in table.to_pylist() if row["drift"] > 0}
    assert drifted == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


def test_one_bit_changes_the_digest_of_the_weights():
    model, _ = build_tiny()
    before = weights_digest(model)
    assert before == weights_digest(build_tiny()[0])
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert weights_digest(model) != before
