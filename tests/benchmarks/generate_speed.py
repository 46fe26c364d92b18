"""Sampling speed: minigpt's engine beside transformers' generate and llama.cpp, on the same weights.

Model: `minimind2-small` (26M, Llama, vocabulary 6,400) with random weights, written once as a folder and as GGUF Q8_0;
with --device cuda `minimind3` (64M, Qwen3), beside transformers alone.
Every block is a fresh process with 2 threads (`peers/generation.py`), greedy, and every answer has exactly --new tokens
behind a prompt of --prompt random tokens. Blocks come in turn, all sides once a round, so that a change of the
machine's pace meets all of them. A block's figure is the median of its repeats after a warm-up: new tokens a second of
wall clock, the prompts' computation included (`prefill`: prompt tokens a second until the first new token).

transformers  AutoModelForCausalLM, generate() with its own cache, inference_mode, all prompts of one length: no padding
llama.cpp     the server inside xllamacpp, a slot a prompt, its defaults but for threads and no prompt cache; over HTTP
              on the loopback, one request a prompt at the same time
minigpt       minigpt.load and minigpt.Engine, prompts not remembered. `compiled` has its compilation in the warm-up
Ratios are of rounds, and their median is the figure.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import measure

SIZES = {"cpu": "minimind2-small", "cuda": "minimind3"}
PEER = measure.HERE / "peers" / "generation.py"


class Block(NamedTuple):
    """What one process does."""

    side: str
    rows: int
    dtype: str = "float32"
    quant: str = ""
    compile: bool = False
    prefill: bool = False

    @property
    def name(self) -> str:
        work = "prefill" if self.prefill else f"batch {self.rows}"
        how = self.quant or {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[self.dtype]
        return f"{work} {self.side} {'Q8_0' if self.side == 'llama.cpp' else how}{' compiled' * self.compile}"


def ours(rows: int, dtype: str = "float32", quant: str = "", **more: bool) -> Block:
    return Block("minigpt", rows, dtype, quant, **more)


HF, CPP = "transformers", "llama.cpp"
# ours, theirs, the ratio to reach
ON_CPU = [
    (ours(1), Block(HF, 1), 1.0),
    (ours(8), Block(HF, 8), 1.0),
    (ours(32), Block(HF, 32), 1.0),
    (ours(1, "bfloat16"), Block(HF, 1, "bfloat16"), 2.5),
    (ours(1, quant="fp16"), Block(HF, 1, "bfloat16"), 2.5),
    (ours(1, quant="fp16", compile=True), Block(HF, 1, "bfloat16"), 2.5),
    (ours(1, quant="int8"), Block(HF, 1), 4.0),
    (ours(1, quant="int8", compile=True), Block(HF, 1), 4.0),
    (ours(8, quant="int8"), Block(HF, 8), 2.5),
    (ours(8, quant="int8", compile=True), Block(HF, 8), 3.5),
    (ours(32, quant="int8"), Block(HF, 32), 2.5),
    (ours(32, quant="int8", compile=True), Block(HF, 32), 3.5),
    (ours(1, quant="int8"), Block(CPP, 1), 0.45),
    (ours(1, quant="int8", compile=True), Block(CPP, 1), 0.65),
    (ours(32, quant="int8"), Block(CPP, 32), 1.2),
    (ours(32, quant="int8", compile=True), Block(CPP, 32), 1.2),
    (ours(1, "bfloat16", prefill=True), Block(CPP, 1, prefill=True), 1.2),
]
ON_CUDA = [
    (ours(rows, "bfloat16", compile=compile), Block(HF, rows, "bfloat16"), goal)
    for rows, goal in ((1, 10.0), (32, 10.0), (256, 20.0))
    for compile in (False, True)
]


@dataclass
class Bench:
    """What every block needs."""

    args: Any
    model: Path
    env: dict[str, str]

    def run(self, block: Block) -> float:
        """Tokens a second of one block, the median of its repeats."""
        a = self.args
        job = {
            **block._asdict(),
            "model": str(self.model.with_suffix(".gguf") if block.side == CPP else self.model),
            "threads": a.threads,
            "prompt": a.prefill if block.prefill else a.prompt,
            "new": a.new,
            "repeats": a.within,
            "vocab": 6400,
            "device": a.device,
        }
        child = measure.run([sys.executable, str(PEER), json.dumps(job)], self.env)
        tokens = block.rows * (job["prompt"] if block.prefill else a.new)
        return tokens / measure.middle(child.result["seconds"])


def make_model(work: Path, tokenizer: Path, size: str) -> Path:
    """The folder and the GGUF file of one random model."""
    import torch

    from minigpt.core.convert import gguf_write
    from minigpt.core.data.tokenizer import Tokenizer
    from minigpt.core.models import folder
    from minigpt.core.models.decoder import Decoder

    path = work / size
    if not path.with_suffix(".gguf").exists():
        torch.manual_seed(0)
        tokens = Tokenizer.load(tokenizer)
        config = folder.create(size, tokens.vocab_size)
        roles = {"bos_token_id": tokens.role("bos_token"), "pad_token_id": tokens.pad_id}
        folder.write(path, Decoder(config), config, eos_token_id=tokens.eos_ids, **roles)
        tokens.save(path)
        gguf_write.write(path, path.with_suffix(".gguf"), quant="q8_0")
    return path


def main() -> None:
    parser = measure.options(__doc__, repeats=3)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt that is only read")
    parser.add_argument("--within", type=int, default=5, help="repeats within a block")
    parser.add_argument("--only", default="", help="pairs whose names hold this")
    parser.add_argument("--device", default="cpu", choices=SIZES, help="cuda: other pairs, a model of 64M")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.within, args.new, args.prefill = 1, 1, 8, 64
    pairs = [p for p in {"cpu": ON_CPU, "cuda": ON_CUDA}[args.device] if args.only in f"{p[0].name} / {p[1].name}"]
    facts = measure.machine(args.threads)
    print(measure.banner(facts), file=sys.stderr)
    with measure.workplace(args.work, args.smoke) as work:
        env = measure.environment(args.threads, work / "cache", TORCHINDUCTOR_CACHE_DIR=str(work / "inductor"))
        small = measure.first_lines(args.data, 2000, work / "text.jsonl")
        bench = Bench(args, make_model(work, measure.tokenizer(small, work, env), SIZES[args.device]), env)
        blocks = dict.fromkeys(block for pair in pairs for block in pair[:2])
        sides = {block.name: (lambda block=block: bench.run(block)) for block in blocks}
        found = measure.interleave(sides, args.repeats, "{:,.0f} tokens/s".format)
    rows = [["ours / theirs", "ours", "theirs", "ratio", "to reach"]]
    for mine, peer, goal in pairs:
        a, b = found[mine.name], found[peer.name]
        ratio = measure.spread(measure.paired(a, b, more_is_better=True), "{:.2f}")
        figures = [measure.spread(values, "{:,.0f}") for values in (a, b)]
        rows.append([f"{mine.name} / {peer.side} {peer.name.split()[-1]}", *figures, ratio, f"{goal:.2f}"])
    print(measure.table(rows))
    measure.write_json(args.json, {"machine": facts, "tokens_per_second": found})


if __name__ == "__main__":
    main()
