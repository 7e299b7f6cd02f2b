"""Training that changes nothing outside a mask, and weights that start from those of another model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from expunge.errors import UserError
from expunge.localize.masks import Mask
from expunge.localize.units import units_of
from expunge.models.drift import open_tensors
from expunge.models.forward import unwrap
from expunge.models.load import skeleton
from expunge.models.quantization import linear_weights
from expunge.recipe import ModelConfig, Unit

#: Units that are made of whole linear modules, which adapters can be put on.
WHOLE_MODULES = ("module", "layer")
#: Key of an optimizer's group whose weight decay acts inside the mask only.
_DECAY = "decay_inside"


class Masked:
    """Keeps the trained parameters of a model as they are, bit by bit, wherever the mask is False.

    Parameters with nothing inside take no part in training at all. One that is partly inside has a dense gradient and
    dense moments in the optimizer, as without a mask, and its bits beside them: a byte per weight, or per row or column
    where the mask broadcasts.
    """

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        """`model` lies where it is trained. Raises UserError for a mask of another model."""
        bound = mask.bound(model)
        self._partly: dict[Tensor, Tensor] = {
            parameter: bound[name]
            for name, parameter in unwrap(model).named_parameters()
            if parameter.requires_grad and name in bound and not bound[name].all()
        }

    @torch.no_grad()
    def keep_gradients_inside(self) -> None:
        """Zero the gradients outside: a moment that is made of zeros moves nothing."""
        for parameter, inside in self._partly.items():
            if parameter.grad is not None:
                # filled, not multiplied: an infinite gradient outside would become NaN
                parameter.grad.masked_fill_(~inside, 0)

    def take_over_decay(self, optimizer: Optimizer) -> None:
        """Let the weight decay of parameters that are partly inside act there only, at each group's rate of the step.

        It stays decoupled, as in AdamW (arXiv 1711.05101), and comes before the step. In bfloat16 weights it is rounded
        by itself, where a fused AdamW rounds decay and step together.
        """
        for group in list(optimizer.param_groups):
            partly = [parameter for parameter in group["params"] if parameter in self._partly]
            if not group["weight_decay"] or not partly:
                continue
            changed = {"weight_decay": 0.0, _DECAY: group["weight_decay"]}
            whole = [parameter for parameter in group["params"] if parameter not in self._partly]
            if not whole:
                group.update(changed)
                continue
            group["params"] = whole
            optimizer.add_param_group({**group, **changed, "params": partly})
        optimizer.register_step_pre_hook(self._decay)

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            rate = float(group["lr"]) * group.get(_DECAY, 0.0)
            for parameter in group["params"] if rate else ():
                if parameter.grad is not None:  # AdamW leaves a parameter without a gradient alone
                    parameter.mul_(torch.where(self._partly[parameter], 1 - rate, 1.0))


def adapter_targets(model: nn.Module, mask: Mask) -> list[str]:
    """Names of the linear modules that the mask holds, for adapters. Raises UserError for none, and for parts of one.

    What else is inside (norms, biases) is not trained then: adapters change weights of linear modules alone.
    """
    bound = mask.bound(model)
    found = []
    for name in linear_weights(model):
        if name not in bound:
            continue
        if not mask.inside[name].all():  # not the bound one: a model that is only checked lies on the meta device
            raise parts_of_modules(f"the mask holds a part of {name}")
        found.append(name.removesuffix(".weight"))
    if not found:
        raise parts_of_modules("the mask holds no linear module")
    return found


def widest_mask(unit: Unit, model: ModelConfig) -> Mask | None:
    """All that such units can hold, to check what is trained inside a mask before it is made; None for GGUF.

    Raises UserError for units that the model lacks.
    """
    modules = skeleton(model)
    if modules is None:
        return None
    names = {slab.parameter for family in units_of(modules, unit) for slab in family.slabs}
    dimensions = {name: value.ndim for name, value in modules.named_parameters() if name in names}
    return Mask({name: torch.ones([1] * count, dtype=torch.bool) for name, count in dimensions.items()})


def parts_of_modules(what: str) -> UserError:
    """The error for adapters on less than whole linear modules."""
    return UserError(
        f"`lora` puts adapters on whole linear modules, and {what}",
        "localize.unit: module or layer makes such a mask; or leave `lora` out",
    )


@torch.no_grad()
def reset_weights(model: nn.Module, config: ModelConfig, mask: Mask | None = None) -> None:
    """Set the trained parameters, inside the mask if there is one, to those of another model (arXiv 2412.02432).

    They are read one at a time from safetensors; a GGUF file or an adapter is held whole while it lasts. Raises
    UserError if that model lacks one of them, or has it in another shape.
    """
    opened = open_tensors(config)
    bound = mask.bound(model) if mask is not None else {}
    for name, parameter in _trained(model):
        stored = opened.read(name) if name in opened.names else None
        value = _fitting(name, parameter, stored, config).to(parameter)
        parameter.copy_(value if name not in bound else torch.where(bound[name], value, parameter))


def check_reset(model: nn.Module, config: ModelConfig) -> None:
    """Raises UserError for what `reset_weights` would refuse, before weights are read, as far as the files tell."""
    described = skeleton(config)
    others = {} if described is None else dict(described.named_parameters())
    for name, parameter in _trained(model) if described is not None else ():
        _fitting(name, parameter, others.get(name), config)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in unwrap(model).named_parameters() if parameter.requires_grad]


def _fitting(name: str, parameter: Tensor, other: Tensor | None, config: ModelConfig) -> Tensor:
    """The other model's tensor, if it can take the parameter's place. Raises UserError."""
    if other is not None and other.shape == parameter.shape:
        return other
    has = "no such tensor" if other is None else f"{tuple(other.shape)}"
    raise UserError(
        f"reset: {name} is {tuple(parameter.shape)} in the model to train, but {has} in {config.id}",
        "give an earlier checkpoint of the same model, e.g. the base before fine-tuning",
    )
