"""Log-probs of tokens from logits: torch's cross-entropy says the same, for values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from expunge.models import token_logprobs as module
from expunge.models.token_logprobs import token_logprobs

VOCABULARY = 37


def given(count: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V], targets [n] and the gradient of a loss over the log-probs [n]."""
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, VOCABULARY, generator=generator, dtype=torch.float64) * spread
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    slope = torch.randn(count, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), targets, slope


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("count", [1, 5, module.PIECE, 2 * module.PIECE + 3])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=str
)
def test_values_and_gradients_equal_cross_entropy(
    dtype: torch.dtype, close: float, count: int, temperature: float
) -> None:
    logits, targets, slope = given(count, dtype)
    made = token_logprobs(logits, targets, temperature)
    made.backward(slope.to(made.dtype))
    wide = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = -cross_entropy(wide / temperature, targets, reduction="none")
    expected.backward(slope.to(expected.dtype))
    assert made.dtype == expected.dtype
    torch.testing.assert_close(made, expected, rtol=close, atol=close)
    assert logits.grad is not None
    assert wide.grad is not None
    assert logits.grad.dtype == dtype
    # a gradient in bfloat16 is the wide one, rounded
    rounding = {"rtol": 1 / 128, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": close, "atol": close}
    torch.testing.assert_close(logits.grad.to(wide.dtype), wide.grad, **rounding)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradcheck(temperature: float) -> None:
    logits, targets, _ = given(4, torch.float64)
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, temperature), (logits,))


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for piece in (1, 4, 1000):
        monkeypatch.setattr(module, "PIECE", piece)
        logits, targets, slope = given(11, torch.float64)
        values = token_logprobs(logits, targets)
        values.backward(slope)
        assert logits.grad is not None
        made.append((values.detach(), logits.grad))
    for values, gradient in made[1:]:
        torch.testing.assert_close(values, made[0][0], rtol=0, atol=0)
        torch.testing.assert_close(gradient, made[0][1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    made = token_logprobs(logits, torch.tensor([0, 0]))
    made.sum().backward()
    assert made[0].item() == 0
    assert made[1].item() == pytest.approx(-2e4, rel=0.01)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_no_position_gives_no_value() -> None:
    logits, targets, _ = given(0, torch.float32)
    made = token_logprobs(logits, targets)
    made.sum().backward()
    assert made.shape == (0,)
    assert logits.grad is not None
    assert logits.grad.shape == (0, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_keeps_the_logits_and_little_else(dtype: torch.dtype) -> None:
    logits, targets, _ = given(600, dtype)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(logits, targets)
    assert kept.pop(logits.untyped_storage().data_ptr()) == logits.numel() * logits.element_size()
    assert sum(kept.values()) <= 600 * (8 + 4)  # targets and normalisers
