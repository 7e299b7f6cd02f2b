"""Scoring at supervised positions in sorted batches against a plain loop over the model.

Both sides give the log-probability and the argmax hit of every supervised token, in float32, at one batch size. The
plain loop takes rows in file order, pads to the longest, keeps all logits, and normalises them whole; ours also
computes entropy and spread of every distribution. Rows are in the model's own template, as `expunge eval` has them.
Run: python benchmarks/scoring.py [--quick] [--model tiny]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded, encode
from expunge.data.example import Example
from expunge.data.template import PLAIN, resolve_template
from expunge.models.load import load_model
from expunge.recipe import ModelConfig
from expunge.scoring.prefix import common_tokens
from expunge.scoring.scores import score

TEXT = (
    "the author wrote a novel about her father who worked as florist in harbour town and won an award for poetry "
    "his books often explore family memory journeys between cities while critics praise their style of writing "
    "what genre does she mainly publish where was he born which of these has been translated into many languages"
)

#: Logarithmic mean and spread of the words of TOFU's questions and answers (median 14 and 29 words).
QUESTION, ANSWER = (14, 0.27), (29, 0.35)


def tofu_like(count: int, seed: int = 0) -> list[Example]:
    """Made-up question–answer rows whose lengths are spread as TOFU's are."""
    choice, words = random.Random(seed), TEXT.split()

    def text(median: int, spread: float, low: int, high: int) -> str:
        size = min(high, max(low, round(median * choice.lognormvariate(0, spread))))
        return " ".join(choice.choices(words, k=size)).capitalize()

    return [Example(str(i), text(*QUESTION, 7, 40) + "?", text(*ANSWER, 6, 66) + ".") for i in range(count)]


def plain_loop(model: Any, rows: list[Encoded], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and hits of all supervised tokens, row after row."""
    logprobs, hits = [], []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            index = range(start, min(start + batch_size, len(rows)))
            batch = pad_right([rows[i] for i in index], list(index), 0)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
            targets, keep = batch.input_ids[:, 1:], batch.supervised[:, :-1]
            logprob = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            logprobs.append(logprob[keep].numpy())
            hits.append((logits.argmax(-1) == targets)[keep].numpy())
    return np.concatenate(logprobs), np.concatenate(hits)


def scoring_pass(model: Any, rows: list[Encoded], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The same numbers from the table of the scoring pass."""
    table = score(model, rows, batch_size=batch_size)
    logprob, hit = (table.column(name).combine_chunks().flatten() for name in ("logprob", "hit"))
    return logprob.to_numpy(), hit.to_numpy(zero_copy_only=False)


def compare(model: Any, rows: list[Encoded], batch_size: int, rounds: int) -> dict[str, Any]:
    """Median rows/s of both sides, run in turn, and how far their numbers are apart.

    `cpu_ratio` compares processor time, which neighbours on a shared machine disturb less than time on the clock.
    """
    sides: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {"ours": scoring_pass, "baseline": plain_loop}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for side in sides.values():  # first calls allocate and plan
        side(model, rows[:4], batch_size)
    for number in range(rounds):
        for name, side in sides.items():
            start, used = time.perf_counter(), time.process_time()
            results[name] = side(model, rows, batch_size)
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)
            print(f"round {number + 1}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    difference = float(np.abs(results["ours"][0] - results["baseline"][0]).max())
    flipped = int((results["ours"][1] != results["baseline"][1]).sum())
    if difference > 1e-3 or flipped > 1e-4 * len(results["ours"][1]):
        sys.exit(f"the two sides disagree: log-probs by {difference:.2g}, {flipped} hits; no speed is reported")
    ours, baseline = (len(rows) / statistics.median(seconds[name]) for name in ("ours", "baseline"))
    print(f"ours {ours:.1f} rows/s, plain loop {baseline:.1f} rows/s: {ours / baseline:.2f} ×")
    return {
        "ratio": round(ours / baseline, 3),
        "ours": round(ours, 3),
        "baseline": round(baseline, 3),
        "unit": "rows/s",
        "cpu_ratio": round(statistics.median(processor["baseline"]) / statistics.median(processor["ours"]), 3),
        "max_logprob_difference": difference,
        "hits_that_differ": flipped,
    }


def rows_in(template: str, count: int, loaded: Any) -> list[Encoded]:
    """TOFU-like rows in a template, and a line on their lengths."""
    rows = encode(tofu_like(count), loaded.tokenizer, resolve_template(template, loaded.tokenizer), 512)
    prompts, answers = ([getattr(row, name) for row in rows] for name in ("prompt_tokens", "answer_tokens"))
    print(
        f"{count} rows, template {template!r}: prompts of {min(prompts)}–{max(prompts)} tokens, {common_tokens(rows)}"
        f" of them shared by all; answers of {min(answers)}–{max(answers)}, {statistics.mean(answers):.0f} on average"
    )
    return rows


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub id")
    parser.add_argument("--quick", action="store_true", help="few rows, one template, under a minute")
    parser.add_argument("--rows", type=int, help="240, or 48 with --quick")
    parser.add_argument("--rounds", type=int, help="3, or 2 with --quick")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    count = options.rows or (48 if options.quick else 240)
    rounds = options.rounds or (2 if options.quick else 3)

    loaded = load_model(ModelConfig(id=options.model))
    print(f"{options.model} in float32, batch size {options.batch_size}, {torch.get_num_threads()} threads")
    result = compare(loaded.model, rows_in("auto", count, loaded), options.batch_size, rounds)
    result |= {"model": options.model, "batch_size": options.batch_size, "rows": count}
    if not options.quick:
        # without a chat template there is next to nothing to share: what sorting and fewer logits give alone
        bare = compare(loaded.model, rows_in(PLAIN, count, loaded), options.batch_size, rounds)
        result["ratio_without_shared_beginning"] = bare["ratio"]
    print(json.dumps({"name": "scoring", **result}))


if __name__ == "__main__":
    main()
