"""Mixing two models in place: no drift, no copy, and what is mixed is what is written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.errors import UserError
from expunge.models.drift import open_tensors
from expunge.models.load import load_model
from expunge.models.mixture import Mixture, ScaledAdapter, mixed_in_memory
from expunge.pipeline.calibrate import (
    both,
    mixture_of,
)
from expunge.pipeline.calibration_folder import write_mixed
from expunge.recipe import ModelConfig
from expunge.scoring.scores import score
from merging_models import adapter, llama, moved, rewrite, save, weights
from scoring_rows import random_rows

pytestmark = pytest.mark.usefixtures("quick_disk")

ALPHAS = (0.0, 0.01, 0.25, 0.5, 0.731, 0.99, 1.0)


# ---------------------------------------------------------------- from files


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_bits(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Target and unlearned model, of which one tensor in three was trained: by kind of checkpoint."""
    root = tmp_path_factory.mktemp("pairs")

    def parted(seed: int = 1, **settings):
        base = llama(0, **settings)
        changed = moved(base, seed)
        with torch.no_grad():
            for number, (one, two) in enumerate(zip(base.parameters(), changed.parameters(), strict=True)):
                if number % 3:
                    two.copy_(one)
        return base, changed

    made = {}
    for kind, tied, dtype, options in [
        ("float32", False, torch.float32, {}),
        ("tied", True, torch.float32, {}),
        ("bfloat16", True, torch.bfloat16, {}),
        ("shards", False, torch.float32, {"max_shard_size": "20KB"}),
    ]:
        base, changed = parted(tied=tied)
        made[kind] = (
            save(base, root / kind / "target", dtype, **options),
            save(changed, root / kind / "unlearned", dtype),
        )
    # float32 training of a bfloat16 target, and adapters on targets of either kind
    made["mixed"] = (made["bfloat16"][0], save(parted(tied=True)[1], root / "mixed"))
    for kind in ("float32", "bfloat16"):
        target = made[kind][0]
        made[f"adapter-{kind}"] = (target, adapter(llama(0), root / f"adapter-{kind}", 5, str(target)))
    target, settings = made["float32"][0], {"use_dora": True, "modules_to_save": ["norm"]}
    made["adapter-dora"] = (target, adapter(llama(0), root / "adapter-dora", 5, str(target), **settings))
    return made


KINDS = ["float32", "tied", "bfloat16", "shards", "mixed", "adapter-float32", "adapter-bfloat16", "adapter-dora"]


def configs(pair: tuple[Path, Path]) -> tuple[ModelConfig, ModelConfig]:
    return ModelConfig(id=str(pair[0])), ModelConfig(id=str(pair[1]))


@pytest.fixture(autouse=True)
def no_tokenizers(monkeypatch, request):
    """The folders of the mixing tests hold weights alone."""
    if "pairs" in request.fixturenames:
        import expunge.models.load

        monkeypatch.setattr(expunge.models.load, "load_tokenizer", lambda config: None)
        monkeypatch.setattr(expunge.models.load, "check_vocabulary", lambda *_: None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mixed_is_what_is_written(pairs, kind, tmp_path):
    target, unlearned = configs(pairs[kind])
    with both(target, unlearned) as opened:
        mixture = mixture_of(opened, target, "float32")
        for alpha in ALPHAS[1:]:
            mixture.set(alpha)
            write_mixed(opened, alpha, tmp_path / "out")
            state = mixture.model.state_dict()
            for name, value in weights(tmp_path / "out").items():
                assert torch.equal(state[name], value.float()), (alpha, name)


@pytest.mark.parametrize("kind", KINDS)
def test_no_earlier_alpha_leaves_a_trace(pairs, kind):
    target, unlearned = configs(pairs[kind])
    with both(target, unlearned) as opened:
        mixture = mixture_of(opened, target, "float32")
        assert_bits(bits(mixture.model), bits(load_model(target).model))
        first = {}
        for alpha in ALPHAS:
            mixture.set(alpha)
            first[alpha] = bits(mixture.model)
        draw = random.Random(0)
        for alpha in draw.choices(ALPHAS, k=20):
            mixture.set(alpha)
            assert_bits(bits(mixture.model), first[alpha])
        assert_bits(first[0.0], bits(load_model(target).model))
        if not kind.startswith("adapter"):
            assert_bits(first[1.0], bits(load_model(unlearned).model))
        start, half = weights(pairs[kind][0]), first[0.5]
        alike = [name for name, value in start.items() if torch.equal(first[1.0][name], value.float())]
        assert alike
        for name in alike:
            assert torch.equal(half[name], start[name].float()), name
        if kind == "tied":
            inner: Any = mixture.model
            assert inner.lm_head.weight.data_ptr() == inner.model.embed_tokens.weight.data_ptr()


def test_a_mixture_is_the_weighted_mean(pairs):
    target, unlearned = configs(pairs["float32"])
    with both(target, unlearned) as opened:
        mixture = mixture_of(opened, target, "float32")
        mixture.set(0.3)
        one, two = weights(pairs["float32"][0]), weights(pairs["float32"][1])
        for name, value in mixture.model.state_dict().items():
            torch.testing.assert_close(value, 0.7 * one[name] + 0.3 * two[name], rtol=1e-6, atol=1e-7)


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_one_model_and_one_tensor(tmp_path, monkeypatch):
    import expunge.models.load

    monkeypatch.setattr(expunge.models.load, "load_tokenizer", lambda config: None)
    monkeypatch.setattr(expunge.models.load, "check_vocabulary", lambda *_: None)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 4096}
    base = llama(0, tied=True, **shape)
    size = sum(value.numel() * 4 for value in base.parameters())
    largest = max(value.numel() * 4 for value in base.parameters())
    target, unlearned = configs((save(base, tmp_path / "t"), save(moved(base, 1), tmp_path / "u")))
    del base
    before = anonymous()
    with both(target, unlearned) as opened:
        mixture = mixture_of(opened, target, "float32")
        grown = []
        for alpha in (1.0, 0.5, 0.25, 0.75, 0.0, 0.125, 0.375, 0.625):
            mixture.set(alpha)
            grown.append(anonymous() - before)
    assert max(grown) < size + 2 * largest + (8 << 20)


# ---------------------------------------------------------------- mixing in memory


def test_a_model_in_memory_is_as_it_was(pairs):
    target, unlearned = configs(pairs["mixed"])
    model = load_model(unlearned).model
    before = bits(model)
    tensors = open_tensors(target)
    with mixed_in_memory(model, tensors) as mixture:
        mixture.set(0.0)
        assert_bits(bits(model), bits(load_model(target).model))
        mixture.set(0.4)
        once = bits(model)
        mixture.set(1.0)
        mixture.set(0.4)
        assert_bits(bits(model), once)
    assert_bits(bits(model), before)
    with pytest.raises(ValueError, match="finite"), mixed_in_memory(model, tensors) as mixture:
        mixture.set(float("nan"))
    assert_bits(bits(model), before)


def test_adapters_are_scaled(pairs):
    target, unlearned = configs(pairs["adapter-float32"])
    rows = [row for row in random_rows(6, longest=12) if row.input_ids.max() >= 0]
    for row in rows:
        row.input_ids[:] %= 64
    model = load_model(unlearned).model
    before = score(model, rows, batch_size=4)
    with both(target, unlearned) as opened, mixed_in_memory(model, open_tensors(target)) as scaled:
        assert isinstance(scaled, ScaledAdapter)
        folded = mixture_of(opened, target, "float32")
        for alpha in ALPHAS:
            scaled.set(alpha)
            folded.set(alpha)
            one, two = (
                score(found.model, rows, batch_size=4).column("logprob").combine_chunks().flatten()
                for found in (scaled, folded)
            )
            np.testing.assert_allclose(one, two, atol=2e-5)
    assert score(model, rows, batch_size=4).equals(before)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_adapters_in_memory_that_are_not_proportional_are_refused(settings, pairs, tmp_path):
    target, _ = configs(pairs["float32"])
    place = adapter(llama(0), tmp_path / "a", 1, target.id, **settings)
    with pytest.raises(UserError, match="not proportional"):
        ScaledAdapter(load_model(ModelConfig(id=str(place))).model)


def test_broken_weights_are_named(pairs, tmp_path):
    target, _ = configs(pairs["float32"])
    place = shutil.copytree(pairs["float32"][1], tmp_path / "broken")
    rewrite(place, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with both(target, ModelConfig(id=str(place))) as opened:
        mixture = mixture_of(opened, target, "float32")
        with pytest.raises(UserError, match=r"model.norm.weight of the unlearned model holds NaN"):
            mixture.set(0.5)


def test_parameters_that_the_files_call_otherwise_are_refused(pairs):
    target, unlearned = configs(pairs["float32"])
    with both(target, unlearned) as opened:
        mixture = mixture_of(opened, target, "float32")
    line = mixture.line
    fewer = type(line)(line.names[:-1], line.target, line.delta)
    with pytest.raises(UserError, match="under that name"):
        Mixture(mixture.model, fewer)
