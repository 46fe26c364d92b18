"""A stage's dataclass as a typer command, and the values a user gave as a resolved config.

typer parses; it hands back what was typed, as text, or None for a flag that was not given. Meaning, defaults,
precedence and error texts are `core.config`'s, so a flag, an environment variable and a YAML key behave alike.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import typer
from typer.core import TyperGroup
from typer.main import get_command

from minigpt.core.config import Layer, Option, build, coerce, env_layer, env_prefix, options, replaced, yaml_layer
from minigpt.core.errors import UsageError
from minigpt.core.files import quoted
from minigpt.core.report import Context, Result
from minigpt.stages import STAGES, Verb

CONTEXT = {
    "help_option_names": [],  # --help is an option of our own, so that its page is ours
    "allow_extra_args": True,  # so that stray words are named in our voice
    "token_normalize_func": lambda name: name.replace("_", "-"),
}
# Words of other programs for a command or a flag of ours: only ever offered as a hint, never accepted.
COMMAND_HINTS = {
    "train": "pretrain", "train-tokenizer": "tokenize train", "finetune": "sft", "fine-tune": "sft", "run": "generate",
    "complete": "generate", "evaluate": "eval", "test": "eval", "talk": "chat", "show": "info", "inspect": "info",
    "describe": "info", "check": "data check", "preview": "data preview", "encode": "tokenize encode",
}  # fmt: skip
FLAG_HINTS = {
    "--learning-rate": "--lr", "--data-path": "--data", "--dataset": "--data", "--train-data": "--data",
    "--save-dir": "--out", "--output-dir": "--out", "--output": "--out", "--max-seq-len": "--max-len",
    "--max-length": "--max-len", "--seq-len": "--max-len", "--block-size": "--max-len", "--preset": "--size",
    "--accumulation-steps": "--batch-tokens", "--grad-accum": "--batch-tokens", "--grad-clip": "--clip",
    "--gradient-accumulation-steps": "--batch-tokens", "--num-epochs": "--epochs", "--max-steps": "--steps",
    "--save-interval": "--save-every", "--log-interval": "--log-every", "--from-resume": "--resume",
    "--from-weight": "--model", "--weight": "--model", "--load": "--model", "--checkpoint": "--model",
    "--max-new-tokens": "--max-tokens", "--tokenizer-path": "--tokenizer", "--scheduler": "--schedule",
    "--hidden-size": "--set model.hidden_size=…", "--num-hidden-layers": "--set model.num_hidden_layers=…",
    "--dim": "--set model.hidden_size=…", "--n-layers": "--set model.num_hidden_layers=…",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command, known without running it."""

    name: str  # `sft`, `tokenize train`
    config: type
    run: Callable[[Any, Context], Result]
    help: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A command line, parsed and not yet resolved."""

    command: Command
    flags: Mapping[str, Any]  # option name → text as typed; only what was given
    extra: tuple[str, ...] = ()  # positional words nobody asked for


class HelpRequested(Exception):
    """--help or --help-all: of one command, of a command's verbs (its name), or of the whole program ('')."""

    def __init__(self, subject: Command | str, everything: bool = False):
        super().__init__()
        self.subject, self.everything = subject, everything


# ---------------------------------------------------------------------------------------------- the registry


def stage_commands(stage: str) -> dict[str, Command]:
    """The commands of one stage: itself under "", or each of its verbs. Imports the stage's module."""
    module = importlib.import_module(f"minigpt.stages.{STAGES[stage][0]}")
    verbs: dict[str, Verb] | None = getattr(module, "VERBS", None)
    if verbs is None:
        return {"": Command(stage, module.Config, module.run, STAGES[stage][1], tuple(module.EXAMPLES))}
    return {v: Command(f"{stage} {v}", d.config, d.run, d.help, d.examples) for v, d in verbs.items()}


class LazyGroup(TyperGroup):
    """Commands found by name when they are called, so that help of one never imports the others."""

    names: tuple[str, ...] = ()
    find: Callable[[str], Any]
    label = "minigpt"
    hints: Mapping[str, str] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.names)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.find(cmd_name) if cmd_name in self.names else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0].replace("_", "-")
        if word not in self.names and not ctx.resilient_parsing:
            close = [self.hints[word]] if word in self.hints else difflib.get_close_matches(word, self.names, n=1)
            hint = f"did you mean {self.label if word not in self.hints else 'minigpt'} {close[0]}? " if close else ""
            kind = "command" if self.label == "minigpt" else "verb"
            raise UsageError(
                f"{self.label} has no {kind} {args[0]!r}", fix=f"{hint}the {kind}s are {', '.join(self.names)}"
            )
        return super().resolve_command(ctx, [word, *args[1:]])


def root() -> Any:
    """The whole program as one typer command."""
    app = typer.Typer(cls=LazyGroup, invoke_without_command=True, context_settings=CONTEXT, rich_markup_mode=None)
    app.callback()(_root_callback)
    group = get_command(app)
    assert isinstance(group, LazyGroup)
    group.names, group.find, group.hints = tuple(STAGES), _stage, COMMAND_HINTS
    return group


def _root_callback(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", "-V"),
    json: bool = typer.Option(False, "--json"),
    help: bool = typer.Option(False, "--help", "-h", "--help-all"),
) -> str | None:
    if ctx.invoked_subcommand is None:
        if version:
            return "version"
        if json:
            raise UsageError("--json stands behind a command, or beside --version")
        raise HelpRequested("")
    if help:
        raise HelpRequested("")
    if json or version:
        raise UsageError(f"{'--json' if json else '--version'} stands behind the command, or alone with --version")
    return None


def _stage(stage: str) -> Any:
    commands = stage_commands(stage)
    if "" in commands:
        return parser(commands[""])

    def callback(
        ctx: typer.Context,
        json: bool = typer.Option(False, "--json"),  # so that even a missing verb can be told as an object
        help: bool = typer.Option(False, "--help", "-h", "--help-all"),
    ) -> None:
        if help:
            raise HelpRequested(stage)
        if ctx.invoked_subcommand is None:
            raise UsageError(
                f"minigpt {stage} needs a verb", fix=f"one of {', '.join(commands)}: see minigpt {stage} --help"
            )

    app = typer.Typer(
        cls=LazyGroup,
        invoke_without_command=True,
        context_settings=CONTEXT,
        rich_markup_mode=None,
        add_completion=False,
        help=STAGES[stage][1],
    )
    app.callback()(callback)
    group = get_command(app)
    assert isinstance(group, LazyGroup)
    group.name, group.names, group.label = stage, tuple(commands), f"minigpt {stage}"
    group.find = lambda verb: parser(commands[verb])
    return group


# ---------------------------------------------------------------------------------------------- one command


def parser(command: Command) -> Any:
    """A typer command that returns a Request, or raises HelpRequested."""

    known = list(options(command.config))

    def callback(ctx: typer.Context, **given: Any) -> Request:
        flags = {o.name: given[o.name] for o in known if given[o.name] is not None}
        return Request(command, flags, tuple(ctx.args))

    def show_help(ctx: typer.Context, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            raise HelpRequested(command)

    def show_all(ctx: typer.Context, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            raise HelpRequested(command, everything=True)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("ctx", keyword, annotation=typer.Context)]
    for option in known:
        kind, info = _declare(option)
        parameters.append(inspect.Parameter(option.name, keyword, default=info, annotation=kind))
    # eager parameters with a callback: help works whatever else is wrong on the line
    for name, flags, act in (("help_", ("--help", "-h"), show_help), ("help_all_", ("--help-all",), show_all)):
        info = typer.Option(False, *flags, is_eager=True, expose_value=False, callback=act)
        parameters.append(inspect.Parameter(name, keyword, default=info, annotation=bool))
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=CONTEXT)
    app.command(name=command.name.split()[-1], help=command.help, context_settings=CONTEXT)(callback)
    return get_command(app)


def _declare(option: Option) -> tuple[Any, Any]:
    """(annotation, typer parameter) of one option. Everything is text: `core.config` gives it meaning."""
    kind: Any = Optional[list[str]] if option.many else Optional[str]  # noqa: UP045 (typer reads the annotation)
    complete = None
    if option.meta["choices"]:
        words = list(option.meta["choices"])

        def complete(incomplete: str) -> list[str]:
            return [word for word in words if word.startswith(incomplete)]

    if option.meta["argument"]:
        return kind, typer.Argument(None, autocompletion=complete, show_default=False)
    names = [*filter(None, [option.meta["short"]]), option.flag]
    if option.type is bool:
        names[-1] += f"/--no-{option.flag[2:]}"
        return Optional[bool], typer.Option(None, *names)  # noqa: UP045
    return kind, typer.Option(None, *names, autocompletion=complete)


# ---------------------------------------------------------------------------------------------- resolving


def resolve(request: Request, environ: Mapping[str, str] | None = None) -> tuple[Any, dict[str, str]]:
    """The config of a request and each value's origin: flag > environment > --config files > preset > default."""
    command = request.command
    if request.extra:
        raise UsageError(f"minigpt {command.name} does not take {' '.join(request.extra)!r}", fix=_extra_hint(request))
    known = {o.name: o for o in options(command.config)}
    layers = [Layer("flag", request.flags), env_layer(command.config, command.name, environ)]
    files: list[str] = next((layer.values["config"] for layer in layers if "config" in layer.values), [])
    layers += [yaml_layer(path) for path in reversed(files)]
    if "size" in known and "size" not in replaced(known, layers) and (preset := _preset(known, layers)):
        layers.append(preset)
    try:
        return build(command.config, layers)
    except UsageError as e:
        if "unknown key" in e.message and e.message.startswith("environment"):
            e.message = e.message.replace("environment has", f"the environment ({env_prefix(command.name)}…) has")
        raise


def _extra_hint(request: Request) -> str:
    """Most stray words are data given without its flag."""
    flags = {o.name for o in options(request.command.config)}
    if "data" in flags:
        return f"data is given as -d {quoted(request.extra[0])}; all flags: minigpt {request.command.name} --help"
    return f"see minigpt {request.command.name} --help"


def _preset(known: Mapping[str, Option], layers: list[Layer]) -> Layer | None:
    """What `--size` says about other options, such as the row length a model of that size is trained with."""
    from minigpt.core.models.presets import PRESETS

    given = next((layer.values["size"] for layer in layers if "size" in layer.values), known["size"].default)
    size = coerce(known["size"], given, "--size") if given is not None else None
    values = {k: v for k, v in PRESETS.get(str(size), {}).items() if k in known and k != "size"}
    return Layer(f"preset:{size}", values) if values else None


# ---------------------------------------------------------------------------------------------- typer's own errors


def usage_error(e: Any) -> UsageError:
    """A parse error of typer in our voice, with the nearest flag that exists."""
    flag = getattr(e, "option_name", None)
    command = e.ctx.command_path if e.ctx else "minigpt"
    if flag is None:
        return UsageError(e.format_message().rstrip("."), fix=f"see {command} --help")
    if "requires" in e.message or "does not take" in e.message:
        return UsageError(f"{flag} {'needs a' if 'requires' in e.message else 'takes no'} value", fix=_all_flags(e.ctx))
    there = [name for p in e.ctx.command.params for name in (*p.opts, *p.secondary_opts)] if e.ctx else []
    near = [h] if (h := FLAG_HINTS.get(flag)) and h.split()[0] in there else _nearest(flag, there)
    hint = f"did you mean {near[0]}?" if near else _all_flags(e.ctx)
    return UsageError(f"{command} has no flag {flag}", fix=hint)


def _all_flags(ctx: Any) -> str:
    return f"see {ctx.command_path if ctx else 'minigpt COMMAND'} --help-all for every flag"


def _nearest(flag: str, there: list[str]) -> list[str]:
    long = [name for name in there if name.startswith("--")]
    return difflib.get_close_matches(flag, long, n=1, cutoff=0.6)
