"""Master weights and the optimizer's state by name."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from minigpt.core.errors import DataError
from minigpt.core.groups import OptimConfig
from minigpt.core.train.optim import Masters, Optimizer


class Toy(nn.Module):
    """Names as in a decoder: one table, two blocks' matrices, one norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(7, 8),
            "layers": nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)]),
            "norm": nn.LayerNorm(8, bias=False),
        })  # fmt: skip

    def forward(self, ids):
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = x + torch.tanh(layer(x))
        return self.model["norm"](x.float()).square().sum()


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_float32_masters_are_the_parameters():
    model = Toy()
    masters = Masters(model, torch.float32)
    assert all(masters.named[n] is p for n, p in model.named_parameters())


def test_bfloat16_gradients_add_up_in_float32():
    """Two micro-batches: the master's gradient is the float32 sum of both bfloat16 ones, and the model keeps none."""
    model = Toy()
    masters = Masters(model, torch.bfloat16)
    name = "model.layers.0.weight"
    weight = dict(model.named_parameters())[name]
    singles = []
    for ids in IDS:
        singles.append(torch.autograd.grad(model(ids[None]), weight)[0].float())
    for ids in IDS:
        model(ids[None]).backward()
    assert weight.dtype == torch.bfloat16 and weight.grad is None
    assert torch.equal(masters.named[name].grad, singles[0] + singles[1])
    assert masters.named["model.norm.weight"].dtype == torch.float32


def test_publish_casts_masters_into_the_model():
    model = Toy()
    masters = Masters(model, torch.bfloat16)
    with torch.no_grad():
        for m in masters.named.values():
            m.add_(1e-4)
    masters.publish()
    for name, p in model.named_parameters():
        assert torch.equal(p.data, masters.named[name].to(p.dtype))


def test_decay_is_on_matrices_only():
    """With zero gradients AdamW only decays: matrices shrink, norms stay."""
    model = Toy()
    masters = Masters(model, torch.float32)
    optimizer = Optimizer(masters.named, OptimConfig(weight_decay=0.1))
    before = {n: p.detach().clone() for n, p in masters.named.items()}
    for p in masters.named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(lr=0.5)
    for name, p in masters.named.items():
        factor = 1.0 if p.ndim < 2 else 1 - 0.5 * 0.1
        torch.testing.assert_close(p.detach(), before[name] * factor)


@pytest.mark.parametrize("device_type", ["fused", "foreach"])
def test_equals_torch_adamw_to_the_bit(device_type):
    """Ten steps with changing rates: the same bits as torch.optim.AdamW with the same kernel."""
    ours, theirs = Toy(), Toy()
    masters = Masters(ours, torch.float32)
    optimizer = Optimizer(masters.named, OptimConfig(weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6))
    optimizer.rules[0].fused = device_type == "fused"
    named = dict(theirs.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-6, **{device_type: True})
    for i in range(10):
        for group in reference.param_groups:
            group["lr"] = 0.01 * (i + 1)
        for model in (ours, theirs):
            model.zero_grad()
            model(IDS).backward()
        optimizer.step(0.01 * (i + 1))
        reference.step()
    for name, p in masters.named.items():
        assert torch.equal(p, named[name]), name


def test_training_does_not_import_the_compiler():
    """Two seconds a start that a run without --compile has no use for."""
    code = (
        "import sys, torch; from tests.core.train.test_optim import *; m = Masters(Toy(), torch.bfloat16);"
        "o = Optimizer(m.named, OptimConfig(optimizer='muon')); m.model(IDS).backward(); o.step(1e-3);"
        "torch.nn.utils.get_total_norm(m.gradients()); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", done.stderr


def test_muon_takes_block_matrices_and_adamw_the_rest():
    masters = Masters(Toy(), torch.float32)
    optimizer = Optimizer(masters.named, OptimConfig(optimizer="muon"))
    for p in masters.named.values():
        p.grad = torch.ones_like(p)
    optimizer.step(lr=1e-3)
    fields = {}
    for key in optimizer.state_dict():
        name, _, field = key.rpartition("/")
        fields.setdefault(name, set()).add(field)
    assert fields["model.layers.0.weight"] == {"momentum_buffer"}
    assert fields["model.embed_tokens.weight"] == fields["model.norm.weight"] == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_round_trip_is_bitwise(kind):
    """Three steps straight = two steps, save, load into a fresh optimizer, one step."""

    def steps(optimizer, masters, model, n):
        for _ in range(n):
            masters.zero_grad()
            model(IDS).backward()
            optimizer.step(lr=1e-2)

    straight = Toy()
    a = Masters(straight, torch.float32)
    steps(Optimizer(a.named, OptimConfig(optimizer=kind)), a, straight, 3)

    broken = Toy()
    b = Masters(broken, torch.float32)
    first = Optimizer(b.named, OptimConfig(optimizer=kind))
    steps(first, b, broken, 2)
    saved = {k: v.clone() for k, v in first.state_dict().items()}
    second = Optimizer(b.named, OptimConfig(optimizer=kind))
    second.load_state_dict(saved)
    steps(second, b, broken, 1)
    for name in a.named:
        assert torch.equal(a.named[name], b.named[name]), name


def test_state_of_another_model_is_refused():
    masters = Masters(Toy(), torch.float32)
    optimizer = Optimizer(masters.named, OptimConfig())
    with pytest.raises(DataError, match=r"model\.layers\.9\.weight"):
        optimizer.load_state_dict({"model.layers.9.weight/exp_avg": torch.zeros(2, 2)})
    with pytest.raises(DataError, match="another shape"):
        optimizer.load_state_dict({"model.layers.0.weight/exp_avg": torch.zeros(2, 2)})
