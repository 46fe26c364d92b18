"""The program: parse, resolve, run, report. Every way out is an exit code of `core.errors.Exit`.

Nothing here imports torch; a stage does, inside its `run`, after paths and options have been checked.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

import minigpt
from minigpt.cli import flags, launch
from minigpt.cli.console import Console, OutputClosed
from minigpt.cli.flags import HelpRequested, Request
from minigpt.core.config import REPLACED, dump, options, values
from minigpt.core.errors import (
    Aborted,
    DataError,
    Exit,
    MinigptError,
    MissingError,
    OutOfMemory,
    is_out_of_memory,
)
from minigpt.core.files import disk_error
from minigpt.core.groups import CommonConfig
from minigpt.core.report import Context, Result
from minigpt.core.world import is_follower

DISTRIBUTION = "minigpt-lm"
DEVELOPERS = ("dev", "parity")  # extras that hold more than a user needs
VERSIONED = ("torch", "transformers", "tokenizers", "safetensors", "typer")
REPORT_IT = (
    "This is a fault of minigpt, not yours. Please report it as CONTRIBUTING.md describes, with everything above "
    "and the output of: minigpt --version --json"
)
_TYPER_USAGE_ERROR: Any = typer.BadParameter.__base__  # the public name of its family; typer exports only this child


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    # Threads that spin for long while they wait stall a run many times over as soon as anything else uses the
    # machine; threads that never spin are a quarter slower when nothing does (docs/benchmarks.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    launch.register()
    words = list(sys.argv[1:] if argv is None else argv)
    typed = words[: words.index("--")] if "--" in words else words
    console = Console(json="--json" in typed, quiet=bool({"-q", "--quiet"} & {*typed}))
    try:
        return _guarded(words, console)
    except OutputClosed:
        return Exit.OK
    except SystemExit as e:  # typer ends shell completion so
        return e.code if isinstance(e.code, int) else Exit.OK
    finally:
        _settle_stdout()


def _guarded(words: list[str], console: Console) -> int:
    """The command line's exit code; every fault is told to the console."""
    try:
        return _dispatch(words, console)
    except OutputClosed:
        raise
    except (Exception, KeyboardInterrupt) as e:
        fault = _known(e)
        if fault is None:
            console.raw(traceback.format_exc())
            whose = f"rank {os.environ['RANK']}: " if is_follower() else ""
            fault = MinigptError(f"{whose}{type(e).__name__}: {e}", fix=REPORT_IT)
            fault.local = True
        if is_follower() and not fault.local:  # rank 0 tells
            return fault.code
        with contextlib.suppress(DataError):  # an object that stdout does not take cannot be told there
            console.error(fault)
        return fault.code


def _dispatch(words: list[str], console: Console) -> int:
    try:
        parsed = flags.root().main(words, prog_name="minigpt", standalone_mode=False)
    except HelpRequested as e:
        console.page(_help(e))
        return Exit.OK
    except _TYPER_USAGE_ERROR as e:
        raise flags.usage_error(e) from None
    if parsed == "version":
        console.finish(_version(), 0.0)
        return Exit.OK
    if parsed == Exit.ABORTED:  # typer's answer to a KeyboardInterrupt, which is told as any other one
        raise KeyboardInterrupt
    if not isinstance(parsed, Request):  # shell completion, or an exit code of typer's own
        return parsed if isinstance(parsed, int) else Exit.OK
    return _run(parsed, words, console)


def _run(request: Request, words: list[str], console: Console) -> int:
    config, origins = flags.resolve(request)
    asked = values(config)
    console.configure(json=asked["json"], quiet=asked["quiet"], verbose=asked["verbose"])
    if asked["show_config"]:
        if asked.get("resume"):
            from minigpt.stages.opening import resumed

            config, origins = resumed(request.command.name, config, origins)
        if asked.get("model") and hasattr(config, "sample"):
            from minigpt.stages.loading import shown_sampling

            shown_sampling(config, origins)
        console.json = False  # the page is YAML, whatever else was asked for
        skip = {f.name for f in fields(CommonConfig)}
        console.page(dump(config, origins, everything=True, skip=skip).rstrip("\n"))
        return Exit.OK
    for option in options(request.command.config):
        if f", {REPLACED}" in (origin := origins[option.name]):
            console.note("unused", f"{option.flag} ({origin})")
    if launch.wanted(asked):
        from minigpt.stages.opening import first_look

        first_look(request.command.name, config)
        if asked["nnodes"] > 1:
            console.note("wait", f"until {asked['nnodes']} machines have met at {asked['rdzv']}")
        code = launch.supervise(words, asked)
        if code is not None:
            return code
        config.train.nproc = 1
    began = time.monotonic()
    result = request.command.run(config, Context(console, origins, ["minigpt", *words]))
    if not is_follower():
        console.finish(result, time.monotonic() - began)
    return Exit.OK


def _help(e: HelpRequested) -> str:
    from minigpt.cli import help as pages

    if isinstance(e.subject, str):
        return pages.verbs_page(e.subject) if e.subject else pages.root_page()
    return pages.page(e.subject, e.everything)


def _version() -> Result:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"minigpt": minigpt.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in VERSIONED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return Result(f"minigpt {minigpt.__version__}", dict(versions))


# ---------------------------------------------------------------------------------------------- faults by name


def _known(e: BaseException) -> MinigptError | None:
    """An error of ours, or a fault of the machine that reached us bare, in words; None for a bug. Imports nothing."""
    if isinstance(e, MinigptError):
        return e
    if isinstance(e, KeyboardInterrupt):
        return Aborted("interrupted")
    if is_out_of_memory(e):
        return OutOfMemory("out of memory", found=str(e) or None, fix="use a smaller --batch-size, --max-len or --size")
    if isinstance(e, ModuleNotFoundError) and e.name and not e.name.startswith("minigpt"):
        return MissingError(f"the package {e.name} is not installed", fix=install_hint(e.name))
    if isinstance(e, OSError) and e.filename and (fault := disk_error(e, Path(os.fsdecode(e.filename)))).fix:
        return fault
    return None


def install_hint(package: str) -> str:
    """The command that installs a package, through the extra that holds it where there is one."""
    from importlib.metadata import PackageNotFoundError, requires

    wanted = re.sub(r"[-_.]+", "-", package.split(".")[0]).lower()
    try:
        listed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        listed = []
    extras = [
        found[2]
        for line in listed
        if (found := re.match(r"([\w.-]+).*extra\s*==\s*['\"]([\w-]+)", line))
        and re.sub(r"[-_.]+", "-", found[1]).lower() == wanted
    ]
    if extras:
        extra = next((extra for extra in extras if extra not in DEVELOPERS), extras[0])
        checkout = (Path(minigpt.__file__).parents[1] / "pyproject.toml").is_file()
        return f"pip install '{'.' if checkout else DISTRIBUTION}[{extra}]'"
    return f"pip install {wanted}"


def _settle_stdout() -> None:
    """Flush stdout; what it cannot take goes nowhere, so that Python's own flush at exit does not complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
