"""A folder of things that a user may hand over by mistake: rows, recipes, and checkpoints broken in one way each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expunge.models.tiny import write_tiny

TWO_SPECIALISTS = """
model: tiny
data: {forget: f.jsonl, retain: r.jsonl}
unlearn:
- {name: a, lora: 2, train: {max_steps: 1}}
- {name: b, lora: 2, train: {max_steps: 1}}
merge: {method: linear}
evaluate: {generate: null}
"""
ONE = "model: tiny\ndata: {forget: f.jsonl, retain: r.jsonl}\n"

FILES: dict[str, str | bytes] = {
    "broken.jsonl": '{"question": "q", "answer": "a"}\n{"question": "q2", "answer" "b"}\n',
    "blank.jsonl": '{"question": "q", "answer": "a"}\n{"question": "q2", "answer": " "}\n',
    "nothing.jsonl": "",
    "nothing.json": "[]",
    "unknown-key.yaml": ONE + "unlearn: [{metod: npo}]\n",
    "no-yaml.yaml": "model: [tiny\ndata: }{\n",
    "list.yaml": "- a\n- b\n",
    "prose.yaml": "Dear reader, this is no recipe",
    "picture.yaml": b"\x89PNG\r\n\x1a\n\x00\x01\xff",
    "tabs.yaml": "model: tiny\ndata:\n\tforget: f.jsonl\n",
    "twice.yaml": "model: tiny\n" + ONE + "unlearn: [{}]\n",
    "good.yaml": ONE + "unlearn: [{train: {max_steps: 1}}]\n",
    "linear.yaml": TWO_SPECIALISTS,
    "merge-name.yaml": TWO_SPECIALISTS.replace("linear", "tiesss"),
    "merge-parameter.yaml": TWO_SPECIALISTS.replace("method: linear", "method: ties, parameters: {sing: total}"),
    "a-file": "x",
    "foreign/thesis.tex": "dear",
    "bad.gguf": b"GGUF" + b"\0" * 100,
}


def people(count: int, name: str) -> list[dict[str, str]]:
    """Question/answer rows."""
    return [{"question": f"Where does {name} {i} live?", "answer": f"In {name} street {i}."} for i in range(count)]


def write_rows(path: Path, rows: list[Any]) -> None:
    """JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*"):
        if "token" in file.name or "chat" in file.name:
            file.unlink()


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _cut_short(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _lacks_tensors(folder: Path) -> None:
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layers.1.mlp" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _more_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"word{i}": len(vocabulary) + i for i in range(100)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _other_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = (token for token, index in vocabulary.items() if index in (300, 301))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


BROKEN: dict[str, Callable[[Path], None]] = {
    "whole": lambda folder: None,
    "no-tokenizer": _no_tokenizer,
    "pickle": _pickle,
    "cut-short": _cut_short,
    "bad-config": lambda folder: (folder / "config.json").write_text("{ not json") and None,
    "no-weights": lambda folder: (folder / "model.safetensors").unlink(),
    "unknown-architecture": lambda folder: _edit(folder / "config.json", model_type="wombat"),
    "other-shape": lambda folder: _edit(folder / "config.json", hidden_size=64),
    "lacks-tensors": _lacks_tensors,
    "not-a-number": _not_a_number,
    "more-tokens": _more_tokens,
    "other-tokens": _other_tokens,
}


def write_inputs(folder: Path) -> Path:
    """Everything above, an adapter whose base is gone, one that is a pickle, and one that is sound."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    write_rows(folder / "f.jsonl", people(4, "Anna"))
    write_rows(folder / "r.jsonl", people(6, "Bert"))
    write_rows(folder / "shared.jsonl", people(4, "Anna")[2:])
    write_rows(folder / "long.jsonl", [{"question": "long " * 2500, "answer": "a"}])
    for name, damage in BROKEN.items():
        damage(write_tiny(folder / name))
    _write_adapters(folder)
    return folder


def _write_adapters(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "whole")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    for name in ("adapter-alone", "adapter-pickle"):
        shutil.copytree(folder / "adapter", folder / name)
    _edit(folder / "adapter-alone" / "adapter_config.json", base_model_name_or_path=str(folder / "gone"))
    weights = folder / "adapter-pickle" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
