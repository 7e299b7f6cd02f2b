"""What a training step of each objective costs, against a plain fine-tuning step on the same forget rows.

Every objective is trained as a recipe trains it, with its own retain terms, parameters and alternatives, without LoRA;
before every fourth of them, plain fine-tuning of all parameters is run on the forget rows alone. The first epoch is
left out: later ones skip the frozen layers where there are some. The pass of the start model, made once before
training, is not counted. A ratio is that of two medians over steps; of several rounds, the median of their ratios. On
a CPU it is processor time, which neighbours disturb less.
Writes docs/measured/objective_cost.json, which the table of docs/objectives.md reads.
Run: python benchmarks/objective_cost.py [--model tiny] [--objectives npo rmu] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from common import free, options_of, parse, synchronize, tofu_like
from expunge.data.example import Example
from expunge.methods.base import OBJECTIVES
from expunge.models.forward import decoder_layers
from expunge.models.load import load_model
from expunge.pipeline.entries import unlearn_job
from expunge.pipeline.job import Job
from expunge.pipeline.resolve import resolve
from expunge.pipeline.training import fit
from expunge.recipe import ModelConfig, load_recipe

#: Objectives that are measured between two runs of plain fine-tuning.
BETWEEN = 4
FILE = Path(__file__).resolve().parents[1] / "docs" / "measured" / "objective_cost.json"


def write_rows(path: Path, rows: list[Example]) -> None:
    """Question, answer and another answer of each row."""
    others = [row.answer for row in rows[1:] + rows[:1]]
    lines = [
        json.dumps({"question": row.prompt, "answer": row.answer, "alternatives": [other]})
        for row, other in zip(rows, others, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def parameters_for(cls: Any, depth: int) -> dict[str, Any]:
    """Hyper-parameters that a model of this depth asks for: the last layer, where the default layer does not exist."""
    layer = cls().hidden_layer()
    return {"layer": depth - 1} if layer is not None and layer >= depth else {}


def objective_job(options: argparse.Namespace, name: str, parameters: Mapping[str, Any]) -> Job:
    """The training run of an objective, as a recipe makes it; retain rows are as many as an epoch uses."""
    rows = tofu_like(options.rows * (1 + OBJECTIVES.get(name).about.retain_ratio))
    train = {"epochs": options.epochs, "batch_size": options.batch, "checkpoint_every": 10_000}
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.jsonl" for side in ("forget", "retain")}
        write_rows(files["forget"], rows[: options.rows])
        write_rows(files["retain"], rows[options.rows :])
        recipe = load_recipe(
            {
                "model": options.model,
                "data": {side: str(file) for side, file in files.items()},
                "unlearn": [{"method": name, "parameters": dict(parameters), "train": train}],
            }
        )
        return unlearn_job(resolve(recipe), recipe.unlearn[0], recipe.model)


def plain_job(options: argparse.Namespace) -> Job:
    """Fine-tuning of all parameters on the forget rows' answers."""
    job = objective_job(options, "grad_ascent", {})
    return Job(model=job.model, retain=job.forget, train=job.train, seed=job.seed)


def step_times(options: argparse.Namespace, job: Job) -> list[float]:
    """Seconds of every optimizer step after the first epoch, update included."""
    clock = time.process_time if options.device.type == "cpu" else time.perf_counter
    steps = job.plan().steps
    marks: list[tuple[int, float]] = []

    def on_step(step: int, _: Mapping[str, float]) -> None:
        synchronize(options.device)
        marks.append(((step - 1) % steps, clock()))  # objectives that train several times start again

    with tempfile.TemporaryDirectory() as work, fit(job, Path(work), on_step=on_step):
        free()
    return [end - start for (_, start), (step, end) in pairwise(marks) if step * options.batch >= options.rows]


def costs(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objectives with their ratio so far, its values by round, and how often the objective trains."""
    depth = len(decoder_layers(load_model(ModelConfig(id=options.model)).model))
    ratios: dict[str, list[float]] = {name: [] for name in options.objectives}
    plain = 0.0
    for _ in range(options.rounds):
        for number, name in enumerate(options.objectives):
            cls: Any = OBJECTIVES.get(name)
            parameters = parameters_for(cls, depth)
            job = objective_job(options, name, parameters)
            if number % BETWEEN == 0:
                plain = statistics.median(step_times(options, plain_job(options)))
            ratios[name].append(statistics.median(step_times(options, job)) / plain)
            trainings = len(cls().variations(job.train))
            yield (
                name,
                {
                    "ratio": round(statistics.median(ratios[name]), 2),
                    "rounds": [round(ratio, 2) for ratio in ratios[name]],
                    "trainings": trainings,
                    **({"parameters": parameters} if parameters else {}),
                },
            )


def options_here() -> argparse.Namespace:
    """From the command line."""
    parser = options_of(__doc__)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES.names(), help="which; all when absent")
    parser.add_argument("--rows", type=int, default=8, help="forget rows")
    parser.add_argument("--batch", type=int, default=8, help="forget rows of a step")
    parser.add_argument("--epochs", type=int, default=3, help="of which the first is not measured")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each objective, each beside a plain one")
    parser.add_argument("--output", type=Path, default=FILE, help="entries of other objectives stay if measured alike")
    options = parse(parser)
    if options.quick:
        options.epochs = min(options.epochs, 2)
    return options


def main() -> None:
    """Measure, print a line each, write the file after each."""
    options = options_here()
    given = {name: getattr(options, name) for name in ("rows", "batch", "epochs", "rounds")}
    about = {
        "command": f"python benchmarks/objective_cost.py --model {options.model}"
        + "".join(f" --{name} {value}" for name, value in given.items()),
        "model": options.model,
        "against": f"a step of plain fine-tuning of all parameters on {options.batch} forget rows",
        "time": "processor time" if options.device.type == "cpu" else "time on the clock",
        "device": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    objectives = before.get("objectives", {}) if {**before, "objectives": 0} == {**about, "objectives": 0} else {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name, found in costs(options):
        objectives[name] = found
        print(f"{name}: {found['ratio']} (by round: {found['rounds']})", flush=True)
        whole = {**about, "objectives": dict(sorted(objectives.items()))}
        options.output.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
