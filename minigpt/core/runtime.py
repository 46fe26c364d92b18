"""Where the work runs: device, compute precision, threads, seeds. The first layer that imports torch."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import random
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigpt.core.errors import MissingError, UsageError
from minigpt.core.machine import cores, cpu, memory
from minigpt.core.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """One process of a run."""

    device: torch.device
    dtype: torch.dtype  # of the forward pass; master weights are always float32

    @classmethod
    def open(cls, device: str = "auto", dtype: str = "auto", world: World | None = None) -> Runtime:
        """Choose device and precision. MissingError (exit 4) when the device is not here, UsageError when unknown.

        world: the processes of this run; each takes a CUDA device of its own.
        """
        chosen = _device(device)
        if world is not None and world.size > 1 and chosen.type == "cuda":
            chosen = _own_gpu(world)
        use_all_cores()
        return cls(chosen, native_dtype(chosen) if dtype == "auto" else DTYPES[dtype])

    @property
    def name(self) -> str:
        """`cpu bf16, 2 threads` or `NVIDIA H100 bf16`: the run's first line."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        if self.device.type == "cpu":
            count = torch.get_num_threads()
            return f"cpu {short}, {count} thread{'s' * (count != 1)}"
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} {short}"
        return f"{self.device.type} {short}"

    @property
    def scales_loss(self) -> bool:
        """float16 has so small a range that gradients vanish in it, unless the loss is scaled up."""
        return self.dtype == torch.float16

    @property
    def emulation(self) -> str | None:
        """What to say where this precision is emulated, with the better choice; None where it is native."""
        if is_native(self.dtype, self.device):
            return None
        name, better = (str(t).removeprefix("torch.") for t in (self.dtype, native_dtype(self.device)))
        return f"{name} is emulated on this {self.device.type.upper()}, many times slower than --dtype {better}"

    def memory_gb(self) -> float:
        """Peak memory of this process so far, in 1e9 bytes: the device's on CUDA, the process's resident set else."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resident_peak() / 1e9

    def free_memory(self) -> int | None:
        """Bytes that can still be taken: of the device on CUDA, else of the machine or container; None = unknown."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return memory().best_guess


def use_all_cores() -> None:
    """Compute on the cores this process may use (a container often has fewer than the machine)."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores().usable))


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError("--device is not a device", found=name, fix="use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MissingError("--device cuda needs a CUDA GPU and a CUDA build of torch", fix="use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MissingError("--device mps needs Apple silicon", fix="use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError("--device is not supported", found=name, fix="use auto, cpu, cuda, cuda:1 or mps")
    return device


def _own_gpu(world: World) -> torch.device:
    if world.local_rank >= torch.cuda.device_count():
        raise UsageError(
            "there are more processes than GPUs on this machine",
            found=f"{torch.cuda.device_count()} GPUs",
            fix="--nproc auto starts one process a GPU",
        )
    return torch.device("cuda", world.local_rank)


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the hardware multiplies in this type. Emulated, a product is several to fifty times slower than float32.

    On a CPU both its instructions and oneDNN, which has the only fast products in 16 bits, must say so; oneDNN can be
    limited from outside (ONEDNN_MAX_CPU_ISA), as tests of older processors do.
    """
    if dtype == torch.float32 or device.type not in ("cpu", "cuda"):
        return True
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) >= (8, 0)
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # no public question
    return instructions and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def native_dtype(device: torch.device) -> torch.dtype:
    """The fastest precision that is native and that a small model trains well in."""
    if is_native(torch.bfloat16, device) and device.type != "mps":
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def tolerant_dtype(device: torch.device) -> torch.dtype:
    """The precision of products whose rounding hardly matters: bfloat16 where it is native, else float32."""
    return torch.bfloat16 if is_native(torch.bfloat16, device) else torch.float32


@functools.cache
def onednn_float32() -> bool:
    """Whether large float32 products are oneDNN's affair: on x86 processors that are not Intel's, where MKL, which
    torch asks otherwise, keeps to kernels that are 1.1 (AVX2) to 3 times (AVX-512) slower. A rule and no measurement:
    a run's bits must not depend on what else the machine was doing when it began.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and torch.backends.mkldnn.is_available() and cpu().vendor == "AuthenticAMD"


def resident_peak() -> int:
    """Largest resident set of this process, bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc).

    Batches of packed documents differ in shape, and the holes they leave would otherwise double the resident set.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_after_failure() -> None:
    """Give back what a failed step held, so that a smaller one can be tried."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_memory()


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Tensor]:
    """State of every generator as tensors, so that it fits safetensors."""
    version, internal, gauss = random.getstate()
    assert version == 3
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert kind == "MT19937"
    state = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def all_rng_states(world: World) -> dict[str, Tensor]:
    """The generators of every process by name; those of rank 1 and on as `rank1.torch`."""
    state = rng_state()
    found = dict(state)
    for name, tensor in state.items() if world.size > 1 else ():
        for rank, theirs in enumerate(world.gather(tensor)[1:], start=1):
            found[f"rank{rank}.{name}"] = theirs
    return found


def restore_rng(found: dict[str, Tensor], rank: int = 0) -> None:
    """Undo of `all_rng_states` in one process. A process that there was not before goes on from its own seed."""
    mine = f"rank{rank}." if rank else ""
    own = {n.removeprefix(mine): t for n, t in found.items() if n.startswith(mine) and "." not in n.removeprefix(mine)}
    if own:
        set_rng_state(own)


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Undo of `rng_state`."""
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(int(v) for v in state["python"]), None if gauss != gauss else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
