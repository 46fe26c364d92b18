"""The count of operations, held against torch's own counter on real forward and backward passes; the peaks."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_backward_flop_count, sdpa_flop_count

from minigpt.core.data.batch import Batch
from minigpt.core.models import folder
from minigpt.core.models.decoder import Decoder
from minigpt.core.models.flops import PEAKS, forward_flops, mean_context, peak_flops, train_flops
from minigpt.core.models.presets import PRESETS
from minigpt.core.nn import linear
from tests.conftest import ARCHITECTURES, tiny

ATEN = torch.ops.aten


def mm_flop(a: tuple[int, ...], b: tuple[int, ...], *args: object, **kwargs: object) -> int:
    """A product whose left factor has one row is how a norm adds up the gradient of its gain: no matrix product."""
    return 2 * a[0] * a[1] * b[1] if a[0] > 1 else 0


# What the counter does not know: products in place, and attention on a CPU.
FORMULAS = {
    ATEN.mm: mm_flop,
    ATEN.addmm_: lambda total, a, b, *args, **kwargs: mm_flop(a, b),
    ATEN.baddbmm_: lambda total, a, b, *args, **kwargs: bmm_flop(a, b),
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}
LINEAR = {"mm", "addmm_"}


@pytest.fixture(autouse=True)
def torchs_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter sees no product of another library."""
    monkeypatch.setattr(linear, "onednn_float32", lambda: False)


def packed(lengths: list[int], rows: int = 2, ignored: int = 0) -> Batch:
    """Equal rows of these documents; the first `ignored` tokens of a row have no label."""
    ids, labels = torch.randint(0, 320, (2, rows, sum(lengths)), generator=torch.Generator().manual_seed(0))
    labels[:, :ignored] = -100
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1).contiguous()
    return Batch(ids, labels, positions, torch.zeros_like(ids), units=1.0)


def counted(model: Decoder, batch: Batch) -> tuple[Counter[str], Counter[str]]:
    """Operations by kind of product (`linear`, `attention`), of forward and of backward."""
    found = []

    def count(counter: FlopCounterMode) -> None:
        kinds: Counter[str] = Counter()
        for op, flops in counter.get_flop_counts()["Global"].items():
            kinds["linear" if str(op).removeprefix("aten.") in LINEAR else "attention"] += flops
        found.append(kinds)

    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = model(batch).nll.sum()
    count(counter)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss.backward()
    count(counter)
    return found[0], found[1]


def head(model: Decoder) -> int:
    return 2 * model.head_weight.numel()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ignored", [0, 24])
def test_linear_products_are_counted_exactly(arch, tied, ignored):
    """Projections, MLP and head to the last operation; only the chunked loss computes its logits a second time."""
    model, batch = tiny(arch, tie_word_embeddings=tied), packed([64, 32], ignored=ignored)
    tokens, labelled = batch.input_ids.numel(), (batch.labels != -100).float().mean().item()
    forward, backward = counted(model, batch)
    assert forward["linear"] == pytest.approx(tokens * forward_flops(model.config, 0.0, labelled=labelled), rel=1e-6)
    again = labelled * tokens * head(model)
    expected = tokens * train_flops(model.config, 0.0, labelled=labelled) + again
    assert forward["linear"] + backward["linear"] == pytest.approx(expected, rel=1e-6)


def attention_flops(model: Decoder, lengths: list[int], rows: int = 2) -> float:
    """What the module counts for attention in forward, over all tokens."""
    per_token = forward_flops(model.config, lengths) - forward_flops(model.config, 0.0)
    return rows * sum(lengths) * per_token


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("lengths", "dense"), [([64], 2.0), ([96, 64, 16], 2.0), ([256], 1.5), ([512], 1.25)])
def test_attention_of_packed_documents(arch, lengths, dense):
    """Documents, not rows. Up to 128 tokens the CPU multiplies the whole square, twice the causal half that counts;
    longer ones go in blocks of 128 queries that see the keys up to their own end: n (n + 1) / 2 of n^2 squares."""
    model, batch = tiny(arch), packed(lengths)
    model.attention_path = "documents"
    forward, backward = counted(model, batch)
    assert forward["attention"] == pytest.approx(dense * attention_flops(model, lengths), rel=1e-9)
    assert backward["attention"] == 2 * forward["attention"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_by_sdpa(arch):
    """SDPA is counted dense, so twice the causal half, and its backward computes the scores again: 5 products for 4."""
    model, batch = tiny(arch), packed([100])
    model.attention_path = "sdpa"
    forward, backward = counted(model, batch)
    causal = attention_flops(model, [100])
    assert forward["attention"] == pytest.approx(2 * causal, rel=1e-9)
    assert backward["attention"] == pytest.approx(2 * (2 * causal) * 5 / 4, rel=1e-9)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_whole_step_within_its_known_surplus(arch):
    """All products of a step together: the count, plus the masked half of attention and the second logits."""
    model, lengths = tiny(arch), [96, 64, 16]
    forward, backward = counted(model, packed(lengths))
    tokens = 2 * sum(lengths)
    surplus = 3 * attention_flops(model, lengths) + tokens * head(model)
    expected = tokens * train_flops(model.config, lengths) + surplus
    assert forward.total() + backward.total() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradient_checkpointing_counts_the_blocks_once_more(arch):
    """Blocks under torch's checkpoint cost four times their forward; torch may stop a little earlier, which is off."""
    model, batch = tiny(arch), packed([64, 32])
    for block in model.model.layers:
        block.forward = lambda *args, plain=block.forward: checkpoint(plain, *args, use_reentrant=False)  # type: ignore
    with set_checkpoint_early_stop(False):
        forward, backward = counted(model, batch)
    tokens = batch.input_ids.numel()
    expected = tokens * (train_flops(model.config, 0.0, grad_checkpoint=True) + head(model))
    assert forward["linear"] + backward["linear"] == pytest.approx(expected, rel=1e-9)


def test_mean_context_weighs_by_tokens():
    """A token is more likely in a long document; splitting a row must lower the count."""
    assert mean_context([100]) == 100
    assert mean_context([90, 10]) == 82
    config = folder.create("3m", 6400)
    assert train_flops(config, [512]) > train_flops(config, [256, 256]) == train_flops(config, 256)


@pytest.mark.parametrize("size", PRESETS)
def test_six_operations_a_weight(size):
    """Kaplan et al., 2020 (arXiv:2001.08361): 6 N without attention, N being the weights that multiply."""
    config = folder.create(size, 6400)
    with torch.device("meta"):
        model = Decoder(config)
    assert config.tie_word_embeddings  # so that the embedding's weights are the head's
    gains = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert train_flops(config, 0.0) == 6 * (model.num_parameters() - gains)


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "torch.bfloat16", 756.5),
        ("NVIDIA H200", "float16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L4", "bfloat16", 121),
        ("Tesla T4", "float16", 65),
        ("Tesla V100-SXM2-16GB", "torch.float16", 125),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ],
)
def test_peaks_by_the_drivers_spelling(name, dtype, tera):
    """Dense peaks of the data sheets, found under the name that torch reports."""
    assert peak_flops(name, dtype) == tera * 1e12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cpu", "bfloat16"),
        ("AMD EPYC 9654 96-Core Processor", "float32"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bfloat16"),
        ("Tesla T4", "bfloat16"),
    ],
)
def test_no_peak_where_none_is_known(name, dtype):
    """Relatives of a known card are not that card, and emulated precision has no peak: better none than a wrong one."""
    assert peak_flops(name, dtype) is None


# Half precision over float32, by how many products tensor cores and ordinary cores of a generation do in a clock.
RATIOS = {
    30: ("b200",),
    14.5: ("gh200", "h200", "h200 nvl", "h100", "h100 pcie", "h100 nvl", "h800"),
    16: ("a100 sxm4", "a100 pcie", "a800 sxm4", "a800 pcie", "a30"),
    4: ("a40", "a10", "l40s", "l4", "rtx a6000", "rtx 6000 ada generation"),
    2: ("a10g", "l40", *(name for name in PEAKS if re.fullmatch(r"rtx \d0\d0( ti)?", name))),
    8: ("t4", "v100 sxm2", "v100 pcie", "v100s pcie", "mi300x"),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_are_dense(name):
    """Sparse figures are twice as high: then the ratio to float32 would be that of no generation's hardware."""
    bf16, fp16, fp32 = PEAKS[name]
    expected = next(ratio for ratio, names in RATIOS.items() if name in names)
    assert fp16 is not None and fp32 is not None
    assert fp16 / fp32 == pytest.approx(expected, rel=0.05)
    assert bf16 == (None if name in ("t4", "v100 sxm2", "v100 pcie", "v100s pcie") else fp16)
