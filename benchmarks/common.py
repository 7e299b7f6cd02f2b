"""What the benchmarks share: rows and models, two sides timed in turn, peak memory, and the printed result."""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from expunge.data.encode import Encoded, encode
from expunge.data.example import Example
from expunge.data.template import PLAIN, resolve_template
from expunge.models.load import load_model
from expunge.recipe import ModelConfig

#: A call with the number of a step (or round); what it returns is the side's own affair.
Side = Callable[[int], Any]

TEXT = (
    "the author wrote a novel about her father who worked as florist in harbour town and won an award for poetry "
    "his books often explore family memory journeys between cities while critics praise their style of writing "
    "what genre does she mainly publish where was he born which of these has been translated into many languages"
)

#: Median, logarithmic spread, least and most words of TOFU's questions and answers.
QUESTION, ANSWER = (14, 0.27, 7, 40), (29, 0.35, 6, 66)
#: Tokens per word of such a row: prompts with the words of the plain template, answers with their terminator.
PROMPT_TOKENS, ANSWER_TOKENS = 1.5, 1.17

#: Llamas with random weights at the shapes of published models, and one that is wide for its depth.
SHAPES: dict[str, dict[str, Any]] = {
    "wide": {
        "vocab_size": 49152,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-1b": {  # Llama 3.2 1B
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-7b": {  # Llama 2 7B
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}


# ---- options


def options_of(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help=f"alias, folder or hub id; or random weights: {', '.join(SHAPES)}"
    )
    parser.add_argument("--quick", action="store_true", help="few steps, about a minute")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--weights", choices=["float32", "bfloat16"], help="dtype in memory; bfloat16 for llama-7b, else float32"
    )
    parser.add_argument("--template", default=PLAIN, help="of the rows, where the model has a tokenizer")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with device and dtypes as torch has them."""
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.device = torch.device(options.device)
    options.weights = getattr(torch, options.weights or ("bfloat16" if options.model == "llama-7b" else "float32"))
    return options


# ---- rows and models


def word_count(choice: random.Random, median: int, spread: float, least: int, most: int) -> int:
    """Words of a question or an answer."""
    return min(most, max(least, round(median * choice.lognormvariate(0, spread))))


def tofu_like(count: int, seed: int = 0) -> list[Example]:
    """Made-up question–answer rows whose lengths are spread as TOFU's are."""
    choice, words = random.Random(seed), TEXT.split()

    def text(*spread: Any) -> str:
        return " ".join(choice.choices(words, k=word_count(choice, *spread))).capitalize()

    return [Example(str(i), text(*QUESTION) + "?", text(*ANSWER) + ".") for i in range(count)]


def tofu_perturbed(count: int, seed: int = 0) -> list[Example]:
    """As `tofu_like`, with a paraphrased question, a paraphrased answer and five wrong answers to each row."""
    others = [tofu_like(count, seed + 1 + number) for number in range(7)]
    rows = []
    for i, example in enumerate(tofu_like(count, seed)):
        asked, said, *wrong = (other[i] for other in others)
        extra = {
            "paraphrased_question": asked.prompt,
            "paraphrased_answer": said.answer,
            "perturbed_answer": [other.answer for other in wrong],
        }
        rows.append(replace(example, extra=extra))
    return rows


def random_rows(count: int, vocabulary: int, seed: int = 0) -> list[Encoded]:
    """Rows of random tokens, as long as TOFU's: for models that have no tokenizer."""
    choice, made = random.Random(seed), np.random.default_rng(seed)
    rows = []
    for i in range(count):
        prompt = round(PROMPT_TOKENS * word_count(choice, *QUESTION))
        answer = round(ANSWER_TOKENS * word_count(choice, *ANSWER))
        ids = made.integers(3, vocabulary, prompt + answer, dtype=np.int32)
        rows.append(Encoded(Example(str(i), "", ""), ids, prompt, answer, 0))
    return rows


def build_model(
    name: str, count: int, *, device: torch.device, dtype: torch.dtype, template: str = PLAIN
) -> tuple[Any, list[Encoded]]:
    """A model in evaluation mode on the device, the same at every call, and rows for it."""
    if name in SHAPES:
        # padding is given by lengths; an id of its own would only zero one embedding
        config = LlamaConfig(**SHAPES[name], max_position_embeddings=2048, pad_token_id=None)
        torch.manual_seed(0)
        with device:
            model: Any = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
        return model.eval(), random_rows(count, config.vocab_size)
    logging.disable_progress_bar()
    loaded = load_model(ModelConfig(id=name))
    rows = encode(tofu_like(count), loaded.tokenizer, resolve_template(template, loaded.tokenizer), 512)
    return loaded.model.to(device=device, dtype=dtype), rows


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bfloat16 where training has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ---- time


@dataclass
class Times:
    """Seconds of each call: by the clock, and of this process's processor time."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the seconds by the clock."""
        return statistics.median(self.seconds)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed(times: Times, device: torch.device) -> Iterator[None]:
    """Add the time of what happens within."""
    synchronize(device)
    began, used = time.perf_counter(), time.process_time()
    yield
    synchronize(device)
    times.seconds.append(time.perf_counter() - began)
    times.processor.append(time.process_time() - used)


def in_turn(sides: Mapping[str, Side], numbers: Iterable[int], device: torch.device) -> dict[str, Times]:
    """The time of each side at each number; the sides take turns, and take turns at being first."""
    times = {name: Times() for name in sides}
    order = list(sides)
    for number in numbers:
        for name in order:
            with timed(times[name], device):
                sides[name](number)
        order.reverse()
    return times


def compared(times: Mapping[str, Times], own_side: str = "ours") -> dict[str, Any]:
    """How many times faster our side is than `baseline`: medians, the range of the pairs, and processor time.

    Neighbours on a shared machine disturb processor time less than time on the clock; on a GPU it says nothing.
    """
    ours, baseline = times[own_side], times["baseline"]
    pairs = sorted(theirs / own for own, theirs in zip(ours.seconds, baseline.seconds, strict=True))
    return {
        "ratio": round(baseline.median / ours.median, 3),
        "ratio_of_pairs": [round(pairs[0], 3), round(pairs[-1], 3)],
        "cpu_ratio": round(statistics.median(baseline.processor) / max(statistics.median(ours.processor), 1e-9), 3),
        "ours": round(ours.median, 4),
        "baseline": round(baseline.median, 4),
        "unit": "s",
    }


def sentence(found: Mapping[str, Any], start: str = "") -> str:
    """What `compared` found, in words; `start` is what its keys begin with."""
    ours, baseline, ratio, processor = (found[f"{start}{key}"] for key in ("ours", "baseline", "ratio", "cpu_ratio"))
    return f"{ours:.3f} s against {baseline:.3f} s: {ratio} × (processor time: {processor} ×)"


# ---- memory


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def free() -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_peak(work: Callable[[], object], device: torch.device) -> None:
    """In a child process: do the work, print by how much memory grew at its peak (on a GPU: what it held there)."""
    before = resident("VmRSS")
    work()
    print(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before)


def peaks(sides: Sequence[str] = ("ours", "baseline")) -> dict[str, int]:
    """Peak bytes of each side: this script, called again with --side, in a process of its own."""
    found = {}
    for side in sides:
        command = [sys.executable, sys.argv[0], *sys.argv[1:], "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"the {side} side failed in a process of its own; no result is reported")
        found[side] = int(done.stdout.split()[-1])
    return found


def memory_result(found: Mapping[str, int]) -> dict[str, Any]:
    """Peak memory of `ours` against `baseline`."""
    return {
        "memory_ratio": round(found["ours"] / found["baseline"], 3),
        "memory_ours_mb": found["ours"] >> 20,
        "memory_baseline_mb": found["baseline"] >> 20,
    }


# ---- results


def agree(values: Mapping[str, Sequence[float]], tolerance: float, what: str = "losses") -> None:
    """Ends the script, without any speed, if the sides do not compute the same."""
    for side in values.values():
        for own, theirs in zip(side, values["baseline"], strict=True):
            if not abs(own - theirs) <= tolerance * abs(theirs):  # NaN disagrees too
                sys.exit(f"the {what} differ: {dict(values)}; no speed is reported")


def measured_on(options: argparse.Namespace) -> dict[str, Any]:
    """Model and machine."""
    return {
        "model": options.model,
        "device": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu",
        "weights": str(options.weights).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def print_result(name: str, options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """The last line: the result as JSON, and what it was measured on."""
    print(json.dumps({"name": name, **result, **measured_on(options)}))
