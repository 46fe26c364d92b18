"""Pretraining speed: real (learnt, not padding) tokens a second, minigpt against transformers.Trainer.

Model: `minimind2-small` (26M, Llama, vocabulary 6,400), rows of 340 tokens. Both sides read the same documents with the
same tokenizer, which `minigpt tokenize train` makes first. Every block is a fresh process with 2 threads and the same
GOMP_SPINCOUNT (10,000, what our command sets itself; --spins own leaves the peer at its library's default). Blocks
come in turn, A B C A B C …; a block is `--warmup` optimizer steps, then `--steps` measured ones by wall clock, without
validation or saving on either side.

ours    `minigpt pretrain`, the command itself: packed rows, micro-batches of 12 rows (its default at this length), one
        of them an optimizer step: about 4,060 learnt tokens. Its schedule is set to linear, Trainer's default, since
        wsd saves a checkpoint on its way. Time: from the progress line of the last warm-up step to that of the last
        step, logging in between included. Tokens: `tokens` of metrics.jsonl.
        Also for information: --dtype float32, and --pack pad with as many documents a step as are in a packed one.
Trainer LlamaForCausalLM from the same config, float32 weights, everything at its default (AdamW fused, sdpa attention,
        batches of 8, shuffled, one document a row cut at 340 tokens) but: no logging, no saving, no bar, and as many
        accumulation steps as make an optimizer step learn as many tokens as ours (--accumulation 1 for the default).
        Documents are tokenised before the clock starts and lie in memory as lists. `longest` pads in the collator to
        the longest of a batch, as DataCollatorForLanguageModeling does; `max_length` pads all to 340 in advance, as
        MiniMind does. The padding token is a spare one, so that the end of a document is learnt there as here.
        Time: from the end of the last warm-up step to the end of the last step, by a callback. Tokens: labels that are
        not -100, after the shift.
Ratios are of rounds, and their median is the figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure

MAX_LEN = 340
SIZE = "minimind2-small"
PEER = measure.HERE / "peers" / "trainer.py"
TARGETS = {"Trainer, defaults": 3.0, "Trainer, bf16=True": 1.6}
Figures = dict[str, Any]


@dataclass
class Bench:
    """What every block needs. mean: learnt tokens a document."""

    args: argparse.Namespace
    work: Path
    data: Path
    tokenizer: Path
    env: dict[str, str]
    config: dict[str, Any]
    mean: float

    @property
    def tokens_per_step(self) -> int:
        return int(self.args.rows * MAX_LEN)

    @property
    def documents_per_step(self) -> int:
        return max(1, round(self.tokens_per_step / self.mean))

    @property
    def accumulation(self) -> int:
        return int(self.args.accumulation or max(1, round(self.documents_per_step / self.args.peer_batch)))

    def ours(self, rows: int, *flags: str) -> Figures:
        """One block of the command. rows: of a step."""
        out, a = self.work / "run", self.args
        total = a.warmup + a.steps
        command = ["pretrain", "-d", str(self.data), "-t", str(self.tokenizer), "--size", SIZE, "-o", str(out)]
        command += ["--overwrite", "--json", "--max-len", str(MAX_LEN), "--batch-tokens", str(rows * MAX_LEN)]
        command += ["--steps", str(total), "--log-every", str(a.warmup), "--schedule", "linear"]
        command += ["--val-split", "0", "--save-every", "1000000", *flags]
        child = measure.run([*measure.MINIGPT, *command], self.env)
        run = json.loads((out / "run.json").read_text())
        logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        tokens = {row["step"]: row["tokens"] for row in logged}
        seconds = child.when(f"train  {total:,}/{total:,}") - child.when(f"train  {a.warmup:,}/{total:,}")
        learnt = tokens[total] - tokens[a.warmup]
        return {**rates(learnt, seconds, child), "parameters": run["parameters"], "device": run["device"]}

    def trainer(self, padding: str, bf16: bool) -> Figures:
        a = self.args
        job = {
            "config": self.config,
            "tokenizer": str(self.tokenizer),
            "data": str(self.data),
            "max_len": MAX_LEN,
            "padding": padding,
            "bf16": bf16,
            "batch": a.peer_batch,
            "accumulation": self.accumulation,
            "warmup": a.warmup,
            "steps": a.steps,
        }
        env = dict(self.env)
        if a.spins == "own":
            del env["GOMP_SPINCOUNT"]
        child = measure.run([sys.executable, str(PEER), json.dumps(job)], env)
        found = child.result
        return {**found, **rates(found["tokens"], found["seconds"], child)}


def rates(tokens: int, seconds: float, child: measure.Child) -> Figures:
    return {"tok_s": tokens / seconds, "tokens": tokens, "seconds": seconds, "peak_mb": child.peak / 1e6}


def prepare(args: argparse.Namespace, work: Path) -> Bench:
    """Data, tokenizer and model config; the store is packed by the first run and kept in the cache."""
    from minigpt.core.models import folder

    env = measure.environment(args.threads, work / "cache")
    data = measure.first_lines(args.data, 1000, work / "small.jsonl") if args.smoke else args.data.resolve()
    tokenizer = measure.tokenizer(data, work, env)
    store = work / f"store-{data.stem}"
    command = ["tokenize", "pack", "-d", str(data), "-t", str(tokenizer), "-o", str(store), "--json"]
    packed = measure.run([*measure.MINIGPT, *command], env).result
    config = folder.create(SIZE, 6400).to_hf()
    mean = packed["tokens"] / packed["documents"] - 1
    return Bench(args, work, data, tokenizer, env, config, mean)


def sides(bench: Bench) -> dict[str, Callable[[], Figures]]:
    """Every contestant, in the order of a round."""
    args = bench.args
    found: dict[str, Callable[[], Figures]] = {"minigpt pretrain": lambda: bench.ours(args.rows)}
    for name, bf16 in (("defaults", False), ("bf16=True", True)):
        for padding in args.peer_padding:
            mark = "" if padding == "longest" else f", padded to {MAX_LEN}"
            found[f"Trainer, {name}{mark}"] = partial(bench.trainer, padding, bf16)
    found["minigpt pretrain --dtype float32"] = lambda: bench.ours(args.rows, "--dtype", "float32")
    found["minigpt pretrain --pack pad"] = lambda: bench.ours(bench.documents_per_step, "--pack", "pad")
    if args.only:
        found = {k: v for k, v in found.items() if any(word in k for word in args.only) or k == "minigpt pretrain"}
    return found


def report(found: dict[str, list[Figures]], facts: Figures) -> Figures:
    """Print the table and return its figures."""
    speed = {name: [f["tok_s"] for f in blocks] for name, blocks in found.items()}
    ours = speed["minigpt pretrain"]
    rows = [["", "real tok/s, median (range)", "tokens/step", "peak MB", "ours is faster by", "target"]]
    summary = {}
    for name, blocks in found.items():
        ratio = measure.paired(ours, speed[name], more_is_better=True)
        summary[name] = {"tok_s": measure.middle(speed[name]), "ratio": measure.middle(ratio)}
        per_step = measure.middle([f["tokens"] for f in blocks]) / facts["steps"]
        peak = measure.middle([f["peak_mb"] for f in blocks])
        target = f"≥ {TARGETS[name]}" if name in TARGETS else ""
        rows.append(
            [name, measure.spread(speed[name], "{:,.0f}"), f"{per_step:,.0f}", f"{peak:,.0f}",
             measure.spread(ratio), target]
        )  # fmt: skip
    print(measure.table(rows))
    sizes = {f["parameters"] for blocks in found.values() for f in blocks}
    print(f"parameters {', '.join(f'{n:,}' for n in sizes)} · ours on {found['minigpt pretrain'][0]['device']}")
    peers = [blocks[0] for blocks in found.values() if "optimizer" in blocks[0]]
    if peers:
        print("Trainer: {optimizer}, {attention} attention, {threads} threads".format(**peers[0]))
    return summary


def parse() -> argparse.Namespace:
    parser = measure.options(__doc__ or "", repeats=3)
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before the clock starts")
    parser.add_argument("--steps", type=int, default=12, help="measured ones, a multiple of --warmup")
    parser.add_argument("--rows", type=int, default=12, help="packed rows of 340 tokens in an optimizer step of ours")
    parser.add_argument("--peer-padding", choices=("longest", "max_length", "both"), default="both")
    parser.add_argument("--peer-batch", type=int, default=8, help="per_device_train_batch_size")
    parser.add_argument("--accumulation", type=int, help="of the peer (default: tokens a step as ours)")
    parser.add_argument("--spins", choices=("same", "own"), default="same", help="GOMP_SPINCOUNT of the peer")
    parser.add_argument("--only", action="append", help="contestants whose name holds this, besides ours (repeatable)")
    args = parser.parse_args()
    args.peer_padding = ["longest", "max_length"] if args.peer_padding == "both" else [args.peer_padding]
    if args.smoke:
        args.warmup, args.steps, args.rows, args.repeats, args.accumulation = 1, 1, 2, 1, 1
    if args.steps % args.warmup:
        parser.error("--steps must be a multiple of --warmup")
    return args


def main() -> None:
    args = parse()
    machine = measure.machine(args.threads)
    print(measure.banner(machine))
    with measure.workplace(args.work, args.smoke) as work:
        bench = prepare(args, work)
        facts = {
            "data": args.data.name,
            "max_len": MAX_LEN,
            "rows_per_step": args.rows,
            "learnt_tokens_per_document": round(bench.mean, 1),
            "peer_batch": args.peer_batch,
            "peer_accumulation": bench.accumulation,
            "warmup": args.warmup,
            "steps": args.steps,
            "spins": args.spins,
        }
        print(measure.banner(facts))
        blocks = measure.interleave(sides(bench), args.repeats, lambda f: f"{f['tok_s']:,.0f} tok/s")
    summary = report(blocks, facts)
    measure.write_json(args.json, {"machine": machine, "facts": facts, "summary": summary, "blocks": blocks})


if __name__ == "__main__":
    main()
