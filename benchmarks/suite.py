"""The standard suite on three models out of shared passes, against each family of metrics with passes of its own.

Target, unlearned and reference are one model with differently disturbed weights. Ours passes every row of every split
and view through each model once for scores (drift included) and once for texts. The other side does as evaluators of
this field do: each family of metrics runs its own passes over the splits that it is about, in file order, padded, with
the logits of every position and a float32 log-softmax of them; texts in file order to a batch's slowest row; drift with
both models in memory. A family is generous: all metrics of one kind that need the same tables (all variants of ROUGE;
of the truth ratio, with TOFU's test; a membership attack with what is made of its AUC) share their passes there too, as
a cache of results by name would have it, and what the reference gave is looked up. Both must give the same values.
Run: python benchmarks/suite.py [--quick] [--model tiny]
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import GenerationConfig

from common import compared, in_turn, options_of, parse, print_result, sentence, tofu_perturbed
from expunge.data.collate import Batch, pad_left_prompts, pad_right
from expunge.data.encode import Encoded, encode
from expunge.data.template import resolve_template
from expunge.data.views import viewed
from expunge.metrics.base import METRICS, Resampling, TableShelf, chosen_metrics, evaluate_metrics
from expunge.models.load import load_model
from expunge.recipe import ModelConfig
from expunge.scoring.divergence import TargetStates, divergence_table
from expunge.scoring.generate import generate
from expunge.scoring.scores import score_tables, scores_table
from expunge.scoring.tables import GENERATIONS

#: split → role; `holdout` is what membership inference compares with
SPLITS = {"forget": "forget", "holdout": "holdout", "retain": "retain"}
#: The reference comes first: results of the others look up its own.
VARIANTS = ("reference", "target", "unlearned")
#: Whose passes the metrics of a module, or one metric, are made from; a membership attack is a family of its own.
_FROM = {"forget_quality": "truth_ratio", "privleak": "mia_min_k", "privacy": "mia_min_k_plus_plus"}
_TOLERANCE = 1e-3

Key = tuple[str, str, str]  # variant, split, table
Family = tuple[str, tuple[str, ...]]  # module, and addresses of tables of the variant itself
Values = dict[Key, float | None]  # by variant, split and metric


@dataclass
class Exam:
    """Models, rows and metrics of a comparison."""

    models: dict[str, nn.Module]
    tokenizer: Any
    rows: dict[tuple[str, str], list[Encoded]]  # by split and table
    metrics: list[str]
    options: argparse.Namespace
    splits: dict[str, str]

    def values(self, tables: Mapping[Key, pa.Table], metrics: Sequence[str], variant: str) -> Values:
        """Value of every split × metric whose tables are there."""
        found: Values = {}
        for split, role in self.splits.items():
            records, _ = evaluate_metrics(TableShelf(tables), role, metrics, Resampling(200), variant, split)
            found |= {(variant, split, record["metric"]): record["value"] for record in records}
        return found


# ---- ours


def shared_passes(exam: Exam) -> Values:
    """All values from one scoring pass and one generation pass per model."""
    tables: dict[Key, pa.Table] = {}
    batch_size = exam.options.batch_size
    keys = {kind: [key for key in exam.rows if key[1].partition("/")[0] == kind] for kind in ("scores", "generations")}
    plain = {id(row) for split in exam.splits for row in exam.rows[split, "scores"]}
    states = TargetStates(wanted=lambda row: id(row) in plain)
    for variant in ("target", "unlearned", "reference"):
        model = exam.models[variant]
        rows = [row for key in keys["scores"] for row in exam.rows[key]]
        against = {"keep": states} if variant == "target" else {"against": states}
        made = score_tables(model, rows, batch_size=batch_size, tokenizer=exam.tokenizer, **against)
        tables |= _apart(exam, keys["scores"], made["scores"], variant)
        if "divergence" in made:
            drift = _apart(exam, keys["scores"], made["divergence"], variant)
            tables |= {(variant, split, "divergence"): drift[variant, split, "scores"] for split in exam.splits}
        rows = [row for key in keys["generations"] for row in exam.rows[key]]
        said = generate(
            model, exam.tokenizer, rows, max_new_tokens=exam.options.max_new_tokens, batch_size=2 * batch_size
        )
        tables |= _apart(exam, keys["generations"], said, variant)
    found: Values = {}
    for variant in VARIANTS:
        found |= exam.values(tables, exam.metrics, variant)
    return found


def _apart(exam: Exam, keys: list[tuple[str, str]], table: pa.Table, variant: str) -> dict[Key, pa.Table]:
    """The parts of a table of all rows."""
    made, start = {}, 0
    for split, name in keys:
        made[variant, split, name] = table.slice(start, len(exam.rows[split, name]))
        start += len(exam.rows[split, name])
    return made


# ---- each family with its own passes


class OwnPasses:
    """The other side; it counts its passes and the rows in them."""

    def __init__(self, exam: Exam) -> None:
        self.exam = exam
        self.passes = self.rows = 0

    def __call__(self) -> Values:
        """All values."""
        found: Values = {}
        self.passes = self.rows = 0
        for family, names in families(self.exam.metrics).items():
            tables: dict[Key, pa.Table] = {}
            for variant in VARIANTS:
                for split, table in self._wanted(names):
                    made = self._pass(variant, split, table, spread=family[0] == "mia_min_k_plus_plus")
                    if made is not None:
                        tables[variant, split, table] = made
                found |= self.exam.values(tables, names, variant)
        return found

    def _wanted(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Splits and tables of a variant that the metrics of a family are made from."""
        wanted = []
        for name in names:
            entry = METRICS.get(name)
            for split in (split for split, role in self.exam.splits.items() if role in entry.roles):
                wanted += [(need.split or split, need.table) for need in entry.addresses if need.variant is None]
        return list(dict.fromkeys(wanted))

    def _pass(self, variant: str, split: str, table: str, spread: bool) -> pa.Table | None:
        drift = table == "divergence"
        rows = self.exam.rows.get((split, "scores" if drift else table))
        if not rows or (drift and variant == "target"):
            return None
        self.passes += 1
        self.rows += len(rows)
        model = self.exam.models[variant]
        if drift:
            return self._drift(model, rows)
        return self._texts(model, rows) if table.startswith("generations") else self._scores(model, rows, spread)

    def _batches(self, rows: Sequence[Encoded]) -> Iterator[tuple[range, Batch]]:
        size = self.exam.options.batch_size
        for start in range(0, len(rows), size):
            index = range(start, min(start + size, len(rows)))
            yield index, pad_right([rows[i] for i in index], list(index), 0).to(self.exam.options.device)

    def _logprobs(self, model: Any, batch: Batch) -> torch.Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[:, :-1].float().log_softmax(-1)  # type: ignore[no-any-return]

    def _scores(self, model: nn.Module, rows: list[Encoded], spread: bool) -> pa.Table:
        parts: dict[int, list[np.ndarray]] = {}
        for index, batch in self._batches(rows):
            whole = self._logprobs(model, batch)
            targets, keep = batch.input_ids[:, 1:], batch.supervised[:, :-1]
            logprob = whole.gather(-1, targets[..., None])[..., 0][keep]
            hit = (whole.argmax(-1) == targets)[keep]
            entropy = deviation = torch.zeros_like(logprob)
            if spread:
                part = whole[keep]
                probability = part.exp()
                mean = (probability * part).sum(-1)
                entropy, deviation = -mean, ((probability * part.square()).sum(-1) - mean.square()).clamp(min=0).sqrt()
            ends = np.cumsum([rows[i].supervised_tokens for i in index])[:-1]
            columns = [np.split(column.cpu().numpy(), ends) for column in (logprob, hit, entropy, deviation)]
            parts |= dict(zip(index, map(list, zip(*columns, strict=True)), strict=True))
        return scores_table(rows, parts, self.exam.tokenizer)

    def _drift(self, model: nn.Module, rows: list[Encoded]) -> pa.Table:
        values: dict[int, np.ndarray] = {}
        for index, batch in self._batches(rows):
            theirs, own = (self._logprobs(each, batch) for each in (self.exam.models["target"], model))
            kl = (theirs.exp() * (theirs - own)).sum(-1)[batch.supervised[:, :-1]].cpu().numpy()
            ends = np.cumsum([rows[i].supervised_tokens for i in index])[:-1]
            values |= dict(zip(index, np.split(kl, ends), strict=True))
        return divergence_table(rows, values)

    def _texts(self, model: Any, rows: list[Encoded]) -> pa.Table:
        tokenizer, options = self.exam.tokenizer, self.exam.options
        end = tokenizer.eos_token_id
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        config = GenerationConfig(
            do_sample=False, max_new_tokens=options.max_new_tokens, eos_token_id=end, pad_token_id=pad
        )
        columns: dict[str, list[Any]] = {name: [] for name in GENERATIONS.names}
        for start in range(0, len(rows), 2 * options.batch_size):
            batch = rows[start : start + 2 * options.batch_size]
            ids, mask = (tensor.to(options.device) for tensor in pad_left_prompts(batch, pad))
            said = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
            for row, tokens in zip(batch, said, strict=True):
                stopped = end in tokens
                new = tokens[: tokens.index(end)] if stopped else tokens
                text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                example = row.example
                cells = [example.id, example.candidate, example.task, example.prompt, example.answer, text]
                for name, cell in zip(GENERATIONS.names, [*cells, len(new), stopped], strict=True):
                    columns[name].append(cell)
        return pa.Table.from_pydict(columns, schema=GENERATIONS)


def families(metrics: Sequence[str]) -> dict[Family, list[str]]:
    """Metrics of one kind that are made from the same tables of a variant."""
    found: dict[Family, list[str]] = {}
    for name in metrics:
        entry = METRICS.get(name)
        module = entry.function.__module__.rpartition(".")[2]
        own = tuple(dict.fromkeys(need for need in entry.needs if "@" not in need))
        if module in ("membership", "privacy"):
            kind = _FROM.get(name, name.removeprefix("s_"))
        else:
            kind = _FROM.get(module, module)
        found.setdefault((kind, own), []).append(name)
    return found


# ---- the comparison


def build(options: argparse.Namespace, count: int) -> Exam:
    """Three models, and the rows of every table of the standard suite that made-up rows have."""
    loaded = load_model(ModelConfig(id=options.model))
    base: Any = loaded.model.to(device=options.device, dtype=options.weights).eval()
    splits = {name: SPLITS[name] for name in options.splits.split(",")}
    template = resolve_template(options.template, loaded.tokenizer)
    names = chosen_metrics(None, "standard")
    wanted = {need.table for name in names for need in METRICS.get(name).addresses}
    rows = {}
    for number, split in enumerate(splits):
        examples = tofu_perturbed(count, seed=100 * number)
        for table in sorted(wanted - {"divergence"}):
            view = table.partition("/")[2]
            made = encode(viewed(examples, view) if view else examples, loaded.tokenizer, template, 512)
            if made:
                rows[split, table] = made
    models = {"reference": base, "target": disturbed(base, 1, 0.02), "unlearned": disturbed(base, 2, 0.05)}
    return Exam(models, loaded.tokenizer, rows, names, options, splits)


def disturbed(model: Any, seed: int, part: float) -> Any:
    """A copy whose matrices have noise of a part of their own size."""
    made = copy.deepcopy(model)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise, alpha=part * float(weight.float().std()))
    return made


def check(own: Values, theirs: Values) -> tuple[int, float]:
    """Number of values, and the largest difference; ends the script if the sides disagree."""
    if set(own) != set(theirs):
        sys.exit(f"the sides have different values: {sorted(set(own) ^ set(theirs))[:5]}; no speed is reported")
    largest = 0.0
    for key, value in own.items():
        other = theirs[key]
        if value is None or other is None:
            difference = 0.0 if value is other else math.inf
        else:
            difference = abs(value - other) / max(1.0, abs(other))
        if not difference <= _TOLERANCE:
            sys.exit(f"{' · '.join(key)}: {value} against {other}; no speed is reported")
        largest = max(largest, difference)
    return len(own), largest


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = options_of(__doc__, template="auto")
    parser.add_argument("--rows", type=int, help="of each split: 40, or 2 with --quick")
    parser.add_argument("--splits", help="forget,holdout,retain, or without retain with --quick")
    parser.add_argument("--max-new-tokens", type=int, help="64, or 8 with --quick")
    parser.add_argument("--batch-size", type=int, default=16, help="of scoring; texts come in twice as large batches")
    options = parse(parser)
    count = options.rows or (2 if options.quick else 40)
    options.splits = options.splits or ("forget,holdout" if options.quick else ",".join(SPLITS))
    options.max_new_tokens = options.max_new_tokens or (8 if options.quick else 64)
    exam = build(options, count)
    own_passes = OwnPasses(exam)
    results: dict[str, Values] = {}

    def side(name: str, work: Any) -> Any:
        def run(_: int) -> None:
            with torch.inference_mode():
                results[name] = work()

        return run

    sides = {"ours": side("ours", lambda: shared_passes(exam)), "baseline": side("baseline", own_passes)}
    found = compared(in_turn(sides, range(1), options.device))
    count, largest = check(results["ours"], results["baseline"])
    made = {metric for _, _, metric in results["ours"]}
    scored = {metric for (_, _, metric), value in results["ours"].items() if value is not None}
    theirs = f"{own_passes.passes} passes over {own_passes.rows} rows"
    print(
        f"{len(made)} metrics, {len(scored)} of them with a value, on {len(VARIANTS)} models and {len(exam.splits)} "
        f"splits: {count} values; {theirs} on the other side, {2 * len(VARIANTS)} passes over "
        f"{len(VARIANTS) * sum(map(len, exam.rows.values()))} rows on ours; {sentence(found)}",
        flush=True,
    )
    facts = {"metrics": len(made), "values": count, "passes": own_passes.passes, "largest_difference": largest}
    print_result("suite", options, {**found, **facts, "batch_size": options.batch_size})


if __name__ == "__main__":
    main()
