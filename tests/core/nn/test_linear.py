"""The layer of the model against torch's own, whichever library computes it."""

import pytest
import torch
from torch import nn

from minigpt.core.nn import linear
from minigpt.core.nn.linear import Linear


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 48), (2, 130, 48)])
def test_equals_torch(shape, onednn, monkeypatch):
    """Values and both gradients within 1e-5 of the largest number, for a gradient in any layout."""
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this build has no oneDNN")
    monkeypatch.setattr(linear, "onednn_float32", lambda: onednn)
    torch.manual_seed(0)
    mine, theirs = Linear(48, 80), nn.Linear(48, 80, bias=False)
    theirs.load_state_dict(mine.state_dict())
    results = []
    grad = torch.randn(*shape[:-1], 160)[..., ::2]
    for layer in (mine, theirs):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(x)
        out.backward(grad)
        results.append((out, x.grad, layer.weight.grad))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_frozen_weights_get_no_gradient(monkeypatch):
    monkeypatch.setattr(linear, "onednn_float32", torch.backends.mkldnn.is_available)
    layer, x = Linear(8, 8).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None


def test_sixteen_bits_are_torchs_own():
    """Only float32 is another library's; a bfloat16 layer is torch's own to the bit."""
    layer, x = Linear(16, 16).bfloat16(), torch.randn(5, 16).bfloat16()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))
