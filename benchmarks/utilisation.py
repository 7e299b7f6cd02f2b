"""Model-FLOPs utilisation of training steps: useful FLOPs ÷ (time × the machine's measured rate of matrix products).

For fine-tuning, NPO with all parameters, NPO with adapters, and RMU after its first epoch. The rate is measured here,
in the dtype of the step: once for the step's own products one after another (`utilisation`), once for one large square
product (`utilisation_of_square`). Numerator, denominators, tokens/s and padding are printed. As a check, the products
that a step really runs are counted too: useful FLOPs above them would be a wrong formula, and end the script.
On a GPU: bfloat16 autocast, SDPA, fused AdamW, and llama-1b or llama-7b with random weights; llama-7b has bfloat16
weights, and adapters with gradient checkpointing unless --no-checkpointing is given.
Run: python benchmarks/utilisation.py [--model llama-1b] [--methods npo rmu] [--weights bfloat16] [--compile]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from common import Times, autocast, free, options_of, parse, print_result, timed
from expunge.methods.base import build_objective
from expunge.models.forward import decoder_layers
from flops import FORMULA, Peak, executed, observed
from training import Ours, Setting, Training

METHODS = ("finetune", "npo", "npo_lora", "rmu")


def setting_of(method: str, options: argparse.Namespace) -> Setting:
    """What a method trains, and how."""
    npo, rmu = build_objective("npo", {}), build_objective("rmu", {"layer": options.layer})
    objective, terms, lora = {
        "finetune": (None, {"nll": 1.0}, 0),
        "npo": (npo, {"nll": 1.0}, 0),
        "npo_lora": (npo, {"nll": 1.0}, options.lora),
        "rmu": (rmu, {}, 0),
    }[method]
    return Setting.of(
        options,
        objective=objective,
        terms=terms,
        lora=lora,
        half=options.precision == "bfloat16",
        rows=4 * options.batch,
        batch=options.batch,
        checkpointing=options.checkpointing and method != "rmu",  # cached states serve it better than recomputation
    )


def compile_layers(training: Training) -> None:
    """torch.compile for what is within the decoder layers; the layers themselves carry hooks."""
    for layer in decoder_layers(training.model):
        for child in layer.children():
            child.compile(dynamic=True)


def measure(method: str, options: argparse.Namespace, peak: Peak) -> dict[str, Any]:
    """The figures of one method."""
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(options.device)
    setting = setting_of(method, options)
    training = Training(setting)
    ours = Ours(training, packs=not options.padded)
    ours.fill()
    step = training.step(ours)
    first = setting.steps_per_epoch  # of the second epoch
    numbers = range(first, first + options.steps)
    lengths = {number: training.lengths(number) for number in numbers}
    supervised = {number: len(training.micro_batch(number)["batch"].targets) for number in numbers}
    training.model.train()
    with observed(training.model) as work, autocast(options.device, setting.half):
        ours(first)
    useful = {number: work.flops(lengths[number], supervised[number]) for number in numbers}
    ran = executed(lambda: step(first))
    products = sum(useful[first].values()) - useful[first]["attention"]
    if products > 1.001 * ran:
        raise SystemExit(f"{method}: {products:.4g} useful FLOPs, but only {ran:.4g} ran; no utilisation is reported")
    if options.compile:
        compile_layers(training)
    for number in numbers[: 3 if options.device.type == "cuda" or options.compile else 1]:
        step(number)
    at = sum(lengths[first]), supervised[first]
    peak.own(work, *at)
    times = Times()
    for number in numbers:
        with timed(times, options.device):
            step(number)
    peak.again()
    own, square = peak.own(work, *at), peak.square()
    total = {number: sum(useful[number].values()) for number in numbers}
    rates = [total[number] / second for number, second in zip(numbers, times.seconds, strict=True)]
    speeds = [sum(lengths[number]) / second for number, second in zip(numbers, times.seconds, strict=True)]
    result = {
        "utilisation": round(statistics.median(rates) / own, 4),
        "utilisation_of_square": round(statistics.median(rates) / square, 4),
        "useful_gflop_per_step": round(statistics.median(total.values()) / 1e9, 3),
        "parts_gflop": {part: round(value / 1e9, 3) for part, value in useful[first].items()},
        "seconds_per_step": round(times.median, 5),
        "processor_seconds_per_step": round(statistics.median(times.processor), 5),
        "useful_gflop_per_second": round(statistics.median(rates) / 1e9, 2),
        "own_products_gflop_per_second": round(own / 1e9, 2),
        "square_gflop_per_second": round(square / 1e9, 2),
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_step": at[0],
        "padding_share": round(1 - at[0] / work.positions, 4),
        "useful_share_of_products_run": round(products / ran, 4),
        "checkpointing": setting.checkpointing,
    }
    if options.device.type == "cuda":
        result["memory_mb"] = torch.cuda.max_memory_allocated(options.device) >> 20
    return result


def show(method: str, found: dict[str, Any], peak: Peak) -> None:
    """Numerator and denominators in words."""
    parts = "; ".join(f"{part} {value:g}" for part, value in found["parts_gflop"].items())
    memory = f"; peak {found['memory_mb']} MB" if "memory_mb" in found else ""
    print(
        f"\n{method}: {100 * found['utilisation']:.1f} % of its own products' rate, "
        f"{100 * found['utilisation_of_square']:.1f} % of a square product's\n"
        f"  useful: {found['useful_gflop_per_step']} GFLOP a step (first: {parts})\n"
        f"  time: {found['seconds_per_step']} s a step ({found['processor_seconds_per_step']} s of processors), "
        f"{found['useful_gflop_per_second']} useful GFLOP/s\n"
        f"  measured rates: own products {found['own_products_gflop_per_second']} GFLOP/s, "
        f"{peak.square_size}² {found['square_gflop_per_second']} GFLOP/s\n"
        f"  {found['tokens_per_second']} tokens/s; {found['tokens_per_step']} tokens a step, "
        f"{100 * found['padding_share']:.1f} % of the positions padding{memory}\n"
        f"  {100 * found['useful_share_of_products_run']:.1f} % of the FLOPs of products that ran are useful",
        flush=True,
    )


def options_here() -> argparse.Namespace:
    """From the command line."""
    parser = options_of(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all; npo_lora and rmu for llama-7b")
    parser.add_argument(
        "--batch", type=int, help="forget rows, and as many retain rows, of a step: 64 on a GPU, else 8"
    )
    parser.add_argument("--steps", type=int, help="20 on a GPU, else 6; 3 with --quick")
    parser.add_argument("--layer", type=int, default=7, help="ℓ of RMU")
    parser.add_argument("--lora", type=int, default=16, metavar="RANK")
    parser.add_argument(
        "--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of forward and backward"
    )
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="on for llama-7b, else off")
    parser.add_argument("--padded", action="store_true", help="a line for each row instead of packed lines")
    parser.add_argument("--compile", action="store_true", help="torch.compile within the decoder layers")
    options = parse(parser)
    cuda, large = options.device.type == "cuda", options.model == "llama-7b"
    options.methods = options.methods or (["npo_lora", "rmu"] if large else list(METHODS))
    options.batch = options.batch or (64 if cuda else 8)
    options.steps = options.steps or (3 if options.quick else 20 if cuda else 6)
    options.checkpointing = large if options.checkpointing is None else options.checkpointing
    return options


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    options = options_here()
    print(FORMULA)
    peak = Peak(options.device, getattr(torch, options.precision))
    found = {}
    for method in options.methods:
        found[method] = measure(method, options, peak)
        show(method, found[method], peak)
        free()
    given = {name: getattr(options, name) for name in ("batch", "lora", "layer", "precision", "padded", "compile")}
    print_result("utilisation", options, {"methods": found, **given})


if __name__ == "__main__":
    main()
