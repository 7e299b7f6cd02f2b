"""LoRA adapters in ΔW space: exactly what folding them gives, or a refusal."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from expunge.errors import UserError
from expunge.merging.run import merge_models
from merging_models import adapter, folded, gpt2, llama, reconfigure, rewrite, save, weights

pytestmark = pytest.mark.usefixtures("quick_disk")


def assert_same(one, two, tolerance=1e-5):
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


PAIRS = {
    "plain": ({}, {}),
    "ranks differ": ({"r": 2}, {"r": 8, "lora_alpha": 4}),
    "rslora": ({"use_rslora": True}, {}),
    "patterns": (
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 32},
        },
        {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {r".*_proj": 3}, "use_rslora": True},
    ),
    "targets differ": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "down_proj"]}),
    "some layers": ({"layers_to_transform": [1], "target_modules": ["o_proj"]}, {}),
    "gaussian and random starts": ({"init_lora_weights": "gaussian"}, {"init_lora_weights": False}),
    "embedding and output": (
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["lm_head"]},
    ),
    "dropout": ({"lora_dropout": 0.5}, {"lora_dropout": 0.1}),
}
METHODS = {
    "ties": {"density": 0.8},
    "ties, whole model": {"density": 0.3, "parameters": {"scope": "model"}},
    "linear": {"method": "linear"},
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("how", METHODS)
def test_merging_adapters_equals_merging_the_folded_checkpoints(tmp_path, pair, how):
    base = save(llama(0), tmp_path / "base")
    first = adapter(llama(0), tmp_path / "a", 1, str(base), **PAIRS[pair][0])
    second = adapter(llama(0), tmp_path / "b", 2, str(base), **PAIRS[pair][1])
    ours = merge_models([first, second], tmp_path / "ours", weights=[1.0, 0.7], **METHODS[how])
    full = [folded(base, first, tmp_path / "A"), folded(base, second, tmp_path / "B")]
    theirs = merge_models(full, tmp_path / "theirs", base=base, weights=[1.0, 0.7], **METHODS[how])
    assert_same(tmp_path / "ours", tmp_path / "theirs")
    for key, value in ours.statistics.items():
        assert value == pytest.approx(theirs.statistics[key], rel=1e-3)


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["c_proj"]])
def test_matrices_stored_the_other_way_round(tmp_path, targets):
    base = save(gpt2(), tmp_path / "base")
    one = adapter(gpt2(), tmp_path / "a", 1, str(base), target_modules=targets, fan_in_fan_out=True)
    merge_models([one], tmp_path / "ours", method="linear")
    assert_same(tmp_path / "ours", folded(base, one, tmp_path / "A"))
    reconfigure(one / "adapter_config.json", fan_in_fan_out=False)  # PEFT goes by the layer, whatever the config says
    merge_models([one], tmp_path / "again", method="linear")
    assert_same(tmp_path / "again", tmp_path / "A")


def test_one_adapter_is_folded_and_the_result_is_a_model_that_loads(tmp_path):
    base = save(llama(0), tmp_path / "base")
    one = adapter(llama(0), tmp_path / "a", 1, str(base))
    merge_models([one], tmp_path / "ours", method="linear")
    assert_same(tmp_path / "ours", folded(base, one, tmp_path / "A"))
    ids = torch.arange(10)[None]
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "A")]
    torch.testing.assert_close(loaded[0](ids).logits, loaded[1](ids).logits, rtol=0, atol=1e-4)


def test_an_adapter_and_a_checkpoint_mix_on_the_adapters_base(tmp_path):
    base = save(llama(0), tmp_path / "base")
    one, two = (adapter(llama(0), tmp_path / str(seed), seed, str(base)) for seed in (1, 2))
    full = folded(base, two, tmp_path / "B")
    merge_models([one, full], tmp_path / "mixed", density=0.5)
    merge_models([one, two], tmp_path / "adapters", density=0.5)
    assert_same(tmp_path / "mixed", tmp_path / "adapters")


def test_untouched_tensors_are_the_bases_bits(tmp_path):
    base = save(llama(0), tmp_path / "base", torch.bfloat16)
    one, two = (adapter(llama(0), tmp_path / str(seed), seed, str(base), target_modules=["q_proj"]) for seed in (1, 2))
    merge_models([one, two], tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]) == ("q_proj" not in name)


def test_the_base_is_found_beside_the_adapter_by_alias_and_in_a_run(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "first"
    save(llama(0), run / "model")
    (run / "run.json").write_text("{}")
    one = adapter(llama(0), tmp_path / "adapters" / "one", 1, "../../runs/first")
    merge_models([one], tmp_path / "relative", method="linear")
    monkeypatch.setattr(
        "expunge.models.load.resolve_folder", lambda name, revision=None: {"nickname": run / "model"}[name]
    )
    reconfigure(one / "adapter_config.json", base_model_name_or_path="nickname")
    merge_models([one], tmp_path / "alias", method="linear")
    assert_same(tmp_path / "relative", tmp_path / "alias", 0)


def test_an_embedding_adapter_may_carry_the_bases_embedding_but_not_another(tmp_path):
    base = save(llama(0), tmp_path / "base")
    one = adapter(llama(0), tmp_path / "a", 1, str(base), target_modules=["embed_tokens"])
    names = []
    rewrite(one, lambda tensors: names.extend(tensors))
    carried = [name for name in names if "lora_" not in name]
    assert carried, "PEFT no longer saves the base's embedding: this test has lost its object"
    merge_models([one], tmp_path / "fine", method="linear")
    rewrite(one, lambda tensors: tensors[carried[0]].add_(1))
    with pytest.raises(UserError, match="changed from"):
        merge_models([one], tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- refusals: never silently wrong


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"bias": "some"}, "bias=some"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"some_variant_of_2030": {"depth": 3}}, "some_variant_of_2030"),
        ({"r": 5}, "has rank 4, its config says 5"),
        ({"base_model_name_or_path": None}, "does not say what its base model is"),
        ({"base_model_name_or_path": "./gone"}, "base of .* is not there"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, changes, sentence):
    base = save(llama(0), tmp_path / "base")
    one = adapter(llama(0), tmp_path / "a", 1, str(base))
    reconfigure(one / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=sentence) as caught:
        merge_models([one], tmp_path / "out", method="linear")
    assert caught.value.hint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(first(t, "lora_B.weight")), "only one of its two factors"),
        (lambda t: t.clear(), "changes nothing"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}), "no LoRA factor"),
        (lambda t: t.update({"base_model.model.x.lora_magnitude_vector": torch.ones(3)}), "no LoRA factor"),
        (
            lambda t: t.update({n.replace("layers.0", "layers.7"): v.clone() for n, v in list(t.items())}),
            "does not hold",
        ),
        (
            lambda t: t.update({first(t, "up_proj.lora_A.weight"): torch.ones(4, 31)}),
            "48 × 31 matrix, but it is 48 × 32",
        ),
        (lambda t: t[first(t, "lora_A.weight")].fill_(float("nan")), "holds NaN or infinite numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, sentence):
    base = save(llama(0), tmp_path / "base")
    one = rewrite(adapter(llama(0), tmp_path / "a", 1, str(base)), change)
    with pytest.raises(UserError, match=sentence) as caught:
        merge_models([one], tmp_path / "out", method="linear")
    assert caught.value.hint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_side_of_tied_embeddings_is_refused(tmp_path, target):
    base = save(llama(0, tied=True), tmp_path / "base")
    one = adapter(llama(0, tied=True), tmp_path / "a", 1, str(base), target_modules=[target])
    with pytest.raises(UserError, match="ties to its other embedding"):
        merge_models([one], tmp_path / "out", method="linear")


def test_adapters_of_different_bases_need_to_be_told_which(tmp_path):
    one, other = save(llama(0), tmp_path / "one"), save(llama(0), tmp_path / "other")
    adapters = [adapter(llama(0), tmp_path / "a", 1, str(one)), adapter(llama(0), tmp_path / "b", 2, str(other))]
    with pytest.raises(UserError, match="different bases") as caught:
        merge_models(adapters, tmp_path / "out")
    assert "--base" in caught.value.hint
    merge_models(adapters, tmp_path / "out", base=one)


def test_an_adapter_is_no_base(tmp_path):
    base = save(llama(0), tmp_path / "base")
    one = adapter(llama(0), tmp_path / "a", 1, str(base))
    with pytest.raises(UserError, match="is itself an adapter") as caught:
        merge_models([one], tmp_path / "out", base=one)
    assert "--method linear" in caught.value.hint


def test_pickled_adapters_are_refused(tmp_path):
    base = save(llama(0), tmp_path / "base")
    one = adapter(llama(0), tmp_path / "a", 1, str(base))
    (one / "adapter_model.safetensors").rename(one / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        merge_models([one], tmp_path / "out", method="linear")
    (one / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="not a JSON object"):
        merge_models([one], tmp_path / "out", method="linear")
