"""log p(token) from logits without a float32 copy of them: what is kept for the backward pass are the logits alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Positions that are turned into float32 at once; bounds the memory beside the logits themselves.
PIECE = 256


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / T) at one token per position; its gradient is (one-hot − softmax) / T."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        chosen = torch.empty(len(targets), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        normalisers = torch.empty_like(chosen)
        for start in range(0, len(targets), PIECE):
            piece = slice(start, start + PIECE)
            wide = logits[piece].to(chosen.dtype) / temperature
            normalisers[piece] = wide.logsumexp(-1)
            chosen[piece] = wide.gather(-1, targets[piece, None])[:, 0]
        ctx.save_for_backward(logits, targets, normalisers)
        ctx.temperature = temperature
        return chosen - normalisers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        logits, targets, normalisers = ctx.saved_tensors
        result = torch.empty_like(logits)
        for start in range(0, len(targets), PIECE):
            piece = slice(start, start + PIECE)
            slope = gradient[piece, None] / ctx.temperature
            wide = logits[piece].to(normalisers.dtype) / ctx.temperature
            wide = wide.sub_(normalisers[piece, None]).exp_().mul_(-slope)
            result[piece] = wide.scatter_add_(-1, targets[piece, None], slope)
        return result, None, None


def token_logprobs(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], temperature: float = 1.0
) -> Float[Tensor, " N"]:
    """log p(target) per position, at least float32, of the distribution softmax(logits / temperature)."""
    result: Tensor = _TokenLogprobs.apply(logits, targets, temperature)
    return result
