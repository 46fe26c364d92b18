"""Look at this machine and say what to run on it.

Each check is a row: ok; note, when something is worth knowing; warn, when it will disturb; fail, when minigpt cannot
run, which makes the exit code 4. Tokens and keys are never shown. Servers are asked while torch is being imported.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minigpt
from minigpt.core import machine
from minigpt.core.config import group, opt
from minigpt.core.errors import MissingError
from minigpt.core.files import cache_dir
from minigpt.core.groups import CommonConfig
from minigpt.core.models.folder import create
from minigpt.core.models.presets import PRESETS
from minigpt.core.report import Context, Result
from minigpt.core.train.defaults import suggested_batch, suggested_rows
from minigpt.core.train.memory import estimate, parameters
from minigpt.core.train.metrics import short, spell_time

if TYPE_CHECKING:
    from minigpt.core.runtime import Runtime

EXAMPLES = (
    "minigpt doctor",
    "minigpt doctor --offline --json > machine.json",
    "minigpt doctor --json | jq -r .suggestion.command",
)

DISTRIBUTION = "minigpt-lm"
GET_TORCH = "https://pytorch.org/get-started/locally/"
HUB, MIRROR, MODELSCOPE = "https://huggingface.co", "https://hf-mirror.com", "https://www.modelscope.cn"
LOW_DISK, LOW_MEMORY = 2 * 10**9, 10**9  # a 3m run takes 1.1 GB of memory (docs/benchmarks.md) and 40 MB a checkpoint
SMALL_SHM = 64 << 20  # what Docker gives a container that asks for nothing

# Of the speed of a large matrix product, the part that a training step reaches, counting 6 operations a parameter and
# token: 0.21 for 3m and 0.12 for 1m on the processor of docs/benchmarks.md (1.2e12 a second). Not measured on a GPU.
SHARE = 0.2
PATIENCE = 3 * 3600  # seconds that the suggested run may take
TOKENS_A_PARAMETER = 20  # Hoffmann et al., 2022, arXiv:2203.15556
VOCABULARY = 6400  # of a preset that leaves it to the data
MEMORY_SHARE = 0.8  # of what is free: the estimate is rough


@dataclass
class Config:
    offline: bool = opt(False, "ask no server; so do HF_HUB_OFFLINE=1 and MINIGPT_OFFLINE=1", save=False)
    timeout: float = opt(3.0, "seconds to wait for a server", low=0.1, high=60.0, save=False)
    common: CommonConfig = group(CommonConfig)


@dataclass(frozen=True)
class Check:
    """One row. status: ok, note, warn, fail. fix: what to do when it is not ok."""

    status: str
    label: str
    found: str
    fix: str = ""


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


def run(cfg: Config, context: Context) -> Result:
    """Check everything and suggest a size. Data: checks, machine, suggestion. MissingError (exit 4) at a failure."""
    offline = offline_reason(cfg.offline, os.environ)
    hub = os.environ.get("HF_ENDPOINT") or HUB
    waiting = [] if offline else [machine.ask(url, cfg.timeout) for url in (hub, MODELSCOPE)]
    driver = machine.later(machine.nvidia_gpus)
    torch = probe()
    gpus, complaint = driver(6) or ([], None)
    answers = [answer() for answer in waiting]
    cores, cpu, memory, packages = machine.cores(), machine.cpu(), machine.memory(), machine.requirements(DISTRIBUTION)
    variables = machine.environment(os.environ)
    checks = [
        *software_checks(packages, torch),
        *gpu_checks(torch, gpus, complaint, os.environ.get("CUDA_VISIBLE_DEVICES")),
        *cpu_checks(cpu, cores, torch),
        *memory_checks(memory, machine.shared_memory()),
        *disk_checks(Path(os.environ.get("MINIGPT_RUNS", "runs")), cache_dir()),
        *extra_checks(packages or {}),
        *hub_checks(answers, offline, bool(os.environ.get("HF_ENDPOINT"))),
        *(Check("ok", "variable", f"{name}={value}") for name, value in variables.items()),
    ]
    suggestion = suggest(torch, torch.gpus[0]["free"] if torch.gpus else memory.best_guess)
    facts = {
        "minigpt": minigpt.__version__, "python": platform.python_version(), "system": platform.platform(),
        "torch": asdict(torch), "memory": asdict(memory), "variables": variables,
        "driver": {"gpus": [asdict(gpu) for gpu in gpus], "fault": complaint},
        "cpu": {**asdict(cpu), **asdict(cores), "usable": cores.usable}, "servers": [asdict(a) for a in answers],
    }  # fmt: skip
    data = {"checks": [asdict(check) for check in checks], "machine": facts, "suggestion": suggestion}
    return finish(checks, page(checks, suggestion), data, context)


def finish(checks: list[Check], text: str, data: dict[str, Any], context: Context) -> Result:
    """The page as the result, or, when something that minigpt needs is missing, shown before the error that says so."""
    failed = [check for check in checks if check.status == "fail"]
    if not failed:
        return Result(text, data)
    context.report.out(text)
    found = "; ".join(f"{check.label}: {check.found}" for check in failed)
    raise MissingError("minigpt cannot run as it should on this machine", found=found, fix=failed[0].fix, data=data)


def offline_reason(flag: bool, environ: Mapping[str, str]) -> str | None:
    """What asks for silence on the network, if anything does."""
    if flag:
        return "--offline"
    names = ("MINIGPT_OFFLINE", "HF_HUB_OFFLINE")
    return next((n for n in names if environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE")), None)


# ---------------------------------------------------------------------------------------------- torch


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
        )
    except Exception as e:  # whatever a broken installation raises is the finding
        return Torch(fault=machine.one_line(f"{type(e).__name__}: {e}"))


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
    """Operations a second of a large matrix product, the best of half a second's tries; or why there is none."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(runtime.device.type, lambda: None)
    size = 1024 if runtime.device.type == "cpu" else 4096
    best, end = 0.0, time.perf_counter() + 0.5
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


# ---------------------------------------------------------------------------------------------- checks


def software_checks(packages: dict[str, list[machine.Package]] | None, torch: Torch) -> Iterator[Check]:
    """minigpt, Python, torch and the other packages, held against the ranges of minigpt's own metadata."""
    yield Check("ok", "minigpt", f"{minigpt.__version__} on Python {platform.python_version()}, {platform.platform()}")
    needed = {p.name: p for p in (packages or {}).get("", [])}
    yield torch_check(torch, needed.pop("torch", None))
    for p in needed.values():
        if not p.fits:
            line = f"pip install '{p.name}{p.wanted}'" if p.name != "python" else "install minigpt in another Python"
            yield Check("fail", p.name, version_words(p), line)
    if fitting := [f"{p.name} {p.installed}" for p in needed.values() if p.fits]:
        yield Check("ok", "packages", ", ".join(fitting))
    if packages is None:
        install = f"pip install packaging {DISTRIBUTION}; in a checkout: pip install -e ."
        yield Check("warn", "packages", "the versions that minigpt needs are not known", install)


def version_words(p: machine.Package) -> str:
    return f"{p.installed}, but minigpt needs {p.wanted}" if p.installed else f"not installed; minigpt needs {p.wanted}"


def torch_check(torch: Torch, package: machine.Package | None) -> Check:
    install = f"pip install 'torch{package.wanted}', or see {GET_TORCH}" if package else f"see {GET_TORCH}"
    if package is not None and not package.fits:
        return Check("fail", "torch", version_words(package), install)
    if torch.fault:
        return Check("fail", "torch", f"cannot be used: {torch.fault}", f"install it again: {install}")
    plain = "MPS" if torch.device == "mps" else "CPU"
    build = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.rocm}" if torch.rocm else plain
    speed = f", {torch.flops / 1e9:,.0f} GFLOP/s" if torch.flops else ""
    return Check("ok", "torch", f"{torch.version}, {build} build; runs use {torch.device} in {torch.dtype}{speed}")


def gpu_checks(torch: Torch, gpus: list[machine.Gpu], complaint: str | None, visible: str | None) -> Iterator[Check]:
    """What computes beside the processor. gpus, complaint: as NVIDIA's tool told. visible: CUDA_VISIBLE_DEVICES."""
    driver = f", driver {gpus[0].driver}" if gpus else ""
    names = ", ".join(gpu.name for gpu in gpus) + driver
    for gpu in torch.gpus:
        room = f"{machine.amount(gpu['memory'])}, {machine.amount(gpu['free'])} free"
        bf16 = f"bfloat16 {'' if gpu['bf16'] else 'not '}native"
        yield Check("ok", "gpu", f"{gpu['name']}, {room}, capability {gpu['capability']}, {bf16}{driver}")
    if torch.gpus:
        if torch.warning:
            yield Check("warn", "gpu", torch.warning, f"if no other program fills it, get torch for it: {GET_TORCH}")
    elif gpus and torch.fault:
        yield Check("note", "gpu", f"{names}: not used while torch does not work", "mend torch first")
    elif gpus and torch.cuda is None:
        yield Check("warn", "gpu", f"{names}: not used, torch has no CUDA in it", f"install a CUDA build: {GET_TORCH}")
    elif gpus and visible is not None and visible.strip() in ("", "-1"):
        yield Check("note", "gpu", f"{names}: hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    elif gpus:
        why = torch.warning or f"torch for CUDA {torch.cuda} cannot use it; the driver may be too old"
        yield Check("warn", "gpu", f"{names}: {why}", f"update the driver, or get torch for an older CUDA: {GET_TORCH}")
    elif complaint:
        yield Check("warn", "gpu", f"nvidia-smi: {machine.one_line(complaint)}", "install NVIDIA's driver again")
    else:
        yield Check("ok", "gpu", "Apple GPU" if torch.device == "mps" else "none; runs compute on the processor")


def cpu_checks(cpu: machine.Cpu, cores: machine.Cores, torch: Torch) -> Iterator[Check]:
    """Cores that may be used, against the threads that torch would start on them."""
    quota = f", {cores.quota:g} by quota" if cores.quota is not None else ""
    bf16 = f"; bfloat16 by {', '.join(cpu.bf16)}" if cpu.bf16 else ""  # without a word: none, or unknown
    found = f"{cpu.name}; {cores.usable} of {cores.present} cores{quota}{bf16}"
    if torch.threads > cores.usable:
        wrong = f"{found}; {torch.threads} threads would crowd them"
        yield Check("warn", "cpu", wrong, machine.setting("OMP_NUM_THREADS", str(cores.usable)))
    elif torch.threads and torch.threads < cores.usable and "OMP_NUM_THREADS" in os.environ:
        idle = f"{found}; OMP_NUM_THREADS leaves {cores.usable - torch.threads} idle"
        yield Check("note", "cpu", idle, "unset OMP_NUM_THREADS")
    else:
        yield Check("ok", "cpu", found)


def judged(well: bool, label: str, found: str, fix: str, otherwise: str = "warn") -> Check:
    return Check("ok", label, found) if well else Check(otherwise, label, found, fix)


def memory_checks(memory: machine.Memory, shm: int | None) -> Iterator[Check]:
    found = f"{machine.amount(memory.total)}, {machine.amount(memory.available)} available"
    enough = memory.available is None or memory.available >= LOW_MEMORY
    yield judged(enough, "memory", found, f"close other programs; a 3m run wants {machine.amount(LOW_MEMORY)}")
    if shm is not None:
        more = "start the container with --shm-size=1g or --ipc=host, if several processes are to share tensors"
        yield judged(shm > SMALL_SHM, "/dev/shm", machine.amount(shm), more)


def disk_checks(runs: Path, cache: Path) -> Iterator[Check]:
    """Room for runs and for the cache."""
    for label, path, variable in (("runs", runs, "MINIGPT_RUNS"), ("cache", cache, "MINIGPT_CACHE")):
        disk = machine.disk(path)
        held = f", {machine.amount(machine.tree_size(path))} used by it" if label == "cache" else ""
        found = f"{path}: {machine.amount(disk.free)} free{held}" if disk.writable else f"{path}: cannot be written"
        room = disk.writable and (disk.free is None or disk.free >= LOW_DISK)
        yield judged(room, label, found, f"use another disk: {machine.setting(variable, 'DIR')}")


def extra_checks(packages: dict[str, list[machine.Package]]) -> Iterator[Check]:
    """Optional packages, by the extra that brings them; those for developing minigpt left out."""
    for extra in sorted(packages.keys() - {"", "dev"}):
        found = ", ".join(f"{p.name} {p.installed or 'not installed'}" for p in packages[extra])
        install = f"if you want it: pip install '{DISTRIBUTION}[{extra}]'"
        yield judged(all(p.fits for p in packages[extra]), f"extra {extra}", found, install, "note")


def hub_checks(answers: list[machine.Answer], offline: str | None, chosen: bool) -> Iterator[Check]:
    """Servers for models and data. answers: the hub's, then ModelScope's. chosen: HF_ENDPOINT names the hub."""
    if offline:
        undo = f"leave out {offline}" if offline.startswith("-") else f"unset {offline}"
        yield Check("note", "hub", f"not asked because of {offline}", undo)
        return
    hub, modelscope = answers
    for label, answer in (("hub", hub), ("modelscope", modelscope)):
        if answer.fault is None:
            yield Check("ok", label, f"{answer.url} answers in {answer.seconds:.2f} s")
        elif label == "modelscope":
            yield Check("note", label, f"{answer.url} {answer.fault}", "needed only for what lies there")
        else:
            other = "unset HF_ENDPOINT, or name another mirror" if chosen else machine.setting("HF_ENDPOINT", MIRROR)
            instead = "" if modelscope.fault else f"; {modelscope.url} answers and has many of the same files"
            yield Check("warn", label, f"{answer.url} {answer.fault}", other + instead)


# ---------------------------------------------------------------------------------------------- suggestion


def suggest(torch: Torch, free: int | None) -> dict[str, Any] | None:
    """The largest preset that fits and sees 20 tokens a parameter within three hours; else the smallest that fits.

    Fits: needs at most 80 % of `free` bytes (None = unknown) with the rows a run computes at once by itself, halved as
    often as necessary. Speed: a fifth of the measured matrix product, over 6 operations a parameter and token.
    """
    plans = [plan for name in PRESETS if torch.flops and (plan := planned(name, torch, free))]
    quick = [plan for plan in plans if plan["seconds"] <= PATIENCE]
    largest = max(quick, key=lambda plan: plan["parameters"], default=None)
    return largest or min(plans, key=lambda plan: plan["parameters"], default=None)


def planned(name: str, torch: Torch, free: int | None) -> dict[str, Any] | None:
    """One preset on this machine; None when it does not fit."""
    config = create(name, PRESETS[name].get("vocab_size", VOCABULARY))
    count, length = parameters(config), PRESETS[name]["max_len"]
    step = suggested_batch(count, 10**9, length, "pretrain") // length  # rows, of a corpus without end
    usual = rows = min(suggested_rows(length, torch.device), step)

    def needed() -> int:
        return estimate(config, rows, length, torch.dtype, "adamw", torch.device, context=length).total

    while free is not None and needed() > MEMORY_SHARE * free:
        if rows == 1:
            return None
        rows //= 2
    speed, tokens = SHARE * torch.flops / (6 * count), TOKENS_A_PARAMETER * count
    smaller = f" --batch-size {rows}" if rows < usual else ""
    return {
        "size": name, "parameters": count, "device": torch.device, "dtype": torch.dtype, "batch_size": rows,
        "max_len": length, "memory_bytes": needed(), "tokens": tokens,
        "tokens_per_second": round(speed), "seconds": round(tokens / speed), "estimate": True,
        "command": f"minigpt pretrain -d FILE --size {name}{smaller}",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- page


def page(checks: list[Check], suggestion: dict[str, Any] | None) -> str:
    """Rows aligned under each other; what to do below what it is about."""
    width = max(len(check.label) for check in checks)
    lines = []
    for c in checks:
        lines.append(f"{c.status:<4}  {c.label:<{width}}  {' '.join(c.found.split())}")
        if c.fix:
            lines.append(f"{'':<{width + 6}}  fix  {c.fix}")
    if suggestion is None:
        return "\n".join([*lines, "", "no suggestion: torch does not work, or the memory is too little for any size"])
    s = suggestion
    return "\n".join([
        *lines, "", f"try   {s['command']}",
        f"      {short(s['parameters'])} parameters on {s['device']} in {s['dtype']}, {s['batch_size']} rows of "
        f"{s['max_len']} tokens at once, about {machine.amount(s['memory_bytes'])}",
        f"      estimate, easily off by two: {short(s['tokens_per_second'])} tokens/s; "
        f"{short(s['tokens'])} tokens (20 a parameter) take {spell_time(s['seconds'])}",
    ])  # fmt: skip
