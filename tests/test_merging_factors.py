"""scope=factor is what PEFT's add_weighted_adapter does, and refuses what that would get silently wrong."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from expunge.errors import UserError
from expunge.merging.run import merge_models
from merging_models import adapter, assert_equal, gpt2, llama, save, weights

pytestmark = pytest.mark.usefixtures("quick_disk")


def merged_by_peft(base, adapters, model_weights, folder, **how):
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    wrapped = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=names[0])
    for name, place in zip(names[1:], adapters[1:], strict=True):
        wrapped.load_adapter(str(place), adapter_name=name)
    wrapped.add_weighted_adapter(names, model_weights, "merged", **how)
    wrapped.set_adapter("merged")
    wrapped.merge_and_unload().save_pretrained(folder)
    return folder


# their combination → our method and the settings that make it theirs
COUNT = {"votes": "equal", "normalize": "count"}
SAME = {
    "linear": ({}, "linear", {"normalize": False}),
    "ties, whole": ({"combination_type": "ties", "density": 1.0}, "ties", COUNT),
    "ties, official": ({"combination_type": "ties", "density": 0.8}, "ties", COUNT),
    "ties, by number": (
        {"combination_type": "ties", "density": 0.37, "majority_sign_method": "frequency"},
        "ties",
        COUNT | {"sign": "frequency"},
    ),
    "pruned": ({"combination_type": "magnitude_prune", "density": 0.6}, "magnitude_prune", {"normalize": False}),
    "dare, linear": ({"combination_type": "dare_linear", "density": 1.0}, "dare_linear", {"normalize": False}),
    "dare, ties": ({"combination_type": "dare_ties", "density": 1.0}, "dare_ties", COUNT),
}
PAIRS = {
    "alike": ({}, {}),
    "scalings differ": (
        {"lora_alpha": 4, "alpha_pattern": {"q_proj": 32}},
        {"lora_alpha": 12, "use_rslora": False},
    ),
    "targets differ": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "down_proj"]}),
    "embeddings": ({"target_modules": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "o_proj"]}),
}


@pytest.mark.parametrize("how", SAME)
@pytest.mark.parametrize("model_weights", [[1.0, 1.0], [0.3, -1.5]], ids=["ones", "mixed signs"])
def test_it_equals_pefts_add_weighted_adapter(tmp_path, how, model_weights):
    theirs, method, ours = SAME[how]
    base = save(llama(0), tmp_path / "base")
    both = [
        adapter(llama(0), tmp_path / str(seed), seed, str(base), **PAIRS["scalings differ"][seed]) for seed in (0, 1)
    ]
    expected = merged_by_peft(base, both, model_weights, tmp_path / "peft", **({"combination_type": "linear"} | theirs))
    merge_models(
        both,
        tmp_path / "ours",
        method=method,
        weights=model_weights,
        density=theirs.get("density"),
        parameters={"scope": "factor", **ours},
    )
    assert_equal(weights(tmp_path / "ours"), weights(expected), 1e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_it_equals_peft_whatever_is_targeted(tmp_path, pair):
    base = save(llama(0), tmp_path / "base")
    both = [adapter(llama(0), tmp_path / str(seed), seed, str(base), **PAIRS[pair][seed]) for seed in (0, 1)]
    expected = merged_by_peft(base, both, [1.0, 0.5], tmp_path / "peft", combination_type="ties", density=0.8)
    settings = {"weights": [1.0, 0.5], "density": 0.8, "parameters": {"scope": "factor", **COUNT}}
    merge_models(both, tmp_path / "ours", **settings)
    assert_equal(weights(tmp_path / "ours"), weights(expected), 1e-6)


def test_it_equals_peft_for_matrices_stored_the_other_way_round(tmp_path):
    base = save(gpt2(), tmp_path / "base")
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    both = [adapter(gpt2(), tmp_path / str(seed), seed, str(base), **targets) for seed in (0, 1)]
    expected = merged_by_peft(base, both, [1.0, 1.0], tmp_path / "peft", combination_type="ties", density=0.8)
    merge_models(both, tmp_path / "ours", density=0.8, parameters={"scope": "factor", **COUNT})
    assert_equal(weights(tmp_path / "ours"), weights(expected), 1e-6)


def test_one_adapter_is_what_it_was_and_two_are_not_their_sum(tmp_path):
    base = save(llama(0), tmp_path / "base")
    both = [adapter(llama(0), tmp_path / str(seed), seed, str(base)) for seed in (1, 2)]
    settings = {"method": "linear", "parameters": {"scope": "factor", "normalize": False}}
    merge_models(both[:1], tmp_path / "one", **settings)
    merge_models(both[:1], tmp_path / "exact", method="linear")
    assert_equal(weights(tmp_path / "one"), weights(tmp_path / "exact"), 1e-6)
    merge_models(both, tmp_path / "factors", **settings)
    merge_models(both, tmp_path / "sum", method="linear", parameters={"normalize": False})
    name = "model.layers.0.mlp.up_proj.weight"
    start, factors, total = (weights(tmp_path / place)[name] for place in ("base", "factors", "sum"))
    assert (factors - total).norm() > 0.5 * (total - start).norm()


def test_rslora_keeps_its_scaling(tmp_path):
    """PEFT's merged adapter inherits use_rslora and with it a factor √r that no input had."""
    base = save(llama(0), tmp_path / "base")
    plain = adapter(llama(0), tmp_path / "plain", 1, str(base), r=4, lora_alpha=8)
    same = adapter(llama(0), tmp_path / "same", 1, str(base), r=4, lora_alpha=4, use_rslora=True)  # 4/√4 = 8/4
    settings = {"method": "linear", "parameters": {"scope": "factor", "normalize": False}}
    for place in (plain, same):
        merge_models([place, place], tmp_path / f"{place.name}-merged", **settings)
    assert_equal(weights(tmp_path / "plain-merged"), weights(tmp_path / "same-merged"), 1e-6)


def test_scale_match_holds_for_factors_as_well(tmp_path):
    base = save(llama(0), tmp_path / "base")
    both = [adapter(llama(0), tmp_path / str(seed), seed, str(base)) for seed in (1, 2)]
    parameters = {"scope": "factor", "normalize": False, "scale_match": "model"}
    found = merge_models(both, tmp_path / "out", method="linear", parameters=parameters).statistics
    assert found["merged_norm"] == pytest.approx(sum(found["delta_norms"]) / 2, rel=1e-4)


REFUSED = {
    "another rank": ({"r": 2}, "equal ranks: that of .* is 4 in .* and 2 in"),
    "DoRA": ({"use_dora": True}, "in another way"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "changes lm_head.weight in another way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_equal_factors_is_refused(tmp_path, case):
    settings, sentence = REFUSED[case]
    base = save(llama(0), tmp_path / "base")
    one = adapter(llama(0), tmp_path / "a", 1, str(base))
    other = adapter(llama(0), tmp_path / "b", 2, str(base), **settings)
    with pytest.raises(UserError, match=sentence) as caught:
        merge_models([one, other], tmp_path / "out", parameters={"scope": "factor"})
    assert "scope=factor" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_checkpoints_have_no_factors(tmp_path):
    base = save(llama(0), tmp_path / "base")
    one, full = adapter(llama(0), tmp_path / "a", 1, str(base)), save(llama(1), tmp_path / "full")
    with pytest.raises(UserError, match=r"and .*full has none"):
        merge_models([one, full], tmp_path / "out", parameters={"scope": "factor"})
