"""`expunge localize`, and the stage of the same name: what is chosen, written, taken up by unlearning, and refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from broken_inputs import people, write_rows
from expunge import api
from expunge.cli.app import main
from expunge.errors import UserError
from expunge.localize.base import ATTRIBUTIONS
from expunge.localize.locate import read_scores
from expunge.localize.masks import Mask, read_mask
from expunge.models.load import load_model, model_digest
from expunge.models.tiny import write_tiny
from expunge.pipeline import localize as localizing
from expunge.pipeline.localize_check import check_mask_of
from expunge.recipe import ModelConfig, dump_yaml, load_recipe
from expunge.report.localization_page import localization_document, write_localization_page
from expunge.report.localization_record import Agreement, Localization, Place, Rows, beside, read_localization
from localize_models import architecture
from merging_models import adapter, rewrite
from report_checks import check_figures, check_page

pytestmark = pytest.mark.usefixtures("quick_disk")

EVIL = "<script>alert(1)</script>]]>&\"'\u202e"
L = "localize whole --forget f.jsonl --retain r.jsonl -o new/m.safetensors "
N = "localize whole -o new/m.safetensors "
U = "unlearn --model whole --forget f.jsonl --retain r.jsonl -o new --set unlearn.0.train.max_steps=2 "

#: the command, what the sentence holds, what the hint holds
CASES: dict[str, tuple[str, str, str]] = {
    "density 0": (L + "--density 0", "localize.density: Input should be greater than 0", "init"),
    "density 1.5": (L + "--density 1.5", "localize.density: Input should be less than or equal to 1", "init"),
    "density of nothing": (L + "--density nan", "localize.density", "init"),
    "limit 0": (L + "--limit 0", "localize.limit: Input should be greater than 0", "init"),
    "unknown unit": (L + "--unit vector", "localize.unit: Input should be 'weight', 'value_vector'", "init"),
    "unknown strata": (L + "--strata row", "localize.strata: Input should be 'model', 'layer'", "init"),
    "unknown attribution": (L + "--by wagel", "unknown attribution 'wagel'", "did you mean 'wagle'?"),
    "unknown setting": (L + "--set localize.parameters.muu=1", "wagle has no parameter 'muu'", "'mu'"),
    "setting out of range": (L + "--set localize.parameters.mu=-1", "mu: Input should be", "list attributions wagle"),
    "a field of no use": (L + "--set unlearn.0.method=npo", "a localization has no use for it", "localize.*"),
    "unknown field": (L + "--set localize.densty=0.1", "localize.densty: unknown key", "did you mean 'density'?"),
    "a unit it can't see": (L + "--by activations --unit layer", "activations can't tell", "units of activations"),
    "no forget rows": (N + "--by gradient", "gradient reads the forget rows", "--forget"),
    "no retain rows": (N + "--forget f.jsonl", "wagle reads the retain rows", "--retain"),
    "no region": (N + "--by oracle", "oracle reads a region", "--against"),
    "missing rows": (L.replace("f.jsonl", "ff.jsonl"), "ff.jsonl: no such file", "'f.jsonl'"),
    "a benchmark and rows": (L + "--benchmark fictitious", "either `benchmark` or", "init"),
    "no such region": (L + "--against x.safetensors", "no mask at x.safetensors", "expunge localize"),
    "a region that is none": (L + "--against whole/model.safetensors", "is no mask", "expunge localize"),
    "a region of other shapes": (L + "--against wider.safetensors", "mask is of another model", "expunge localize"),
    "a unit the model lacks": (
        "localize experts --by random --unit value_vector -o new/m.safetensors",
        "MixtralForCausalLM has no units of the kind value_vector",
        "units of this model: ",
    ),
    "no such model": (N.replace("whole", "./nowhere") + "--by random", "no model at ./nowhere", "alias"),
    "an adapter": (N.replace("whole", "adapter") + "--by random", "adapter is an adapter", "expunge merge adapter"),
    "a mask where one is made": (
        L + "--by random --set localize.mask=old.safetensors",
        "leave out by",
        "init",
    ),
    "only a mask": (N + "--set localize.mask=old.safetensors", "here one is made", "leave it out"),
    "output: no name of a mask": (N.replace("m.safetensors", "m.bin") + "--by random", "no name of a mask", "-o mask"),
    "output: a folder": ("localize whole --by random -o whole.safetensors", "is a folder", "name a file in it"),
    "output: in the model": ("localize whole --by random -o whole/m.safetensors", "the folder of the model", "-o"),
    "output: weights": ("localize whole --by random -o other/model.safetensors", "and is no mask", "-o"),
    "output: below a file": ("localize whole --by random -o f.jsonl/m.safetensors", "f.jsonl is a file", "-o"),
    "output: its record": ("localize whole --by random -o other/config.safetensors", "config.json is there", "-o"),
    "unlearn: another model's mask": (U + "--mask old.safetensors --model other", "its digest differs", "localize"),
    "unlearn: no such mask": (U + "--mask x.safetensors", "no mask at x.safetensors", "expunge localize"),
    "unlearn: other shapes": (U + "--mask wider.safetensors", "mask is of another model", "localize"),
    "unlearn: both": (U + "--mask old.safetensors --set localize.by=random", "leave out by", "init"),
    "unlearn: unknown": (U + "--set localize.by=wagel", "unknown attribution 'wagel'", "'wagle'"),
    "unlearn: setting": (U + "--set localize.parameters.muu=1", "no parameter 'muu'", "'mu'"),
    "unlearn: no retain": (
        U.replace("--retain r.jsonl ", "") + "--set localize.by=wagle --method grad_ascent",
        "wagle reads the retain rows",
        "--retain",
    ),
    "unlearn: unit": (
        U.replace("whole", "experts") + "--set localize.by=gradient",
        "has no units of the kind",
        "units",
    ),
    "eval": ("eval whole --forget f.jsonl --set localize.by=wagle", "an evaluation has no use for it", "evaluate.*"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models of other weights, one without value vectors, an adapter, rows, and masks."""
    root = tmp_path_factory.mktemp("world")
    write_rows(root / "f.jsonl", people(3, "Anna"))
    write_rows(root / "r.jsonl", people(4, "Bert"))
    write_tiny(root / "whole")
    shutil.copytree(root / "whole", root / "other")
    rewrite(root / "other", lambda tensors: tensors["model.norm.weight"].add_(1))
    tokenizer = AutoTokenizer.from_pretrained(root / "whole")
    architecture("Mixtral", vocab_size=len(tokenizer)).save_pretrained(root / "experts")
    tokenizer.save_pretrained(root / "experts")
    loaded: Any = load_model(ModelConfig(id=str(root / "whole"))).model
    adapter(loaded, root / "adapter", 0, str(root / "whole"))
    (root / "whole.safetensors").mkdir()
    api.localize(str(root / "whole"), output=root / "old.safetensors", by="random", quiet=True)
    inside = {"model.layers.0.mlp.down_proj.weight": torch.ones(1, 7, dtype=torch.bool)}
    Mask(inside).write(root / "wider.safetensors")
    return root


@pytest.mark.parametrize("case", CASES)
def test_every_mistake_is_one_sentence(
    case: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, sentence, hint = CASES[case]
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith(("error:", "hint:", "Traceback"))]
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], said.err
    assert sentence in lines[0]
    assert hint in lines[1]
    assert sorted(world.rglob("*")) == before, "nothing is written"


# ---------------------------------------------------------------- what is written

#: attribution → a unit that it sees, where that is not the value vector
UNITS = {"layer_gradient_norm": "layer", "wagle": "weight", "del": "module", "fisher": "module", "gradient": "neuron"}


@pytest.mark.parametrize("name", ATTRIBUTIONS.names())
def test_every_attribution_writes_mask_scores_record_and_page(name: str, world: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "m.safetensors"
    rows = {"forget": str(world / "f.jsonl"), "retain": str(world / "r.jsonl")}
    unit, region = UNITS.get(name, "value_vector"), str(world / "old.safetensors")
    density = 0.1 if name == "oracle" else 0.25  # it stays inside the region, which holds a tenth
    given: dict[str, Any] = {"by": name, "unit": unit, "density": density, "against": region}
    found = api.localize(str(world / "whole"), output=output, **rows, **given, quiet=True)
    names = ["m.html", "m.json", "m.safetensors", "m.scores.safetensors"]
    assert sorted(file.name for file in output.parent.iterdir()) == names
    mask = read_mask(output)
    model = load_model(ModelConfig(id=str(world / "whole"))).model
    assert (found.inside, found.weights) == mask.weights(model)
    assert found.chosen == max(1, round(density * found.units))
    assert found == read_localization(output.with_suffix(".json"))
    assert found.mask_digest == mask.digest
    about = mask.about
    assert about["model"] == model_digest(world / "whole") == found.model_digest
    assert (about["by"], about["unit"], about["density"], about["seed"]) == (name, unit, density, 42)
    assert (about["units"], about["chosen"]) == (found.units, found.chosen)
    assert set(about["rows"]) == set(found.rows) == set(ATTRIBUTIONS.get(name).about.needs) - {"region"}
    scores = read_scores(beside(output)["scores"])
    assert sum(values.numel() for values in scores.values()) == found.units
    assert max(place.highest or 0.0 for place in found.places) == pytest.approx(
        max(float(values.max()) for values in scores.values())
    )
    html = beside(output)["page"].read_text(encoding="utf-8")
    check_page(html)
    assert len(check_figures(html)) >= 1
    assert "Against the known region" in html
    check_mask_of(mask, model_digest(world / "whole"), "m")


def compare(world: Path, output: Path, by: str, **given: Any) -> Agreement:
    found = api.localize(
        str(world / "whole"), output=output, by=by, against=str(world / "old.safetensors"), quiet=True, **given
    )
    assert found.against is not None
    return found.against


def test_the_region_is_found_by_the_oracle_and_missed_by_its_complement(world: Path, tmp_path: Path) -> None:
    oracle = compare(world, tmp_path / "o.safetensors", "oracle")
    assert (oracle.precision, oracle.recall, oracle.overlap, oracle.auc) == (1, 1, 1, 1)
    assert oracle.units == read_mask(world / "old.safetensors").about["chosen"]
    assert oracle.chance == pytest.approx(77 / 768)
    missed = compare(world, tmp_path / "c.safetensors", "complement")
    assert (missed.precision, missed.recall, missed.overlap, missed.auc) == (0, 0, 0, 0)
    assert read_mask(tmp_path / "o.safetensors").digest == read_mask(world / "old.safetensors").digest


def test_the_command_says_what_it_found_and_json_is_pure(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    given = ["--by", "gradient_times_weight", "--strata", "layer", "--limit", "2", "--seed", "7"]
    given += ["--against", "old.safetensors", "--set", "localize.batch_size=3"]
    command = ["localize", "whole", "--forget", "f.jsonl", "-o", str(tmp_path / "m.safetensors"), *given]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "76 value vectors of 768" in shown.out or "77 value vectors of 768" in shown.out
    assert all(word in shown.out for word in ("precision", "recall", "overlap", "auc", "by chance"))
    assert "m.html" in shown.err
    assert main([*command, "--json"]) == 0
    found = Localization.model_validate(json.loads(capsys.readouterr().out))
    assert (found.seed, found.strata, found.rows["forget"].rows) == (7, "layer", 2)
    assert {place.chosen for place in found.places} == {38}
    assert main(["report", str(tmp_path / "m.safetensors")]) == 0
    assert found.answer in capsys.readouterr().out


def test_the_same_again_gives_the_same_mask(world: Path, tmp_path: Path) -> None:
    def digest(**given: Any) -> str:
        made = api.localize(str(world / "whole"), output=tmp_path / "m.safetensors", by="random", quiet=True, **given)
        return made.mask_digest

    first = digest()
    assert digest() == first, "its own earlier mask is replaced"
    assert digest(overrides=["seed=1"]) != first
    assert digest(density=0.2) != first


@pytest.mark.parametrize("where", ["locate", "write_scores", "write_localization_page"])
def test_what_is_interrupted_leaves_no_half_of_a_mask(
    where: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "m.safetensors"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(localizing, where, stop)
        assert main(["localize", str(world / "whole"), "--by", "random", "-o", str(output)]) == 130
    assert not output.exists()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert main(["localize", str(world / "whole"), "--by", "random", "-o", str(output)]) == 0
    assert read_mask(output).digest == read_localization(beside(output)["record"]).mask_digest


@pytest.mark.parametrize(
    ("about", "fits"),
    [({}, True), ({"model": "a"}, True), ({"model": "b"}, False), ({"model": "b", "model_id": "tiny"}, False)],
)
def test_a_mask_knows_whose_it_is(about: dict[str, str], fits: bool) -> None:
    mask = Mask({"w": torch.ones(1, 1, dtype=torch.bool)}, about)
    if fits:
        check_mask_of(mask, "a", "m.safetensors")
        return
    with pytest.raises(UserError, match=r"the mask m\.safetensors was made for another model.*digest differs"):
        check_mask_of(mask, "a", "m.safetensors")


# ---------------------------------------------------------------- in recipes


def test_a_resolved_recipe_with_a_mask_is_read_again(tmp_path: Path) -> None:
    tree = {
        "model": "tiny",
        "data": {"benchmark": "fictitious"},
        "unlearn": [{}],
        "localize": {"mask": "m.safetensors"},
    }
    recipe = load_recipe(tree)
    (tmp_path / "r.yaml").write_text(dump_yaml(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe
    (tmp_path / "m.safetensors").touch()
    assert load_recipe(tmp_path / "r.yaml").localize.mask == str(tmp_path / "m.safetensors")  # type: ignore[union-attr]


def run(world: Path, out: Path, *overrides: str) -> Path:
    rows = {"forget": str(world / "f.jsonl"), "retain": str(world / "r.jsonl")}
    small = ["evaluate.generate=null", "evaluate.bootstrap=100", "unlearn.0.train.max_steps=2"]
    fast = ["unlearn.0.train.lr=1e-2", "unlearn.0.train.precision=float32"]
    api.unlearn(str(world / "whole"), **rows, output=out, overrides=[*small, *fast, *overrides], quiet=True)
    return out


@pytest.mark.slow
def test_a_run_changes_only_the_part_that_was_chosen(world: Path, tmp_path: Path) -> None:
    chosen = ["localize.by=gradient", "localize.unit=head", "localize.density=0.25"]
    first = run(world, tmp_path / "one", *chosen)
    mask = read_mask(first / "localize" / "mask.safetensors")
    assert mask.about["model"] == model_digest(world / "whole")
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "whole", first / "model"))
    changed = 0
    for name, tensor in before.items():
        moved = tensor != after[name]
        inside = mask.inside.get(name, torch.zeros([1] * tensor.ndim, dtype=torch.bool))
        assert not (moved & ~inside).any(), name
        changed += int(moved.sum())
    assert changed > 0
    record = json.loads((first / "run.json").read_text())
    assert record["stages"]["localize"]["status"] == "done"
    assert any("attention heads of" in note for note in record["notes"])
    assert "25.0% of the head units" in (first / "report.html").read_text(encoding="utf-8")
    # the same mask from a file gives the same model, bit by bit
    second = run(world, tmp_path / "two", f"localize.mask={first / 'localize' / 'mask.safetensors'}")
    again = load_file(second / "model" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in again.items())
    assert read_mask(second / "localize" / "mask.safetensors").digest == mask.digest
    # again: nothing is made anew; another density: another mask, and another training
    run(world, first, *chosen)
    assert json.loads((first / "run.json").read_text())["stages"]["localize"]["skipped"]
    run(world, first, *chosen[:2], "localize.density=0.5")
    stages = json.loads((first / "run.json").read_text())["stages"]
    assert not stages["localize"]["skipped"]
    assert not stages["unlearn/unlearned"]["skipped"]


def test_the_outline_of_a_recipe_says_what_is_chosen(world: Path) -> None:
    data = {"forget": str(world / "f.jsonl"), "retain": str(world / "r.jsonl")}
    tree = {"model": str(world / "whole"), "data": data, "unlearn": [{}]}
    lines = api.plan({**tree, "localize": {"by": "random", "strata": "layer"}}).lines()
    (line,) = [line for line in lines if line.startswith("localize")]
    assert "10.0% of the value_vector units in each layer by random" in line
    lines = api.plan({**tree, "localize": {"mask": str(world / "old.safetensors")}}).lines()
    assert any("inside the mask old.safetensors" in line for line in lines)
    assert not any(line.startswith("localize") for line in api.plan(tree).lines())


# ---------------------------------------------------------------- the page


def record(layers: int = 3, modules: tuple[str, ...] = ("q_proj", "down_proj"), **changes: Any) -> Localization:
    places = [
        Place(layer=layer, module=module, units=10, chosen=layer % 3, score=layer - 1.0, highest=2.0 * layer)
        for layer in range(layers)
        for module in modules
    ]
    given: dict[str, Any] = {
        "expunge": "1", "model": "m", "model_digest": "d", "mask": "m.safetensors", "mask_digest": "e", "by": "wagle",
        "unit": "value_vector", "density": 0.1, "strata": "model", "seed": 1, "weights": 1000, "inside": 50,
        "places": places, "answer": "Some are chosen.", "rows": {"forget": Rows(rows=1, tokens=2, digest="f")},
    }  # fmt: skip
    return Localization(**{**given, **changes})


AGREED = Agreement(file="region.safetensors", units=4, precision=0.5, recall=0.25, overlap=0.2, auc=None, chance=0.1)


@pytest.mark.parametrize(
    "shown",
    [
        record(),
        record(80, tuple(f"block.{place}" for place in range(12))),
        record(1, ("layer",), unit="layer"),
        record(against=AGREED, control=True, by="random", rows={}),
        record(model=EVIL, by=EVIL, answer=EVIL, command=EVIL, notes=[EVIL], parameters={EVIL: EVIL}, mask=EVIL),
        record(places=[Place(layer=None, module="head", units=1, chosen=1)]),
        record(modules=(EVIL,), unit=EVIL, strata=EVIL, against=AGREED.model_copy(update={"file": EVIL})),
    ],
)
def test_pages_of_any_record_are_whole_and_safe(shown: Localization, tmp_path: Path) -> None:
    page = write_localization_page(tmp_path / "m.safetensors", shown)
    html = page.read_text(encoding="utf-8")
    check_page(html)
    check_figures(html)
    assert "\u202e" not in html
    first = page.read_bytes()
    write_localization_page(tmp_path / "m.safetensors", shown)
    assert page.read_bytes() == first


def test_the_heat_maps_hold_the_numbers_of_the_record() -> None:
    document = localization_document(record(4))
    chosen, scores = document.sections[0].figures
    assert chosen.rows == scores.rows == ["q_proj", "down_proj"]  # type: ignore[union-attr]
    assert chosen.values == [[0.0, 0.1, 0.2, 0.0]] * 2  # type: ignore[union-attr]
    assert chosen.middle == pytest.approx(0.075)  # type: ignore[union-attr]
    assert scores.values == [[-0.5, 0.0, 0.5, 1.0]] * 2  # type: ignore[union-attr]
    by_module = document.sections[-1].tables[0]
    assert [[cell.text for cell in row.cells] for row in by_module.rows] == [
        ["q_proj", "40", "3", "7.5%", "0.5", "6"],
        ["down_proj", "40", "3", "7.5%", "0.5", "6"],
    ]
