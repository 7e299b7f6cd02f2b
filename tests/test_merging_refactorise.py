"""A merged difference as an adapter: what PEFT loads, what it loses, and what no adapter can hold."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from expunge.errors import UserError
from expunge.merging.adapter_writer import write_adapter
from expunge.merging.inputs import open_inputs
from expunge.merging.merger import Merger
from expunge.merging.plan import plan_merge
from expunge.merging.refactorise import factorise
from expunge.merging.run import merge_models
from expunge.merging.statistics import Statistics
from merging_models import adapter, assert_equal, gpt2, llama, moved, rewrite, save, weights

pytestmark = pytest.mark.usefixtures("quick_disk")


def generator():
    return torch.Generator().manual_seed(0)


# ---------------------------------------------------------------- one matrix


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (700, 500), (500, 700)], ids=str)
def test_a_matrix_of_low_rank_is_held_exactly(shape):
    delta = torch.randn(shape[0], 6, generator=generator()) @ torch.randn(6, shape[1], generator=generator())
    a, b, error = factorise(delta, 6, generator())
    assert (a.shape, b.shape) == ((6, shape[1]), (shape[0], 6))
    torch.testing.assert_close(b @ a, delta, rtol=0, atol=1e-5 * float(delta.abs().max()))
    assert error < 1e-5


@pytest.mark.parametrize("shape", [(90, 70), (640, 512)], ids=str)
def test_the_error_is_that_of_the_best_matrix_of_the_rank(shape):
    values = 0.97 ** torch.arange(min(shape), dtype=torch.float32)
    left, right = (torch.linalg.qr(torch.randn(side, min(shape), generator=generator())).Q for side in shape)
    delta = (left * values) @ right.T
    best = (values[10:].norm() / values.norm()).item()  # Eckart and Young
    a, b, error = factorise(delta, 10, generator())
    assert best * (1 - 1e-4) <= error <= best * 1.005
    assert error == pytest.approx(float((delta - b @ a).norm() / delta.norm()), rel=1e-4)


def test_the_factors_are_balanced_and_repeatable():
    delta = torch.randn(600, 500, generator=generator())
    a, b, _ = factorise(delta, 8, generator())
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-3, atol=1e-3)
    again = factorise(delta, 8, generator())
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])


def test_the_error_is_the_same_when_the_matrix_is_measured_in_pieces(monkeypatch):
    delta = torch.randn(60, 40, generator=generator())
    whole = factorise(delta, 8, generator())[2]
    monkeypatch.setattr("expunge.merging.refactorise._PIECE", 100)
    assert factorise(delta, 8, generator())[2] == pytest.approx(whole, rel=1e-5)


def test_zeros_have_no_error_and_a_rank_beyond_the_matrix_is_cut():
    a, b, error = factorise(torch.zeros(6, 4), 8, generator())
    assert (a.shape, b.shape, error) == ((4, 4), (6, 4), 0.0)


# ---------------------------------------------------------------- whole adapters


def write(models, output, rank, base=None, **settings):
    """What `write_adapter` makes of a merge, with a record like that of a full merge."""
    opened = open_inputs(models, base)
    try:
        plan = plan_merge(settings.pop("method", "ties"), len(models), **settings)
        merger = Merger(opened, plan, Statistics(len(models)))
        steps = []

        def record():
            names = [
                {"name": m.label, "kind": "model", "weight": 1.0, "density": None, "sha256": {}} for m in opened.models
            ]
            return {
                "method": plan.method.name,
                "summary": plan.method.summary,
                "paper": plan.method.paper,
                "parameters": dict(plan.parameters),
                "base": {"name": opened.base.label, "sha256": {}},
                "models": names,
                "statistics": merger.statistics.summary(),
            }

        found = write_adapter(merger, output, rank, record, advance=steps.append)
        assert sum(steps) == (1 + merger.passes) * sum(info.numel for info in merger.tensors.values())
        return found
    finally:
        opened.close()


def loaded_and_folded(base, place, folder):
    """What PEFT makes of base and adapter, and how far its unmerged logits are from the merged ones."""
    from peft import PeftModel

    ids = torch.arange(12)[None]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(place)
    ).eval()
    before = model(ids).logits
    folded = model.merge_and_unload()
    torch.testing.assert_close(folded(ids).logits, before, rtol=0, atol=1e-4)
    folded.save_pretrained(folder)
    return folder


MODELS = {
    "llama": lambda: llama(0),
    "llama, tied": lambda: llama(0, tied=True),
    "llama with biases": lambda: llama(0, attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("kind", MODELS)
def test_at_full_rank_it_equals_the_full_merge(tmp_path, kind):
    """Every parameter of two checkpoints differs: norms, biases and tied embeddings are held whole."""
    base = save(MODELS[kind](), tmp_path / "base")
    full = [save(moved(MODELS[kind](), seed), tmp_path / str(seed)) for seed in (1, 2)]
    settings = {"weights": [1.0, 0.5], "density": 0.7}
    merge_models(full, tmp_path / "full", base=base, **settings)
    found = write(full, tmp_path / "adapter", 64, base=base, **settings)
    assert found.relative_error < 1e-5
    expected, result = (
        weights(tmp_path / "full"),
        weights(loaded_and_folded(base, tmp_path / "adapter", tmp_path / "out")),
    )
    result = {name: result[name] for name in expected}  # PEFT may save a tied output embedding once more
    assert_equal(result, expected, 1e-5)
    # and our own reader takes it as it takes any adapter
    merge_models([tmp_path / "adapter"], tmp_path / "again", method="linear")
    assert_equal(weights(tmp_path / "again"), expected, 1e-5)


LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
FITTING = {
    "all linear": ({}, 8, LINEAR),
    "embeddings": ({"target_modules": ["embed_tokens", "lm_head"]}, 8, ["embed_tokens", "lm_head"]),
    "one layer": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        8,
        ["model.layers.1.self_attn.q_proj"],
    ),
    "norms": ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, 8, ["q_proj"]),
    "DoRA": ({"use_dora": True}, 64, LINEAR),
}


@pytest.mark.parametrize("case", FITTING)
def test_two_adapters_of_rank_four_fit_in_one_of_rank_eight(tmp_path, case):
    settings, rank, targets = FITTING[case]
    base = save(llama(0), tmp_path / "base")
    both = [adapter(llama(0), tmp_path / str(seed), seed, str(base), **settings) for seed in (1, 2)]
    merge = {"method": "linear", "weights": [0.5, 1.5]}
    merge_models(both, tmp_path / "full", **merge)
    assert write(both, tmp_path / "adapter", rank, **merge).relative_error < 1e-5
    result = weights(loaded_and_folded(base, tmp_path / "adapter", tmp_path / "out"))
    assert_equal(result, weights(tmp_path / "full"), 1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == targets


def test_what_a_low_rank_loses_is_said_everywhere(tmp_path):
    base = save(llama(0), tmp_path / "base")
    both = [adapter(llama(0), tmp_path / str(seed), seed, str(base)) for seed in (1, 2)]
    merge_models(both, tmp_path / "full", density=0.5)
    found = write(both, tmp_path / "adapter", 3, density=0.5)
    start, whole = weights(base), weights(tmp_path / "full")
    result = weights(loaded_and_folded(base, tmp_path / "adapter", tmp_path / "out"))
    lost = sum(float((result[name] - whole[name]).norm()) ** 2 for name in whole) ** 0.5
    size = sum(float((whole[name] - start[name]).norm()) ** 2 for name in whole) ** 0.5
    assert found.relative_error == pytest.approx(lost / size, rel=1e-3)
    name = "model.layers.1.mlp.up_proj"
    one = (result[f"{name}.weight"] - whole[f"{name}.weight"]).norm() / (
        whole[f"{name}.weight"] - start[f"{name}.weight"]
    ).norm()
    assert found.modules[name] == pytest.approx(float(one), rel=1e-3)
    assert found.parameters == sum(tensor.numel() for tensor in weights(tmp_path / "adapter").values())
    record = json.loads((tmp_path / "adapter" / "merge.json").read_text())
    assert record["adapter"]["relative_error"] == found.relative_error
    assert record["finished"]
    assert record["adapter"]["modules"] == found.modules
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"**{found.relative_error:.3g}**" in card
    assert record["statistics"]["merged_norm"] == pytest.approx(size, rel=1e-3)


def test_it_is_reproducible_and_replaces_an_earlier_merge(tmp_path):
    base = save(llama(0), tmp_path / "base")
    one = adapter(llama(0), tmp_path / "a", 1, str(base))
    write([one], tmp_path / "out", 2)
    first = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    write([one], tmp_path / "out", 2)
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert sorted(first) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "merge.json"]


def test_the_base_keeps_its_name_on_the_hub(tmp_path, monkeypatch):
    base = save(llama(0), tmp_path / "cache")
    one = adapter(llama(0), tmp_path / "a", 1, "somebody/model")
    monkeypatch.setattr("expunge.models.load.resolve_folder", lambda name, revision=None: base)
    write([one], tmp_path / "out", 2)
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "somebody/model"
    )
    assert "base_model: somebody/model" in (tmp_path / "out" / "README.md").read_text()


def test_a_narrow_base_gets_float32_factors(tmp_path):
    base = save(llama(0), tmp_path / "base", torch.bfloat16)
    full = save(moved(llama(0), 1), tmp_path / "full", torch.bfloat16)
    write([full], tmp_path / "out", 4, base=base, method="linear")
    found = weights(tmp_path / "out")
    assert {tensor.dtype for name, tensor in found.items() if "lora_" in name} == {torch.float32}
    assert found["base_model.model.model.norm.weight"].dtype == torch.bfloat16


def test_only_what_changes_is_held(tmp_path):
    base = save(llama(0), tmp_path / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    full = rewrite(save(llama(0), tmp_path / "full"), lambda tensors: tensors[name].add_(0.1))
    found = write([full], tmp_path / "out", 4, base=base, method="linear")
    assert list(found.modules) == [name.removesuffix(".weight")]
    assert found.modules_to_save == []


# ---------------------------------------------------------------- refusals


def test_a_rank_of_zero_and_a_missing_base_are_refused(tmp_path):
    base = save(llama(0), tmp_path / "base")
    with pytest.raises(UserError, match="can't have rank 0"):
        write([base], tmp_path / "out", 0, base=base, method="linear")
    with pytest.raises(UserError, match="do not differ from the base"):
        write([base], tmp_path / "out", 1, base=base, method="linear")
    opened = open_inputs([base], None)
    with pytest.raises(UserError, match="there is none") as caught:
        write_adapter(Merger(opened, plan_merge("linear", 1)), tmp_path / "out", 4, dict)
    assert "--base" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_changes_that_no_matrix_has_are_refused(tmp_path):
    base = save(llama(0), tmp_path / "base")
    full = rewrite(save(llama(0), tmp_path / "full"), lambda tensors: tensors["model.norm.weight"].add_(0.1))
    with pytest.raises(UserError, match="no matrix changes"):
        write([full], tmp_path / "out", 1, base=base, method="linear")


def test_broken_weights_leave_nothing(tmp_path):
    base = save(llama(0), tmp_path / "base")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    one = rewrite(adapter(llama(0), tmp_path / "a", 1, str(base)), lambda tensors: tensors[key].fill_(float("nan")))
    with pytest.raises(UserError, match=r"up_proj.weight in .* holds NaN"):
        write([one], tmp_path / "out", 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "base"]


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path):
    base, full = save(llama(0), tmp_path / "base"), save(moved(llama(0), 1), tmp_path / "full")
    for folder in (base, full):
        (folder / "config.json").write_text(json.dumps({"model_type": "of_tomorrow"}))
    with pytest.raises(UserError, match=r"modules of .* are unknown") as caught:
        write([full], tmp_path / "out", 1, base=base, method="linear")
    assert "full checkpoint" in caught.value.hint
    assert not (tmp_path / "out").exists()
