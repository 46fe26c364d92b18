"""The norm with a hand-written backward is the norm of the formula."""

from __future__ import annotations

import pytest
import torch

from minigpt.core.nn.layers import RMSNorm


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 7, 4, 16), (700, 33)])
def test_norm_and_gradients(shape, dtype, bound):
    """Output, input gradient and weight gradient follow the formula; rows off centre and tiny rows included."""
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = (torch.randn(shape) + 0.7).to(dtype)
    x.view(-1, shape[-1])[1] *= 1e-3  # here epsilon matters
    x.requires_grad_()
    grad = torch.randn(shape).to(dtype)
    y = norm(x)
    y.backward(grad)
    want_x, want_w = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    want = formula(want_x, want_w, 1e-5)
    want.backward(grad.double())
    assert y.dtype == dtype
    assert relative(y, want) <= bound
    assert relative(x.grad, want_x.grad) <= bound
    assert relative(norm.weight.grad, want_w.grad) <= bound


@pytest.mark.parametrize("rows", [5, 5000])
def test_norm_without_gradient_is_the_same(rows):
    """The kernels used for a few tokens, for evaluation and for training agree."""
    torch.manual_seed(0)
    norm, x = RMSNorm(64, 1e-6), torch.randn(rows, 64)
    with torch.no_grad():
        fast = norm(x)
    assert (fast - norm(x)).abs().max() <= 1e-6


def test_float32_weight_in_a_bfloat16_model():
    """Norm weights may stay float32: the output keeps the input's dtype and the weight gets a float32 gradient."""
    norm = RMSNorm(32, 1e-6)
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
