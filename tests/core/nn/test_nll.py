"""Chunked NLL equals the plain formula, gradients included, without ever holding all logits."""

from __future__ import annotations

import pytest
import torch

from minigpt.core.nn import nll as module
from minigpt.core.nn.nll import chunked_nll


def plain(hidden, weight, labels, temperature):
    logp = (hidden @ weight.t() / temperature).log_softmax(-1)
    return -logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_equals_the_formula(tokens, temperature, entropy, monkeypatch):
    """Values to 1e-6, gradients to 1e-5 relative; token weights differ, and the last chunk is short."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # the smallest chunk: 64 tokens
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 24), torch.randn(100, 24) * 0.3
    labels, scale = torch.randint(0, 100, (tokens,)), torch.randn(tokens)
    results = []
    for function in (plain, lambda *a: chunked_nll(*a, entropy=entropy)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        nll, spread = function(h, w, labels, temperature)
        loss = (nll * scale).sum() + ((spread * scale.flip(0)).sum() * 0.4 if entropy else 0)
        loss.backward()
        results.append((nll, spread, h.grad, w.grad))
    (nll, spread, gh, gw), (nll2, spread2, gh2, gw2) = results
    assert (nll - nll2).abs().max() <= 1e-5
    if entropy:
        assert (spread - spread2).abs().max() <= 1e-5
    assert (gh - gh2).norm() / gh.norm() <= 1e-5
    assert (gw - gw2).norm() / gw.norm() <= 1e-5


def test_confident_tokens_keep_their_gradient():
    """In bfloat16 p(label) rounds to 1, yet the gradient p - 1 keeps its size: it is taken from the NLL."""
    hidden = torch.tensor([[6.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    nll, _ = chunked_nll(hidden, weight, torch.tensor([0]))
    nll.sum().backward()
    p = torch.tensor([6.0, 0.0]).softmax(0)
    assert hidden.grad[0, 0].item() == pytest.approx((p[0] - 1).item(), rel=0.01)


def test_bfloat16_gradients_are_close():
    """bfloat16 costs a rounding of each product, not an accumulation in bfloat16."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(300, 32), torch.randn(500, 32) * 0.2, torch.randint(0, 500, (300,))
    h, w = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    chunked_nll(h, w, labels)[0].sum().backward()
    h2, w2 = h.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    plain(h2, w2, labels, 1.0)[0].sum().backward()
    assert (h.grad.float() - h2.grad).norm() / h2.grad.norm() < 0.01
    assert (w.grad.float() - w2.grad).norm() / w2.grad.norm() < 0.01


def test_no_labelled_token():
    """A batch of padding only has a loss of nothing and gradients of zero."""
    h, w = torch.randn(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    nll, _ = chunked_nll(h, w, torch.empty(0, dtype=torch.int64))
    nll.sum().backward()
    assert nll.shape == (0,)
    assert w.grad.abs().max() == 0


def test_memory_stays_below_the_logits():
    """512 tokens of a 50,000 vocabulary: the largest tensor allocated is a chunk, an eighth of the logits."""
    h, w = torch.randn(512, 4, requires_grad=True), torch.randn(50_000, 4, requires_grad=True)
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Largest():
        chunked_nll(h, w, torch.randint(0, 50_000, (512,)))[0].sum().backward()
    assert max(sizes) <= 2 * 64 * 50_000
