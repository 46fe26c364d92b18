"""Seconds from starting a command to the first text of a chat model's answer on stdout.

Model: `minimind2-small` (26M, Llama, vocabulary 6,400), made here through the product: a few steps of
`minigpt pretrain`, then of `minigpt sft`, which adds the chat template. It has learnt next to nothing, but answers.

Every block is a fresh process with 2 threads; blocks come in turn, after one unmeasured round that brings programs and
model into memory. Both sides are greedy and make at most `--max-tokens` tokens. stdout is a pipe; the clock stops at
its first byte.

ours          `minigpt chat -m MODEL -p TEXT --temperature 0`, else at its defaults (bf16 where that is native).
transformers  a script: AutoTokenizer, AutoModelForCausalLM.from_pretrained (its default precision: that of the file,
              float32), apply_chat_template, generate. `token` prints every token at once, whole character or not;
              `TextStreamer` is what its users take, and holds text back until a space or a Chinese character.
Ratios are of rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

SIZE = "minimind2-small"
PEER = measure.HERE / "peers" / "chat.py"
OURS = "minigpt chat"
TARGET = 4.0
Figures = dict[str, Any]


def prepare(args: argparse.Namespace, work: Path, env: dict[str, str]) -> Path:
    """The chat model's directory; made once a work directory."""
    base, chat = work / "pretrain", work / "sft"
    if not (chat / "latest").is_file():
        data = measure.first_lines(args.data, 1000 if args.smoke else 20_000, work / "text.jsonl")
        tokenizer = measure.tokenizer(data, work, env)
        common = ["--steps", str(args.prepare_steps), "--max-len", "128", "--batch-tokens", "1024", "--val-split", "0"]
        common += ["--overwrite", "--quiet"]
        first = ["pretrain", "--size", SIZE, "-d", str(data), "-t", str(tokenizer), "-o", str(base)]
        measure.run([*measure.MINIGPT, *first, *common], env)
        second = ["sft", "-m", str(base), "-d", str(args.chat_data.resolve()), "-o", str(chat), "--long", "truncate"]
        measure.run([*measure.MINIGPT, *second, *common], env)
    return chat / (chat / "latest").read_text().strip()


def ours(args: argparse.Namespace, model: Path, env: dict[str, str]) -> Figures:
    flags = ["chat", "-m", str(model), "-p", args.prompt, "--temperature", "0", "--max-tokens", str(args.max_tokens)]
    return figures(measure.run([*measure.MINIGPT, *flags], env))


def peer(args: argparse.Namespace, model: Path, env: dict[str, str], streamer: str) -> Figures:
    job = {"model": str(model), "prompt": args.prompt, "max_tokens": args.max_tokens, "streamer": streamer}
    return figures(measure.run([sys.executable, str(PEER), json.dumps(job)], env))


def figures(child: measure.Child) -> Figures:
    if not child.stdout.strip():
        sys.exit("a model answered nothing: take another --prompt or more --prepare-steps")
    return {"first": child.first_output, "whole": child.seconds, "peak_mb": child.peak / 1e6, "text": child.stdout}


def report(found: dict[str, list[Figures]]) -> Figures:
    """Print the table and return its figures."""
    first = {name: [f["first"] for f in blocks] for name, blocks in found.items()}
    rows = [["", "first text s, median (range)", "whole s", "peak MB", "ours is faster by"]]
    summary = {}
    for name, blocks in found.items():
        ratio = measure.paired(first[OURS], first[name], more_is_better=False)
        summary[name] = {"first": measure.middle(first[name]), "ratio": measure.middle(ratio)}
        whole = measure.middle([f["whole"] for f in blocks])
        peak = measure.middle([f["peak_mb"] for f in blocks])
        rows.append([name, measure.spread(first[name]), f"{whole:.2f}", f"{peak:,.0f}", measure.spread(ratio)])
    print(measure.table(rows))
    print(f"target: ours ≤ {TARGET} s")
    for name, blocks in found.items():
        print(f"  {name:<28} {blocks[0]['text'].strip()[:60]!r}")
    return summary


def parse() -> argparse.Namespace:
    parser = measure.options(__doc__ or "", repeats=5)
    shared = measure.HERE.parents[2] / "shared" / "data"
    parser.add_argument("--chat-data", type=Path, default=shared / "alpaca_zh_demo.json", help="conversations for sft")
    parser.add_argument("--prompt", default="春天有哪些花？")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--prepare-steps", type=int, default=20, help="of pretrain and of sft")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.prepare_steps = 1, 2
    return args


def main() -> None:
    args = parse()
    machine = measure.machine(args.threads)
    print(measure.banner(machine))
    with measure.workplace(args.work, args.smoke) as work:
        env = measure.environment(args.threads, work / "cache")
        model = prepare(args, work, env)
        sides: dict[str, Callable[[], Figures]] = {
            OURS: lambda: ours(args, model, env),
            "transformers, token": lambda: peer(args, model, env, "token"),
            "transformers, TextStreamer": lambda: peer(args, model, env, "text"),
        }
        for side in sides.values():
            side()
        blocks = measure.interleave(sides, args.repeats, lambda f: f"{f['first']:.2f} s")
    summary = report(blocks)
    facts = {"prompt": args.prompt, "max_tokens": args.max_tokens, "prepare_steps": args.prepare_steps}
    measure.write_json(args.json, {"machine": machine, "facts": facts, "summary": summary, "blocks": blocks})


if __name__ == "__main__":
    main()
