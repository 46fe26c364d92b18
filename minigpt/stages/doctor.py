"""Look at this machine and say what to run on it.

Each check is a row, shown as soon as it is known: ok; note, when something is worth knowing; warn, when it will
disturb; fail, when minigpt cannot run, which makes the exit code 4. Tokens and keys are never shown. Servers are asked
while torch is being imported.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import minigpt
from minigpt.core import machine
from minigpt.core.config import group, opt
from minigpt.core.errors import MissingError
from minigpt.core.files import cache_dir
from minigpt.core.groups import CommonConfig
from minigpt.core.report import Context, Report, Result
from minigpt.core.train.metrics import short, spell_time
from minigpt.stages import suggestion
from minigpt.stages.suggestion import MEASURED, Plan, Room
from minigpt.stages.torch_facts import Torch, probe

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

DEVELOPERS = ("dev", "parity")  # extras for working on minigpt itself
LABEL = 10  # columns of the usual labels


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


class Page:
    """The rows, shown one by one."""

    def __init__(self, report: Report):
        self.report, self.checks = report, list[Check]()

    def show(self, checks: Iterable[Check]) -> None:
        for check in checks:
            self.checks.append(check)
            self.report.out(row(check))

    def wait(self, words: str) -> None:
        """Say what takes a while."""
        self.report.note("wait", words)


def run(cfg: Config, context: Context) -> Result:
    """Check everything and suggest a size. Data: checks, machine, sizes, suggestion. MissingError (4) at a failure."""
    page = Page(context.report)
    offline = offline_reason(cfg.offline, os.environ)
    hub = os.environ.get("HF_ENDPOINT") or HUB
    waiting = [] if offline else [machine.ask(url, cfg.timeout) for url in (hub, MODELSCOPE)]
    driver = machine.later(machine.nvidia_gpus)
    cores, cpu, memory, packages = machine.cores(), machine.cpu(), machine.memory(), machine.requirements(DISTRIBUTION)
    variables = machine.environment(os.environ)
    page.show(software_checks(packages))
    page.show(memory_checks(memory, machine.shared_memory()))
    page.show(disk_checks(Path(os.environ.get("MINIGPT_RUNS", "runs")), cache_dir()))
    page.show(extra_checks(packages or {}))
    page.show(Check("ok", "variable", f"{name}={value}") for name, value in variables.items())
    page.wait("PyTorch is being started")
    torch = probe()
    gpus, complaint = driver(6) or ([], None)
    page.show([torch_check(torch, package_of(packages, "torch"))])
    page.show(gpu_checks(torch, gpus, complaint, os.environ.get("CUDA_VISIBLE_DEVICES")))
    page.show(cpu_checks(cpu, cores, torch))
    page.show(numerics_checks(torch))
    answers = [answer() for answer in waiting]
    page.show(hub_checks(answers, offline, bool(os.environ.get("HF_ENDPOINT"))))
    sizes = sizes_of(torch, torch.gpus[0]["free"] if torch.gpus else memory.best_guess, page)
    advised = suggestion.best(sizes)
    context.report.out("\n" + advice(sizes, advised))
    facts = {
        "minigpt": minigpt.__version__, "python": platform.python_version(), "system": platform.platform(),
        "torch": asdict(torch), "memory": asdict(memory), "variables": variables,
        "driver": {"gpus": [asdict(gpu) for gpu in gpus], "fault": complaint},
        "cpu": {**asdict(cpu), **asdict(cores), "usable": cores.usable}, "servers": [asdict(a) for a in answers],
    }  # fmt: skip
    data = {
        "checks": [asdict(check) for check in page.checks], "machine": facts, "sizes": [asdict(s) for s in sizes],
        "suggestion": asdict(advised) if advised else None,
    }  # fmt: skip
    return finish(page.checks, data)


def finish(checks: Sequence[Check], data: dict[str, Any]) -> Result:
    """The result, whose rows are shown already. MissingError when something that minigpt needs is missing."""
    failed = [check for check in checks if check.status == "fail"]
    if not failed:
        return Result(None, data)
    found = "; ".join(f"{check.label}: {check.found}" for check in failed)
    raise MissingError("minigpt cannot run as it should on this machine", found=found, fix=failed[0].fix, data=data)


def offline_reason(flag: bool, environ: Mapping[str, str]) -> str | None:
    """What asks for silence on the network, if anything does."""
    if flag:
        return "--offline"
    names = ("MINIGPT_OFFLINE", "HF_HUB_OFFLINE")
    return next((n for n in names if environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE")), None)


# ---------------------------------------------------------------------------------------------- checks


def package_of(packages: dict[str, list[machine.Package]] | None, name: str) -> machine.Package | None:
    """One of the packages that minigpt always needs."""
    return next((p for p in (packages or {}).get("", []) if p.name == name), None)


def software_checks(packages: dict[str, list[machine.Package]] | None) -> Iterator[Check]:
    """minigpt, Python and the packages but torch, held against the ranges of minigpt's own metadata."""
    yield Check("ok", "minigpt", f"{minigpt.__version__} on Python {platform.python_version()}, {platform.platform()}")
    needed = {p.name: p for p in (packages or {}).get("", []) if p.name != "torch"}
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


def numerics_checks(torch: Torch) -> Iterator[Check]:
    """Which precisions are native, and which promises about bits hold here."""
    if torch.native:
        native, emulated = (
            [name for name, is_so in torch.native.items() if is_so is wanted] for wanted in (True, False)
        )
        slow = f"; emulated, many times slower: {', '.join(emulated)}" if emulated else ""
        yield Check("ok", "precision", f"native: {', '.join(native)}{slow}")
    if torch.exact:
        exact, rounded = ([name for name, is_so in torch.exact.items() if is_so is wanted] for wanted in (True, False))
        parts = [
            f"{how}: {', '.join(names)}" for how, names in (("to the bit", exact), ("to rounding", rounded)) if names
        ]
        yield Check("ok", "same text", f"at any load, measured {'; '.join(parts)}; with --compile to rounding")


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
    """Extras that may be installed besides, in one row; a row for each whose package is there and does not fit."""
    extras = {extra: packages[extra] for extra in sorted(packages.keys() - {"", *DEVELOPERS})}
    here = [extra for extra, of in extras.items() if all(p.fits for p in of)]
    outdated = [extra for extra, of in extras.items() if any(p.installed and not p.fits for p in of)]
    absent = [extra for extra in extras if extra not in (*here, *outdated)]
    for extra in outdated:
        found = ", ".join(f"{p.name} {version_words(p)}" for p in extras[extra] if not p.fits)
        yield Check("note", "extra", f"{extra}: {found}", f"pip install '{DISTRIBUTION}[{extra}]'")
    if here or absent:
        more = f"to be had with pip install '{DISTRIBUTION}[NAME]': {', '.join(absent)}" if absent else ""
        yield Check("ok", "extras", "; ".join(filter(None, [", ".join(here) or "none", more])))


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


def sizes_of(torch: Torch, free: int | None, page: Page) -> list[Plan]:
    """The sizes that this machine can train in a few hours, and the next one; none where torch does not work."""
    if not torch.flops:
        return []
    page.wait("training steps are being measured, for a few seconds")
    try:
        return list(suggestion.plans(Room(torch.device, torch.dtype, torch.flops, free), suggestion.measuring()))
    except RuntimeError as e:  # of a device that multiplies and cannot train
        why = machine.one_line(f"a training step fails on {torch.device} in {torch.dtype}: {e}")
        page.show(
            [Check("warn", "training", why, "try another --device or --dtype; see CONTRIBUTING.md for reporting it")]
        )
        return []


def row(c: Check) -> str:
    """A check with aligned columns; what to do below what it is about."""
    line = f"{c.status:<4}  {c.label:<{LABEL}}  {' '.join(c.found.split())}"
    return f"{line}\n{'':<{LABEL + 6}}  fix  {c.fix}" if c.fix else line


def advice(sizes: Sequence[Plan], advised: Plan | None) -> str:
    """The sizes as a table, and the command to try."""
    if advised is None:
        return "no suggestion: torch does not work or cannot train, or the memory is too little for any size"
    width = max(len(plan.size) for plan in sizes)
    lines = [f"{'size':<{width}}  parameters  tokens/s  20 tokens a parameter take"]
    lines += [
        f"{plan.size:<{width}}  {short(plan.parameters):>10}  {short(plan.tokens_per_second):>8}  "
        f"{spell_time(plan.seconds)} for {short(plan.tokens)}"
        + ("" if plan.speed == MEASURED else f" ({plan.speed}, easily off by two)")
        for plan in sizes
    ]
    return "\n".join([
        *lines, "", f"try   {advised.command}",
        f"      {advised.batch_size} rows of {advised.max_len} tokens at once, about "
        f"{machine.amount(advised.memory_bytes)}, on {advised.device} in {advised.dtype}",
    ])  # fmt: skip
