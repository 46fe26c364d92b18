"""jsonl to token ids on disk: minigpt against datasets.map, in seconds and in memory.

Both sides read the same file with the same tokenizer (vocabulary 6,400, trained first) and put the document token
before and after every document; that they find the same number of tokens is checked. Every block is a fresh process
with an empty cache of its own; blocks come in turn. The file has been read once before, so no side waits for the disk.

ours      `minigpt tokenize pack`, the command itself: uint16 tokens, a mask, a record a document with its hash.
          For the time without imports, the same call (`store.build`) in a process that imported everything before.
datasets  load_dataset("json") and map(batched=True) with PreTrainedTokenizerFast, everything at its default but no
          attention mask; once in one process (default: the tokenizer's own threads) and once with num_proc=2. What map
          leaves in its cache counts as the result; what save_to_disk takes on top is shown apart and not counted.
Times     whole: from the start of the process to its end, imports included, less the peer's save_to_disk.
          inside: imports left out.
Memory    one: the largest resident set of any single process. tree: largest sum of proportional set sizes over all
          processes, looked at four times a second; files that are mapped count there while they are in memory.

--repeat-to SIZE first makes a file of about that size: the documents again and again, each with the number of its
repetition behind it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

PEER = measure.HERE / "peers" / "map_datasets.py"
TARGET = 1.5
OURS, INSIDE = "minigpt tokenize pack", "minigpt, inside only"
Figures = dict[str, Any]


@dataclass
class Bench:
    args: argparse.Namespace
    work: Path
    data: Path
    tokenizer: Path

    def block(self, words: list[str], place: Path) -> tuple[measure.Child, int]:
        """Run a command that writes to `out` in a place of its own, with empty caches. Also the bytes it left."""
        env = measure.environment(self.args.threads, place / "cache")
        child = measure.run(words, env, sample_tree=0.25)
        return child, sum(f.stat().st_size for f in (place / "out").rglob("*") if f.is_file())

    def job(self, place: Path, **more: Any) -> str:
        return json.dumps({"data": str(self.data), "tokenizer": str(self.tokenizer), "out": str(place / "out"), **more})

    def ours(self) -> Figures:
        with self.place() as place:
            flags = ["-d", str(self.data), "-t", str(self.tokenizer), "-o", str(place / "out"), "--json"]
            child, size = self.block([*measure.MINIGPT, "tokenize", "pack", *flags], place)
        return {"whole": child.seconds, **counts(child, size)}

    def inside(self) -> Figures:
        with self.place() as place:
            child, size = self.block([sys.executable, __file__, "--inside", self.job(place)], place)
        return {"inside": child.result["made"], **counts(child, size)}

    def datasets(self, num_proc: int | None) -> Figures:
        with self.place() as place:
            child, size = self.block([sys.executable, str(PEER), self.job(place, num_proc=num_proc)], place)
        found = child.result
        whole = child.seconds - found["save"] - found["check"]
        return {"whole": whole, "inside": found["made"], "save": found["save"], **counts(child, size)}

    @contextmanager
    def place(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.work) as made:
            yield Path(made)


def counts(child: measure.Child, size: int) -> Figures:
    found = {key: child.result[key] for key in ("documents", "tokens")}
    return {**found, "one_mb": child.peak / 1e6, "tree_mb": child.tree / 1e6, "disk_mb": size / 1e6}


def inside(job: Figures) -> None:
    """Our packing in this process, clocked after the imports."""
    import transformers  # noqa: F401  (the other side has imported it too)

    from minigpt.core.data import store
    from minigpt.core.data.tokenizer import Tokenizer

    began = time.perf_counter()
    tokenizer = Tokenizer.load(job["tokenizer"])
    made = store.build([job["data"]], tokenizer, val_share=0.0, out=Path(job["out"]))
    seconds = time.perf_counter() - began
    print(json.dumps({"made": seconds, "documents": made.meta["documents"], "tokens": made.meta["tokens"]}))


# ------------------------------------------------------------------------------------------------ data


def size_in_bytes(text: str) -> int:
    """`1GB`, `200MB`, `5e8`."""
    found = re.fullmatch(r"([\d.eE+]+)\s*([kKMG]?)B?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 1GB")
    return int(float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[found[2].upper()])


def grown(source: Path, size: int, target: Path) -> Path:
    """A file of about `size` bytes out of the documents of another; kept in the work directory."""
    if target.is_file():
        return target
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    written = number = 0
    with open(target.with_suffix(".part"), "wb") as file:
        while written < size:
            number += 1
            for row in rows:
                line = json.dumps({**row, "text": f"{row['text']}\n{number}"}, ensure_ascii=False)
                written += file.write(line.encode("utf-8") + b"\n")
                if written >= size:
                    break
    target.with_suffix(".part").rename(target)
    return target


def prepare(args: argparse.Namespace, work: Path) -> Bench:
    source = args.data.resolve()
    data = measure.first_lines(source, 2000, work / "small.jsonl") if args.smoke else source
    tokenizer = measure.tokenizer(data, work, measure.environment(args.threads, work / "cache"))
    if args.repeat_to:
        data = grown(data, args.repeat_to, work / f"{data.stem}-{args.repeat_to}.jsonl")
    with open(data, "rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass
    return Bench(args, work, data, tokenizer)


# ------------------------------------------------------------------------------------------------ report


def values(blocks: list[Figures], key: str) -> list[float]:
    return [b[key] for b in blocks if key in b]


def cell(blocks: list[Figures], key: str, form: str) -> str:
    found = values(blocks, key)
    return measure.spread(found, form) if found else "–"


def report(found: dict[str, list[Figures]]) -> Figures:
    """Print the table and the check; return medians and ratios."""
    ours = {"whole": values(found[OURS], "whole"), "inside": values(found[INSIDE], "inside")}
    head = ["", "whole s", "inside s", "+ save s", "one MB", "tree MB", "disk MB", "ours: whole", "ours: inside"]
    rows, summary = [head], {}
    for name, blocks in found.items():
        ratios = {k: measure.paired(ours[k], values(blocks, k), False) for k in ours if values(blocks, k)}
        cells = [cell(blocks, key, "{:.2f}") for key in ("whole", "inside", "save")]
        cells += [f"{max(values(blocks, key)):,.0f}" for key in ("one_mb", "tree_mb", "disk_mb")]
        cells += [measure.spread(ratios[k]) if k in ratios else "–" for k in ("whole", "inside")]
        rows.append([name, *cells])
        medians = {k: measure.middle(values(blocks, k)) for k in blocks[0]}
        summary[name] = {**medians, "ratio": {k: measure.middle(v) for k, v in ratios.items()}}
    print(measure.table(rows))
    print(f"target: ours ≥ {TARGET} times as fast; memory is the most of any round")
    tokens = {(f["documents"], f["tokens"]) for blocks in found.values() for f in blocks}
    same = "the same on all sides" if len(tokens) == 1 else "NOT the same on all sides"
    print(f"documents and tokens: {same}: {', '.join(f'{d:,} and {t:,}' for d, t in sorted(tokens))}")
    return summary


def parse() -> argparse.Namespace:
    parser = measure.options(__doc__ or "", repeats=5)
    parser.add_argument("--repeat-to", type=size_in_bytes, metavar="SIZE", help="grow the data to this size, as in 1GB")
    parser.add_argument("--only-ours", action="store_true", help="leave the peer out, to look at memory alone")
    args = parser.parse_args()
    if args.smoke:
        args.repeats = 1
    return args


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        return inside(json.loads(sys.argv[2]))
    args = parse()
    machine = measure.machine(args.threads)
    print(measure.banner(machine))
    with measure.workplace(args.work, args.smoke) as work:
        bench = prepare(args, work)
        free = shutil.disk_usage(work).free
        facts = {"data": bench.data.name, "bytes": bench.data.stat().st_size, "free_disk": free}
        print(measure.banner(facts))
        sides: dict[str, Callable[[], Figures]] = {OURS: bench.ours, INSIDE: bench.inside}
        if not args.only_ours:
            sides["datasets.map"] = lambda: bench.datasets(None)
            sides["datasets.map num_proc=2"] = lambda: bench.datasets(2)
        blocks = measure.interleave(sides, args.repeats, lambda f: f"{f.get('whole', f.get('inside')):.2f} s")
    summary = report(blocks)
    measure.write_json(args.json, {"machine": machine, "facts": facts, "summary": summary, "blocks": blocks})


if __name__ == "__main__":
    main()
