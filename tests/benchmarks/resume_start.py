"""How long a run on a large token store takes from `--resume` to its next step, imports not counted.

    python tests/benchmarks/resume_start.py texts.jsonl --gigabytes 1

Packs the texts, repeats the store until its tokens fill that many gigabytes (documents keep their lengths, hashes are
made anew), trains one step, and resumes it three times in fresh processes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TIMED = """
import sys, os, time
import torch, tokenizers, numpy, safetensors.torch
from minigpt.cli.app import main
from minigpt.core.train.trainer import Trainer
wall, cpu = time.perf_counter(), time.process_time()
def advance(self, *args):
    print(time.perf_counter() - wall, time.process_time() - cpu)
    sys.stdout.flush()
    os._exit(0)
Trainer.advance = advance
main(sys.argv[1:])
"""


def repeat(small: Path, large: Path, size: float) -> tuple[int, int]:
    """Write the store `small` over and over. Returns documents and bytes of tokens."""
    large.mkdir()
    meta = json.loads((small / "meta.json").read_text())
    times = -(-int(size) // (small / "tokens.bin").stat().st_size)
    for name in ("tokens.bin", "mask.bin"):
        with open(large / name, "wb") as f:
            for _ in range(times):
                f.write((small / name).read_bytes())
    docs = np.load(small / "docs.npy")
    many = np.tile(docs, times)
    many["offset"] += np.repeat(np.arange(times, dtype="u8") * meta["tokens"], len(docs))
    many["hash"] = np.random.default_rng(0).integers(0, 2**64, len(many), dtype="u8")
    np.save(large / "docs.npy", many)
    for key in ("tokens", "documents", "supervised", "characters", "rows"):
        meta[key] *= times
    (large / "meta.json").write_text(json.dumps(meta))
    return len(many), (large / "tokens.bin").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    asked = parser.parse_args()
    minigpt = [sys.executable, "-m", "minigpt"]
    home = Path(tempfile.mkdtemp(prefix="resume-"))
    environment = {**os.environ, "MINIGPT_CACHE": str(home / "cache")}

    def run(*args: object) -> None:
        subprocess.run([*minigpt, *map(str, args), "-q"], check=True, env=environment, stdout=subprocess.DEVNULL)

    try:
        run("tokenize", "train", "-d", asked.data, "--vocab-size", 4000, "-o", home / "tok")
        run("tokenize", "pack", "-d", asked.data, "-t", home / "tok", "-o", home / "small")
        documents, size = repeat(home / "small", home / "large", asked.gigabytes * 1e9)
        command = [
            "pretrain",
            "-d",
            home / "large",
            "-t",
            home / "tok",
            "--size",
            "1m",
            "--steps",
            100,
            "-o",
            home / "run",
        ]
        run(*command, "--steps", 1, "--eval-rows", 4)
        print(f"{documents:,} documents, {size / 1e9:.2f} GB of tokens")
        for _ in range(3):
            again = [*map(str, command), "--eval-rows", "4", "--resume", "auto"]
            done = subprocess.run(
                [sys.executable, "-c", TIMED, *again], check=True, env=environment, capture_output=True, text=True
            )
            wall, cpu = map(float, done.stdout.split())
            print(f"first step after {wall:.2f} s, {cpu:.2f} s of processor time")
            time.sleep(1)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
