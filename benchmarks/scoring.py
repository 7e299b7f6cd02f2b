"""Scoring at supervised positions in sorted batches against a plain loop over the model.

Both sides give the log-probability and the argmax hit of every supervised token, in float32, at one batch size. The
plain loop takes rows in file order, pads to the longest, keeps all logits, and normalises them whole; ours also
computes entropy and spread of every distribution. Rows are in the model's own template, as `expunge eval` has them.
Run: python benchmarks/scoring.py [--quick] [--model tiny]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from common import build_model, compared, in_turn, options_of, parse, print_result
from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.data.template import PLAIN
from expunge.scoring.prefix import common_tokens
from expunge.scoring.scores import score

Table = tuple[np.ndarray, np.ndarray]


def plain_loop(model: Any, rows: list[Encoded], batch_size: int) -> Table:
    """Log-probabilities and hits of all supervised tokens, row after row."""
    logprobs, hits = [], []
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            index = range(start, min(start + batch_size, len(rows)))
            batch = pad_right([rows[i] for i in index], list(index), 0).to(device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
            targets, keep = batch.input_ids[:, 1:], batch.supervised[:, :-1]
            logprob = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            logprobs.append(logprob[keep].cpu().numpy())
            hits.append((logits.argmax(-1) == targets)[keep].cpu().numpy())
    return np.concatenate(logprobs), np.concatenate(hits)


def scoring_pass(model: Any, rows: list[Encoded], batch_size: int) -> Table:
    """The same numbers from the table of the scoring pass."""
    table = score(model, rows, batch_size=batch_size)
    logprob, hit = (table.column(name).combine_chunks().flatten() for name in ("logprob", "hit"))
    return logprob.to_numpy(), hit.to_numpy(zero_copy_only=False)


def compare(model: Any, rows: list[Encoded], options: argparse.Namespace) -> dict[str, Any]:
    """Median rows/s of both sides, run in turn, and how far their numbers are apart."""
    results: dict[str, Table] = {}

    def side(name: str, table: Callable[..., Table]) -> Callable[[int], None]:
        def run(_: int) -> None:
            results[name] = table(model, rows, options.batch_size)

        table(model, rows[:4], options.batch_size)  # the first call allocates and plans
        return run

    sides = {"ours": side("ours", scoring_pass), "baseline": side("baseline", plain_loop)}
    found = compared(in_turn(sides, range(options.rounds), options.device))
    difference = float(np.abs(results["ours"][0] - results["baseline"][0]).max())
    flipped = int((results["ours"][1] != results["baseline"][1]).sum())
    if difference > 1e-3 or flipped > 1e-4 * len(results["ours"][1]):
        sys.exit(f"the two sides disagree: log-probs by {difference:.2g}, {flipped} hits; no speed is reported")
    ours, baseline = (len(rows) / found[name] for name in ("ours", "baseline"))
    print(f"ours {ours:.1f} rows/s, plain loop {baseline:.1f} rows/s: {found['ratio']:.2f} ×", flush=True)
    speeds = {"ours": round(ours, 3), "baseline": round(baseline, 3), "unit": "rows/s"}
    return {**found, **speeds, "max_logprob_difference": difference, "hits_that_differ": flipped}


def describe(rows: Sequence[Encoded], template: str) -> None:
    """A line on the rows' lengths."""
    prompts, answers = ([getattr(row, name) for row in rows] for name in ("prompt_tokens", "answer_tokens"))
    print(
        f"{len(rows)} rows, template {template!r}: prompts of {min(prompts)}–{max(prompts)} tokens, "
        f"{common_tokens(rows)} of them shared by all; answers of {min(answers)}–{max(answers)}, "
        f"{statistics.mean(answers):.0f} on average"
    )


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = options_of(__doc__, template="auto")
    parser.add_argument("--rows", type=int, help="240, or 48 with --quick")
    parser.add_argument("--rounds", type=int, help="3, or 2 with --quick")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parse(parser)
    count = options.rows or (48 if options.quick else 240)
    options.rounds = options.rounds or (2 if options.quick else 3)
    result: dict[str, Any] = {"batch_size": options.batch_size, "rows": count}
    # without a chat template there is next to nothing to share: what sorting and fewer logits give alone
    for template in (options.template,) if options.quick else (options.template, PLAIN):
        model, rows = build_model(options.model, count, device=options.device, dtype=options.weights, template=template)
        describe(rows, template)
        found = compare(model, rows, options)
        if template == options.template:
            result |= found
        else:
            result["ratio_without_shared_beginning"] = found["ratio"]
    print_result("scoring", options, result)


if __name__ == "__main__":
    main()
