"""A small world for tests of attacks that change a model, and what is looked at before and after."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from expunge.attacks.base import World, build_attack
from expunge.models.tiny import build_tiny
from scoring_rows import lively, random_rows

QUICK = {"trained_lens": {"steps": 2}}
IDS = torch.arange(20, 60)[None]


@cache
def built(seed: int) -> Any:
    return lively(build_tiny(seed)[0])


def tiny(seed: int = 0) -> Any:
    return copy.deepcopy(built(seed))


def world(**given: Any) -> World:
    """Random rows, another tiny model as target, a third as reference."""
    target, reference = tiny(1), tiny(2)
    rows = {"forget": random_rows(7, seed=1, longest=12), "retain": random_rows(12, seed=2, longest=12)}

    @contextmanager
    def open_reference():
        yield reference

    made = World(
        examples={name: [r.example for r in split] for name, split in rows.items()},
        rows=rows,
        tokenizer=None,
        seed=5,
        encode=lambda examples: [],
        target=lambda name: target.get_parameter(name).detach(),
        reference=lambda name: reference.get_parameter(name).detach(),
        open_reference=open_reference,
    )
    return replace(made, **given)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0]


def layers_of(model: Any) -> list[torch.Tensor]:
    """Output of every decoder layer for IDS, by hooks of the test's own."""
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in model.model.layers]
    logits(model)
    for hook in hooks:
        hook.remove()
    return [out[0] if isinstance(out, tuple) else out for out in seen]


def everything(model: Any) -> list[Any]:
    """Bits of all tensors, and what hangs on the modules."""
    tensors = [tensor.clone() for tensor in model.state_dict().values()]
    hung = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training, "forward" in vars(m))
        for name, m in model.named_modules()
    ]
    return [tensors, hung, [p.grad is None and p.requires_grad for p in model.parameters()], torch.is_grad_enabled()]


def same(before: list[Any], after: list[Any]) -> bool:
    equal = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return equal and before[1:] == after[1:]


def attack(name: str, settings: dict[str, Any]) -> Any:
    return build_attack(name, QUICK.get(name, {}) | settings)


def shallow() -> Any:
    model = tiny()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model
