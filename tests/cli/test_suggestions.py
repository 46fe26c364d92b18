"""Commands that are suggested can be copied into a shell, whatever a path is called."""

import re
from pathlib import Path

import minigpt

# a flag or a command that takes a path, then a value that is put in as it is
BARE = re.compile(
    r"""(?<!f["'])(?:-[mdtof] |--resume |data (?:check|preview) |minigpt info |vllm serve )\{(?!quoted|made|run)"""
)


def test_paths_in_suggested_commands_are_quoted():
    """Every `-m {path}` and the like in the package goes through `core.files.quoted`."""
    package = Path(minigpt.__file__).parent
    bare = [
        f"{file.relative_to(package)}:{number}: {line.strip()}"
        for file in package.rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if BARE.search(line)
    ]
    assert bare == []
