"""Generation in batches that rows leave when they have ended and others enter, against one prompt at a time.

Both sides decode greedily in float32 up to the same number of new tokens and must say the same texts. One prompt at a
time is how SemEval-2025 Task 4's script evaluates: `transformers`' generate, a key–value cache, no padding. Rows are
invented in the shape of LUME (`fictitious`), or those of a LUME file (--data). They are asked in the model's own chat
template, as `expunge eval` does, and (not with --quick) as the bare prompt, as that script does. With --quick, one at
a time is timed on every fourth row alone, and seconds per row are compared.
Run: python benchmarks/generation.py [--quick] [--model tiny] [--data forget_val.jsonl]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import pyarrow as pa
import torch
from transformers import GenerationConfig

from common import Times, compared, in_turn, options_of, parse, print_result, sentence
from expunge.data.benchmarks.fictitious import fictitious
from expunge.data.encode import Encoded, encode
from expunge.data.example import Example
from expunge.data.load import load_examples
from expunge.data.template import resolve_template
from expunge.models.load import Loaded, load_model
from expunge.recipe import ModelConfig, SourceConfig
from expunge.scoring.generate import generate

#: Texts of a near tie may differ with the order of sums.
_MAY_DIFFER = 0.02


def one_at_a_time(loaded: Loaded, rows: list[Encoded], limit: int) -> list[str]:
    """The greedy text of each row, in file order."""
    model: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    device = next(model.parameters()).device
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    texts = []
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row.input_ids[None, : row.prompt_tokens]).long().to(device)
            said = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            new = said[0, row.prompt_tokens :]
            texts.append(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def invented(count: int) -> list[Example]:
    """Rows to forget and to keep, a few of each task."""
    splits = fictitious()
    rows = [example for name in ("forget", "retain", "holdout") for example in splits[name].examples]
    step = len(rows) / count
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]


def compare(loaded: Loaded, rows: list[Encoded], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both sides, run in turn; ends the script if their texts differ."""
    limit, batch_size = options.max_new_tokens, options.batch_size
    sample = rows[::4] if options.quick else rows
    tables: list[pa.Table] = []
    texts: list[list[str]] = []

    def ours(_: int) -> None:
        tables.append(generate(loaded.model, loaded.tokenizer, rows, max_new_tokens=limit, batch_size=batch_size))

    def baseline(_: int) -> None:
        texts.append(one_at_a_time(loaded, sample, limit))

    generate(loaded.model, loaded.tokenizer, rows[:2], max_new_tokens=2, batch_size=2)  # the first call allocates
    one_at_a_time(loaded, rows[:1], 2)
    times = in_turn({"ours": ours, "baseline": baseline}, range(options.rounds), options.device)
    for name, count in (("ours", len(rows)), ("baseline", len(sample))):
        times[name] = Times(
            *([value / count for value in part] for part in (times[name].seconds, times[name].processor))
        )
    found = {**compared(times), "unit": "s per row"}
    said = dict(zip([id(row) for row in rows], tables[-1].column("generated").to_pylist(), strict=True))
    differing = sum(said[id(row)] != text for row, text in zip(sample, texts[-1], strict=True))
    if differing > _MAY_DIFFER * len(sample):
        sys.exit(f"{differing} of {len(sample)} texts differ; no speed is reported")
    lengths = tables[-1].column("new_tokens").to_pylist()
    print(
        f"{len(rows)} rows, {min(lengths)}–{max(lengths)} new tokens, {statistics.mean(lengths):.0f} on average: "
        f"a row takes {sentence(found)}",
        flush=True,
    )
    return {**found, "texts_that_differ": differing, "new_tokens": sum(lengths)}


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = options_of(__doc__, template="auto")
    parser.add_argument("--rows", type=int, help="128, or 64 with --quick")
    parser.add_argument("--rounds", type=int, help="2, or 1 with --quick")
    parser.add_argument("--max-new-tokens", type=int, help="128, or 32 with --quick")
    parser.add_argument("--batch-size", type=int, default=32, help="the recipe's default")
    parser.add_argument("--data", help="a LUME file (jsonl) instead of invented rows")
    options = parse(parser)
    count = options.rows or (64 if options.quick else 128)
    options.rounds = options.rounds or (1 if options.quick else 2)
    options.max_new_tokens = options.max_new_tokens or (32 if options.quick else 128)
    loaded = load_model(ModelConfig(id=options.model))
    loaded.model.to(device=options.device, dtype=options.weights).eval()
    examples = load_examples(SourceConfig(path=options.data, limit=count)) if options.data else invented(count)
    result: dict[str, Any] = {"batch_size": options.batch_size, "rows": len(examples)}
    for template in (options.template,) if options.quick else (options.template, "raw"):
        rows = encode(examples, loaded.tokenizer, resolve_template(template, loaded.tokenizer), 1024)
        print(f"template {template!r}:", flush=True)
        found = compare(loaded, rows, options)
        if template == options.template:
            result |= found
        else:
            result["ratio_of_bare_prompts"] = found["ratio"]
    print_result("generation", options, {**result, "max_new_tokens": options.max_new_tokens})


if __name__ == "__main__":
    main()
