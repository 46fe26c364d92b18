"""Weights laid out for sampling: the same numbers in fewer products, and 8 bits as far off as 8 bits must be."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch

from minigpt.core.data.batch import Batch
from minigpt.core.errors import DataError, UsageError
from minigpt.core.infer import lean, products
from minigpt.core.infer.engine import Engine
from minigpt.core.infer.products import FEW_INT8, FP16, Fp16Linear, Int8Linear
from minigpt.core.infer.sampling import SamplingParams
from minigpt.core.models import model_types
from tests.conftest import tiny
from tests.core.infer.test_engine import Letters

ARCHITECTURES = model_types()
PACKED = [False, pytest.param(True, marks=pytest.mark.skipif(FEW_INT8 is None, reason="this build has no FBGEMM"))]
needs_fp16 = pytest.mark.skipif(FP16 is None, reason="this build has no FBGEMM")


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.head(model.hidden(ids[None], torch.arange(len(ids))[None]))[0]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("most", [127, 63])
def test_int8_is_the_product_of_rounded_numbers(packed, most, monkeypatch):
    """Against the same rounding written out in float64: within 1e-5 of the largest number. Zeros stay zeros. most:
    steps of a weight, 63 on processors without VNNI, where products in 16 bits overflow with 127.
    """
    if most > products.weight_steps():
        pytest.skip("this processor adds up 63 steps")
    monkeypatch.setattr(products, "weight_steps", lambda: most)
    torch.manual_seed(0)
    weight, x = torch.randn(70, 130), torch.randn(3, 5, 130) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    weight[4], x[1, 2] = 0, 0
    got = Int8Linear(weight, packed)(x)
    scale, size = weight.abs().amax(1, keepdim=True), x.abs().amax(-1, keepdim=True)
    rounded = (weight / (scale / most)).nan_to_num().round().double() * scale / most
    steps = (x / size * 127).nan_to_num().round().double() * size / 127
    want = steps @ rounded.t()
    assert got.shape == (3, 5, 70)
    for part, wanted in zip(got, want, strict=True):
        assert (part - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not got[1, 2].any()
    assert not got[..., 4].any()


@pytest.mark.parametrize("packed", PACKED)
def test_int8_rows_do_not_depend_on_each_other(packed):
    """To the bit, for any number of rows."""
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.randn(96, 64), packed), torch.randn(70, 64) * torch.rand(70, 1) * 10
    _alike(layer, x)


@pytest.mark.skipif(FEW_INT8 is None, reason="this build has no FBGEMM")
@pytest.mark.parametrize("shape", [(96, 64), (70, 130), (33, 512)])
def test_int8_kernels_give_the_same_bits(shape):
    """Of few rows, of many, and of the plain product of integers; ties between two steps included."""
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(70, shape[1])
    x[:, 1:] = (x[:, 1:] * 20).round() + 0.5
    x[:, 0] = 127
    fast, plain = Int8Linear(weight, True), Int8Linear(weight, False)
    for rows in (1, 5, 70):
        assert torch.equal(fast(x[:rows]), plain(x[:rows]))


OLDER = """
import torch
from minigpt.core.infer.products import Int8Linear, weight_steps
torch.manual_seed(0)
weight, x = torch.randn(96, 512), torch.randn(70, 512)
scale, size = weight.abs().amax(1, keepdim=True) / weight_steps(), x.abs().amax(-1, keepdim=True) / 127
want = (x / size).round().double() * size @ ((weight / scale).round().double() * scale).t()
assert (Int8Linear(weight, False)(x) - want).abs().max() <= 1e-5 * want.abs().max()
print(weight_steps())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about processors of that family")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_int8_on_older_processors(isa):
    """Kernels of a CPU without VNNI: a bit less of every weight, and exact."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", OLDER], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["63"]


def test_kernels_that_overflow_are_noticed(monkeypatch):
    """A kernel that is off for the largest numbers costs a bit of every weight."""
    assert products.weight_steps() in (63, 127)
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: torch.full((len(x), w.shape[1]), 32767 * 32))
    assert products.weight_steps.__wrapped__() == 63


@needs_fp16
def test_fp16_is_the_product_of_rounded_weights():
    """Within 1e-5 of the largest number of a product in float64, whatever the shape of the input."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(70, 64)
    layer = Fp16Linear(weight)
    want = x.double() @ weight.half().double().t()
    assert (layer(x) - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(layer(x.view(7, 10, 64)), layer(x).view(7, 10, 96))
    with pytest.raises(DataError, match="16 bits"):
        Fp16Linear(weight * 1e6)


def _alike(layer, x: torch.Tensor) -> None:
    """Rows have the bits that they have alone. x: (70, K)."""
    alone = torch.cat([layer(row[None]) for row in x])
    for rows in (*range(1, 26), 31, 32, 33, 64, 70):
        assert torch.equal(layer(x[:rows]), alone[:rows])


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_int8_model(arch, packed):
    """Logits within 5 % of their size for models so narrow (measured: 2 to 3.3 %), and the loss is that of them."""
    model, ids = tiny(arch), torch.arange(40, 90)
    want = logits(model, ids)
    lean.int8(model, packed)
    got = logits(model, ids)
    assert 0 < (got - want).norm() / want.norm() <= 0.05
    batch = Batch(ids[None, :-1], ids[None, 1:], torch.arange(49)[None], torch.zeros(1, 49, dtype=torch.long), None, 49)
    nll = model(batch).nll[0]
    assert torch.allclose(nll, -got[:-1].log_softmax(-1)[torch.arange(49), ids[1:]], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="inference"):
        model(batch, want=("nll", "entropy"))


@needs_fp16
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fp16_model(arch):
    """Logits within a thousandth of their size, where 8 bits are off by some hundredths."""
    model, ids = tiny(arch), torch.arange(40, 90)
    want = logits(model, ids)
    lean.fp16(model)
    assert 0 < (logits(model, ids) - want).norm() / want.norm() <= 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fused_weights_stay_the_models_own(arch):
    """The same names and numbers, in one piece of memory: what changes a weight changes what is computed."""
    model, ids = tiny(arch), torch.arange(40, 90)
    other = {name: value + 0.01 for name, value in model.state_dict().items()}
    names, before = list(model.state_dict()), logits(model, ids)
    lean.fuse(model)
    assert list(model.state_dict()) == names
    assert (logits(model, ids) - before).abs().max() <= 1e-5
    model.load_state_dict(other)
    fresh = tiny(arch)
    fresh.load_state_dict(other)
    assert (logits(model, ids) - logits(fresh, ids)).abs().max() <= 1e-4
    assert (logits(model, ids) - before).abs().max() > 1e-2


def test_int8_is_for_cpus():
    """Elsewhere it is refused before anything is changed."""
    with torch.device("meta"):
        model = tiny("llama").to("meta")
    with pytest.raises(UsageError, match="int8"):
        lean.int8(model)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8", pytest.param("fp16", marks=needs_fp16)])
@pytest.mark.parametrize("paged", [False, True])
def test_compiled_is_eager(quant, paged):
    """The same greedy tokens, over several shapes."""
    pytest.importorskip("torch._inductor")
    given = [list(range(20, 20 + n)) for n in (3, 60, 9, 250, 31)]
    params = SamplingParams(max_tokens=20, temperature=0, min_tokens=20)

    model = tiny("qwen3", max_position_embeddings=1024)
    {"none": lean.pack, "int8": partial(lean.int8, compile=True), "fp16": lean.fp16}[quant](model)
    options = {"paged": True, "cache_tokens": 4096} if paged else {}
    eager = Engine(model, Letters()).generate(given, params)
    compiled = Engine(model, Letters(), compile=True, **options).generate(given, params)
    assert [c.ids for c in compiled] == [c.ids for c in eager]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"paged": True, "cache_tokens": 4096, "prefix_tokens": 0}], ids=["slots", "pages"]
)
def test_few_programs_are_compiled(options):
    """Other requests, in other pages, are answered by the programs that are there."""
    pytest.importorskip("torch._inductor")
    from torch._dynamo.utils import counters

    model = tiny("qwen3", max_position_embeddings=1024)
    lean.fuse(model)
    one = Engine(model, Letters(), rows=4, compile=True, **options)
    params = SamplingParams(max_tokens=80, temperature=0, min_tokens=80)
    counters.clear()
    for lengths in ((3, 60, 9, 100), (70, 5, 64, 20)):
        one.generate([list(range(20, 20 + n)) for n in lengths], params)
    assert counters["stats"]["unique_graphs"] == 1
