"""What goes with a mask: adapters, patterns, recipes, a reset to another model, and the baseline of going on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.localize.masks import Mask
from expunge.models import drift
from expunge.models.load import load_model, load_tokenizer
from expunge.models.tiny import build_tiny, write_tiny
from expunge.pipeline import training
from expunge.pipeline.entries import unlearn_job
from expunge.pipeline.job import Job, check_terms, prepare_parameters
from expunge.pipeline.masked import adapter_targets, check_reset
from expunge.pipeline.preflight import check_job
from expunge.pipeline.resolve import resolve
from expunge.pipeline.stages import job_inputs
from expunge.recipe import LocalizeConfig, LoraConfig, ModelConfig, load_recipe
from merging_models import gpt2
from test_unlearn_entries import recipe
from training_jobs import FORGET, QUICK, RETAIN, TINY, job, run
from training_masks import DOWN, UP, changed, mask_of, random_mask, shapes, unchanged, weights


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Each training ends in a collection of garbage, which would look at every imported module again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# adapters


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("unit", ["module", "layer"])
def test_adapters_go_on_exactly_the_modules_of_the_mask(unit: str, tmp_path: Path) -> None:
    names = [UP, DOWN] if unit == "module" else [name for name in shapes() if "layers.1." in name]
    made = job("npo", lora=LoraConfig(rank=4), mask=mask_of(*names))
    model = prepare_parameters(build_tiny()[0], made)
    linear = {name.removesuffix(".weight") for name in names if "_proj" in name}
    assert adapted(model) == {f"base_model.model.{name}" for name in linear}
    _, after = run(made, tmp_path)
    assert changed(weights(TINY), after) == {f"{name}.weight" for name in linear}


def test_adapters_on_matrices_that_are_stored_the_other_way_round() -> None:
    model = gpt2()
    name = "transformer.h.1.mlp.c_proj"
    inside = {f"{name}.{part}": torch.ones([1] * ndim, dtype=torch.bool) for part, ndim in (("weight", 2), ("bias", 1))}
    assert adapter_targets(model, Mask(inside)) == [name]
    adapters = prepare_parameters(model, job("npo", lora=LoraConfig(rank=2), mask=Mask(inside)))
    assert adapted(adapters) == {f"base_model.model.{name}"}


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ({DOWN: torch.arange(384)[None] < 9}, "the mask holds a part of model.layers.1.mlp.down_proj.weight"),
        ({UP: torch.ones(1, 1).bool(), DOWN: torch.eye(128, 384).bool()}, "the mask holds a part of"),
        ({"model.norm.weight": torch.ones(1).bool()}, "the mask holds no linear module"),
    ],
)
def test_adapters_on_parts_of_modules_are_refused(inside: dict[str, Tensor], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        check_job(job("npo", lora=LoraConfig(rank=4), mask=Mask(inside)), TINY)
    assert "module or layer" in error.value.hint


# what is trained, and what is refused


def test_patterns_and_mask_both_count(tmp_path: Path) -> None:
    mask = random_mask()
    for changes, name in (({"trainable": [r"\.1\."]}, "npo"), ({}, "rmu")):
        made = job(name, mask=mask, **changes)
        model = prepare_parameters(build_tiny()[0], made)
        trained = {entry for entry, parameter in model.named_parameters() if parameter.requires_grad}
        wanted = {entry for entry, inside in mask.inside.items() if inside.any()}
        assert trained == {entry for entry in wanted if (".1." if changes else "down_proj") in entry}


LOWER = "model.layers.0.mlp.up_proj.weight"
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "trainable": ("npo", {"mask": mask_of(UP), "trainable": ["down_proj"]}, "matches `trainable`: down_proj", "leave"),
    "own patterns": ("rmu", {"mask": mask_of(UP)}, "method rmu trains .*nothing of that is inside", "trainable=.[.]"),
    "unreached": ("rmu", {"mask": mask_of(UP), "trainable": ["."], "objective": 0}, "lies above", "layer=1"),
    "another model": ("npo", {"mask": Mask({"a.weight": torch.ones(1, 1).bool()})}, "another model", "localize"),
    "another shape": ("npo", {"mask": Mask({DOWN: torch.ones(1, 7).bool()})}, "as the shape of", "localize"),
    "empty": ("npo", {"mask": Mask({DOWN: torch.zeros(1, 1).bool()})}, "the mask is empty", "density"),
    "targets": (
        "npo",
        {"mask": mask_of(UP), "lora": LoraConfig(targets=["up_proj"])},
        "so does lora.targets",
        "leave lora.targets out",
    ),
    "reset of adapters": ("npo", {"reset": TINY, "lora": LoraConfig()}, "which adapters don't hold", "leave `lora`"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("when", ["before a weight is read", "in training"])
def test_mistakes_get_one_sentence_before_the_first_step(case: str, when: str, tmp_path: Path) -> None:
    name, changes, says, hint = REFUSED[case]
    if "objective" in changes:
        from expunge.methods.base import build_objective

        changes = {**changes, "objective": build_objective(name, {"layer": changes["objective"]})}
    made = job(name, **changes)
    with pytest.raises(UserError, match=says) as error:
        check_job(made, TINY) if when == "before a weight is read" else training.train(made, tmp_path)
    assert hint.replace(".[", "[") in error.value.hint


def test_sharded_training_refuses_a_mask_unless_it_only_places_adapters() -> None:
    for kind in ("FSDP", "DEEPSPEED"):
        with pytest.raises(UserError, match="a mask needs whole parameters"):
            training._check_sharding(job("npo", mask=mask_of(UP)), kind)
        training._check_sharding(job("npo", mask=mask_of(UP), lora=LoraConfig()), kind)
    training._check_sharding(job("npo", mask=mask_of(UP)), "MULTI_GPU")


def test_a_stage_depends_on_mask_and_reset(tmp_path: Path) -> None:
    plain, other = job("npo"), str(write_tiny(tmp_path / "other", seed=5))
    found = [
        plain,
        replace(plain, mask=random_mask()),
        replace(plain, mask=random_mask(seed=1)),
        replace(plain, reset=TINY),
        replace(plain, reset=ModelConfig(id=other)),
    ]
    inputs = [job_inputs(made) for made in found]
    assert all(one != two for place, one in enumerate(inputs) for two in inputs[:place])
    assert not {"mask", "reset"} & inputs[0].keys(), "runs without them keep their digests"
    assert job_inputs(replace(plain, mask=random_mask())) == inputs[1]


REFUSED_RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "adapters": ({"unit": "value_vector"}, {"lora": 4}, "localize.unit: value_vector is less"),
    "patterns": ({"unit": "value_vector"}, {"trainable": ["q_proj"]}, "nothing inside the mask matches"),
    "own patterns": ({"unit": "head"}, {"method": "rmu", "parameters": {"layer": 1}}, "nothing of that is inside"),
}


@pytest.mark.parametrize("case", REFUSED_RECIPES)
def test_recipes_are_refused_before_the_mask_is_made(case: str, tmp_path: Path) -> None:
    localize, entry, says = REFUSED_RECIPES[case]
    made = recipe(tmp_path, **entry).model_copy(update={"localize": LocalizeConfig(by="magnitude", **localize)})
    with pytest.raises(UserError, match=says):
        resolve(made)


def test_an_entry_hands_mask_and_reset_to_its_job(tmp_path: Path) -> None:
    made = recipe(tmp_path, method="finetune", reset="tiny")
    resolved = resolve(made.model_copy(update={"localize": LocalizeConfig(by="magnitude")}))
    entry, mask = made.unlearn[0], random_mask()
    found = unlearn_job(resolved, entry, TINY, mask=mask)
    assert found.mask is mask
    assert found.reset == TINY
    assert found.plan().rows("forget", "forget_alternatives") == []


# reset


#: A step that moves no weight by more than 1e-29.
NOTHING_LEARNT = QUICK.model_copy(update={"max_steps": 1, "lr": 1e-30, "weight_decay": 0.0})
RESETS: dict[str, dict[str, Any]] = {
    "all": {},
    "inside": {"mask": random_mask()},
    "patterns": {"trainable": ["down_proj"]},
    "both": {"mask": random_mask(), "trainable": ["_proj"]},
}


@pytest.mark.parametrize(("case", "name"), [*((case, "finetune") for case in RESETS), ("both", "task_negation")])
def test_reset_puts_the_other_models_weights_inside(
    case: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ModelConfig(id=str(write_tiny(tmp_path / "other", seed=5)))
    monkeypatch.setattr(drift, "load_model", None)  # it is read tensor by tensor
    made = job(name, reset=other, train=NOTHING_LEARNT, **RESETS[case])
    check_job(made, TINY)
    _, after = run(made, tmp_path / "run")
    before, wanted = weights(TINY), weights(other)
    model = prepare_parameters(build_tiny()[0], made)
    trained = {entry for entry, parameter in model.named_parameters() if parameter.requires_grad}
    for entry, start in before.items():
        inside = torch.zeros(()).bool() if entry not in trained else torch.ones(()).bool()
        if made.mask is not None and entry in trained:
            inside = made.mask.inside[entry]
        torch.testing.assert_close(after[entry], torch.where(inside, wanted[entry], start), rtol=0, atol=1e-20)
        assert (unchanged(start, after[entry]) | inside).all(), entry
    moved = changed(before, after)
    assert moved == {entry for entry in trained if "norm" not in entry}, "norms are 1 in both"


def test_reset_reads_adapters_and_then_training_goes_on(tmp_path: Path) -> None:
    training.train(job("npo", lora=LoraConfig(rank=4)), tmp_path / "adapter")
    adapter = ModelConfig(id=str(tmp_path / "adapter" / "out"))
    folded: Any = load_model(adapter).model
    wanted = dict(folded.merge_and_unload().named_parameters())
    made = job("finetune", reset=adapter, mask=mask_of(DOWN), train=NOTHING_LEARNT)
    _, after = run(made, tmp_path / "run")
    torch.testing.assert_close(after[DOWN], wanted[DOWN].detach(), rtol=1e-6, atol=1e-8)
    assert changed(weights(TINY), after) == {DOWN}
    _, learnt = run(replace(made, train=QUICK), tmp_path / "learnt")
    assert not torch.equal(learnt[DOWN], after[DOWN])
    assert changed(weights(TINY), learnt) == {DOWN}


def narrower(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    given = build_tiny()[0].config.to_dict() | {"intermediate_size": 256}
    LlamaForCausalLM(LlamaConfig(**given)).save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)
    return str(folder)


def other_family(folder: Path) -> str:
    gpt2().save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("make", "says"),
    [(narrower, r"\(128, 384\) in the model to train, but \(128, 256\) in"), (other_family, "but no such tensor in")],
)
def test_reset_needs_the_same_architecture(make: Callable[[Path], str], says: str, tmp_path: Path) -> None:
    made = job("finetune", reset=ModelConfig(id=make(tmp_path / "other")), mask=mask_of(DOWN))
    for attempt in (lambda: check_job(made, TINY), lambda: training.train(made, tmp_path / "run")):
        with pytest.raises(UserError, match=says) as error:
            attempt()
        assert "base before fine-tuning" in error.value.hint
    same = job("finetune", reset=made.reset, mask=mask_of("model.norm.weight"))
    if make is narrower:  # what is not trained may differ
        assert made.reset is not None
        check_reset(prepare_parameters(build_tiny()[0], same), made.reset)


# the baseline


def test_finetune_makes_the_steps_of_fine_tuning_on_the_retain_rows(tmp_path: Path) -> None:
    plain = Job(TINY, RETAIN, QUICK, 7)
    curve, wanted = run(plain, tmp_path / "plain")
    same, after = run(job("finetune"), tmp_path / "finetune")
    assert [step["loss"] for step in same] == [step["loss"] for step in curve]
    assert all(torch.equal(wanted[name], after[name]) for name in wanted)
    other = job("finetune", forget=FORGET[::-1])
    assert run(other, tmp_path / "other")[0] == same, "forget rows are only counted"


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_finetune_has_as_many_steps_as_other_objectives(accumulation: int) -> None:
    settings = QUICK.model_copy(update={"max_steps": None, "epochs": 3, "batch_size": 3, "accumulation": accumulation})
    plan, other = (job(name, train=settings).plan() for name in ("finetune", "grad_diff"))
    assert plan.steps == other.steps == 8
    for mine, theirs in zip(plan.micro_batches, other.micro_batches, strict=True):
        assert mine.rows["forget"] == ()
        assert mine.totals.rows["retain"] == theirs.totals.rows["retain"] == 3
        assert mine.rows["retain"], "no part of a step is empty"
        assert mine.totals.epoch == theirs.totals.epoch
    with pytest.raises(UserError, match="a step of 3 rows can't be split into 4 parts"):
        job("finetune", train=settings.model_copy(update={"accumulation": 4})).plan()


def test_check_terms_lets_masks_through() -> None:
    check_terms(job("npo", mask=random_mask(), reset=TINY))


def test_original_is_the_model_before_it_was_taught(tmp_path: Path) -> None:
    tree = recipe(tmp_path, method="finetune").model_dump(mode="json")
    tree["unlearn"][0]["reset"] = "original"
    with pytest.raises(UserError, match="there is no 'original' model here"):
        load_recipe(tree)
    tree["prepare"] = {}
    resolved = resolve(load_recipe(tree))
    (entry,) = resolved.recipe.unlearn
    assert unlearn_job(resolved, entry, resolved.recipe.model).reset == resolved.recipe.model
