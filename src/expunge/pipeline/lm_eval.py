"""Tasks of lm-evaluation-harness, run through its own API on a model that is in memory (extra `eval`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from expunge.data.hub import cache_alone
from expunge.data.network import hub_answers
from expunge.errors import UserError
from expunge.scoring.tables import RECORD_KEYS

#: The split under which results stand among the records of an evaluation; benchmarks look for them there.
SPLIT = "lm_eval"
#: Metrics of a task in the order in which one of them stands for it.
_MAIN = ("acc", "acc_norm", "exact_match", "mc2", "mc1", "f1", "word_perplexity")
_Z = 1.959964  # two-sided 95% of a normal distribution


@dataclass(frozen=True)
class TaskValue:
    """One number of lm-eval's, with the standard error that it gives."""

    value: float
    stderr: float | None
    n: int


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
    folder: Path | None = None,
) -> dict[str, dict[str, TaskValue]]:
    """Task or group → metric → value, as lm-eval counts. `limit` takes the first rows of each task, for a try.

    `folder` holds further task files (YAML), whose data may be local.
    Raises UserError if lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    simple_evaluate, wrap, manager = _harness(folder)
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            raise UserError(f"lm-eval has no task '{task}'", _near(task, known))
    if not tasks:
        raise UserError("no lm-eval task is named", "for instance: mmlu, wmdp_bio")
    was_training = model.training
    settings = {"limit": limit, "task_manager": manager, "log_samples": False, "bootstrap_iters": 1000}
    try:
        wrapped = wrap(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)
        with cache_alone(active=not hub_answers()):
            found = simple_evaluate(model=wrapped, tasks=list(tasks), **settings)
    except Exception as error:  # its tasks fetch their data from the hub, and fail in as many ways as that can
        if not _about_data(error):
            raise
        raise UserError(
            f"lm-eval cannot load the data of {', '.join(tasks)}: {' '.join(str(error).split())[:200]}",
            "they come from the hub: run once with a network, then HF_DATASETS_OFFLINE=1 takes them from the cache",
        ) from error
    finally:
        model.train(was_training)
    if found is None:  # only the first of several processes is told
        return {}
    return {task: _values(task, numbers, found.get("n-samples", {})) for task, numbers in _asked(found, tasks).items()}


def lm_eval_records(results: Mapping[str, Mapping[str, TaskValue]], variant: str) -> list[dict[str, Any]]:
    """One record (RECORD_KEYS) for each task, under the split "lm_eval" with the task as metric."""
    records = []
    for task, numbers in results.items():
        metric = next((name for name in _MAIN if name in numbers), next(iter(numbers), None))
        if metric is None:
            continue
        found = numbers[metric]
        reach = None if found.stderr is None else _Z * found.stderr
        cells = {
            "variant": variant,
            "split": SPLIT,
            "metric": task,
            "value": found.value,
            "ci_low": None if reach is None else found.value - reach,
            "ci_high": None if reach is None else found.value + reach,
            "n": found.n,
            "unscored": 0,
            "direction": "none",  # whether a task is to be forgotten or kept is for the benchmark to say
            "note": f"lm-eval's {metric}",
        }
        records.append({key: cells.get(key) for key in RECORD_KEYS})
    return records


def _near(task: str, known: set[str]) -> str:
    near = get_close_matches(task, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else "all of them are listed by: lm-eval ls tasks"


def _harness(folder: Path | None) -> tuple[Any, Any, Any]:
    """lm-eval's evaluation, its model class, and its tasks. Raises UserError if it is not installed."""
    try:
        evaluate = import_module("lm_eval").simple_evaluate
        wrap = import_module("lm_eval.models.huggingface").HFLM
        manager = import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        raise UserError(
            f"lm-eval tasks need the package lm-eval ({error})", "install it: pip install 'expunge[eval]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return evaluate, wrap, manager(include_path=None if folder is None else str(folder))


def _asked(found: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The results of what was asked for: a group's own (mmlu), without those of its parts."""
    every = {**found.get("results", {}), **found.get("groups", {})}
    return {task: every[task] for task in tasks if task in every}


def _values(task: str, numbers: Mapping[str, Any], samples: Mapping[str, Mapping[str, int]]) -> dict[str, TaskValue]:
    """lm-eval's keys are "acc,none" and "acc_stderr,none": metric and filter."""
    count = int(samples.get(task, {}).get("effective", 0) or numbers.get("sample_len", 0) or 0)
    values = {}
    for key, value in numbers.items():
        metric, _, answer_filter = key.partition(",")
        if not answer_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{metric}_stderr,{answer_filter}")
        name = metric if answer_filter == "none" else f"{metric} ({answer_filter})"
        values[name] = TaskValue(float(value), float(error) if isinstance(error, int | float) else None, count)
    return values


def _about_data(error: BaseException) -> bool:
    """Whether an error, or one behind it, came from loading a data set."""
    seen: BaseException | None = error
    while seen is not None:
        module = type(seen).__module__
        if module.startswith(("datasets", "huggingface_hub", "requests", "httpx", "fsspec")):
            return True
        if isinstance(seen, ConnectionError | FileNotFoundError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
