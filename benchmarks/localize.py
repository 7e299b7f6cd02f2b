"""What it costs to find a mask, against one plain training epoch on the same rows.

Every attribution is run as `expunge localize` runs it, from the model in memory to the mask. Before and after it, the
project's own trainer fine-tunes all parameters for two epochs, of which the second is taken. An attribution that reads
the forget rows alone is held against an epoch of these; one that reads both, against an epoch of both. Batch size and
precision are the same on both sides. A cost is the attribution's over the epoch's; goals: 1.5 of the time, 1.3 of the
memory. On a CPU the time is processor time, which neighbours disturb less. Memory is the growth of a process of its own
at its peak, the model included.
Run: python benchmarks/localize.py [--quick] [--units value_vector module] [--attributions wagle fisher]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common import build_model, free, options_of, parse, peaks, print_peak, print_result, synchronize
from expunge.data.encode import Encoded
from expunge.localize.base import ATTRIBUTIONS, build_attribution
from expunge.localize.evidence import Evidence
from expunge.localize.locate import locate
from expunge.localize.units import units_of
from expunge.pipeline.job import Job
from expunge.pipeline.training import fit
from expunge.recipe import ModelConfig, TrainConfig

DENSITY = 0.1
TIME_GOAL, MEMORY_GOAL = 1.5, 1.3

Rows = Mapping[str, list[Encoded]]


def start(options: argparse.Namespace) -> tuple[Any, Rows]:
    """The model, and as many forget rows as retain rows."""
    model, rows = build_model(
        options.model, 2 * options.rows, device=options.device, dtype=options.weights, template=options.template
    )
    return model, {"forget": rows[: options.rows], "retain": rows[options.rows :]}


def splits_of(name: str) -> tuple[str, ...]:
    """The rows of the epoch that an attribution is held against."""
    needs = ATTRIBUTIONS.get(name).about.needs
    return ("forget", "retain") if "retain" in needs else ("forget",)


def clock(options: argparse.Namespace) -> float:
    """Processor time on a CPU, else the clock's."""
    synchronize(options.device)
    return time.process_time() if options.device.type == "cpu" else time.perf_counter()


def epoch(options: argparse.Namespace, rows: list[Encoded]) -> float:
    """Seconds of the second of two epochs, updates included."""
    marks: list[float] = []
    train = TrainConfig(
        epochs=2,
        batch_size=options.batch,
        precision="bfloat16" if options.half else "float32",
        checkpoint_every=10_000,
    )
    job = Job(ModelConfig(id=options.model), rows, train, seed=0)
    steps = job.plan().steps
    with (
        tempfile.TemporaryDirectory() as work,
        fit(job, Path(work), on_step=lambda step, terms: marks.append(clock(options))),
    ):
        free()
    return marks[-1] - marks[steps // 2 - 1]


def find(options: argparse.Namespace, model: Any, rows: Rows, name: str, unit: str) -> float:
    """Seconds from the model in memory to the mask."""
    with tempfile.TemporaryDirectory() as work:
        began = clock(options)
        families = units_of(model, unit)  # type: ignore[arg-type]
        given = {"batch_size": options.batch, "half": options.half, "folder": Path(work)}
        evidence = Evidence(model, rows, families, unit=unit, **given)
        locate(build_attribution(name, {}), evidence, DENSITY, "model")
        return clock(options) - began


def cases(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Attributions with each unit that they can tell apart, of those that were asked for."""
    made = []
    for name in options.attributions or ATTRIBUTIONS.names():
        about = ATTRIBUTIONS.get(name).about
        if "region" in about.needs:  # a region that is known costs nothing to find
            continue
        units = [unit for unit in options.units if not about.units or unit in about.units]
        made += [(name, unit) for unit in units or about.units[:1]]
    return made


def times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Costs by round: in each, every attribution between two epochs on its rows."""
    model, rows = start(options)
    found: dict[str, list[float]] = {}
    few = {split: part[:2] for split, part in rows.items()}
    for _ in range(options.rounds):
        for name, unit in cases(options):
            together = [row for split in splits_of(name) for row in rows[split]]
            find(options, model, few, name, unit)  # the first pass finds out whether rows can be packed, and more
            before = epoch(options, together)
            own = find(options, model, rows, name, unit)
            plain = statistics.mean([before, epoch(options, together)])
            found.setdefault(f"{name} {unit}", []).append(own / plain)
            print(f"{name}, {unit}: {own:.2f} s against {plain:.2f} s: {own / plain:.2f} ×", flush=True)
    return found


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Peaks over that of the epoch. In a child process it does one side's work and prints the peak."""
    if not options.side:
        made = cases(options)
        baselines = sorted({f"epoch {'+'.join(splits_of(name))}" for name, _ in made})
        found = peaks([*baselines, *(f"{name} {unit}" for name, unit in made)])
        return {
            f"{name} {unit}": found[f"{name} {unit}"] / found[f"epoch {'+'.join(splits_of(name))}"]
            for name, unit in made
        }
    name, what = options.side.split()

    def work() -> None:
        model, rows = start(options)
        if name == "epoch":
            del model  # the trainer loads its own
            free()
            epoch(options, [row for split in what.split("+") for row in rows[split]])
        else:
            find(options, model, rows, name, what)

    print_peak(work, options.device)
    return {}


def options_here() -> argparse.Namespace:
    """From the command line."""
    parser = options_of(__doc__, model=None)
    parser.add_argument("--attributions", nargs="+", help="which; all when absent")
    parser.add_argument("--units", nargs="+", default=["value_vector", "module"], help="what is chosen")
    parser.add_argument("--rows", type=int, default=24, help="forget rows, and as many retain rows")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, and of a pass")
    parser.add_argument("--half", action="store_true", help="bfloat16 autocast on both sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks out")
    options = parse(parser)
    options.model = options.model or ("tiny" if options.quick else "smollm2-135m")
    options.rounds = 1 if options.quick else options.rounds
    return options


def main() -> None:
    """Measure, print a line each, and the result."""
    options = options_here()
    if options.side:
        memory(options)
        return
    found = times(options)
    grown = {} if options.no_memory else memory(options)
    result = {
        case: {
            "time_ratio": round(statistics.median(ratios), 2),
            "rounds": [round(ratio, 2) for ratio in ratios],
            **({"memory_ratio": round(grown[case], 2)} if case in grown else {}),
        }
        for case, ratios in found.items()
    }
    for case, values in result.items():
        over = values["time_ratio"] > TIME_GOAL or values.get("memory_ratio", 0) > MEMORY_GOAL
        print(f"{case}: {values}{' – over the goal' if over else ''}")
    settings = {"rows": options.rows, "batch": options.batch, "half": options.half, "load": os.getloadavg()[0]}
    print_result("localize", options, {**settings, "costs": result})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
