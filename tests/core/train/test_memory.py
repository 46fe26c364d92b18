"""The estimate of a step's memory, held against what autograd keeps and what a real step allocates."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from minigpt.core.data.batch import Batch
from minigpt.core.groups import OptimConfig
from minigpt.core.models import folder
from minigpt.core.models.decoder import Decoder
from minigpt.core.models.flops import mean_context
from minigpt.core.models.presets import PRESETS
from minigpt.core.nn import nll, seqinfo
from minigpt.core.runtime import is_native, tolerant_dtype
from minigpt.core.train import memory
from minigpt.core.train.losses import next_token
from minigpt.core.train.memory import Estimate, estimate
from minigpt.core.train.optim import Masters, Optimizer
from tests.conftest import ARCHITECTURES, tiny

GB = 10**9
DTYPES = [torch.float32, torch.bfloat16]


def packed(lengths: list[int], rows: int, vocabulary: int) -> Batch:
    """Equal rows of these documents; the last token has no label."""
    ids, labels = torch.randint(0, vocabulary, (2, rows, sum(lengths)), generator=torch.Generator().manual_seed(0))
    labels[:, -1] = -100
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1).contiguous()
    return Batch(ids, labels, positions, torch.zeros_like(ids), units=1.0)


def kept(model: Decoder, batch: Batch) -> int:
    """Bytes that a forward keeps for backward, parameters left out and every storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).nll.sum()
    assert loss.requires_grad
    return sum(storages.values())


def poems(seed: int, typical: int, row: int = 512) -> list[int]:
    """Lengths of documents that fill a row."""
    generator, lengths = random.Random(seed), [0]
    while sum(lengths) < row:
        lengths.append(min(max(4, int(generator.lognormvariate(0, 0.5) * typical)), row - sum(lengths)))
    return lengths[1:]


def guessed(model: Decoder, lengths: list[int], rows: int, dtype: torch.dtype, device: str) -> int:
    """Activations by the estimate. device `cuda` means SDPA, which a processor uses for long rows, too."""
    context = mean_context(lengths)
    return estimate(model.config, rows, sum(lengths), str(dtype), "adamw", device, context=context).parts["activations"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("lengths", "rows"), [([64], 8), ([256], 2), ([512], 2)])
@pytest.mark.parametrize(("path", "device"), [("documents", "cpu"), ("sdpa", "cuda")])
def test_whole_rows_to_the_byte(path, device, arch, dtype, lengths, rows):
    """Rows of one document leave nothing to guess: half a percent is left for gains and labels."""
    model = tiny(arch)
    Masters(model, dtype)
    model.attention_path = path
    measured = kept(model, packed(lengths, rows, 320))
    assert guessed(model, lengths, rows, dtype, device) == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "lengths",
    [[100, 60, 96], [16, 24, 9, 37, 50, 100, 20], [17] * 12, [300, 80, 60, 60, 12], *(poems(s, 60) for s in range(3))],
)
@pytest.mark.parametrize(("path", "device"), [("documents", "cpu"), ("sdpa", "cuda")])
def test_packed_rows(path, device, arch, dtype, lengths):
    """One number stands for all lengths, and padding of the buckets is a rule of thumb: within 15 %."""
    model = tiny(arch)
    Masters(model, dtype)
    model.attention_path = path
    measured = kept(model, packed(lengths, 4, 320))
    assert guessed(model, lengths, 4, dtype, device) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("size", ["1m", "3m"])
@pytest.mark.parametrize("typical", [25, 150])
def test_presets(size, typical):
    """The sizes that people train, in the precision that they train in, through the path that they get: within 10 %."""
    model = Decoder(folder.create(size, 1000))
    Masters(model, torch.bfloat16)
    lengths = poems(1, typical)
    measured = kept(model, packed(lengths, 2, 1000))
    assert guessed(model, lengths, 2, torch.bfloat16, "cpu") == pytest.approx(measured, rel=0.10)


def test_unknown_lengths_are_the_worst():
    """Without a context the estimate covers every length but those shorter than their padding; 1 % for rounding up."""
    for device in ("cpu", "cuda"):
        worst = estimate(tiny("llama").config, 4, 256, "bfloat16", "adamw", device).total
        for context in (20, 60, 200, 256):
            known = estimate(tiny("llama").config, 4, 256, "bfloat16", "adamw", device, context=context).total
            assert known <= 1.01 * worst


# ---------------------------------------------------------------------------------------------- the other parts


def nbytes(tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_static_parts(arch, tied, optimizer, dtype):
    """Weights, copies, gradients and optimizer state are those of the tensors of a real step."""
    model = tiny(arch, tie_word_embeddings=tied)
    masters = Masters(model, dtype)
    moving = Optimizer(masters.named, OptimConfig(optimizer=optimizer))
    next_token(model, packed([32], 1, 320)).sum_loss.backward()
    parts = estimate(model.config, 1, 32, str(dtype), optimizer, "cpu").parts
    moving.step(1e-3)
    state = [t for t in moving.state_dict().values() if t.dim()]
    assert memory.parameters(model.config) == model.num_parameters()
    assert parts["weights"] == nbytes(masters.named.values())
    assert parts["gradients"] == nbytes(masters.gradients())
    assert parts["optimizer"] == nbytes(state)
    assert parts["copies"] == nbytes(p for p in model.parameters() if p.dtype != torch.float32)


@pytest.mark.parametrize("size", PRESETS)
def test_parameters_of_the_presets(size):
    """Counted from the shapes alone."""
    with torch.device("meta"):
        model = Decoder(folder.create(size, 6400))
    assert memory.parameters(model.config) == model.num_parameters()


def peak_of(step: Callable[[], None]) -> int:
    """The most that live tensors added while a function ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "optimizer", "vocabulary", "lengths", "rows"),
    [
        ("3m", "adamw", 6400, [100, 60, 96], 4),  # the documents decide
        ("1m", "adamw", 6400, [256], 2),  # logits in forward decide
        ("10m", "adamw", 12_800, [128], 2),  # the head's gradient decides
        ("10m", "adamw", 12_800, [16], 1),  # the tied table's gradients decide
        ("wide", "adamw", 100, [256], 4),  # backward of a block decides
        ("1m", "muon", 500, [32], 1),  # the update decides
    ],
)
def test_peak_of_a_step(size, optimizer, vocabulary, lengths, rows, dtype):
    """All that comes and goes in a step of two micro-batches: gradients, activations, loss and workspace, to 5 %."""
    if not is_native(dtype, torch.device("cpu")):
        pytest.skip("emulated here: no run has it, and a step takes many times longer")
    shape = {"intermediate_size": 4096, "num_hidden_layers": 1} if size == "wide" else {}
    model = Decoder(folder.create("1m" if shape else size, vocabulary, shape))
    masters = Masters(model, dtype)
    moving = Optimizer(masters.named, OptimConfig(optimizer=optimizer))
    batch = packed(lengths, rows, vocabulary)

    def step() -> None:
        for _ in range(2):
            next_token(model, batch).sum_loss.backward()
        moving.step(1e-3)
        masters.publish()
        masters.zero_grad()

    step()  # makes the optimizer's state
    context = mean_context(lengths)
    products = str(tolerant_dtype(torch.device("cpu")))
    parts = estimate(
        model.config, rows, sum(lengths), str(dtype), optimizer, "cpu", context=context, products=products
    ).parts
    passing = sum(parts[name] for name in ("gradients", "activations", "loss", "workspace"))
    assert passing == pytest.approx(peak_of(step), rel=0.05)


def test_checkpointing_keeps_the_inputs_of_layers():
    """One layer in full, and of every layer its input."""
    config = folder.create("3m", 6400)
    plain = estimate(config, 8, 512, "bfloat16", "adamw", "cpu")
    spared = estimate(config, 8, 512, "bfloat16", "adamw", "cpu", grad_checkpoint=True)
    whole, inputs = memory.layer_activations(plain.setting), 8 * 512 * 192 * 2
    assert plain.parts["activations"] - spared.parts["activations"] == 4 * whole - 5 * inputs


def test_constants_of_the_layers():
    """Written out twice, because the layers import torch."""
    assert (memory.LONGEST, memory.QUERIES, memory.GRANULE) == (seqinfo.LONGEST, seqinfo.QUERIES, seqinfo.GRANULE)
    assert memory.CHUNK_BYTES == nll.CHUNK_BYTES


# ---------------------------------------------------------------------------------------------- words


def minimind(rows: int = 16) -> Estimate:
    return estimate(folder.create("minimind3", 6400), rows, 512, "bfloat16", "adamw", "cuda")


def test_line_names_the_largest_parts():
    """The total, the room, and three parts in order of size."""
    found = minimind()
    first, second, third = sorted(found.parts, key=lambda name: -found.parts[name])[:3]
    assert found.total == sum(found.parts.values())
    assert found.line(24 * GB).startswith(f"about {found.total / 1e9:.1f} GB of 24.0 GB: {first} ")
    assert found.line().index(f": {first} ") < found.line().index(f", {second} ") < found.line().index(f", {third} ")


def test_no_advice_when_it_fits():
    """Room for exactly what it takes is enough."""
    assert minimind().advice(minimind().total) is None
    assert minimind().advice(minimind().total - 1) is not None


def test_advice_is_the_largest_batch_that_fits():
    """One row more would not fit."""
    room = minimind(5).total + 1000
    assert minimind().advice(room) == f"--batch-size 5 would need about {minimind(5).total / 1e9:.1f} GB"


def test_advice_when_one_row_is_too_much():
    """First checkpointing, with the rows asked for if they fit; then a smaller model, unless the model is given."""
    config = folder.create("minimind3", 6400)
    long = estimate(config, 1, 8192, "bfloat16", "adamw", "cuda")
    spared = estimate(config, 1, 8192, "bfloat16", "adamw", "cuda", grad_checkpoint=True)
    assert (long.advice(spared.total) or "").startswith("--grad-checkpoint would need")
    all_rows = minimind(4)
    small = estimate(folder.create("minimind2-small", 6400), 4, 512, "bfloat16", "adamw", "cuda")
    assert (all_rows.advice(small.total) or "").startswith("--size minimind2-small would need")
    assert "another --device" in (all_rows.advice(small.total, sized=False) or "")
    assert "another --device" in (all_rows.advice(1000) or "")


def test_advice_names_no_size_whose_context_is_too_short():
    """llama-100m reads 512 tokens: no help to rows of 1,024."""
    large = estimate(folder.create("minimind2", 32_004), 1, 1024, "bfloat16", "adamw", "cuda", grad_checkpoint=True)
    smaller = large.advice(large.total - 1) or ""
    assert smaller.startswith("--size ") and "llama-100m" not in smaller
