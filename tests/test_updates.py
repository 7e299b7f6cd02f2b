"""Where an update landed: sums per tensor against closed forms and plain arithmetic on whole state dicts."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.errors import UserError
from expunge.localize.masks import Mask
from expunge.merging.checkpoint import Checkpoint
from expunge.models.names import module_of
from expunge.pipeline.updates import measure_updates, write_updates
from expunge.recipe import ModelConfig
from expunge.report.update_record import TensorUpdate, Updates, read_updates
from merging_models import adapter, folded, gpt2, llama, moved, rewrite, save, weights

pytestmark = pytest.mark.usefixtures("quick_disk")

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def config(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(id=str(folder), **changes)


def by_name(updates: Updates) -> dict[str, TensorUpdate]:
    return {tensor.tensor: tensor for tensor in updates.tensors}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (UP, "mlp.up_proj"),
        ("model.layers.11.self_attn.q_proj.bias", "self_attn.q_proj"),
        ("model.layers.3.input_layernorm.weight", "input_layernorm"),
        ("model.layers.3.mlp.experts.17.down_proj.weight", "mlp.experts.down_proj"),
        ("model.layers.3.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
        ("model.layers.3.self_attn.sinks", "self_attn.sinks"),
        ("transformer.h.0.attn.c_attn.weight", "attn.c_attn"),
        ("h.0.mlp.c_fc.bias", "mlp.c_fc"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "lm_head"),
        ("weight", "weight"),
    ],
)
def test_the_module_of_a_parameter(name: str, module: str) -> None:
    assert module_of(name) == module


def test_an_update_of_known_size(tmp_path: Path) -> None:
    """Powers of two on zeros: every sum is exact."""
    base = llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
        changed = moved(base, 1, 0.0)
        base.get_parameter(UP).fill_(0.5)
        changed.get_parameter(UP).fill_(0.5)
        changed.get_parameter(UP)[3] = 0.75  # 32 elements by 1/4
        changed.get_parameter("model.embed_tokens.weight")[0, :8] = 2.0**-10
    before, after = save(base, tmp_path / "before"), save(changed, tmp_path / "after")
    updates = measure_updates(config(before), config(after))
    found = by_name(updates)
    assert list(found) == [name for name, _ in base.named_parameters()]
    size = base.get_parameter(UP).numel()
    assert found[UP] == TensorUpdate(
        tensor=UP, layer=1, module="mlp.up_proj", weights=size, energy=2.0, before=size / 4, changed=32
    )
    embedding = found["model.embed_tokens.weight"]
    assert (embedding.layer, embedding.energy, embedding.changed) == (None, 8 * 2.0**-20, 8)
    assert updates.energy == 2.0 + 8 * 2.0**-20
    assert updates.relative == math.sqrt(updates.energy / (size / 4))
    assert updates.changed == 40 / sum(parameter.numel() for parameter in base.parameters())
    assert (updates.inside, updates.masked, updates.changed_outside) == (None, None, 0)
    still = [tensor for tensor in found.values() if tensor not in (found[UP], embedding)]
    assert all(tensor.energy == tensor.changed == 0 for tensor in still)


def expected(before: Path, after: Path, dtype: torch.dtype) -> dict[str, tuple[float, float, int]]:
    """‖Δ‖², ‖θ‖² and changed elements from whole state dicts in float64."""
    old, new = weights(before), weights(after)
    pairs = {name: (old[name].to(dtype).double(), new[name].to(dtype).double()) for name in old}
    return {
        name: (float(((b - a) ** 2).sum()), float((a**2).sum()), int((a != b).sum())) for name, (a, b) in pairs.items()
    }


#: kind → (model, changes of it, dtype of the files, options of saving the changed one)
FULL: dict[str, tuple[Any, dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "float32": (llama, {}, torch.float32, {}),
    "tied": (llama, {"tied": True}, torch.float32, {}),
    "bfloat16": (llama, {}, torch.bfloat16, {}),
    "shards": (llama, {}, torch.float32, {"max_shard_size": "20KB"}),
    "gpt2": (gpt2, {}, torch.float32, {}),
    "biases": (llama, {"attention_bias": True, "mlp_bias": True}, torch.float32, {}),
}


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_checkpoints(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, settings, stored, options = FULL[kind]
    monkeypatch.setattr("expunge.pipeline.updates._CHUNK", 100)  # pieces that do not divide the tensors
    base = make(0, **settings)
    before, after = save(base, tmp_path / "before", stored), save(moved(base, 1), tmp_path / "after", stored, **options)
    found = by_name(measure_updates(config(before, dtype=dtype), config(after, dtype=dtype)))
    wanted = expected(before, after, getattr(torch, dtype))
    assert found.keys() == wanted.keys() == {name for name, _ in base.named_parameters()}
    for name, (energy, norm, changed) in wanted.items():
        tensor = found[name]
        assert tensor.energy == pytest.approx(energy, rel=1e-12), name
        assert tensor.before == pytest.approx(norm, rel=1e-12), name
        assert tensor.changed == changed, name
        assert energy > 0


def test_rounding_a_checkpoint_on_loading_is_no_update(tmp_path: Path) -> None:
    """A float32 target that is trained in bfloat16 and did not move."""
    base = llama()
    before, after = save(base, tmp_path / "before"), save(base, tmp_path / "after", torch.bfloat16)
    assert measure_updates(config(before, dtype="bfloat16"), config(after, dtype="bfloat16")).energy == 0
    assert measure_updates(config(before), config(after)).energy > 0  # in float32 the rounding shows


ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear": {},
    "one module": {"target_modules": ["down_proj"]},
    "whole module": {"modules_to_save": ["norm"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind: str, tmp_path: Path) -> None:
    """ΔW without a folded copy, against what PEFT folds."""
    before = save(llama(), tmp_path / "before")
    after = adapter(llama(), tmp_path / "adapter", 5, str(before), **ADAPTERS[kind])
    found = by_name(measure_updates(config(before), config(after)))
    wanted = expected(before, folded(before, after, tmp_path / "folded"), torch.float32)
    assert found.keys() == wanted.keys()
    for name, (energy, norm, changed) in wanted.items():
        assert found[name].energy == pytest.approx(energy, rel=1e-4), name
        assert found[name].before == pytest.approx(norm, rel=1e-12), name
        assert (found[name].changed == 0) == (changed == 0), name
    assert found[DOWN].energy
    assert found["model.embed_tokens.weight"].energy == 0


def test_an_adapter_on_another_model_counts_the_difference_of_the_bases_too(tmp_path: Path) -> None:
    base = llama()
    before, other = save(base, tmp_path / "before"), save(moved(base, 3), tmp_path / "other")
    after = adapter(moved(base, 3), tmp_path / "adapter", 5, str(other))
    whole = folded(other, after, tmp_path / "folded")
    wanted = expected(before, whole, torch.float32)
    for name, tensor in by_name(measure_updates(config(before), config(after))).items():
        assert tensor.energy == pytest.approx(wanted[name][0], rel=1e-4), name
    back = measure_updates(config(after), config(before))
    assert back.energy == pytest.approx(sum(energy for energy, _, _ in wanted.values()), rel=1e-4)
    norms = expected(whole, before, torch.float32)
    assert sum(t.before or 0 for t in back.tensors) == pytest.approx(sum(n for _, n, _ in norms.values()), rel=1e-6)


def test_what_no_stream_can_read_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle, and an adapter whose difference can't be said exactly."""
    import expunge.models.load

    monkeypatch.setattr(expunge.models.load, "load_tokenizer", lambda config: None)
    monkeypatch.setattr(expunge.models.load, "check_vocabulary", lambda *_: None)
    base = llama()
    before, after = save(base, tmp_path / "before"), save(moved(base, 1), tmp_path / "after")
    wanted = measure_updates(config(before), config(after))
    torch.save(weights(after), after / "pytorch_model.bin")
    (after / "model.safetensors").unlink()
    assert measure_updates(config(before), config(after, allow_pickle=True)) == wanted
    tuned = adapter(llama(), tmp_path / "adapter", 5, str(before))
    plain = measure_updates(config(before), config(tuned))
    monkeypatch.setattr("expunge.merging.adapters.Adapter.bind", _refused)
    loaded = measure_updates(config(before), config(tuned))
    assert loaded.energy == pytest.approx(plain.energy, rel=1e-4)


def _refused(*_: Any) -> None:
    raise UserError("it can't be merged exactly", "fold it")


def test_one_tensor_of_each_model_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    before, after = save(base, tmp_path / "before"), adapter(base, tmp_path / "adapter", 5, str(tmp_path / "before"))
    alive: dict[int, list[weakref.ref[torch.Tensor]]] = {}
    read = Checkpoint.read

    def watched(self: Checkpoint, name: str) -> torch.Tensor:
        assert not any(reference() is not None for reference in alive.get(id(self), []))
        tensor = read(self, name)
        alive.setdefault(id(self), []).append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    updates = measure_updates(config(before), config(after))
    assert sorted(len(references) for references in alive.values()) == [len(updates.tensors)] * 2


# ---------------------------------------------------------------- masks


def columns(*chosen: int) -> Mask:
    """Columns of a down_proj: value vectors."""
    bits = torch.zeros(1, 48, dtype=torch.bool)
    bits[0, list(chosen)] = True
    return Mask({DOWN: bits})


def test_what_lies_inside_a_mask(tmp_path: Path) -> None:
    base = llama()
    changed = moved(base, 1, 0.0)
    with torch.no_grad():
        changed.get_parameter(DOWN)[:, [2, 5]] += 0.25
    before, after = save(base, tmp_path / "before"), save(changed, tmp_path / "after")
    whole = measure_updates(config(before), config(after), columns(2, 5, 7))
    assert (whole.inside, whole.changed_outside) == (1.0, 0)
    total = sum(parameter.numel() for parameter in base.parameters())
    assert whole.masked == 3 * 32 / total
    inside = by_name(whole)[DOWN].inside
    assert inside is not None
    assert (inside.weights, inside.changed) == (96, 64)
    assert by_name(whole)[UP].inside is not None  # nothing of it is inside, and that is known
    half = measure_updates(config(before), config(after), columns(2))
    difference = (weights(after)[DOWN].double() - weights(before)[DOWN].double()).square()
    assert half.inside == pytest.approx(float(difference[:, 2].sum() / difference.sum()), rel=1e-12)
    assert half.changed_outside == 32
    assert measure_updates(config(before), config(before), columns(2)).inside is None


@pytest.mark.parametrize("shape", [(32, 48), (32, 1), (1, 48), (1, 1)])
def test_masks_broadcast_in_pieces(shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.pipeline.updates._CHUNK", 100)
    base = llama()
    before, after = save(base, tmp_path / "before"), save(moved(base, 1), tmp_path / "after")
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    tensor = by_name(measure_updates(config(before), config(after), Mask({DOWN: bits})))[DOWN]
    difference = (weights(after)[DOWN].double() - weights(before)[DOWN].double()).square()
    whole = bits.expand(32, 48)
    assert tensor.inside is not None
    assert tensor.inside.weights == int(whole.sum())
    assert tensor.inside.energy == pytest.approx(float(difference[whole].sum()), rel=1e-12)
    assert tensor.inside.changed == int((difference[whole] > 0).sum())


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Mask({"model.layers.9.mlp.down_proj.weight": torch.ones(1, 1).bool()}), "has no model.layers.9.mlp.down_proj"),
        (Mask({DOWN: torch.ones(1, 47).bool()}), r"has \(32, 48\) as the shape of model.layers.0.mlp.down_proj"),
    ],
)
def test_masks_of_another_model_are_refused(mask: Mask, words: str, tmp_path: Path) -> None:
    before = save(llama(), tmp_path / "before")
    with pytest.raises(UserError, match=words):
        measure_updates(config(before), config(before), mask)


# ---------------------------------------------------------------- what is not alike, and what is not finite


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "before has no tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "after has no tensor model.layers.1"),
        ({"intermediate_size": 64}, r"gate_proj.weight is \(48, 32\) in the target, but \(64, 32\) in the model"),
    ],
)
def test_models_that_are_not_alike(changes: dict[str, int], words: str, tmp_path: Path) -> None:
    before, after = save(llama(), tmp_path / "before"), save(llama(**changes), tmp_path / "after")
    with pytest.raises(UserError, match=words):
        measure_updates(config(before), config(after))
    write_updates(config(before), config(after), None, tmp_path / "run" / "updates" / "npo")
    found = read_updates(tmp_path / "run")["npo"]
    assert not found.tensors
    assert "tensor" in found.problem or "shape" in found.problem or "weight is" in found.problem


def test_weights_that_are_not_finite_stay_readable(tmp_path: Path) -> None:
    before, after = save(llama(), tmp_path / "before"), save(moved(llama(), 1), tmp_path / "after")
    rewrite(after, lambda tensors: tensors[DOWN][0].fill_(float("nan")))
    write_updates(config(before), config(after), columns(1), tmp_path / "run" / "updates" / "npo")
    found = read_updates(tmp_path / "run")["npo"]
    tensor = by_name(found)[DOWN]
    assert tensor.energy is None
    assert tensor.changed == tensor.weights
    assert math.isfinite(found.energy)
    assert found.energy > 0


# ---------------------------------------------------------------- a run


def run_on_tiny(folder: Path, **parts: Any) -> tuple[Any, dict[str, Any]]:
    """A run of two steps on made-up rows, and its recipe."""
    from expunge import api

    for name in ("forget", "retain"):
        rows = ({"question": f"{name} {index}: where?", "answer": f"In {index * 37} places."} for index in range(4))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain")}
    recipe = {"model": "tiny", "data": data, "evaluate": {"metrics": ["nll"], "generate": None}, **parts}
    return api.run(recipe, output=folder / "run", quiet=True), recipe


TWO_STEPS = {"max_steps": 2, "lr": 1e-3, "batch_size": 2, "precision": "float32", "weight_decay": 0.1}


def test_a_run_says_where_its_updates_landed(tmp_path: Path) -> None:
    """Adapters, their merge, and nothing twice; a run without records has a page all the same."""
    from expunge import api
    from expunge.report.build import build_report

    entry = {"method": "npo", "train": TWO_STEPS, "lora": {"rank": 2, "targets": ["down_proj"]}}
    unlearn = [{**entry, "name": "one"}, {**entry, "name": "two", "seed": 7}]
    result, recipe = run_on_tiny(tmp_path, unlearn=unlearn, merge={"method": "linear"})
    found = read_updates(result.path)
    assert list(found) == ["merged", "one", "two"]
    for name, updates in found.items():
        own = [tensor.tensor for tensor in updates.tensors if tensor.changed]
        assert own == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)], name
    whole = measure_updates(ModelConfig(id="tiny"), config(result.model))
    assert whole.energy == found["merged"].energy
    assert "Where the update landed" in result.report.read_text(encoding="utf-8")
    assert api.run(recipe, output=tmp_path / "run", quiet=True).skipped_all
    shutil.rmtree(result.path / "updates")
    html = build_report(result.path).read_text(encoding="utf-8")
    assert "Where the update landed was not recorded." in html


def test_a_run_inside_a_mask_says_that_it_stayed_there(tmp_path: Path) -> None:
    localize = {"by": "random", "unit": "value_vector", "density": 0.25}
    result, _ = run_on_tiny(tmp_path, unlearn=[{"method": "npo", "train": TWO_STEPS}], localize=localize)
    (updates,) = read_updates(result.path).values()
    assert (updates.inside, updates.changed_outside) == (1.0, 0)
    weights_of_value_vectors = sum(t.weights for t in updates.tensors if t.module == "mlp.down_proj")
    total = sum(tensor.weights for tensor in updates.tensors)
    assert updates.masked == pytest.approx(0.25 * weights_of_value_vectors / total)
    assert updates.changed == pytest.approx(updates.masked, rel=0.05)  # all of them moved, or nearly
    html = result.report.read_text(encoding="utf-8")
    assert "of the weights: none outside it changed." in html
