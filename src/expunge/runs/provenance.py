"""With what a run was made: versions, hardware, git commit, and digests of files and folders."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import expunge

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def environment() -> dict[str, Any]:
    """Versions, platform, processor, memory, graphics processor (if torch is loaded) and git commit."""
    return {
        "expunge": expunge.__version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": cores(),
        "memory_gb": round(memory_bytes() / 2**30, 1),
        **_torch_facts(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Installed version of every declared core dependency; "missing" if there is none."""
    found = {}
    for requirement in requirements():
        match = _NAME.match(requirement)
        name = match.group() if match else requirement
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def requirements() -> list[str]:
    """The core requirements as declared (`torch>=2.6`), extras left out; empty if the package is not installed."""
    try:
        declared = metadata.requires("expunge") or []
    except metadata.PackageNotFoundError:
        return []
    return [entry for entry in declared if "extra ==" not in entry]


def command_line(run: Path) -> str:
    """The command that makes this run: the one typed, or from Python the one that repeats it."""
    return typed_command() or shlex.join(["expunge", "run", str(run / "recipe.resolved.yaml"), "-o", str(run)])


def typed_command() -> str:
    """The command that was typed; nothing from Python."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    if program in ("expunge", "expunge.exe") or (program in ("app.py", "__main__.py") and "expunge" in sys.argv[0]):
        return shlex.join(["expunge", *sys.argv[1:]])
    return ""


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(path: Path) -> str:
    """sha256 over the names and contents below a folder, hidden files and stage records left out."""
    whole = hashlib.sha256()
    for file in sorted(Path(path).rglob("*"), key=lambda file: file.relative_to(path).as_posix()):
        inside = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts) or file.name == "stage.json":
            continue
        whole.update(f"{inside.as_posix()}\0{file_digest(file)}\n".encode())
    return whole.hexdigest()


def git_commit() -> str | None:
    """Commit of the source tree that runs, with "+" if it has changes; None for an installed package."""
    folder = Path(expunge.__file__).parent
    git = shutil.which("git")
    if git is None or _git(git, folder, "ls-files", "__init__.py") != "__init__.py":
        return None
    commit = _git(git, folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+" if _git(git, folder, "status", "--porcelain", "--untracked-files=no", ".") else "")


def _git(git: str, folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [git, "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    """The processor's name."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those instruction sets that make bfloat16 or wide vectors fast, as the kernel calls them."""
    useful = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "bf16", "sve", "i8mm")
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return [name for name in useful if name in flags]
    return []


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit; 0 if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    limit = "".join(_lines("/sys/fs/cgroup/memory.max")).strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _torch_facts() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # never import it for this
    if torch is None or not hasattr(torch, "get_num_threads"):
        return {"threads": None, "gpu": None}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "gpu": gpu}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
