"""One NPO step: cached reference, one shared forward, few logits; against two models, separate forwards, full logits.

Both sides take the same rows, NPO + retain NLL (+ retain KL with --kl), bfloat16 autocast, gradient clipping and fused
AdamW. The other side holds a second model for the reference, pads forget and retain rows apart, and keeps all logits,
as public unlearning code does. Each side runs in a process of its own for its peak memory (growth since the imports),
and both in turn in one process for the times. The losses of the first step must agree, or no speed is reported.
Run: python benchmarks/npo_step.py [--quick] [--lora 16] [--kl] [--model tiny]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid

from expunge.data.collate import Batch, pad_right
from expunge.data.encode import Encoded, encode
from expunge.data.template import PLAIN, resolve_template
from expunge.methods.base import build_objective
from expunge.methods.step import Forward, Step, Totals
from expunge.models.load import load_model
from expunge.models.lora import add_lora
from expunge.models.packing import supports_packing
from expunge.models.reference import build_reference
from expunge.recipe import LoraConfig, ModelConfig
from scoring import tofu_like

BETA, BATCH = 0.1, 8
Loss = Callable[[int], Tensor]


def autocast(enabled: bool = True) -> torch.autocast:
    """bfloat16 where training has it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def build(options: argparse.Namespace) -> tuple[Any, list[Encoded], list[Encoded]]:
    """The model to train, forget rows and retain rows."""
    loaded = load_model(ModelConfig(id=options.model))
    rows = encode(tofu_like(2 * options.rows), loaded.tokenizer, resolve_template(PLAIN, loaded.tokenizer), 512)
    model: Any = loaded.model
    if options.lora:
        model = add_lora(model, LoraConfig(rank=options.lora), seed=0)
    model.config.use_cache = False
    return model, rows[: options.rows], rows[options.rows :]


def chosen(step: int, count: int) -> list[int]:
    """Rows of a step: a window that moves over all of them."""
    return [(step * BATCH + i) % count for i in range(BATCH)]


def ours(model: Any, forget: Sequence[Encoded], retain: Sequence[Encoded], kl: bool) -> Loss:
    """The step of this project; the reference pass is timed apart, for it is made once."""
    began = time.perf_counter()
    with autocast():
        forget_cache = build_reference(model, forget, range(len(forget)), logprobs=True)
        retain_cache = build_reference(model, retain, range(len(retain)) if kl else [], head=kl)
    print(f"reference pass, once before training: {time.perf_counter() - began:.1f} s", flush=True)
    objective, packs = build_objective("npo", {"beta": BETA}), supports_packing(model)

    def loss(step: int) -> Tensor:
        left, right = chosen(step, len(forget)), chosen(step, len(retain))
        rows = [forget[i] for i in left] + [retain[i] for i in right]
        supervised = [row.supervised_tokens for row in rows]
        totals = Totals(BATCH, sum(supervised[:BATCH]), BATCH, sum(supervised[BATCH:]))
        forward = Forward(model, pad_right(rows, left + right, 0), None, True, packs)
        made = Step(forward, BATCH, forget_cache, retain_cache, None, totals, 1.0)
        total = objective.loss(made)["forget"] + made.retain.nll()
        return total + made.retain.kl() if kl else total

    return loss


def two_models(model: Any, forget: Sequence[Encoded], retain: Sequence[Encoded], kl: bool, name: str) -> Loss:
    """The step as it is commonly written."""
    reference: Any = load_model(ModelConfig(id=name)).model

    def token_logprobs(network: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        logp = logits.float().log_softmax(-1)
        keep = batch.supervised[:, :-1]
        return logp, logp.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * keep, keep

    def loss(step: int) -> Tensor:
        left, right = chosen(step, len(forget)), chosen(step, len(retain))
        forget_batch = pad_right([forget[i] for i in left], left, 0)
        retain_batch = pad_right([retain[i] for i in right], right, 0)
        _, current, _ = token_logprobs(model, forget_batch)
        with torch.no_grad():
            _, start, _ = token_logprobs(reference, forget_batch)
        total = (-2 / BETA * logsigmoid(-BETA * (current.sum(-1) - start.sum(-1)))).mean()
        logp, kept, keep = token_logprobs(model, retain_batch)
        total = total - kept.sum() / keep.sum()
        if kl:
            with torch.no_grad():
                reference_logp, _, _ = token_logprobs(reference, retain_batch)
            total = total + kl_div(logp[keep], reference_logp[keep], log_target=True, reduction="sum") / keep.sum()
        return total

    return loss


def stepper(model: Any, loss: Loss) -> Callable[[int], float]:
    """Forward, backward, clipping and update; returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    model.train()

    def step(number: int) -> float:
        with autocast():
            value = loss(number)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def memory(kind: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))


def peak(options: argparse.Namespace) -> None:
    """Child process: a few steps of one side; prints the growth of its memory."""
    before = memory("VmRSS")
    model, forget, retain = build(options)
    side = ours if options.side == "ours" else two_models
    extra = () if options.side == "ours" else (options.model,)
    step = stepper(model, side(model, forget, retain, options.kl, *extra))
    for number in range(3):
        step(number)
    print(memory("VmHWM") - before)


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="fewer steps, under a minute")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters instead of all parameters")
    parser.add_argument("--kl", action="store_true", help="add the retain KL term")
    parser.add_argument("--rows", type=int, default=32, help="forget rows, and as many retain rows")
    parser.add_argument("--steps", type=int, help="8, or 3 with --quick")
    parser.add_argument("--side", choices=["ours", "baseline"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return peak(options)
    steps = options.steps or (3 if options.quick else 8)
    model, forget, retain = build(options)
    other, _, _ = build(options)
    losses = {
        "ours": ours(model, forget, retain, options.kl),
        "baseline": two_models(other, forget, retain, options.kl, options.model),
    }
    models = {"ours": model, "baseline": other}
    with torch.no_grad():
        first = {name: losses[name](0).item() for name in losses}  # in float32 but for our bfloat16 reference
    if abs(first["ours"] - first["baseline"]) > 0.02 * abs(first["baseline"]):
        sys.exit(f"the losses differ: {first}; no speed is reported")
    run = {name: stepper(models[name], losses[name]) for name in losses}
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for number in range(steps + 1):
        for name, step in run.items():
            began = time.perf_counter()
            step(number)
            if number:  # the first allocates
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    peaks = {}
    for name in run:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    result = {
        "name": "npo_step",
        "ratio": round(medians["baseline"] / medians["ours"], 3),
        "ours": round(medians["ours"], 3),
        "baseline": round(medians["baseline"], 3),
        "unit": "s/step",
        "memory_ratio": round(peaks["ours"] / peaks["baseline"], 3),
        "memory_ours_mb": peaks["ours"] >> 20,
        "memory_baseline_mb": peaks["baseline"] >> 20,
        "first_loss": first,
        "model": options.model,
        "lora": options.lora,
        "kl": options.kl,
        "rows_per_step": 2 * BATCH,
        "threads": torch.get_num_threads(),
    }
    print(f"{medians['ours']:.2f} s against {medians['baseline']:.2f} s a step: {result['ratio']} ×")
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main()
