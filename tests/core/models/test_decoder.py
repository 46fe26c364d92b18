"""The decoder's own promises: packing, determinism, outputs, counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minigpt.core.data.batch import Batch
from minigpt.core.models import folder, model_types
from minigpt.core.models.decoder import Decoder
from minigpt.core.models.presets import PRESETS
from tests.conftest import tiny

ARCHITECTURES = model_types()


def documents(lengths: list[int], seed: int = 0) -> list[Batch]:
    """Each document as a batch of its own: one row, no padding. Some labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i, n in enumerate(lengths):
        ids, labels = torch.randint(0, 320, (2, 1, n), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        batches.append(Batch(ids, labels, torch.arange(n)[None], torch.full((1, n), i), units=1.0))
    return batches


def pack(parts: list[Batch], width: int, pad_id: int = 0) -> Batch:
    """Documents one after the other in rows of `width`, the rest padding: a document of its own without labels."""
    rows: list[list[Batch]] = [[]]
    for part in parts:
        if sum(p.input_ids.shape[1] for p in rows[-1]) + part.input_ids.shape[1] > width:
            rows.append([])
        rows[-1].append(part)
    columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "segments": []}
    for row in rows:
        rest = width - sum(p.input_ids.shape[1] for p in row)
        fill = {
            "input_ids": torch.full((1, rest), pad_id),
            "labels": torch.full((1, rest), -100),
            "position_ids": torch.arange(rest)[None],
            "segments": torch.full((1, rest), -1),
        }
        for name, column in columns.items():
            column.append(torch.cat([*(getattr(p, name) for p in row), fill[name]], 1))
    return Batch(**{name: torch.cat(column) for name, column in columns.items()}, units=1.0)


def loss_and_gradients(model: Decoder, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = torch.zeros((), device=model.head_weight.device)
    for batch in batches:
        loss = model(batch).nll.sum()
        loss.backward()
        total = total + loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


LENGTHS = [30, 1, 7, 64, 12, 50, 3, 3, 33, 20, 41]


@pytest.mark.parametrize("path", ["documents", "sdpa"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_row_is_separate_documents(arch, path):
    """Packed and padded rows give the loss (≤ 1e-6 relative) and gradients (≤ 1e-5) of the documents one by one."""
    model = tiny(arch)
    parts = documents(LENGTHS)
    model.attention_path = "sdpa"  # one document a row: no packing involved at all
    alone, alone_gradients = loss_and_gradients(model, parts)
    model.attention_path = path
    for width in (64, 200):
        loss, gradients = loss_and_gradients(model, [pack(parts, width)])
        assert abs(loss - alone) / alone <= 1e-6
        for name, want in alone_gradients.items():
            assert (gradients[name] - want).norm() / want.norm() <= 1e-5, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_changes_nothing(arch):
    """More padding, or other ids in it, changes no token's loss."""
    model = tiny(arch)
    parts = documents(LENGTHS)
    narrow = model(pack(parts, 64)).nll
    wide = model(pack(parts, 80, pad_id=7)).nll
    assert narrow[narrow != 0].numel() == wide[wide != 0].numel()
    assert (narrow[narrow != 0] - wide[wide != 0]).abs().max() <= 1e-5


def test_a_document_sees_nothing_of_its_neighbours():
    """Changing one document of a row leaves the others' losses bit for bit."""
    model = tiny("llama")
    batch = pack(documents([20, 20, 20]), 60)
    before = model(batch).nll
    ids = batch.input_ids.clone()
    ids[0, 20:40] = (ids[0, 20:40] + 1) % 320
    after = model(replace(batch, input_ids=ids)).nll
    assert torch.equal(before[:, :20], after[:, :20]) and torch.equal(before[:, 40:], after[:, 40:])
    assert not torch.equal(before[:, 20:40], after[:, 20:40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_runs_are_bit_equal(arch, dtype):
    """Two identical forwards and backwards give equal bits."""
    model = tiny(arch).to(dtype)
    batch = pack(documents(LENGTHS * 6), 256)
    loss, gradients = loss_and_gradients(model, [batch])
    loss2, gradients2 = loss_and_gradients(model, [batch])
    assert torch.equal(loss, loss2)
    assert all(torch.equal(gradients[name], gradients2[name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["documents", "sdpa"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_recomputed_blocks_give_the_same_bits(arch, path, dtype):
    """Activation checkpointing changes what is kept for backward, and no bit of loss and gradients."""
    model = tiny(arch, num_hidden_layers=4).to(dtype)
    model.attention_path = path
    batch = pack(documents(LENGTHS * 6), 256)
    kept = {}
    for model.recompute in (False, True):
        sizes: dict[int, int] = {}

        def keep(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(batch).nll.sum()
        kept[model.recompute] = (loss_and_gradients(model, [batch]), sum(sizes.values()), loss)
    (plain, before, _), (again, after, _) = kept[False], kept[True]
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])
    assert after < 0.5 * before


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_outputs(arch):
    """What is asked for comes, consistent with each other; the rest is None; an unknown name is refused."""
    model = tiny(arch)
    batch = pack(documents(LENGTHS), 100)
    out = model(batch, {"nll", "logits", "hidden", "entropy"}, temperature=0.8)
    logp = out.logits.log_softmax(-1)
    used = batch.labels != -100
    want = -logp.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0] * used
    assert (out.nll - want).abs().max() <= 1e-5
    assert (out.entropy - -(logp.exp() * logp).sum(-1) * used).abs().max() <= 1e-5
    assert torch.equal(model.head(out.hidden) / 0.8, out.logits)
    assert out.nll.dtype == torch.float32 and out.aux == {} and out.values is None
    plain = model(batch)
    assert plain.logits is None and plain.hidden is None and plain.entropy is None
    with pytest.raises(ValueError, match="values"):
        model(batch, {"values"})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16_training_is_close(arch):
    """A bfloat16 copy with float32 norm weights gives the float32 loss and gradients within rounding."""
    model = tiny(arch)
    batch = pack(documents(LENGTHS), 128)
    loss, gradients = loss_and_gradients(model, [batch])
    half = tiny(arch)
    for parameter in half.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
    loss_half, gradients_half = loss_and_gradients(half, [batch])
    assert abs(loss - loss_half) / loss < 0.01
    for name, want in gradients.items():
        assert (gradients_half[name].float() - want).norm() / want.norm() < 0.1, name


def test_padding_only_batch_has_zero_gradients():
    """A rank without rows computes such a batch, so every parameter must get a gradient."""
    model = tiny("llama")
    batch = pack(documents([5]), 16)
    _, gradients = loss_and_gradients(model, [replace(batch, labels=torch.full_like(batch.labels, -100))])
    assert all(g.abs().max() == 0 for g in gradients.values())


PARAMETERS = {
    "minimind2-small": 25_829_888,
    "minimind2": 104_030_976,
    "minimind3": 63_912_192,
    "llama-100m": 100_538_112,
}


@pytest.mark.parametrize("size", PRESETS)
def test_parameter_counts(size):
    """The reference sizes are exact; ours are near their names with a 6,400 vocabulary."""
    with torch.device("meta"):
        model = Decoder(folder.create(size, vocab_size=6400))
    if size in PARAMETERS:
        assert model.num_parameters() == PARAMETERS[size]
    else:
        assert 0.7 <= model.num_parameters() / (float(size[:-1]) * 1e6) <= 1.6


def test_initial_loss_is_that_of_guessing():
    """A fresh model knows nothing: its loss is ln(vocabulary)."""
    torch.manual_seed(0)
    model = Decoder(folder.create("1m", vocab_size=2000))
    batch = Batch(*torch.randint(0, 2000, (2, 2, 100)), torch.arange(100).expand(2, 100), torch.zeros(2, 100), 1.0)
    assert model(batch).nll.mean().item() == pytest.approx(7.6, abs=0.1)
    std = model.model.layers[0].mlp.up_proj.weight.std().item()
    assert std == pytest.approx(0.02, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_equals_cpu(arch):
    """Packed rows give the CPU's losses and gradients on a CUDA device."""
    model, batch = tiny(arch), pack(documents(LENGTHS), 100)
    loss, gradients = loss_and_gradients(model, [batch])
    there = tiny(arch).to("cuda")
    loss_there, gradients_there = loss_and_gradients(there, [batch.to(torch.device("cuda"))])
    assert abs(loss - loss_there.cpu()) / loss <= 1e-5
    for name, want in gradients.items():
        assert (gradients_there[name].cpu() - want).norm() / want.norm() <= 1e-4, name
