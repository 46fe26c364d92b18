"""The little of jq that pages use, for machines without it: `jq [-r] .name.name[0]` on JSON from stdin or files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def objects(text: str) -> Iterator[Any]:
    """JSON values one after another."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        yield value
        at = end + len(text[end:]) - len(text[end:].lstrip())


def look_up(value: Any, path: str) -> Any:
    """`.a.b[0]` of a value; what is not there is null."""
    for key, index in re.findall(r"\.([\w-]+)|\[(\d+)\]", path):
        if key:
            value = None if value is None else value.get(key)
        else:
            value = value[int(index)] if value and int(index) < len(value) else None
    return value


def main(words: list[str]) -> None:
    raw = "-r" in words
    path, *files = [word for word in words if word != "-r"]
    text = "".join(Path(f).read_text(encoding="utf-8") for f in files) if files else sys.stdin.read()
    for value in objects(text.strip()):
        found = look_up(value, path)
        sys.stdout.write((found if raw and isinstance(found, str) else json.dumps(found, ensure_ascii=False)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
