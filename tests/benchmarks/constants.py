"""Are the constants of the code right on this processor? Each beside its alternatives, times in milliseconds.

attention   forward and backward of packed rows at the 26M model's shape (8 query heads, 2 key/value heads of 64), by
            length of document: batched products (`documents`), which SeqInfo chooses up to LONGEST = 1,024, and SDPA.
queries     the same by batched products with blocks of 64, 128 (QUERIES) and 256 queries.
micro       a training step of 8,192 tokens of the `1m` and `3m` models, by tokens computed at once (suggested: 4,096).
integers    rows from which oneDNN's 8-bit product is faster than FBGEMM's, as measured at start-up.
batches     the smallest padded batch of each number of rows for each kind of weights.
The best of several tries in this process, in the precision that a run would choose; --dtype names another.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import measure
import torch

from minigpt.core.data.batch import Batch
from minigpt.core.infer import lean
from minigpt.core.infer.batch_invariance import BatchInvariance
from minigpt.core.infer.products import fewest_for_int_mm, fewest_for_onednn
from minigpt.core.models import folder
from minigpt.core.models.decoder import Decoder
from minigpt.core.nn import attend, seqinfo
from minigpt.core.nn.rope import RotaryEmbedding
from minigpt.core.nn.seqinfo import SeqInfo
from minigpt.core.runtime import DTYPES, Runtime, use_all_cores

TOKENS, HEADS, KV_HEADS, DIM = 4096, 8, 2, 64
Row = list[str]


def milliseconds(work: Callable[[], None], tries: int) -> float:
    work()
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best * 1e3


def attention(dtype: torch.dtype, length: int, path: str, tries: int, queries: int = seqinfo.QUERIES) -> float:
    """Forward and backward over TOKENS tokens of documents of one length."""
    seqinfo.QUERIES = attend.QUERIES = queries
    positions = torch.arange(length).repeat(TOKENS // length)[None]
    rotary = RotaryEmbedding({"rope_type": "default", "rope_theta": 10_000.0}, DIM)
    q = torch.randn(1, HEADS, TOKENS, DIM, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, KV_HEADS, TOKENS, DIM, dtype=dtype, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(q)

    def work() -> None:
        seq = SeqInfo.packed(positions, rotary, dtype, path)
        attend.attend(q, k, v, seq).backward(grad)

    if path == "sdpa":  # of whole rows: one a document, so that nothing is masked
        q, k, v, grad = (
            x.detach()
            .view(1, x.shape[1], -1, length, DIM)
            .squeeze(0)
            .transpose(0, 1)
            .contiguous()
            .requires_grad_(x.requires_grad)
            for x in (q, k, v, grad)
        )
        positions = torch.arange(length).expand(TOKENS // length, -1)
    try:
        return milliseconds(work, tries)
    finally:
        seqinfo.QUERIES = attend.QUERIES = 128


def step(dtype: torch.dtype, size: str, rows: int, tries: int) -> float:
    """Forward and backward of 32 rows of 256 tokens, documents of 64, so many rows at once."""
    model = Decoder(folder.create(size, 6400)).to(dtype)
    ids = torch.randint(0, 6400, (rows, 256))
    positions = torch.arange(64).repeat(4).expand(rows, -1).contiguous()
    batch = Batch(ids, ids, positions, torch.zeros_like(ids), None, float(ids.numel()))

    def work() -> None:
        for _ in range(32 // rows):
            model(batch).nll.sum().backward()

    return milliseconds(work, tries)


def padded(layout: str, dtype: torch.dtype) -> str:
    """Runs of numbers of rows with the batch that is computed for them: `1–16, 17→18, …`; only padded ones named."""
    model = Decoder(folder.create("minimind2-small", 6400, {"num_hidden_layers": 1})).to(dtype)
    getattr(lean, layout)(model)
    found = BatchInvariance(model)
    if not found.exact:
        return "to rounding"
    more = {n: found.padded(n) for n in (1, 2, 3, 5, 6, 7, 8, 12, 16, 31, 32) if found.largest(n) == n}
    return "; ".join(f"{n} as {size}" for n, size in more.items() if n != size) or "none padded"


def tables(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[list[Row]]:
    tries = 1 if args.smoke else args.repeats
    lengths = (64, 256) if args.smoke else (64, 256, 512, 1024, 2048)
    paths = {path: [attention(dtype, n, path, tries) for n in lengths] for path in ("documents", "sdpa")}
    yield [["attention", *map(str, lengths)], *([path, *map("{:.1f}".format, row)] for path, row in paths.items())]
    blocks = {n: [attention(dtype, length, "documents", tries, n) for length in lengths] for n in (64, 128, 256)}
    yield [["queries", *map(str, lengths)], *([str(n), *map("{:.1f}".format, row)] for n, row in blocks.items())]
    rows = (4, 16) if args.smoke else (2, 4, 8, 16, 32)
    steps = {size: [step(dtype, size, n, tries) for n in rows] for size in ("1m", "3m")}
    yield [["micro", *(f"{n * 256:,}" for n in rows)], *([s, *map("{:.0f}".format, row)] for s, row in steps.items())]
    fewest = {"eager": fewest_for_onednn(), "compiled": fewest_for_int_mm()}
    yield [["integers", "rows"], *([how, "never" if n == sys.maxsize else str(n)] for how, n in fewest.items())]
    kinds = {"pack": dtype, "int8": torch.float32, "fp16": torch.float32}
    yield [["batches", "padded"], *([name, padded(name, kind)] for name, kind in kinds.items())]


def main() -> None:
    parser = measure.options(__doc__, repeats=7)
    parser.add_argument("--dtype", choices=DTYPES)
    args = parser.parse_args()
    use_all_cores()
    dtype = DTYPES[args.dtype] if args.dtype else Runtime.open("cpu").dtype
    print(measure.banner(measure.machine(args.threads)), f"\n{dtype}, {torch.backends.cpu.get_cpu_capability()}")
    for table in tables(args, dtype):
        print(f"\n{measure.table(table)}")


if __name__ == "__main__":
    main()
