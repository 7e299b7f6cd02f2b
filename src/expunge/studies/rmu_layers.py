"""Where to steer: RMU and adaptive RMU over decoder layers and strengths (arXiv 2408.06223, 2506.16548)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from expunge.errors import UserError
from expunge.report.text import plural
from expunge.studies.base import Numbers, StudyOptions, Whole, study
from expunge.studies.rmu_layers_page import JUDGED, METHODS, PAPER, SUMMARY, Grid, document

if TYPE_CHECKING:
    from expunge.report.document import Document
    from expunge.studies.ground import Ground, Planned

LAYERS = 8
#: c of the published runs (arXiv 2403.03218).
PUBLISHED = 6.5
#: A rate that steers within 75 steps on a model of this many parameters; see docs/design/studies.md.
RATE, RATE_SIZE = 1e-2, 1.35e8


class RmuLayers(StudyOptions):
    """Options of `rmu_layers`."""

    layers: Whole | None = Field(
        None, description="decoder layers, 0-based, e.g. 2,6,10; eight over the depth when absent"
    )
    betas: Numbers = Field((2.0, 5.0), description="strengths β of adaptive_rmu: length of the goal over the states'")
    coefficients: Numbers | None = Field(
        None, description="strengths c of rmu: length of the goal; when absent 6.5, and what the first β is half-way up"
    )
    lr: float | None = Field(None, gt=0, description="learning rate; 1e-2, and less for more than 135M parameters")


def entry(options: RmuLayers) -> dict[str, Any]:
    """What all trials share: the published loss on down_proj of layers ℓ−2..ℓ, set for few and short steps."""
    return {
        "method": "rmu",
        "parameters": {"layer": 0, "alpha": 100.0},
        "train": {"epochs": 20, "batch_size": 8, "schedule": "linear", "checkpoint_every": 100_000},
    }


@study(
    "rmu_layers",
    summary=SUMMARY,
    paper=PAPER,
    estimate="32 trials; on a model of 135M parameters and two cores about a quarter of an hour",
    options=RmuLayers,
    entry=entry,
    fixed=("method", "parameters.layer", "parameters.coefficient", "parameters.beta", "train.lr", "lora"),
)
def rmu_layers(ground: Ground, options: RmuLayers) -> Document:
    """Every method × layer × strength on one target, judged by what unseen retain rows keep."""
    depth, layers = _layers(ground, options)
    count = len(options.betas) + len(options.coefficients or (PUBLISHED, "half-way"))
    ground.expect(len(layers) * count, f"{plural(len(layers), 'layer')}, {len(METHODS)} methods")
    ground.set_aside(JUDGED)
    ground.measure_yardsticks()
    norms = measured_norms(ground)
    strengths = {"rmu": options.coefficients or coefficients(options, layers, norms), "adaptive_rmu": options.betas}
    trials = [
        _trial(ground, options, method, layer, values[turn])
        # the first strength of each method at every layer, then the next: an interrupted study has whole maps first
        for turn in range(max(map(len, strengths.values())))
        for layer in layers
        for method, values in strengths.items()
        if turn < len(values)
    ]
    ground.run(trials)
    return document(ground, options, Grid(depth, layers, strengths, _rate(ground, options)), norms)


def coefficients(options: RmuLayers, layers: Sequence[int], norms: Mapping[str, list[float]]) -> tuple[float, ...]:
    """The published c, and the length of adaptive RMU's goal for the first β at the middle one of the layers."""
    middle = norms["forget"][layers[len(layers) // 2]]
    return (PUBLISHED, float(f"{options.betas[0] * middle:.1e}"))


def steering_rate(parameters: int) -> float:
    """The learning rate for a model of a size: Adam's best rate falls with its width (arXiv 2203.03466)."""
    return float(f"{min(RATE, RATE * math.sqrt(RATE_SIZE / parameters)):.1e}")


def spread_layers(depth: int, count: int = LAYERS) -> list[int]:
    """`count` layers evenly over the depth, the last one among them; every layer of a shallow model."""
    if depth <= count:
        return list(range(depth))
    return [round((place + 1) * depth / count) - 1 for place in range(count)]


def _layers(ground: Ground, options: RmuLayers) -> tuple[int, list[int]]:
    """Depth of the model, and the layers to scan. Raises UserError for layers that it does not have or can't steer."""
    from expunge.models.forward import decoder_layers

    depth = len(decoder_layers(ground.architecture))
    layers = sorted(set(options.layers)) if options.layers is not None else spread_layers(depth)
    beyond = [layer for layer in layers if layer >= depth]
    if beyond or not layers:
        what = f"layer {beyond[0]} does not exist" if beyond else "no layer is given"
        raise UserError(
            f"--layers: {what}; the model has layers 0 to {depth - 1}",
            f"for instance: --layers {','.join(map(str, spread_layers(depth, 3)))}",
        )
    for layer in layers:
        ground.check(_trial(ground, options, "adaptive_rmu", layer, options.betas[0]).entry)
    return depth, layers


def _rate(ground: Ground, options: RmuLayers) -> float:
    return options.lr or steering_rate(ground.parameters)


def _trial(ground: Ground, options: RmuLayers, method: str, layer: int, strength: float) -> Planned:
    from expunge.studies.ground import Planned

    _, parameter, sign = METHODS[method]
    given = {**ground.whole.recipe.unlearn[0].parameters, "layer": layer, parameter: strength}
    made = ground.entry(method=method, parameters=given, train={"lr": _rate(ground, options)})
    name = f"{method}-layer{layer}-{sign}{strength:g}".replace("β", "b")
    return Planned(name, made, {"method": method, "layer": layer, "strength": strength})


def measured_norms(ground: Ground) -> dict[str, list[float]]:
    """Per split the target's norm profile, as a stage of the run directory."""
    from expunge.pipeline.evaluate import LazyModel
    from expunge.pipeline.resolve import rows_digest
    from expunge.runs.atomic import write_json
    from expunge.scoring.hidden import norm_profile

    rows = {split: ground.rows[split] for split in ("forget", "retain")}
    target, evaluate, reporter = ground.variants["target"], ground.whole.recipe.evaluate, ground.stages.reporter
    digests = {split: rows_digest(chosen) for split, chosen in rows.items()}

    def work(folder: Path) -> None:
        (folder / "out").mkdir()
        with reporter.bar("norms", sum(map(len, rows.values()))) as tick:
            model = LazyModel(target.config, evaluate.dtype).loaded.model
            found = {
                split: norm_profile(model, chosen, batch_size=evaluate.batch_size, progress=tick)
                for split, chosen in rows.items()
            }
        write_json(folder / "out" / "norms.json", found)

    inputs = {"model": target.digest, "dtype": evaluate.dtype, "rows": digests}
    made = ground.directory.stage("norms", "norms", inputs, work)
    found: dict[str, list[float]] = json.loads((made.path / "norms.json").read_text(encoding="utf-8"))
    return found
