"""TIES of two checkpoints on a base: tensor by tensor on all cores, against mergekit.

Both sides read three float32 checkpoints of random weights from safetensors, merge them with density 0.5 per tensor and
weights of 1 in mergekit's convention (votes weighted, normalised), and write a checkpoint. The other side is mergekit's
own `run_merge` on a configuration as its command line takes it. Ours also digests (sha256) every file that it reads and
writes, sums up what the merge did, and waits until the disk has the result. A third side only reads the inputs once and
writes as many bytes as the result has, and waits for the disk as well: what no merge can fall short of.

The page cache is warm (the inputs lie in memory) and then cold (they are dropped from it before every call; what a
hypervisor or a disk keeps of them stays). Peaks are of anonymous memory, each in a process of its own: mapped files do
not count. The outputs must agree to 1e-6 in every weight, or nothing is reported. As equal magnitudes at the cut may be
kept by one and dropped by the other, the inputs have none. --large merges checkpoints of 3.3 GB, on 17 GB of disk.
Run: python benchmarks/merge.py [--quick] [--large]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from calibration import sampled
from common import Times, compared, memory_result, options_of, parse, peaks, print_result, sentence, timed
from expunge.merging.run import merge_models
from expunge.merging.selection import cut, kept_count, trimmed

DENSITY, TOLERANCE = 0.5, 1e-6
INPUTS = ("a", "b", "base")
BLOCK = 1 << 22  # bytes

_TIED = {"tie_word_embeddings": True, "vocab_size": 49152, "pad_token_id": None}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-135m": {  # SmolLM2 135M
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-830m": {  # layers of Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


# ---- checkpoints


def prepare(folder: Path, model: str) -> None:
    """Write the base and both models to `folder`, unless they are there."""
    config = LlamaConfig(**SHAPES[model], **_TIED, architectures=["LlamaForCausalLM"], dtype="float32")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    base: dict[str, torch.Tensor] = {}
    for number, name in enumerate(("base", "a", "b")):
        if (folder / name / "model.safetensors").is_file():
            continue
        draw = torch.Generator().manual_seed(number)
        if name == "base":
            base = {key: torch.randn(shape, generator=draw).mul_(0.02) for key, shape in shapes.items()}
            tensors = base
        else:
            tensors = {key: moved(tensor, draw) for key, tensor in base.items()}
        config.save_pretrained(folder / name)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})


def moved(base: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The tensor with noise on it, and without equal magnitudes on both sides of the cut."""
    tensor = torch.randn(base.shape, generator=draw).mul_(0.002).add_(base)
    delta = (tensor - base).view(-1)
    at = cut(delta, kept_count(delta.numel(), DENSITY))
    dropped = delta.abs().eq_(at.threshold).bool() & (trimmed(delta, 0, at) == 0)
    tensor.view(-1)[dropped] = base.view(-1)[dropped]
    return tensor


# ---- the sides


def sides_of(folder: Path, device: str) -> dict[str, Callable[[], object]]:
    """Ours, mergekit, and reading and writing alone."""
    return {
        "ours": lambda: merge_models(
            [folder / "a", folder / "b"], folder / "ours", base=folder / "base", density=DENSITY, device=device
        ),
        "baseline": lambda: by_mergekit(folder, device),
        "alone": lambda: read_and_write(folder),
    }


def by_mergekit(folder: Path, device: str) -> None:
    """What `mergekit-yaml` does after it has read its configuration."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    shutil.rmtree(folder / "mergekit", ignore_errors=True)
    parameters = {"weight": 1.0, "density": DENSITY}
    config = {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "dtype": "float32",
        "parameters": {"normalize": True},
        "models": [{"model": str(folder / name), "parameters": parameters} for name in ("a", "b")],
    }
    options = MergeOptions(copy_tokenizer=False, quiet=True, cuda=device == "cuda")
    run_merge(MergeConfiguration.model_validate(config), str(folder / "mergekit"), options=options)


def read_and_write(folder: Path) -> None:
    """All inputs once, and as many bytes as one of them has, on the disk."""
    block = memoryview(bytearray(BLOCK))
    for name in INPUTS:
        with (folder / name / "model.safetensors").open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    left = (folder / "base" / "model.safetensors").stat().st_size
    with (folder / "alone").open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(block[: min(left, BLOCK)])
        os.fsync(file.fileno())
    (folder / "alone").unlink()


def drop(folder: Path) -> None:
    """Ask the system to forget what it keeps of the inputs."""
    for name in INPUTS:
        with (folder / name / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(folder: Path) -> int:
    """Number of weights compared; ends the script, without any speed, if the sides do not merge the same."""
    compared_weights = 0
    with safe_open(folder / "ours" / "model.safetensors", "pt") as own:
        theirs = {
            key: file
            for path in sorted((folder / "mergekit").glob("*.safetensors"))
            for file in [safe_open(path, "pt")]
            for key in file.keys()  # noqa: SIM118 – no mapping
        }
        for key in own.keys():  # noqa: SIM118
            if key not in theirs:
                sys.exit(f"mergekit wrote no {key}; no speed is reported")
            one, other = own.get_tensor(key), theirs[key].get_tensor(key)
            difference = float((one - other).abs().max())
            if not difference <= TOLERANCE:  # NaN disagrees too
                sys.exit(f"{key} differs by {difference}; no speed is reported")
            compared_weights += one.numel()
    return compared_weights


# ---- all of it


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = options_of(__doc__, model="llama-135m")
    parser.add_argument("--large", action="store_true", help="checkpoints of 3.3 GB")
    parser.add_argument("--rounds", type=int, help="of each side, warm and cold; 3, or 1 with --quick or --large")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are put and stay; else they are removed")
    options = parse(parser)
    options.model = "llama-830m" if options.large else options.model
    if options.model not in SHAPES or options.weights != torch.float32:
        sys.exit(f"only {' and '.join(SHAPES)} in float32 are merged here")
    if options.folder is not None:
        run(options, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.argv += ["--folder", folder]  # for the processes that measure memory
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    """Memory, then time; or one side alone, for its memory."""
    prepare(folder, options.model)
    sides = sides_of(folder, options.device.type)
    if options.side is not None:
        highest = [0]
        with sampled(highest):
            sides[options.side]()
        print(highest[0])
        return
    refuse_without_mergekit()
    memory = memory_result(peaks())
    weights = check(folder)
    rounds = options.rounds or (1 if options.quick or options.large else 3)
    result = timed_sides(sides, rounds, options, before=lambda: read_and_write(folder))
    cold = timed_sides(sides, rounds, options, before=lambda: drop(folder))
    check(folder)
    for start, found in (("warm", result), ("cold", cold)):
        print(f"{start}: {sentence(found)}; reading and writing alone: {found['alone']:.3f} s")
    result |= {f"cold_{key}": value for key, value in cold.items()} | memory
    print_result("merge", options, {**result, "parameters": weights, "rounds": rounds})


def refuse_without_mergekit() -> None:
    """Ends the script where mergekit can't be run."""
    try:
        import mergekit.merge  # noqa: F401
    except Exception as error:  # whatever an incompatible version raises while it is imported
        sys.exit(f"mergekit can't be run here ({type(error).__name__}: {error}); no ratio is reported")


def timed_sides(
    sides: dict[str, Callable[[], object]], rounds: int, options: argparse.Namespace, before: Callable[[], None]
) -> dict[str, Any]:
    """Each side in turn; `before` each call the page cache is brought to its state, which is not timed."""
    times = {name: Times() for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            before()
            with timed(times[name], options.device):
                sides[name]()
    result = compared(times)
    alone = compared({"ours": times["alone"], "baseline": times["ours"]})
    return result | {"alone": alone["ours"], "times_of_alone": alone["ratio"]}


if __name__ == "__main__":
    main()
