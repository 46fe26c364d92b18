"""What torch tells of itself and of the device that a run would choose. Whatever it raises is a fact too."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minigpt.core import machine

if TYPE_CHECKING:
    from minigpt.core.runtime import Runtime


@dataclass(frozen=True)
class Torch:
    """What torch told. fault: why it does not work here; the rest is then empty."""

    fault: str | None = None
    version: str | None = None
    cuda: str | None = None  # versions it was built for
    rocm: str | None = None
    device: str = "cpu"  # what a run chooses by itself: device, precision, threads
    dtype: str = ""
    threads: int = 0
    gpus: list[dict[str, Any]] = field(default_factory=list)
    warning: str | None = None  # its complaint about a GPU
    flops: float = 0.0  # operations a second of a large matrix product in `dtype`, measured
    native: dict[str, bool] = field(default_factory=dict)  # precision → whether the device has it; else it is emulated
    exact: dict[str, bool] = field(default_factory=dict)  # weights → whether text is the same to the bit at any load


def probe() -> Torch:
    """Import torch, choose a device as a run would, and time it."""
    try:
        import torch

        from minigpt.core.runtime import Runtime

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            runtime = Runtime.open()
            gpus = [gpu_facts(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
            flops, trouble = matmul_flops(runtime)
        return Torch(
            version=torch.__version__,
            cuda=torch.version.cuda,
            rocm=torch.version.hip,
            device=runtime.device.type,
            dtype=str(runtime.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            gpus=gpus,
            warning=trouble or next((machine.one_line(str(w.message)) for w in said if "CUDA" in str(w.message)), None),
            flops=flops,
            native=native_precisions(runtime),
            exact=batch_invariance() if runtime.device.type == "cpu" else {},
        )
    except Exception as e:  # whatever a broken installation raises is the finding
        return Torch(fault=machine.one_line(f"{type(e).__name__}: {e}"))


def native_precisions(runtime: Runtime) -> dict[str, bool]:
    """Each precision and whether the device computes in it."""
    from minigpt.core.runtime import DTYPES, is_native

    return {name: is_native(dtype, runtime.device) for name, dtype in DTYPES.items()}


def batch_invariance() -> dict[str, bool]:
    """For each kind of weights that a model is asked with, whether products and attention of the 26M model's shapes
    give a row the same bits whatever is computed beside it, with the padding that the engine gives.
    """
    import torch

    from minigpt.core.infer import lean
    from minigpt.core.infer.batch_invariance import BatchInvariance
    from minigpt.core.infer.products import FEW_INT8, FP16
    from minigpt.core.models import folder
    from minigpt.core.models.decoder import Decoder
    from minigpt.core.runtime import tolerant_dtype

    cpu = torch.device("cpu")
    kinds = {str(dtype).removeprefix("torch."): (dtype, lean.pack) for dtype in (torch.float32, tolerant_dtype(cpu))}
    if FEW_INT8 is not None:
        kinds["int8"] = torch.float32, lean.int8
    if FP16 is not None:
        kinds["fp16"] = torch.float32, lean.fp16
    shape = folder.create("minimind2-small", 6400, {"num_hidden_layers": 1})
    found = {}
    for name, (dtype, lay_out) in kinds.items():
        model = Decoder(shape).to(dtype)
        lay_out(model)
        found[name] = BatchInvariance(model).exact
    return found


def gpu_facts(index: int) -> dict[str, Any]:
    """One CUDA or ROCm device."""
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:  # in use by somebody who does not share it
        free, total = 0, torch.cuda.get_device_properties(index).total_memory
    name, bf16 = torch.cuda.get_device_name(index), (major, minor) >= (8, 0)
    return {"name": name, "memory": total, "free": free, "capability": f"{major}.{minor}", "bf16": bf16}


def matmul_flops(runtime: Runtime) -> tuple[float, str | None]:
    """Operations a second of a large matrix product, the best of a fifth of a second's tries; or why there is none."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(runtime.device.type, lambda: None)
    size = 1024 if runtime.device.type == "cpu" else 4096
    best, end = 0.0, time.perf_counter() + 0.2
    try:
        a = torch.randn(size, size, device=runtime.device).to(runtime.dtype)
        while (began := time.perf_counter()) < end:
            for _ in range(3):
                a @ a
            wait()
            best = max(best, 3 * 2 * size**3 / (time.perf_counter() - began))
    except RuntimeError as e:  # full, or of a kind that this build of torch has no code for
        return 0.0, machine.one_line(f"{runtime.device.type} cannot compute: {e}")
    return best, None
