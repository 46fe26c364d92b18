"""What a reader has when they start on a page: data files under the names the pages use, and earlier runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.conftest import run_cli
from tests.docs import shell
from tests.docs.blocks import ROOT

Row = dict[str, object]

# Every command small. A flag on a page beats these, so pages keep the last word on what they show.
SMALL = {
    "MINIGPT_PRETRAIN_STEPS": "2",
    "MINIGPT_PRETRAIN_VOCAB_SIZE": "400",
    "MINIGPT_PRETRAIN_MAX_LEN": "128",
    "MINIGPT_PRETRAIN_BATCH_TOKENS": "512",
    "MINIGPT_PRETRAIN_EVAL_EVERY": "2",
    "MINIGPT_SFT_STEPS": "2",
    "MINIGPT_SFT_MAX_LEN": "128",
    "MINIGPT_SFT_BATCH_TOKENS": "512",
    "MINIGPT_SFT_EVAL_EVERY": "2",
    "MINIGPT_EVAL_ROWS": "16",
    "MINIGPT_EVAL_MAX_TOKENS": "8",
    "MINIGPT_GENERATE_MAX_TOKENS": "8",
    "MINIGPT_CHAT_MAX_TOKENS": "8",
    "MINIGPT_QUICKSTART_SMOKE": "1",
    "MINIGPT_DOCTOR_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # at these sizes a second thread costs more than it brings
}


def environment(programs: Path) -> dict[str, str]:
    """The process's own, without its minigpt settings but for the cache of the tests. programs: first on PATH."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MINIGPT_") or k == "MINIGPT_CACHE"}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, **SMALL, "PATH": path}


def put_programs(folder: Path) -> None:
    """The programs besides minigpt that pages use and a machine may lack."""
    folder.mkdir()
    if shutil.which("jq") is None:
        (folder / "jq").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("jq.py")}" "$@"\n')
        (folder / "jq").chmod(0o755)


# ------------------------------------------------------------------------------------------------ data files


def english() -> Iterator[str]:
    for who, does, what in itertools.product(
        ("The fox", "A sailor", "My neighbour", "The old king"),
        ("finds", "paints", "forgets", "sells", "carries"),
        ("a red lantern.", "seven stones.", "the last apple.", "a letter from the north.", "nothing at all."),
    ):
        yield f"{who} {does} {what}"


def chinese() -> Iterator[str]:
    for when, what, end in itertools.product("春夏秋冬朝夕", "風雨花月山水", ("落滿庭。", "入我懷。", "無人問。")):
        yield f"{when}日見{what}，{what}{end}"


def texts() -> list[Row]:
    return [{"text": f"{line}\n{line[::-1]}"} for line in (*english(), *chinese())]


def alpaca() -> list[Row]:
    asked = [("Say it again.", line) for line in english()] + [("再說一遍。", line) for line in chinese()]
    return [{"instruction": say, "input": line, "output": line} for say, line in asked]


def conversations() -> list[Row]:
    return [
        {"messages": [{"role": "user", "content": f"Who? {line}"}, {"role": "assistant", "content": line.split()[1]}]}
        for line in english()
    ]


def questions() -> list[Row]:
    return [{"question": f"Which word comes first? {line}", "answer": line.split()[0]} for line in english()]


def json_lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_array(rows: list[Row]) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1)


def prose() -> str:
    return "\n\n".join(english()) + "\n"


FILES: dict[str, Callable[[], str]] = {
    "README.md": lambda: (ROOT / "README.md").read_text(encoding="utf-8"),
    "a.jsonl": lambda: json_lines(texts()),
    "b.jsonl": lambda: json_lines(alpaca()),
    "data.jsonl": lambda: json_lines(texts()),
    "held-out.jsonl": lambda: json_lines(texts()),
    "poems.jsonl": lambda: json_lines(texts()),
    "pretrain_zh_poetry.jsonl": lambda: json_lines(texts()),
    "a.json": lambda: json_array(alpaca()),
    "alpaca.json": lambda: json_array(alpaca()),
    "alpaca_en_demo.json": lambda: json_array(alpaca()),
    "alpaca_zh_demo.json": lambda: json_array(alpaca()),
    "chat.jsonl": lambda: json_lines(conversations()),
    "conversations.jsonl": lambda: json_lines(conversations()),
    "sft.jsonl": lambda: json_lines(conversations()),
    "questions.jsonl": lambda: json_lines(questions()),
    "questions.txt": lambda: "你好\nName three colours.\nWhat is the capital of France?\n",
    "book.txt": prose,
    "tinyshakespeare.txt": prose,
    "data/texts.jsonl": lambda: json_lines(texts()),
    "data/book.txt": prose,
}


def put_files(folder: Path) -> None:
    for name, make in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(make(), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ earlier runs


def runs_needed(script: str) -> set[str]:
    """Runs that a page uses and does not make: it goes on from another page. script: all that the page types."""
    made = set(re.findall(r"(?:-o|--out|\bout=)[ =]?[\"']?(runs/[\w./-]*\w)", script))
    for words in shell.commands(script):
        if words[:1] == ["quickstart"] and "--steps" not in words:
            lang = f"-{words[words.index('--lang') + 1]}" if "--lang" in words else ""
            made.add(f"runs/quickstart{lang}")
    used = set(re.findall(r"\bruns/[\w./-]*\w", script))
    return {path for path in used if not any(path == m or path.startswith(f"{m}/") for m in made)}


def make_runs(folder: Path) -> dict[str, Path]:
    """One run of each kind, a step long: `base` and, fine-tuned from it, `chat`."""
    (folder / "a.jsonl").write_text(json_lines(texts()), encoding="utf-8")
    (folder / "chat.jsonl").write_text(json_lines(conversations()), encoding="utf-8")
    small = ("--steps", 1, "--max-len", 128, "--batch-tokens", 512)
    base, chat = folder / "base", folder / "chat"
    for words in (
        ("pretrain", "-d", folder / "a.jsonl", "--size", "1m", "--vocab-size", 400, *small, "-o", base),
        ("sft", "-m", base, "-d", folder / "chat.jsonl", *small, "-o", chat),
    ):
        code, _, stderr = run_cli(*words)
        assert code == 0, stderr
    return {"base": base, "chat": chat}


def put_runs(folder: Path, wanted: set[str], made: dict[str, Path]) -> None:
    """A copy under each wanted name; a name with `chat` in it is a fine-tuned model's."""
    for path in sorted(wanted):  # a run before what lies in it
        shutil.copytree(made["chat" if "chat" in path else "base"], folder / path)
