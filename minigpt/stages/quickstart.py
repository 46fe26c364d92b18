"""Train a small model that answers, from nothing, within five minutes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from minigpt.core.config import Layer, build, group, opt, options
from minigpt.core.data import sample
from minigpt.core.errors import Stopped, UsageError
from minigpt.core.files import read_json, write_json
from minigpt.core.groups import CommonConfig, DeviceConfig
from minigpt.core.report import Context, Progress, Report, Result
from minigpt.core.train.run import make
from minigpt.stages import Verb, chat, evaluate, pretrain, sft, tokenize

EXAMPLES = (
    "minigpt quickstart",
    "minigpt quickstart --lang zh",
    "minigpt quickstart --steps",
)
COMMANDS: dict[str, Verb] = {
    "tokenize train": tokenize.VERBS["train"],
    **{
        name: Verb(module.Config, module.run, "", ())
        for name, module in (("pretrain", pretrain), ("sft", sft), ("eval", evaluate), ("chat", chat))
    },
}
GOALS = {"fact": 0.95, "sum": 0.90, "stops": 0.98}  # what the recipe is made to reach
NAMES = {"fact": "facts", "sum": "one-digit sums", "stops": "answers that end by themselves"}
PROMPTS = {"en": ("There once was a", "What is the capital of Japan?"), "zh": ("从前有", "日本的首都是哪里？")}
MARKER, MADE = "quickstart.json", ("tokenizer", "pretrain", "chat")  # what it leaves in --out
SHOWN = 4  # questions of the test that are shown with their answers


@dataclass
class Config:
    lang: str = opt("both", "language of the data", panel="Data", choices=("both", "en", "zh"))
    out: str | None = opt(
        None,
        "where everything goes",
        short="-o",
        metavar="DIR",
        shown="runs/quickstart, for one language runs/quickstart-LANG",
    )
    steps: bool = opt(False, "print the same steps as commands instead of running them")
    smoke: bool = opt(False, "a few steps of everything, to see that it works: the model learns nothing")
    overwrite: bool = opt(False, "start afresh instead of going on with what is in --out")
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


class Step(NamedTuple):
    """One command of the recipe, by its options."""

    command: str
    options: dict[str, Any]

    def words(self) -> list[str]:
        """The command line that does the same."""
        words = ["minigpt", *self.command.split()]
        for option in options(COMMANDS[self.command].config):
            flag = option.meta["short"] or option.flag
            value = self.options.get(option.name)
            if value is True:
                words.append(flag)
            elif value is not None:
                words += [w for item in (value if option.many else [value]) for w in (flag, str(item))]
        return words

    def run(self, report: Report) -> Result:
        """Do it in this process."""
        verb = COMMANDS[self.command]
        cfg: Any
        cfg, origins = build(verb.config, [Layer("flag", self.options)])
        return verb.run(cfg, Context(report, origins, self.words()))


def recipe(cfg: Config, out: Path) -> list[Step]:
    """Tokenizer, pretraining, fine-tuning, evaluation, chat. A model of under a million parameters."""
    texts, chats, questions = (f"sample:{part}:{cfg.lang}" for part in ("text", "chat", "eval"))
    default = DeviceConfig()
    machine = {k: v for k, v in vars(cfg.device).items() if v != getattr(default, k)}
    passes = (1.5, 2) if cfg.lang == "both" else (3, 4)  # one language is half the data
    lengths: list[dict[str, Any]] = [{"epochs": n} for n in passes]
    if cfg.smoke:
        lengths = [{"steps": 10, "eval_every": 5}] * 2
    test = {"rows": 32, "max_tokens": 16} if cfg.smoke else {}
    shape = {"max_len": 256, "batch_tokens": 4096, "optimizer": "muon", "log_every": 100, **machine}
    begin, question = PROMPTS["zh" if cfg.lang == "zh" else "en"]
    tokenizer, base, model = (str(out / made) for made in MADE)
    pretraining = {"data": [texts], "tokenizer": tokenizer, "size": "1m", "sample_prompt": [begin], "out": base}
    tuning = {"model": base, "data": [chats], "sample_prompt": [question], "out": model}
    return [
        Step("tokenize train", {"data": [texts, chats], "vocab_size": 1000, "out": tokenizer}),
        Step("pretrain", {**pretraining, **shape, **lengths[0]}),
        Step("sft", {**tuning, **shape, **lengths[1]}),
        Step("eval", {"model": model, "data": [questions], "answers": True, **test, **machine}),
        Step("chat", {"model": model, **machine}),
    ]


def run(cfg: Config, context: Context) -> Result:
    """Data, tokenizer, pretraining, fine-tuning and a test on questions that training never saw; then chat."""
    name = "quickstart" if cfg.lang == "both" else f"quickstart-{cfg.lang}"
    out = Path(cfg.out or Path(os.environ.get("MINIGPT_RUNS", "runs"), name))
    steps = recipe(cfg, out)
    if cfg.steps:
        lines = [shlex.join(step.words()) for step in steps]
        return Result("\n".join(lines), {"commands": lines})
    began = time.monotonic()
    report = context.report
    report.title(f"minigpt quickstart · into {out} · Ctrl-C saves, the same command goes on")
    claim(out, steps, cfg)
    try:
        scored = train(cfg, out, steps, report)
    except Stopped as e:
        raise Stopped(e.message, found=e.found, fix="the same command goes on from here", data=e.data) from None
    for line in card(scored["metrics"], scored["asked"]):
        report.out(line)
    seconds = time.monotonic() - began
    talk = steps[-1]
    report.note(
        "done", f"{spell(seconds)} · the same steps as commands: {shlex.join([*again(context.argv), '--steps'])}"
    )
    report.note("next", shlex.join(talk.words()))
    if person(report) and not cfg.smoke:
        talk.run(report)
    metrics = {"questions": scored["metrics"], "goals": goals(scored["metrics"])}
    return Result(None, {"run_dir": str(out), "model": scored["model"], "metrics": metrics})


def train(cfg: Config, out: Path, steps: list[Step], report: Report) -> dict[str, Any]:
    """Run every step up to the evaluation, and return what that found. What is done already is not done again."""
    tokens, base, tuned, test, _ = steps
    inner = Inner(report)
    for n, line in enumerate(described(cfg.lang)):
        report.note("1/5" if not n else "", line)
    if not (out / "tokenizer" / "tokenizer.json").is_file():
        tokens.run(inner)
    report.note("2/5", tokenizer_line(out / "tokenizer", cfg.lang))
    for number, step, what in (
        ("3/5", base, "pretrain on the texts"),
        ("4/5", tuned, "fine-tune on the conversations"),
    ):
        if finished(Path(step.options["out"])):
            report.note(number, f"{what}: done before")
            continue
        report.note(number, f"{what}, {step.options['out']}")
        resumable = {**step.options, "resume": "auto"}
        step._replace(options=resumable).run(inner)
    report.note("5/5", "questions in words that training never saw")
    return test.run(inner).data


# ------------------------------------------------------------------------------------------------ what is there already


def claim(out: Path, steps: list[Step], cfg: Config) -> None:
    """Make `out` this quickstart's own; one of --smoke gives way. UsageError when something else is there."""
    wanted = {"data": sample.VERSION, "smoke": cfg.smoke, "steps": [shlex.join(step.words()) for step in steps]}
    marker = out / MARKER
    if marker.is_file():
        there = read_json(marker)
        if cfg.overwrite or (there.get("smoke") and there != wanted):
            for made in MADE:
                shutil.rmtree(out / made, ignore_errors=True)
        elif there != wanted:
            raise UsageError(
                f"{out} holds a quickstart with other options",
                fix="repeat the command that made it, start afresh with --overwrite, or choose another --out",
            )
    elif out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty and not a quickstart's", fix="choose another --out")
    make(out)
    write_json(marker, wanted)


def finished(run: Path) -> bool:
    return (run / "run.json").is_file() and read_json(run / "run.json").get("status") == "done"


def again(argv: list[str]) -> list[str]:
    """The command as typed, in words that go on instead of beginning afresh."""
    return [word for word in argv if word != "--overwrite"] or ["minigpt", "quickstart"]


# ------------------------------------------------------------------------------------------------ what is said


class Inner(Report):
    """The reporter of a step: its bar, its warnings and its samples are shown, the rest with --verbose."""

    def __init__(self, outer: Report):
        self.outer = outer
        self.interactive = outer.interactive

    def title(self, text: str) -> None:
        self.outer.detail(text)

    def note(self, label: str, text: str) -> None:
        if label == "sample":
            self.outer.note("", text)
        else:
            self.outer.detail(f"{label:<6} {text}")

    def warn(self, text: str, *, fix: str | None = None) -> None:
        self.outer.warn(text, fix=fix)

    def detail(self, text: str) -> None:
        self.outer.detail(text)

    def progress(self, total: int | None, *, start: int = 0, label: str = "") -> Progress:
        return self.outer.progress(total, start=start, label=label)


def described(lang: str) -> Iterator[str]:
    """What the data is, and one story of it."""
    paths = {part: sample.path_of(f"sample:{part}:{lang}") for part in ("text", "chat")}
    counts = {part: path.read_bytes().count(b"\n") for part, path in paths.items()}
    where = {"both": "English and Chinese", "en": "English", "zh": "Chinese"}[lang]
    yield f"data: {counts['text']:,} texts and {counts['chat']:,} conversations in {where}, made here by minigpt itself"
    yield from stories(lang)


def stories(lang: str) -> list[str]:
    """One story of each language: shown, and measured the tokenizer with."""
    return [sample.story(tongue, Random(7)) for tongue in sample.LANGUAGES[lang]]


def tokenizer_line(path: Path, lang: str) -> str:
    from minigpt.core.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    text = "\n".join(stories(lang))
    count = len(tokenizer.encode(text))
    return (
        f"tokenizer: {tokenizer.vocab_size:,} tokens, {len(text.encode()) / count:.1f} bytes a token on those stories"
    )


def goals(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was reached of what the recipe is made for: shares, by name."""
    by_kind = metrics["by_kind"]
    reached = {"fact": by_kind["fact"]["accuracy"], "sum": by_kind["sum"]["accuracy"], "stops": metrics["stops"]}
    return {name: {"reached": reached[name], "goal": goal} for name, goal in GOALS.items()}


def card(metrics: dict[str, Any], asked: list[dict[str, Any]]) -> Iterator[str]:
    """The score, good or bad, and some questions with their answers."""
    for name, found in goals(metrics).items():
        part = metrics["by_kind"].get(name)
        right, total = (
            (part["right"], part["asked"]) if part else (round(metrics["stops"] * metrics["asked"]), metrics["asked"])
        )
        mark = "" if found["reached"] >= found["goal"] else f"   below the {found['goal']:.0%} it should reach"
        yield f"{NAMES[name]:<30} {right:>4,} of {total:>4,}   {found['reached']:6.1%}{mark}"
    yield ""
    for a in asked[:SHOWN]:
        yield f"{a['question']} → {a['said']}" + ("" if a["right"] else f"   (wrong: {a['answer']})")


def person(report: Report) -> bool:
    """Somebody sits there to chat with."""
    return report.interactive and not report.json and sys.stdin is not None and sys.stdin.isatty()


def spell(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.1f} s"
