"""One module chooses precisions, and knows which of them are emulated."""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt.core import runtime
from minigpt.core.runtime import Runtime, is_native, native_dtype, tolerant_dtype

PACKAGE = Path(minigpt.__file__).parent
STORAGE = (  # what numbers are stored in, read from and checked against; nothing is computed in it
    "core/convert/",
    "core/models/folder.py",
    "core/infer/products.py",
)
HALF = {"bfloat16", "float16", "half"}
CPU = torch.device("cpu")


def test_nothing_else_chooses_sixteen_bits():
    """No module but `runtime` names `torch.bfloat16`, `torch.float16` or casts with `.bfloat16()` and `.half()`."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "core/runtime.py" or name.startswith(STORAGE):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in HALF:
                found.append(f"{name}:{node.lineno} .{node.attr}")
    assert not found


@pytest.mark.parametrize(("instructions", "library", "native"), [
    ((True, False), True, True),
    ((False, True), True, True),
    ((False, False), True, False),
    ((True, True), False, False),
])  # fmt: skip
def test_bfloat16_needs_instructions_and_a_library(instructions, library, native, monkeypatch):
    """AVX-512 alone makes oneDNN willing, and slow; instructions alone leave torch's own loop, which is slower yet."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions[0])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: instructions[1])
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library, raising=False)
    assert is_native(torch.bfloat16, CPU) is native
    assert native_dtype(CPU) == tolerant_dtype(CPU) == (torch.bfloat16 if native else torch.float32)
    assert Runtime.open("cpu").dtype == native_dtype(CPU)


def test_emulation_is_told_with_the_better_choice(monkeypatch):
    monkeypatch.setattr(runtime, "is_native", lambda dtype, device: dtype == torch.float32)
    told = Runtime(CPU, torch.bfloat16).emulation
    assert told is not None and "bfloat16" in told and "--dtype float32" in told
    assert Runtime(CPU, torch.float32).emulation is None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about processors of that family")
def test_an_older_processor_computes_in_float32():
    """With oneDNN limited to AVX2, as on a processor that has no more, nobody chooses 16 bits."""
    code = "from minigpt.core.runtime import *; print(Runtime.open().dtype, tolerant_dtype(torch.device('cpu')))"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["torch.float32", "torch.float32"], done.stderr
