"""What is said to be batch invariant is; what the processor cannot hold is not promised."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from minigpt.core.infer import lean, products
from minigpt.core.infer.batch_invariance import BATCH_SIZES, REFERENCE_ROWS, BatchInvariance, fewest_keys
from minigpt.core.infer.cache import STEP
from minigpt.core.nn.attend import attend
from minigpt.core.nn.seqinfo import SeqInfo
from tests.conftest import tiny

needs_fp16 = pytest.mark.skipif(products.FP16 is None, reason="this build has no FBGEMM")
LAYOUTS = ["fuse", "pack", "int8", pytest.param("fp16", marks=needs_fp16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_holds_holds(layout, dtype):
    """At every batch size that is said to hold, rows of every product of the model have the bits of groups of four."""
    if dtype != torch.float32 and layout in ("int8", "fp16"):
        pytest.skip("computes in float32")
    model = tiny("llama", hidden_size=128, intermediate_size=352).to(dtype)
    getattr(lean, layout)(model)
    found = BatchInvariance(model)
    sizes = [n for n in BATCH_SIZES if found.holds(n)]
    assert REFERENCE_ROWS in sizes
    mlp, x = model.model.layers[0].mlp, torch.randn(64, 128).to(dtype)
    with torch.inference_mode():
        for product in (mlp.fused, model.head):
            few = torch.cat([product(part) for part in x.split(REFERENCE_ROWS)])
            for count in sizes:
                assert torch.equal(product(x[:count]), few[:count])


def test_what_depends_on_the_place_is_not_exact():
    """A row that has other bits as the last of four: nothing is promised, and batches are taken as they are."""
    model = tiny("llama")
    lean.fuse(model)
    plain = model.model.layers[0].mlp.fused

    class Placed(products.Packed):
        def __call__(self, x):
            return plain(x) * (1 + 1e-6 * (torch.arange(len(x)) % 4 == 3)[:, None])

    model.model.layers[0].mlp.fused = Placed(plain.weight)
    mine = BatchInvariance(model)
    assert not mine.exact and (mine.largest(7), mine.padded(7)) == (7, 7)


def test_numbers_that_fill_no_vector():
    """SiLU of an unfused layer goes over all rows at once, and its last numbers are computed one by one."""
    mine = BatchInvariance(tiny("llama", intermediate_size=81))
    x = torch.randn(64, 81)
    few = torch.cat([torch.nn.functional.silu(part) for part in x.split(REFERENCE_ROWS)])
    for n in (size for size in BATCH_SIZES if mine.holds(size)):
        assert torch.equal(torch.nn.functional.silu(x[:n]), few[:n])


class Only(BatchInvariance):
    """As on a processor on which just these sizes hold."""

    def __init__(self, *sizes: int):
        super().__init__(tiny("llama"))
        self.sizes = sizes

    def holds(self, rows):
        return rows in self.sizes


@pytest.mark.parametrize(("sizes", "count", "largest", "padded"), [
    ((4, 8, 12, 16, 32), 1, 1, 4),
    ((4, 8, 12, 16, 32), 9, 9, 12),
    ((4, 8, 12, 16, 32), 17, 17, 32),
    ((4, 8, 12, 16, 32), 40, 32, 32),
    ((4,), 5, 4, 4),
    (BATCH_SIZES, 1, 1, 1),
    (BATCH_SIZES, 100, 64, 64),
])  # fmt: skip
def test_batches_are_padded_to_a_size_that_holds(sizes, count, largest, padded):
    """The smallest one that has room, and where none has, the rows are split."""
    mine = Only(*sizes)
    assert mine.largest(count) == largest and mine.padded(min(count, largest)) == padded


def test_products_that_change_are_noticed():
    """A product whose bits depend on the number of rows is not said to hold at that number."""
    model = tiny("llama")
    lean.fuse(model)
    mlp = model.model.layers[0].mlp
    plain = mlp.fused

    class Odd(products.Packed):
        def __call__(self, x):
            return plain(x) * (1 + 1e-6 * (len(x) == 7))

    mlp.fused = Odd(plain.weight)
    mine = BatchInvariance(model)
    assert not mine.holds(7) and mine.holds(REFERENCE_ROWS)


def test_only_what_is_asked_is_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(BatchInvariance, "_measure", lambda self, rows: measured.append(rows) or True)
    mine = BatchInvariance(tiny("llama"))
    assert (mine.largest(3), mine.padded(3), mine.padded(3), mine.padded(4)) == (3, 3, 3, 4)
    assert measured == [REFERENCE_ROWS, 3]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (8, 1, 128), (12, 2, 96), (3, 3, 80), (4, 2, 16)])
def test_fewest_keys_are_enough(heads, kv_heads, dim):
    """From the number that was found on, the bits of attention do not depend on how many keys are read."""
    model = tiny("llama", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim)
    fewest = fewest_keys(model)
    assert STEP <= fewest <= 256 and fewest % STEP == 0
    q, k, v = torch.randn(5, heads, 1, dim), torch.randn(5, kv_heads, 2048, dim), torch.randn(5, kv_heads, 2048, dim)
    for last in (0, 8, 40, 66, 100, 150, 200, 300, 700):  # a text of that length
        at = torch.full((5, 1), last)
        sizes = range(max(fewest, -(-(last + 1) // STEP) * STEP), 2049, STEP)
        seen = [attend(q, k[:, :, :n], v[:, :, :n], SeqInfo(at, q, q, cached=True)) for n in sizes]
        assert all(torch.equal(x, seen[0]) for x in seen), last


OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
         "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about processors of that family")
def test_an_older_processor():
    """The tests that speak of bits, with every library limited to AVX2 as on a processor that has no more."""
    tests = ["test_batch_invariance.py", "test_engine.py", "test_lean.py", "test_cache.py", "test_ahead.py"]
    here = os.path.dirname(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"{here}/{t}" for t in tests)]
    done = subprocess.run(command, env={**os.environ, **OLDER}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
