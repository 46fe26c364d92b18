"""Option groups that several stages share: the same word means the same thing everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from minigpt.core.config import duration, opt

DTYPES = ("auto", "float32", "bfloat16", "float16")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def split_docs_option(**more: Any) -> Any:
    """The one option that says what a document of a plain text file is."""
    return opt(
        "auto",
        "documents of a plain text file: blank = split at blank lines, line, file, endoftext = at these letters; "
        "auto joins paragraphs to about 4 kB",
        panel="Data",
        choices=("auto", "blank", "line", "file", "endoftext"),
        **more,
    )


def fill_option(**more: Any) -> Any:
    """The one option that fills the placeholders of rows."""
    return opt(
        [],
        "text for {{name}} in the rows, as name=Ada or name=Ada,author=Anna; then each placeholder needs one",
        panel="Data",
        metavar="KEY=TEXT",
        **more,
    )


def precision(value: Any) -> str:
    """The name of a number type as torch has it: fp32, bf16 and fp16 are short for float32, bfloat16 and float16."""
    return PRECISIONS.get(str(value).lower(), str(value))


def meeting_point(value: Any) -> str:
    """`node0:29400`, `10.0.0.7:29400`, `[fe80::1]:29400`: a host and a port."""
    host, _, port = str(value).strip().rpartition(":")
    if (
        not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", host)
        or not re.fullmatch(r"\d{1,5}", port)
        or not 0 < int(port) < 65536
    ):
        raise ValueError("is no host and port such as node0:29400")
    return f"{host}:{port}"


@dataclass
class CommonConfig:
    """Every command has these."""

    config: list[str] = opt([], "YAML file of options; later files win", short="-c", metavar="FILE", save=False)
    json: bool = opt(False, "print one JSON object at the end instead of text", panel="Output", save=False)
    quiet: bool = opt(False, "results, warnings and errors only", short="-q", panel="Output", save=False)
    verbose: bool = opt(False, "say more", short="-v", panel="Output", save=False, advanced=True)
    show_config: bool = opt(
        False, "print the resolved options with where each came from, and stop", panel="Output", save=False
    )


@dataclass
class DeviceConfig:
    """Where and in what precision to compute."""

    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt(
        "auto",
        "precision of the forward pass; auto = bfloat16 where it is native",
        choices=DTYPES,
        parse=precision,
        advanced=True,
    )
    seed: int = opt(42, "seed of weights, data order and sampling", low=0)


@dataclass
class DataConfig:
    """What to train on and how to lay it out."""

    data: list[str] = opt(
        [],
        "file, directory, glob, - for stdin, or sample:… (data demo shows it); FILE:0.3 weights it in a mix",
        short="-d",
        panel="Data",
        metavar="PATH",
    )
    val_data: list[str] = opt([], "separate validation data", panel="Data", metavar="PATH")
    val_split: float | None = opt(
        None,
        "share of the documents held out for validation, by hash",
        panel="Data",
        low=0.0,
        high=0.5,
        shown="auto: 200 documents, 0.5 to 5 %",
    )
    tokenizer: str | None = opt(None, "tokenizer directory, or any model's", short="-t", panel="Data", metavar="PATH")
    max_len: int | None = opt(None, "tokens a row", panel="Data", low=2, shown="by size")
    pack: str = opt(
        "pack",
        "pack = several documents a row, best fit; pad = one document a row",
        panel="Data",
        choices=("pack", "pad"),
        advanced=True,
    )
    long: str = opt(
        "split",
        "documents longer than a row: split loses no token, truncate cuts, drop leaves out, error stops",
        panel="Data",
        choices=("split", "truncate", "drop", "error"),
        advanced=True,
    )
    max_bad: str = opt(
        "0", "bad rows to skip and count before giving up, as a number or 1%", panel="Data", advanced=True
    )
    split_docs: str = split_docs_option(advanced=True)
    fill: list[str] = fill_option(advanced=True)


@dataclass
class OptimConfig:
    """How the weights move."""

    lr: float | None = opt(
        None, "peak learning rate", panel="Optimisation", above=0.0, high=1e38, shown="auto by size and stage"
    )
    schedule: str = opt(
        "wsd",
        "learning rate: cosine, linear, constant, or wsd = flat, then linear to zero",
        panel="Optimisation",
        choices=("cosine", "wsd", "linear", "constant"),
    )
    warmup: float = opt(
        0.02, "warm-up, as a share of the steps (below 1) or a number of steps", panel="Optimisation", low=0.0
    )
    decay: float = opt(
        0.4, "share of the steps that wsd spends going down", panel="Optimisation", low=0.0, high=1.0, advanced=True
    )
    min_lr: float = opt(
        0.0, "where the schedule ends, as a share of the peak", panel="Optimisation", low=0, high=1, advanced=True
    )
    optimizer: str = opt(
        "adamw",
        "adamw, or muon for the matrices with AdamW for the rest",
        panel="Optimisation",
        choices=("adamw", "muon"),
    )
    weight_decay: float = opt(0.1, "on matrices only", panel="Optimisation", low=0.0)
    beta1: float = opt(0.9, "AdamW", panel="Optimisation", low=0.0, high=0.9999, advanced=True)
    beta2: float = opt(0.95, "AdamW", panel="Optimisation", low=0.0, high=0.9999, advanced=True)
    eps: float = opt(1e-8, "AdamW", panel="Optimisation", low=1e-30, advanced=True)
    clip: float = opt(1.0, "largest gradient norm; 0 = never clip", panel="Optimisation", low=0.0)
    skip_spikes: float = opt(
        0.0,
        "leave out steps whose loss or gradient norm is so many standard deviations above the last 128; 0 = none",
        panel="Optimisation",
        low=0.0,
        advanced=True,
    )


@dataclass
class TrainConfig:
    """The run itself."""

    out: str | None = opt(
        None, "run directory", short="-o", panel="Run", metavar="DIR", save=False, shown="runs/<stage>-<date>"
    )
    resume: str | None = opt(
        None,
        "continue a run: auto (the one in --out, or start), or its directory. --model starts a new run instead",
        panel="Run",
        metavar="auto|DIR",
        save=False,
    )
    overwrite: bool = opt(False, "replace the run that is in --out", panel="Run", save=False)
    allow_changes: bool = opt(
        False, "resume although model, data, seed or batch differ", panel="Run", save=False, advanced=True
    )
    epochs: float | None = opt(1.0, "passes over the data", panel="Optimisation", above=0.0)
    steps: int | None = opt(
        None,
        "optimizer steps, instead of --epochs",
        panel="Optimisation",
        low=1,
        shown="from --epochs",
        instead_of=("epochs", "tokens"),
    )
    tokens: int | None = opt(
        None,
        "token budget, instead of --epochs (10M, 1G)",
        panel="Optimisation",
        low=1,
        instead_of=("epochs",),
    )
    batch_size: int | None = opt(
        None,
        "rows a device computes at once; auto = the fastest",
        panel="Optimisation",
        low=1,
        auto=True,
        metavar="N|auto",
        shown="by --max-len",
    )
    batch_tokens: int | None = opt(
        None, "tokens an optimizer step, over all devices", panel="Optimisation", low=1, shown="auto by size and stage"
    )
    max_time: float | None = opt(
        None,
        "stop after this long (90s, 10m, 2h), saved and resumable",
        panel="Run",
        above=0.0,
        parse=duration,
        save=False,
    )
    save_every: int | None = opt(None, "steps between checkpoints", panel="Run", low=1, shown="10 a run")
    keep: int = opt(3, "checkpoints kept, besides the best", panel="Run", low=1, advanced=True)
    save_failure: str = opt(
        "stop",
        "when the disk refuses a checkpoint: stop, or warn and go on to the next one",
        panel="Run",
        choices=("stop", "warn"),
        advanced=True,
    )
    log_every: int = opt(10, "steps between log lines", panel="Run", low=1)
    eval_every: int | None = opt(None, "steps between validations", panel="Run", low=1, shown="10 a run")
    eval_rows: int = opt(64, "most validation rows an evaluation reads", panel="Run", low=1, advanced=True)
    sample_prompt: list[str] = opt([], "prompt to answer at every validation", panel="Run", shown="from the data")
    grad_checkpoint: bool = opt(
        False, "compute each block again in backward: less memory, about a third more time", panel="Run", advanced=True
    )
    track: list[str] = opt(
        [],
        "also show the run in a tracker; each is an extra: pip install 'minigpt-lm[wandb]'",
        panel="Run",
        choices=("tensorboard", "wandb", "swanlab", "trackio"),
        advanced=True,
    )
    compile: bool = opt(False, "torch.compile the model (pays on CUDA)", panel="Run", advanced=True)
    dry_run: bool = opt(
        False, "show the first row, memory and time, and stop; with -v also every option", panel="Run", save=False
    )
    nproc: int = opt(
        1,
        "processes on this machine; auto = one for each GPU",
        panel="Run",
        low=1,
        auto=True,
        metavar="N|auto",
        save=False,
    )
    nnodes: int = opt(1, "machines; start the same command on each", panel="Scale", low=1, advanced=True, save=False)
    rdzv: str | None = opt(
        None,
        "where the machines meet: one of them and a free port",
        panel="Scale",
        metavar="HOST:PORT",
        parse=meeting_point,
        advanced=True,
        save=False,
    )
    parallel: str = opt(
        "ddp",
        "ddp = a whole model in each process; fsdp = a part of it in each, for models one GPU cannot hold",
        panel="Scale",
        choices=("ddp", "fsdp"),
        advanced=True,
    )
    rank_timeout: float = opt(
        300.0,
        "how long a process waits for one that does not answer",
        panel="Scale",
        low=1.0,
        parse=duration,
        advanced=True,
        save=False,
    )


QUANTS = ("none", "int8", "fp16")
SCALINGS = ("yarn", "linear")


def rope_scaling(value: Any) -> tuple[str, float]:
    """`yarn:4` → ("yarn", 4.0)."""
    kind, _, factor = str(value).partition(":")
    try:
        times = float(factor)
    except ValueError:
        times = 0.0
    if kind not in SCALINGS or not 1 <= times <= 1024:
        raise ValueError("is no method and factor such as yarn:4, which makes the context four times as long")
    return kind, times


def _checked_scaling(value: Any) -> str:
    rope_scaling(value)
    return str(value)


@dataclass
class LoadConfig:
    """How to use a model's weights. One group wherever text is generated or scored."""

    quant: str = opt(
        "none",
        "int8: weights in 8 bits, the fastest on a CPU, a little less exact; fp16: in 16, for one answer at a time",
        panel="Model",
        choices=QUANTS,
    )
    rope_scaling: str | None = opt(
        None,
        "a longer context than the model was trained on: yarn:4 for four times",
        panel="Model",
        metavar="KIND:N",
        parse=_checked_scaling,
        shown="the model's own",
    )
    compile: bool = opt(
        False, "compile the decoding step: slow to begin, then faster; pays in long runs", panel="Run", advanced=True
    )


@dataclass
class SampleConfig:
    """How to choose the next token. One group wherever text is generated."""

    max_tokens: int = opt(256, "most tokens to generate", panel="Sampling", low=1)
    temperature: float = opt(0.7, "0 = greedy", panel="Sampling", low=0.0, high=100.0)
    top_k: int = opt(0, "sample among the k likeliest tokens; 0 = all", panel="Sampling", low=0)
    top_p: float = opt(0.95, "sample among the likeliest tokens that hold this much probability", panel="Sampling",
                       low=0.0, high=1.0)  # fmt: skip
    min_p: float = opt(
        0.0, "drop tokens below this share of the likeliest one", panel="Sampling", low=0.0, high=1.0, advanced=True
    )
    repetition_penalty: float = opt(1.0, "above 1 discourages tokens already there", panel="Sampling", low=0.01)
    presence_penalty: float = opt(
        0.0, "above 0 discourages tokens that the answer has", panel="Sampling", low=-2.0, high=2.0, advanced=True
    )
    frequency_penalty: float = opt(
        0.0, "the same, for each time that it has them", panel="Sampling", low=-2.0, high=2.0, advanced=True
    )
    stop: list[str] = opt([], "end at this text (repeatable); it is not printed", panel="Sampling", metavar="TEXT")
    form: str | None = opt(
        None,
        "hold the answer to json, regex:PATTERN, choice:a|b or schema:FILE",
        panel="Sampling",
        metavar="FORM",
        advanced=True,
    )
    think: bool | None = opt(None, "let a thinking model think, or not", panel="Sampling", shown="the template's own")

    @property
    def thinks(self) -> bool | None:
        """What to ask of the chat template. A form holds from an answer's first token, so there is no thought then."""
        return False if self.form is not None and self.think is None else self.think
