"""The reference pages, made from the code they describe: `python -m minigpt.cli.reference [--check]`.

Commands come from the stages' dataclasses, exit codes from `core.errors`, sizes from `core.models.presets`.
`--check` writes nothing and exits 7 naming every page that is not what it would write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from minigpt.cli.console import Console
from minigpt.cli.flags import Command, stage_commands
from minigpt.cli.help import argument, default_text, metavar, missing_choices, names, usage
from minigpt.core.config import PANELS, Option, bounds, env_prefix, options
from minigpt.core.errors import CheckFailed, Exit, MinigptError, UsageError
from minigpt.core.files import write_atomic
from minigpt.stages import STAGES

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
MADE = "<!-- Made by `python -m minigpt.cli.reference`; change the code, not this page. -->\n\n"
EXIT_MEANING = {
    Exit.OK: "Done.",
    Exit.BUG: "A fault of minigpt. The stack trace is printed; please report it.",
    Exit.USAGE: "A flag, a configuration value, or a run directory that is locked or already in use.",
    Exit.DATA: "Data, a checkpoint or the disk. The message names the file, and the line where there is one.",
    Exit.MISSING: "A package or hardware that is not here, or a lost process. The message says what to do.",
    Exit.OUT_OF_MEMORY: "Out of memory.",
    Exit.DIVERGED: "The loss, its gradient or a model's logits are not numbers. A run's last good checkpoint stands.",
    Exit.CHECK_FAILED: "A check found something, such as bad rows in `data check`.",
    Exit.STOPPED: "Stopped early by a signal or `--max-time`. A checkpoint is saved; go on with `--resume`.",
    Exit.ABORTED: "Stopped at once by Ctrl-C. While training that takes two; the newest saved step stands.",
}
PRECEDENCE = """# Reference

Every value of an option comes from the first of these that has it:

1. the flag on the command line;
2. the environment variable `MINIGPT_<COMMAND>_<FLAG>`, such as `MINIGPT_SFT_BATCH_SIZE=4` (commas separate the values
   of an option that may be given several times);
3. the YAML files given with `--config`, the last one first;
4. the `--size` preset;
5. the default.

Of two options that say the same thing in two ways, such as `--steps` and `--epochs`, the stronger source's one replaces
the other; both in one source are refused.

`--show-config` prints the result with the origin of each value. It is a file that `--config` reads.

stdout holds the result only; everything else goes to stderr. With `--json` stdout holds one object:
`{"status": "ok", …, "seconds": 1.2}` or `{"status": "error", "code": 3, "kind": "data", "message": …, "hint": …}`.

| variable | meaning |
|---|---|
| `MINIGPT_CACHE` | where token stores are kept; else the platform's cache directory |
| `MINIGPT_RUNS` | where runs without `--out` go; else `runs` |
| `MINIGPT_OFFLINE`, `HF_HUB_OFFLINE` | `1`: `minigpt doctor` asks no server |
| `HF_ENDPOINT` | another address of the Hugging Face hub, such as a mirror |
| `OMP_NUM_THREADS` | threads to compute with; else the cores this process may use |
| `NO_COLOR` | no colour |
| `COLUMNS` | the width of help pages |

"""


def pages() -> Iterator[tuple[str, str]]:
    """Every page as (path inside docs/reference, text)."""
    yield "README.md", MADE + PRECEDENCE + _index()
    for stage in STAGES:
        yield f"cli/{stage}.md", MADE + command_page(stage)
    yield "exit-codes.md", MADE + exit_codes_page()
    yield "presets.md", MADE + presets_page()


def _index() -> str:
    rows = [f"- [`minigpt {name}`](cli/{name}.md): {text}" for name, (_, text) in STAGES.items()]
    rows += ["- [Exit codes](exit-codes.md)", "- [Sizes](presets.md)"]
    return "## Pages\n\n" + "\n".join(rows) + "\n"


def command_page(stage: str) -> str:
    """One command with all its options, or with all its verbs."""
    commands = stage_commands(stage)
    text = [f"# minigpt {stage}\n", STAGES[stage][1] + "\n"]
    for verb, command in commands.items():
        if verb:
            text += [f"## {stage} {verb}\n", command.help + "\n"]
        text += list(_command(command, "###" if verb else "##"))
    return "\n".join(text)


def _command(command: Command, heading: str) -> Iterator[str]:
    yield f"```console\n{usage(command)}\n```\n"
    yield "```console\n" + "\n".join(command.examples) + "\n```\n"
    panels: dict[str, list[Option]] = {name: [] for name in ("Arguments", *PANELS)}
    for option in options(command.config):
        panels["Arguments" if option.meta["argument"] else option.meta["panel"]].append(option)
    for name, members in panels.items():
        if members:
            yield f"{heading} {name}\n"
            yield "| option | default | meaning |\n|---|---|---|"
            yield "\n".join(_row(option) for option in members) + "\n"
    yield f"Environment variables begin with `{env_prefix(command.name)}`.\n"


def _row(option: Option) -> str:
    flag = argument(option) if option.meta["argument"] else f"{names(option)} {metavar(option)}".strip()
    meaning = [option.meta["help"], missing_choices(option), bounds(option)]
    cells = [f"`{flag}`", default_text(option), "; ".join(filter(None, meaning))]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def exit_codes_page() -> str:
    rows = "\n".join(f"| {code.value} | {EXIT_MEANING[code]} |" for code in Exit)
    return f"# Exit codes\n\n| code | meaning |\n|---|---|\n{rows}\n\n" + (
        "A run that may be stopped at any time goes on by itself in a loop:\n\n"
        "```bash\nuntil minigpt pretrain -d data.jsonl -o runs/big --resume auto; do\n"
        "    [ $? -eq 75 ] || exit 1\ndone\n```\n"
    )


def presets_page() -> str:
    from minigpt.core.models.presets import PRESETS

    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    head = "| size | " + " | ".join(f"`{k}`" for k in keys) + " |\n" + "|---" * (len(keys) + 1) + "|\n"
    rows = [f"| `{name}` | " + " | ".join(str(p.get(k, "")) for k in keys) + " |" for name, p in PRESETS.items()]
    intro = (
        "What `--size` stands for: the model's keys as Hugging Face names them, and `max_len`, the length of a "
        "training row. Any model key can be changed with `--set model.KEY=VALUE`.\n\n"
    )
    return "# Sizes\n\n" + intro + head + "\n".join(rows) + "\n"


def stale(folder: Path) -> list[str]:
    """Pages that are missing, differ, or belong to a command that is gone."""
    wanted = dict(pages())
    there = {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.md")}
    return sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))


def write(folder: Path) -> list[str]:
    """Write what `stale` names. Returns it."""
    wanted, changed = dict(pages()), stale(folder)
    for name in changed:
        if name in wanted:
            write_atomic(folder / name, wanted[name])
        else:
            (folder / name).unlink()
    return changed


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    console = Console()
    try:
        if words not in ([], ["--check"]):
            raise UsageError("python -m minigpt.cli.reference takes --check or nothing", found=" ".join(words))
        if not FOLDER.parent.is_dir():
            raise UsageError(f"{FOLDER.parent} does not exist", fix="run this in a checkout of the repository")
        if words:
            if old := stale(FOLDER):
                listed = ", ".join(f"docs/reference/{name}" for name in old)
                raise CheckFailed(f"out of date: {listed}", fix="python -m minigpt.cli.reference")
            return Exit.OK
        for name in write(FOLDER):
            console.out(f"docs/reference/{name}")
    except MinigptError as e:
        console.error(e)
        return e.code
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
