"""Muon against torch's own single-tensor implementation."""

import pytest
import torch

from minigpt.core.train.muon import Muon, orthogonalise


@pytest.mark.parametrize("shapes", [[(8, 8)] * 3, [(16, 8), (8, 16), (16, 8), (5, 7)]])
def test_equals_torch_muon(shapes):
    """Same gradients, five steps: stacked and single give the same weights (torch rounds to bfloat16 inside, too)."""
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


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    u = orthogonalise(torch.randn(4, 32, 16)).float()
    values = torch.linalg.svdvals(u)
    assert values.min() > 0.6 and values.max() < 1.3


def test_matrices_without_gradient_stay():
    p = torch.ones(2, 2, requires_grad=True)
    Muon([p]).step(lr=1.0)
    assert torch.equal(p, torch.ones(2, 2))
