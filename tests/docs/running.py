"""A page's blocks as one shell session, as its reader runs them: later blocks see the variables of earlier ones."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.docs.blocks import Block
from tests.docs.shell import HEREDOC, QUOTED

LIMIT = 300  # seconds for a page
INSTALL = re.compile(r"(?:python\S* -m )?\bpip3? install\b[^&|;#\n]*|\bgit clone\b[^&|;#\n]*")
CHAIN = re.compile(
    rf"((?<!\S)#[^\n]*|{HEREDOC}|^\s*(?:if|elif|while|until)\b[^\n]*|^[^\n]*\|\|[^\n]*|{QUOTED})|\s*&&\s*",
    re.DOTALL | re.MULTILINE,
)


def run(page: str, blocks: Iterable[Block], folder: Path, env: Mapping[str, str]) -> str | None:
    """Run a page's blocks in `folder`/work. Returns what went wrong: the place, the block and its stderr."""
    session = ["set -euo pipefail"]
    marked = {}
    for block in blocks:
        place = f"{page}:{block.line}"
        marked[place] = block
        session += [f"echo {shlex.quote(mark(place))} >&2", entry(block, folder)]
    (folder / "session.sh").write_text("\n".join(session) + "\n", encoding="utf-8")
    code = bash(folder, env)
    if code == 0:
        return None
    said = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    place = max(marked, key=lambda p: said.rfind(mark(p)))
    ended = f"took more than {LIMIT} s" if code is None else f"ended with {code}"
    return f"{place} {ended}\n\n{marked[place].text}\n{said[said.rfind(mark(place)) :]}"


def bash(folder: Path, env: Mapping[str, str]) -> int | None:
    """Run the session. Returns its exit code; None when it took too long and was killed with all that it started."""
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        process = subprocess.Popen(
            ["bash", str(folder / "session.sh")],
            cwd=folder / "work",
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the usual case: nothing was left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def mark(place: str) -> str:
    """The line of stderr before a block's own."""
    return f"── {place} ──"


def entry(block: Block, folder: Path) -> str:
    """The line of the session that runs a block, which is kept in a file of its own."""
    suffix, text = ("py", block.python) if block.python else ("sh", runnable(block.shell))
    file = folder / f"line-{block.line}.{suffix}"
    file.write_text(text, encoding="utf-8")
    return f"{'python' if block.python else 'source'} {shlex.quote(str(file))}"


def runnable(script: str) -> str:
    """A block's text without what installs, and with chains on lines of their own.

    When `a` of `a && b` fails, bash goes on with the next line in spite of `set -e`; on a line of its own it stops.
    Conditions and lines with `||` stay as they are.
    """
    return CHAIN.sub(lambda m: m[1] or "\n", INSTALL.sub("true ", script))
