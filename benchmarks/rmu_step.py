"""One RMU step: three layers over cached states; against two full models with forward hooks.

Both sides train down_proj of layers ℓ−2..ℓ with fused AdamW, bfloat16 autocast and gradient clipping, on the mean
squared errors over the answers' tokens. The other side runs all layers and the logits of the trained model over forget
and retain rows apart, and of a second, frozen model over the retain rows, as the authors' code does; that code also
makes the gradients of all parameters below ℓ, which this one does only with --all-gradients.
Ours keeps the states below the first trained layer from the first epoch on; `ratio` is about the epochs after it,
`first_epoch_ratio` about the first with the pass of the start model added. Both come for each number of rows.
Each side runs in a process of its own for its peak memory, both in turn in one process for the times. The losses of
the first steps must agree, or no speed is reported.
Run: python benchmarks/rmu_step.py [--quick] [--model wide] [--layer 7] [--rows 32 256]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from common import compared, free, in_turn, memory_result, options_of, parse, print_result, sentence
from expunge.data.collate import Batch
from expunge.methods.base import build_objective
from expunge.models.forward import capture_layer
from training import Make, Ours, Setting, Training, check_losses, peak_memory


def hooked_models(objective: Any, all_gradients: bool) -> Make:
    """The loss as the authors' code makes it."""

    def make(training: Training) -> Callable[[int], Tensor]:
        model = training.model
        frozen, _ = training.start()
        if all_gradients:
            model.requires_grad_(True)

        def states(network: torch.nn.Module, batch: Batch) -> Tensor:
            sink: list[Tensor] = []
            with capture_layer(network, objective.layer, sink):
                network(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            return sink[0].float()[batch.supervised]

        def loss(number: int) -> Tensor:
            forget, retain = (training.side(number, side) for side in ("forget", "retain"))
            steered = states(model, forget)
            goal = objective.coefficient * objective.direction(steered.shape[-1]).to(steered.device)
            kept = states(model, retain)
            with torch.no_grad():
                start = states(frozen, retain)
            return mse_loss(steered, goal.expand_as(steered)) + objective.alpha * mse_loss(kept, start)

        return loss

    return make


def measure(setting: Setting, makes: Mapping[str, Make], steps: int) -> dict[str, Any]:
    """Ratios and tokens/s of the first epoch and of those after it, at one number of rows."""
    trainings = {name: Training(setting) for name in makes}
    ours = Ours(trainings["ours"])
    losses: dict[str, Callable[[int], Tensor]] = {"ours": ours, "baseline": makes["baseline"](trainings["baseline"])}
    sides = {name: trainings[name].step(losses[name]) for name in losses}
    epoch = setting.steps_per_epoch
    sides["baseline"](0)  # the first allocates; ours has made its pass of the start model
    first = in_turn(sides, range(min(steps, epoch)), setting.device)
    ours.fill()
    numbers = range(epoch, epoch + steps)
    later = in_turn(sides, numbers, setting.device)
    tokens = [sum(trainings["ours"].lengths(number)) for number in numbers]
    rates = {
        name: round(statistics.median(count / time for count, time in zip(tokens, later[name].seconds, strict=True)))
        for name in sides
    }
    own = first["ours"].median + ours.reference_seconds / epoch
    return {
        **compared(later),
        "first_epoch_ratio": round(first["baseline"].median / own, 3),
        "tokens_per_second": rates["ours"],
        "baseline_tokens_per_second": rates["baseline"],
        "cached_layers": ours.prefix.depth if ours.prefix is not None else 0,
    }


def options_here() -> argparse.Namespace:
    """From the command line."""
    parser = options_of(__doc__)
    parser.add_argument("--layer", type=int, default=7, help="ℓ, the decoder layer whose output is steered")
    parser.add_argument("--rows", type=int, nargs="+", help="forget rows, and as many retain rows: 32 256, or 32")
    parser.add_argument("--batch", type=int, default=8, help="rows of each side in a step")
    parser.add_argument("--steps", type=int, help="12 of each kind, or 4 with --quick")
    parser.add_argument("--all-gradients", action="store_true", help="as the authors' code: nothing is frozen there")
    options = parse(parser)
    options.rows = options.rows or ([32] if options.quick else [32, 256])
    options.steps = options.steps or (4 if options.quick else 12)
    return options


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    options = options_here()
    objective = build_objective("rmu", {"layer": options.layer})
    given = {name: getattr(options, name) for name in ("layer", "batch", "all_gradients")}
    setting = Setting.of(options, objective=objective, terms={}, rows=options.rows[0], batch=options.batch, rate=5e-5)
    makes: dict[str, Make] = {"ours": Ours, "baseline": hooked_models(objective, options.all_gradients)}
    peaks = peak_memory(options, setting, makes)
    if peaks is None:
        return
    losses = check_losses(setting, makes, tolerance=1e-3)  # the retain term is a small part of it
    by_rows = {}
    for rows in options.rows:
        by_rows[rows] = found = measure(replace(setting, rows=rows), makes, options.steps)
        free()
        print(
            f"{rows} + {rows} rows, a step: {sentence(found)};"
            f" {found['first_epoch_ratio']} × in the first epoch; {found['tokens_per_second']} tokens/s",
            flush=True,
        )
    result = {**by_rows[options.rows[0]], **memory_result(peaks), "first_losses": losses, "by_rows": by_rows}
    print_result("rmu_step", options, {**result, **given})


if __name__ == "__main__":
    main()
