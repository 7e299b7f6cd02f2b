"""Records out of hub datasets and dataset folders, through the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expunge.data.containers import SUFFIXES, Record
from expunge.data.network import hub_answers
from expunge.errors import UserError, did_you_mean

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SPLIT_NAMES = re.compile(r"^(train|test|validation|valid|val|dev|eval)\b", re.IGNORECASE)


def is_dataset(path: str) -> bool:
    """Whether a source is a folder, or the id of a hub dataset, rather than a file."""
    if Path(path).is_file():
        return False
    base = split_id(path)[0]
    if Path(base).is_dir():
        return True
    # `data/forget` beside a folder `data` is a mistyped file, and not worth a look at the hub.
    mistyped = Path(base).parent.is_dir()
    return _HUB_ID.match(base) is not None and Path(base).suffix.lower() not in SUFFIXES and not mistyped


def split_id(path: str) -> tuple[str, str | None, str | None]:
    """`owner/name[:config][@split]` in its three parts; an existing path is never cut."""
    if Path(path).exists():
        return path, None, None
    rest, _, split = path.partition("@")
    if Path(rest).exists():
        return rest, None, split or None
    base, _, config = rest.rpartition(":") if ":" in rest else (rest, "", "")
    return base, config or None, split or None


def read_dataset(path: str) -> Iterator[Record]:
    """Records of a hub dataset or a dataset folder. Raises UserError."""
    base, config, split = split_id(path)
    if Path(base).is_dir():
        _check_folder(Path(base), config)
    rows = _load(path, base, config, split)
    for number, values in enumerate(rows, start=1):
        yield Record(path, "row", number, dict(values))


def _load(path: str, base: str, config: str | None, split: str | None) -> Any:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if (Path(base) / "state.json").is_file() or (Path(base) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(base)
        else:
            with cache_alone(active=not Path(base).is_dir() and not hub_answers()):
                loaded = datasets.load_dataset(base, name=config)
        if isinstance(loaded, dict):
            return loaded[_choose_split(path, base, config, split, list(loaded))]
        return loaded
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen types, network errors included
        configs = _configs_in(error)
        if configs and config is None:
            raise UserError(
                f"{path} has the configs {', '.join(configs)}", f"choose one, for instance {base}:{configs[0]}"
            ) from error
        if configs and config is not None:
            raise UserError(f"{path}: the dataset has no config '{config}'", did_you_mean(config, configs)) from error
        if not Path(base).is_dir() and not hub_answers():
            raise UserError(
                f"{path}: no such file, and the hub, where it may be a dataset, can't be reached", _load_hint(base)
            ) from error
        raise UserError(f"{path}: {_reason(error)}", _load_hint(base)) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def cache_alone(active: bool) -> Iterator[None]:
    """Within it, datasets takes what it has in its cache, instead of waiting for a hub that does not answer."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or active
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _choose_split(path: str, base: str, config: str | None, split: str | None, names: list[str]) -> str:
    whole = f"{base}:{config}" if config else base
    if split is not None:
        if split not in names:
            raise UserError(f"{path}: the dataset has no split '{split}'", did_you_mean(split, names))
        return split
    if len(names) != 1:
        raise UserError(f"{path} has the splits {', '.join(names)}", f"choose one, for instance {whole}@{names[0]}")
    return names[0]


def _check_folder(folder: Path, config: str | None) -> None:
    """`load_dataset` would pour every file of a folder into one split: forget and retain rows among them."""
    files = sorted(entry.name for entry in folder.rglob("*") if entry.suffix.lower() in (*SUFFIXES, ".arrow"))
    if not files:
        raise UserError(f"{folder} is a folder without data files", "give the path of a file")
    described = any((folder / name).is_file() for name in ("README.md", "state.json", "dataset_dict.json"))
    separate = [name for name in files if not _SPLIT_NAMES.match(name) and name.lower().endswith(SUFFIXES)]
    if config is None and not described and len(separate) > 1:
        raise UserError(f"{folder} is a folder with several data files", f"name one: {folder / separate[0]}")


def _configs_in(error: Exception) -> list[str]:
    """The library names a dataset's configs in the text of its error alone."""
    told = re.search(r"(?:available configs|Available): \[(.*?)\]", " ".join(str(error).split()))
    return re.findall(r"'([^']+)'", told.group(1)) if told else []


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__


def _load_hint(base: str) -> str:
    if Path(base).is_dir():
        return "give the path of one file instead"
    return "check owner/name[:config][@split] and the network, or download the file and give its path"
