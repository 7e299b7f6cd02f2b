"""Calibration to α within 0.01: mixing in place and one scoring pass per α, against reloading and generating.

Both sides find the largest mixture of a target with an unlearned model that keeps 95% of the target's retain extraction
strength, and then measure the forget rows of both ends and of the mixture. The other side works as released code for
such mixtures does: for every α it loads both checkpoints, mixes their state dicts into a third, and finds extraction
strength row by row, by bisection over the given part of the answer with a greedy generation each. A third side reloads
too, but scores as ours does: what mixing in place gives alone. Each side's peak of anonymous memory (files that are
mapped into memory do not count) is sampled in a process of its own.

No training is needed: the answers are the target's own greedy continuations of random prompts, so that it knows them
all, and the unlearned model is the target with noise on its matrices. α must agree within 0.01, or nothing is reported.
Run: python benchmarks/calibration.py [--quick] [--model tiny]
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from common import (
    SHAPES,
    build_model,
    compared,
    in_turn,
    memory_result,
    options_of,
    parse,
    peaks,
    print_result,
    resident,
)
from expunge.data.encode import Encoded
from expunge.data.example import Example
from expunge.models.load import load_tokenizer
from expunge.pipeline.calibrate import Settings, bisect, calibrate_model
from expunge.pipeline.calibration_passes import CalibrationRows, strengths
from expunge.recipe import EvaluateConfig, ModelConfig
from expunge.scoring.scores import score

KEEP, EPSILON = 0.95, 0.01
PROMPT, ANSWER = 16, 24  # tokens; of an answer the longest

#: α, passes over retain rows of mixed models, and retain strength at both ends.
Outcome = tuple[float, int, float, float]


@dataclass(frozen=True)
class World:
    """Two checkpoints and rows that the target knows."""

    target: Path
    unlearned: Path
    rows: CalibrationRows

    def outcome(self, alpha: float, passes: int, strength: Callable[[float], float]) -> Outcome:
        """What is compared."""
        return alpha, passes, strength(0.0), strength(1.0)


# ---- models and rows


def prepare(options: argparse.Namespace, folder: Path) -> World:
    """Write both checkpoints to `folder`."""
    model, _ = build_model(options.model, 1, device=options.device, dtype=torch.float32)
    if options.model == "tiny":  # small fresh weights repeat their last token
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(6 if weight.ndim > 1 else 1)
    rows = CalibrationRows(known_rows(model, options.rows, 1), known_rows(model, max(1, options.rows // 3), 2))
    tokenizer = load_tokenizer(ModelConfig(id="tiny" if options.model in SHAPES else options.model))
    model.save_pretrained(folder / "target")
    unlearn(model, rows.retain)
    model.save_pretrained(folder / "unlearned")
    for name in ("target", "unlearned"):
        tokenizer.save_pretrained(folder / name)
    return World(folder / "target", folder / "unlearned", rows)


def unlearn(model: Any, rows: Sequence[Encoded]) -> None:
    """Noise on the matrices, more and more of it, until about a quarter of what was known is gone."""
    generator, size = torch.Generator().manual_seed(3), 1e-4
    while float(np.mean(strengths(score(model, rows, batch_size=16)))) > 0.75:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    noise = torch.randn(weight.shape, generator=generator).to(weight)
                    weight.add_(noise, alpha=size * float(weight.std()))
        size *= 2


def known_rows(model: Any, count: int, seed: int) -> list[Encoded]:
    """Random prompts of one length, each with a part of the model's own greedy continuation as answer."""
    draw = np.random.default_rng(seed)
    device = next(model.parameters()).device
    prompts = torch.from_numpy(draw.integers(3, model.config.vocab_size - 3, (count, PROMPT))).to(device)
    rows = []
    for start in range(0, count, 16):
        for ids in generate(model, prompts[start : start + 16], ANSWER).cpu().numpy().astype(np.int32):
            length = int(draw.integers(ANSWER // 2, ANSWER + 1))
            name = f"{seed}-{len(rows)}"
            rows.append(Encoded(Example(name, "", ""), ids[: PROMPT + length], PROMPT, length, 0))
    return rows


def generate(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy continuation [rows, prompt + new]; nothing ends it early."""
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        end = {"eos_token_id": None, "pad_token_id": 0}
        made: torch.Tensor = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, **end)
    return made


# ---- the sides


def ours(world: World, batch_size: int) -> Outcome:
    """Calibration as `expunge calibrate --no-curve` does it."""
    target, unlearned = (ModelConfig(id=str(place)) for place in (world.target, world.unlearned))
    evaluate = EvaluateConfig(batch_size=batch_size)
    found = calibrate_model(target, unlearned, world.rows, Settings(KEEP, EPSILON, curve=False), evaluate)
    return world.outcome(found.alpha, found.passes.retain, lambda alpha: found.at(alpha).retain)


def reloading(world: World, strength: Callable[[Any, Sequence[Encoded]], float]) -> Outcome:
    """Plain bisection; for every α both checkpoints are read and a third model is made."""
    retained: dict[float, float] = {}

    def retain(alpha: float) -> float:
        if alpha not in retained:
            retained[alpha] = strength(mixed(world, alpha), world.rows.retain)
        return retained[alpha]

    least = KEEP * retain(0.0)
    alpha = 1.0 if retain(1.0) >= least else bisect(retain, least, 0.0, 1.0, EPSILON)
    for end in dict.fromkeys((0.0, alpha, 1.0)):
        strength(mixed(world, end), world.rows.forget)
    return world.outcome(alpha, len(retained) - 1, retain)


def mixed(world: World, alpha: float) -> Any:
    """(1 − α) of one state dict and α of the other, in a third model."""
    places = (world.target, world.unlearned, world.target)
    one, two, made = (AutoModelForCausalLM.from_pretrained(place) for place in places)
    first, second = one.state_dict(), two.state_dict()
    made.load_state_dict({name: (1 - alpha) * first[name] + alpha * second[name] for name in first})
    return made.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def generated(model: Any, rows: Sequence[Encoded]) -> float:
    """Mean extraction strength: per row the least k, by bisection, after which greedy decoding gives the rest."""
    device = next(model.parameters()).device
    found = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64)).to(device)[None]
        low, high = 0, row.answer_tokens  # with all of it given, nothing is left to be wrong
        while low < high:
            middle = (low + high) // 2
            start = row.prompt_tokens + middle
            if torch.equal(generate(model, ids[:, :start], ids.shape[1] - start), ids):
                high = middle
            else:
                low = middle + 1
        found.append(1 - high / row.answer_tokens)
    return float(np.mean(found))


def sides_of(world: World, batch_size: int) -> dict[str, Callable[[], Outcome]]:
    """Ours, the way it is commonly done, and reloading alone."""

    def scored(model: Any, rows: Sequence[Encoded]) -> float:
        return float(np.mean(strengths(score(model, rows, batch_size=batch_size))))

    return {
        "ours": lambda: ours(world, batch_size),
        "baseline": lambda: reloading(world, generated),
        "reload": lambda: reloading(world, scored),
    }


# ---- memory


@contextmanager
def sampled(highest: list[int]) -> Iterator[None]:
    """Growth of this process's anonymous memory at its highest, looked at every few milliseconds."""
    gc.collect()
    start, done = resident("RssAnon"), threading.Event()

    def look() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], resident("RssAnon") - start)
            time.sleep(0.004)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measured_memory() -> dict[str, Any]:
    """Ours against reloading, which holds what the baseline holds and is done sooner."""
    found = peaks(("ours", "reload"))
    return memory_result({"ours": found["ours"], "baseline": found["reload"]})


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = options_of(__doc__)
    parser.add_argument("--rows", type=int, help="retain rows, and a third as many forget rows; 60, or 4 with --quick")
    parser.add_argument("--rounds", type=int, help="2, or 1 with --quick")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parse(parser)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options.rows = options.rows or (4 if options.quick else 60)
    with tempfile.TemporaryDirectory() as folder:
        memory = measured_memory() if options.side is None and options.device.type == "cpu" else {}
        world = prepare(options, Path(folder))
        sides = sides_of(world, options.batch_size)
        if options.side is not None:
            highest = [0]
            with sampled(highest):
                sides[options.side]()
            print(highest[0])
            return
        found: dict[str, Outcome] = {}

        def side(name: str) -> Callable[[int], None]:
            return lambda _: found.update({name: sides[name]()})

        rounds = options.rounds or (1 if options.quick else 2)
        times = in_turn({name: side(name) for name in sides}, range(rounds), options.device)
    for name, outcome in found.items():
        print(f"{name:<9} α* {outcome[0]:.4f}, {outcome[1]} retain passes of mixed models, {times[name].median:.1f} s")
    check(found)
    result = compared(times)
    alone = compared({"ours": times["ours"], "baseline": times["reload"]})
    result |= {f"{key}_to_reloading": alone[key] for key in ("ratio", "cpu_ratio")} | memory
    alphas = {f"alpha_{name}": outcome[0] for name, outcome in found.items()}
    passes = {f"passes_{name}": outcome[1] for name, outcome in found.items()}
    retain = {"retain_target": found["ours"][2], "retain_unlearned": round(found["ours"][3], 4)}
    print_result("calibration", options, {**result, **alphas, **passes, **retain, "rows": options.rows})


def check(found: dict[str, Outcome]) -> None:
    """Ends the script, without any speed, if the sides do not find the same."""
    for name, (alpha, _, target, unlearned) in found.items():
        own = found["ours"]
        if abs(alpha - own[0]) > EPSILON * (1 + 1e-9):
            sys.exit(f"α of ours and {name} differ: {own[0]} and {alpha}; no speed is reported")
        if max(abs(target - own[2]), abs(unlearned - own[3])) > 0.01:
            sys.exit(f"strengths of ours and {name} differ: {own[2:]} and {(target, unlearned)}; no speed is reported")
    if not 0 < found["ours"][0] < 1:
        sys.exit("the unlearned model is as good or as bad as can be: nothing is searched")
    if found["ours"][1] > 8:
        sys.exit(f"calibration took {found['ours'][1]} retain passes, and 8 are promised")


if __name__ == "__main__":
    main()
