"""Muon against torch's own single-tensor implementation, and its iteration against the formula."""

import pytest
import torch

from minigpt.core.train import muon
from minigpt.core.train.muon import COEFFICIENTS, Muon, orthogonalise


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["native", "emulated"])
def products(request, monkeypatch):
    """The precision of the iteration, as on a processor that has bfloat16 and on one that emulates it."""
    monkeypatch.setattr(muon, "tolerant_dtype", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("shapes", [[(8, 8)] * 3, [(16, 8), (8, 16), (16, 8), (5, 7)]])
def test_equals_torch_muon(shapes, monkeypatch):
    """Same gradients, five steps: stacked and single give the same weights (torch rounds to bfloat16 inside, too)."""
    monkeypatch.setattr(muon, "tolerant_dtype", lambda device: torch.bfloat16)
    torch.manual_seed(0)
    start = [torch.randn(s) for s in shapes]
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [p.clone().requires_grad_() for p in start]
    a = Muon(ours, weight_decay=0.1, momentum=0.95)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step(lr=0.02)
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=2e-3, rtol=0)  # bf16 products in another order


@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 16, 40)])
def test_iteration_is_the_formula(shape, products):
    """x <- a x + (b A + c A A) x with A = x x', written out in float64: within the type's rounding."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = g.double().mT if shape[1] > shape[2] else g.double()
    x = x / x.norm(dim=(1, 2), keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    got = orthogonalise(g)
    assert got.dtype == products
    want = x.mT if shape[1] > shape[2] else x
    assert (got.double() - want).abs().max() <= (1e-5 if products == torch.float32 else 0.03)


def test_singular_values_come_near_one(products):
    torch.manual_seed(0)
    u = orthogonalise(torch.randn(4, 32, 16)).float()
    values = torch.linalg.svdvals(u)
    assert values.min() > 0.6 and values.max() < 1.3


def test_matrices_without_gradient_stay():
    p = torch.ones(2, 2, requires_grad=True)
    Muon([p]).step(lr=1.0)
    assert torch.equal(p, torch.ones(2, 2))
