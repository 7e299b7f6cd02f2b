"""DoRA, biases, whole modules and single tokens: exactly what PEFT folds them to, or a refusal."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from expunge.errors import UserError
from expunge.merging.run import merge_models
from merging_models import adapter, assert_equal, folded, gpt2, llama, reconfigure, rewrite, save, weights

pytestmark = pytest.mark.usefixtures("quick_disk")


def llama_biased() -> LlamaForCausalLM:
    return llama(0, attention_bias=True)


def llama_tied() -> LlamaForCausalLM:
    return llama(0, tied=True)


def llama_biased_tied() -> LlamaForCausalLM:
    return llama(0, tied=True, attention_bias=True)


QUERY, FAN = {"target_modules": ["q_proj"]}, {"fan_in_fan_out": True}
VARIANTS = {
    "DoRA": (llama, {"use_dora": True}),
    "DoRA, rsLoRA and patterns": (llama, {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "DoRA on embeddings": (llama, {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]}),
    "DoRA, transposed": (gpt2, {"use_dora": True, "target_modules": ["c_attn", "c_proj"], **FAN}),
    "biases of B": (llama_biased, {"lora_bias": True, "use_rslora": True, **QUERY}),
    "biases of B, transposed": (gpt2, {"lora_bias": True, "target_modules": ["c_attn", "c_proj"], **FAN}),
    "all biases": (llama_biased, {"bias": "all", **QUERY}),
    "all biases, norms among them": (gpt2, {"bias": "all", "target_modules": ["c_attn"], **FAN}),
    "biases beside factors": (gpt2, {"bias": "lora_only", "target_modules": ["c_attn"], **FAN}),
    "biases twice in the file": (
        gpt2,
        {"bias": "all", "modules_to_save": ["ln_f"], "target_modules": ["c_attn"], **FAN},
    ),
    "whole head": (llama, {"modules_to_save": ["lm_head"], **QUERY}),
    "whole embeddings": (llama, {"modules_to_save": ["embed_tokens", "lm_head"], **QUERY}),
    "whole norms and blocks": (llama, {"modules_to_save": ["norm", "mlp"], **QUERY}),
    "whole modules, transposed": (gpt2, {"modules_to_save": ["ln_f", "mlp"], "target_modules": ["c_attn"], **FAN}),
    "whole tied embedding": (
        llama_tied,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, **QUERY},
    ),
    "whole tied embedding and biases": (
        llama_biased_tied,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "bias": "all", **QUERY},
    ),
    "single tokens": (llama, {"trainable_token_indices": [5, 1], **QUERY}),
    "single tokens of both embeddings": (
        llama,
        {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}, **QUERY},
    ),
    "single tokens, tied": (llama_tied, {"trainable_token_indices": [1, 5], **QUERY}),
    "single tokens, tied and by name": (
        gpt2,
        {"trainable_token_indices": {"wte": [63, 0]}, "target_modules": ["c_attn"], **FAN},
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_are_folded_as_peft_folds_them(tmp_path, case):
    make, settings = VARIANTS[case]
    base = save(make(), tmp_path / "base")
    one = adapter(make(), tmp_path / "a", 1, str(base), **settings)
    merge_models([one], tmp_path / "ours", method="linear")
    assert_equal(weights(tmp_path / "ours"), weights(folded(base, one, tmp_path / "A")), 1e-5)


@pytest.mark.parametrize("case", ["DoRA", "whole norms and blocks", "single tokens"])
def test_merging_variants_equals_merging_the_folded_checkpoints(tmp_path, case):
    make, settings = VARIANTS[case]
    base = save(make(), tmp_path / "base")
    both = [
        adapter(make(), tmp_path / f"{seed}", seed, str(base), **(settings if seed == 1 else {})) for seed in (1, 2)
    ]
    merge_models(both, tmp_path / "ours", density=0.8)
    merge_models(
        [folded(base, one, tmp_path / f"{one.name}f") for one in both], tmp_path / "theirs", base=base, density=0.8
    )
    assert_equal(weights(tmp_path / "ours"), weights(tmp_path / "theirs"), 1e-5)


def test_a_bfloat16_base_is_merged_in_float32(tmp_path):
    base = save(llama(0), tmp_path / "base", torch.bfloat16)
    wide = save(llama(0).to(torch.bfloat16).float(), tmp_path / "wide")
    one = adapter(llama(0), tmp_path / "a", 1, str(base), use_dora=True, modules_to_save=["norm"])
    merge_models([one], tmp_path / "ours", method="linear")
    folded(wide, one, tmp_path / "A")
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "A")
    for name, tensor in theirs.items():
        # rounded once, at the end: a number in the middle may go either way
        torch.testing.assert_close(ours[name].float(), tensor, rtol=2**-8, atol=1e-6, msg=name)


# ---------------------------------------------------------------- refusals: never silently wrong


REFUSED_SETTINGS = {
    "pissa": (llama, {"init_lora_weights": "pissa"}, "initialised by pissa"),
    "olora": (llama, {"init_lora_weights": "olora"}, "initialised by olora"),
    "a bias that the base lacks": (llama, {"lora_bias": True, **QUERY}, r"q_proj.bias, which .* does not hold"),
    "one bias in two ways": (
        llama_biased,
        {"lora_bias": True, "bias": "lora_only", **QUERY},
        "in two ways at once",
    ),
    "one side of tied embeddings": (llama_tied, {"modules_to_save": ["lm_head"], **QUERY}, "ties to its other"),
    "the other side of tied embeddings": (
        llama_tied,
        {"modules_to_save": ["embed_tokens"], **QUERY},
        "ties to its other",
    ),
    "tied embeddings apart": (
        llama_tied,
        {"modules_to_save": ["embed_tokens", "lm_head"], **QUERY},
        "ties to its other",
    ),
    "tokens of tied embeddings apart": (
        llama_tied,
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, **QUERY},
        "ties to its other",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SETTINGS)
def test_variants_without_an_exact_difference_are_refused(tmp_path, case):
    make, settings, sentence = REFUSED_SETTINGS[case]
    base = save(make(), tmp_path / "base")
    one = adapter(make(), tmp_path / "a", 1, str(base), **settings)
    with pytest.raises(UserError, match=sentence) as caught:
        merge_models([one], tmp_path / "out", method="linear")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


DAMAGED = {
    "a magnitude is missing": (
        {"use_dora": True, **QUERY},
        lambda tensors: tensors.pop(first(tensors, "lora_magnitude_vector")),
        {},
        "lacks its DoRA magnitude",
    ),
    "a magnitude of another size": (
        {"use_dora": True, **QUERY},
        lambda tensors: tensors.update({first(tensors, "lora_magnitude_vector"): torch.ones(3)}),
        {},
        "magnitude of another size",
    ),
    "a magnitude without DoRA": (
        {"use_dora": True, **QUERY},
        lambda tensors: None,
        {"use_dora": False},
        "no LoRA factor",
    ),
    "another vocabulary": (
        {"modules_to_save": ["lm_head"], **QUERY},
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(70, 32)}),
        {},
        "as 70 × 32, but it is 64 × 32",
    ),
    "a module that the config does not name": (
        {"modules_to_save": ["norm"], **QUERY},
        lambda tensors: None,
        {"modules_to_save": None},
        "no LoRA factor",
    ),
    "tokens that the config does not count": (
        {"trainable_token_indices": [1, 2], **QUERY},
        lambda tensors: None,
        {"trainable_token_indices": [1]},
        "for 1 trainable_token_indices",
    ),
    "tokens beyond the vocabulary": (
        {"trainable_token_indices": [1, 2], **QUERY},
        lambda tensors: None,
        {"trainable_token_indices": [1, 64]},
        "tokens that .* does not have",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_variants_whose_file_and_config_disagree_are_refused(tmp_path, case):
    settings, change, config, sentence = DAMAGED[case]
    base = save(llama(0), tmp_path / "base")
    one = rewrite(adapter(llama(0), tmp_path / "a", 1, str(base), **settings), change)
    reconfigure(one / "adapter_config.json", **config)
    with pytest.raises(UserError, match=sentence) as caught:
        merge_models([one], tmp_path / "out", method="linear")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
