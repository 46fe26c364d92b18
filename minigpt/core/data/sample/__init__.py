"""The data set that comes with minigpt: a small consistent world in two languages, made by these files from a seed.

`sample[:PART[:LANG]]` names it wherever a file is named. A spec becomes JSON lines in the cache, written once. Checks:
`rl` and `rl-eval` have `answer` and `kind`: sum = the last number of the answer, format = the whole answer, tool = the
name of the tool that is called. `eval` rows are conversations whose last message holds `answer`.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from minigpt.core.data.sample.chinese import CHINESE
from minigpt.core.data.sample.english import ENGLISH
from minigpt.core.data.sample.parts import PARTS, story
from minigpt.core.errors import UsageError
from minigpt.core.files import cache_dir, write_atomic

__all__ = ["LANGUAGES", "PARTS", "VERSION", "is_spec", "jsonl", "parse", "path_of", "rows", "story"]

VERSION = 5  # raise whenever any row changes: it names the files in the cache
LANGUAGES = {"en": (ENGLISH,), "zh": (CHINESE,), "both": (ENGLISH, CHINESE)}


def is_spec(spec: str) -> bool:
    """Whether a `--data` value names the sample."""
    return spec == "sample" or spec.startswith("sample:")


def parse(spec: str) -> tuple[str, str]:
    """(part, language) of a spec; `sample` is `sample:text:both`. UsageError for what there is not."""
    _, *named = spec.split(":")
    part, lang = (*named, *("text", "both")[len(named) :])[:2]
    if len(named) > 2 or part not in PARTS or lang not in LANGUAGES:
        raise UsageError(
            f"--data: the sample has no {spec}",
            found=spec,
            fix=f"write sample:PART:LANG with a part of {', '.join(PARTS)} and a language of {', '.join(LANGUAGES)}",
        )
    return part, lang


def rows(part: str, lang: str = "both", seed: int = 0) -> list[dict[str, Any]]:
    """The rows of a part in shuffled order. `both` has exactly the rows of `en` and those of `zh`."""
    make, _ = PARTS[part]
    found = [row for tongue in LANGUAGES[lang] for row in make(tongue, Random(f"{part} {tongue.name} {seed}"))]
    Random(f"{part} {lang} {seed}").shuffle(found)
    return found


def jsonl(part: str, lang: str = "both", seed: int = 0) -> str:
    """The rows of a part as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(part, lang, seed))


def path_of(spec: str, seed: int = 0) -> Path:
    """The file that holds a spec's rows, written to the cache if it is not there."""
    part, lang = parse(spec)
    path = cache_dir() / "sample" / f"v{VERSION}" / f"{part}.{lang}.{seed}.jsonl"
    if not path.is_file():
        write_atomic(path, jsonl(part, lang, seed))
    return path
