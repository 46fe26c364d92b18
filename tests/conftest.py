"""Shared by all tests: tiny random models, and the command line run in process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command does, before torch starts its threads

import torch

from minigpt.cli.app import main
from minigpt.core.models import folder
from minigpt.core.models.decoder import Decoder

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def trials(count: int, in_ci: int) -> list[Any]:
    """Numbers of a long proof's trials for `parametrize`: the first are `slow`, the others an `exam`."""
    return [pytest.param(i, marks=pytest.mark.slow if i < in_ci else pytest.mark.exam) for i in range(count)]


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},  # Qwen3's head size is free of hidden_size / heads
}


def tiny(arch: str, seed: int = 0, **overrides: Any) -> Decoder:
    """A float32 Decoder, random weights: two layers, grouped queries, tied embeddings; overrides are config keys."""
    config = folder.create({"model_type": arch, **TINY, **ARCHITECTURES[arch], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Decoder(config)
        for parameter in model.parameters():  # far from the initial state, so that every weight matters
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model


def run_cli(*args: object, stdin: str | bytes | None = None) -> tuple[int, str, str]:
    """Run `minigpt ARGS` in this process, without a terminal. Returns (exit code, stdout, stderr)."""
    given = stdin.encode("utf-8") if isinstance(stdin, str) else stdin or b""
    streams = [io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="") for data in (given, b"", b"")]
    streams[2] = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="")
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = streams
    try:
        code = main([str(a) for a in args])
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
    texts = []
    for stream in streams[1:]:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return int(code), texts[0], texts[1]


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Token stores of tests go to a temporary cache, not to the user's."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGPT_CACHE", str(path))
        yield path
