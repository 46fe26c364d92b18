"""What the benchmarks share: child processes measured from outside, runs in turn, medians, tables, the machine.

Every measured block is a process of its own. Its environment is the same for both sides but for what `environment` is
told. Bytes are 1e6-based in tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeVar

HERE = Path(__file__).resolve().parent
MINIGPT = [sys.executable, "-m", "minigpt"]
PACKAGES = ("minigpt-lm", "torch", "transformers", "tokenizers", "accelerate", "datasets", "pyarrow", "numpy",
            "xllamacpp")  # fmt: skip
SPINS = "10000"  # GOMP_SPINCOUNT that the minigpt command gives itself
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------ one process


@dataclass
class Child:
    """A finished process. Times in seconds from its start. peak: largest resident set of one process of its tree.

    tree: largest sum of proportional set sizes over the tree, sampled; 0 when it was not asked for. Memory that is
    shared or mapped from files counts once there.
    """

    seconds: float = 0.0
    first_output: float | None = None
    stdout: str = ""
    stderr: list[tuple[float, str]] = field(default_factory=list)
    peak: int = 0
    tree: int = 0

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        return dict(json.loads(self.stdout.strip().splitlines()[-1]))

    def when(self, start: str) -> float:
        """The time of the first line of stderr that begins so."""
        return next(at for at, line in self.stderr if line.startswith(start))


def run(command: Sequence[str], env: Mapping[str, str], sample_tree: float = 0.0) -> Child:
    """Run a command to its end. sample_tree: seconds between looks at the memory of the tree, 0 = never."""
    child, began = Child(), time.perf_counter()
    process = subprocess.Popen(command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    readers = [
        threading.Thread(target=_read_result, args=(process.stdout, child, began)),
        threading.Thread(target=_read_lines, args=(process.stderr, child, began)),
    ]
    ended = threading.Event()
    if sample_tree:
        readers.append(threading.Thread(target=_watch, args=(process.pid, child, ended, sample_tree)))
    for reader in readers:
        reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    child.seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    for reader in readers:
        reader.join()
    child.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if process.returncode:
        said = "\n".join(line for _, line in child.stderr[-30:])
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{said}\n{child.stdout[-2000:]}")
    return child


def _read_result(stream: IO[bytes], child: Child, began: float) -> None:
    parts = []
    while part := os.read(stream.fileno(), 1 << 16):
        if child.first_output is None:
            child.first_output = time.perf_counter() - began
        parts.append(part)
    child.stdout = b"".join(parts).decode("utf-8", "replace")


def _read_lines(stream: IO[bytes], child: Child, began: float) -> None:
    for line in stream:
        child.stderr.append((time.perf_counter() - began, line.decode("utf-8", "replace").rstrip("\n")))


def _watch(root: int, child: Child, ended: threading.Event, pause: float) -> None:
    while not ended.wait(pause):
        child.tree = max(child.tree, sum(map(_proportional, _tree(root))))


def _tree(root: int) -> Iterator[int]:
    """A process and all that it started, by Linux's /proc."""
    yield root
    try:
        tasks = os.listdir(f"/proc/{root}/task")
        found = [Path(f"/proc/{root}/task/{task}/children").read_text() for task in tasks]
    except OSError:  # it has ended
        return
    for pid in " ".join(found).split():
        yield from _tree(int(pid))


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def environment(threads: int, cache: Path, **more: str) -> dict[str, str]:
    """The environment of a child: both sides get the same threads, spinning and no network; nothing is cached yet."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MINIGPT_", "HF_", "OMP_", "GOMP_", "MKL_"))}
    return {
        **kept,
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": SPINS,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "hf"),
        "MINIGPT_CACHE": str(cache / "minigpt"),
        "PYTHONIOENCODING": "utf-8",
        **more,
    }


# ------------------------------------------------------------------------------------------------ many of them


def interleave(sides: Mapping[str, Callable[[], T]], repeats: int, show: Callable[[T], str]) -> dict[str, list[T]]:
    """A B A B …: every side once a round, so that a change of the machine's pace meets all of them."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, side in sides.items():
            found[name].append(side())
            print(f"  {number + 1}/{repeats}  {name:<34} {show(found[name][-1])}", file=sys.stderr, flush=True)
    return found


def middle(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def spread(values: Sequence[float], form: str = "{:,.2f}") -> str:
    """`median (least–most)`."""
    least, most = form.format(min(values)), form.format(max(values))
    return form.format(middle(values)) + (f" ({least}–{most})" if len(values) > 1 else "")


def paired(ours: Sequence[float], theirs: Sequence[float], more_is_better: bool) -> list[float]:
    """How many times better we were, round by round."""
    return [a / b if more_is_better else b / a for a, b in zip(ours, theirs, strict=True)]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; the first column is to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        right = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *right]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# ------------------------------------------------------------------------------------------------ where and how


def machine(threads: int) -> dict[str, Any]:
    """Date, processor, load and versions."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return " ".join([name, *(f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f in flags)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def banner(facts: Mapping[str, Any]) -> str:
    return " · ".join(f"{key} {value}" for key, value in facts.items())


def options(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = HERE.parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared / "pretrain_zh_poetry.jsonl", help="jsonl of {text}")
    parser.add_argument("--work", type=Path, help="directory for tokenizer, caches and runs (default: a temporary one)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that the program works; no figure")
    return parser


@contextmanager
def workplace(given: Path | None, smoke: bool = False) -> Iterator[Path]:
    """--work, or a temporary directory that goes away. A smoke run has a place of its own in it."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="minigpt-bench-") as made:
            yield Path(made)
    else:
        place = given.resolve() / ("smoke" if smoke else "full")
        place.mkdir(parents=True, exist_ok=True)
        yield place


def first_lines(source: Path, count: int, target: Path) -> Path:
    """The first rows of a jsonl file as a file of their own."""
    with open(source, encoding="utf-8") as read, open(target, "w", encoding="utf-8") as write:
        write.writelines(line for _, line in zip(range(count), read, strict=False))
    return target


def tokenizer(data: Path, work: Path, env: Mapping[str, str], vocab_size: int = 6400) -> Path:
    """Train the tokenizer that both sides use, once for each data file of a work directory."""
    folder = work / f"tokenizer-{data.stem}"
    if not folder.is_dir():
        command = ["tokenize", "train", "-d", str(data), "--vocab-size", str(vocab_size), "-o", str(folder)]
        run([*MINIGPT, *command], env)
    return folder


def write_json(path: Path | None, facts: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
