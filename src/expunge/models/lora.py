"""Low-rank adapters on a loaded model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from expunge.errors import UserError
from expunge.models.forward import unwrap
from expunge.recipe import LoraConfig


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> Any:
    """The model with fresh adapters (B = 0, so that it starts where the base stands); the base is frozen."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    if config.targets != "all-linear":
        _check_targets(model, config.targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(
            model,
            PeftLora(
                r=config.rank,
                lora_alpha=config.alpha if config.alpha is not None else config.rank,
                lora_dropout=config.dropout,
                target_modules=config.targets,
                task_type="CAUSAL_LM",
            ),
        )


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in unwrap(model).named_modules() if isinstance(module, nn.Linear | Conv1D)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise UserError(
                f"lora.targets: the model has no linear layer '{target}'", f"valid: {', '.join(endings)}, or all-linear"
            )
