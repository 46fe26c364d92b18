"""Facts about this machine, from the standard library alone: cores, memory, disks, drivers, packages, servers.

`root` stands for `/` and is another directory in tests. What a system does not tell is None, never an exception.
Sizes are bytes.
"""

from __future__ import annotations

import csv
import http.client
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

T = TypeVar("T")
ROOT = Path("/")


def read(path: Path) -> str:
    """A small file's text; empty where there is nothing to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def one_line(text: str, most: int = 200) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def amount(size: int | None) -> str:
    """Bytes for people, in powers of ten as in a run's own figures."""
    if size is None:
        return "unknown"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# ---------------------------------------------------------------------------------------------- cores and memory


@dataclass(frozen=True)
class Cores:
    present: int  # in the machine
    allowed: int  # that the scheduler may put this process on
    quota: float | None  # processor seconds a second that its control groups allow

    @property
    def usable(self) -> int:
        """Threads that can compute at the same time."""
        return max(1, self.allowed if self.quota is None else min(self.allowed, int(self.quota)))


@dataclass(frozen=True)
class Memory:
    total: int | None  # of the machine, or of its control group where that is less
    available: int | None  # that can be taken without swapping

    @property
    def best_guess(self) -> int | None:
        """Room for a model: all of it where the system does not tell what is taken."""
        return self.total if self.available is None else self.available


def cgroup_dirs(controller: str, root: Path) -> Iterator[Path]:
    """This process's control groups for `controller` (cpu, memory), innermost first, of version 1 and 2.

    Limits of all ancestors hold. /proc may name a path as seen from outside a container, whose own group is then the
    mount itself: the last of the ancestors tried.
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mounts = (controller, controllers) if controllers else (".", "unified")
        inner = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for part in (inner, *inner.parents):
                yield root / "sys/fs/cgroup" / mount / part


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the control groups allow; None without a limit."""
    limits = []
    for group in cgroup_dirs("cpu", root):
        both = read(group / "cpu.max") or f"{read(group / 'cpu.cfs_quota_us')} {read(group / 'cpu.cfs_period_us')}"
        if found := re.fullmatch(r"\s*(\d+)\s+([1-9]\d*)\s*", both):  # no limit is `max`, or -1
            limits.append(int(found[1]) / int(found[2]))
    return min(limits, default=None)


def cores(root: Path = ROOT) -> Cores:
    """Cores that this process may use: a container often has fewer than the machine."""
    present = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present  # Linux only
    return Cores(present, allowed, cpu_quota(root))


def memory(root: Path = ROOT) -> Memory:
    """The machine's memory, less where a control group allows less."""
    told = {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB", read(root / "proc/meminfo"), re.MULTILINE)}
    total, available = told.get("MemTotal") or _physical(), told.get("MemAvailable")
    for group in cgroup_dirs("memory", root):
        limit = _number(group, "memory.max", "memory.limit_in_bytes")
        if limit is None:
            continue  # version 1 writes no limit as a number beyond all memory, which the minima below leave out
        used = _number(group, "memory.current", "memory.usage_in_bytes") or 0
        left = max(0, limit - max(0, used - _reclaimable(group)))
        total = limit if total is None else min(total, limit)
        available = left if available is None else min(available, left)
    return Memory(total, available)


def _number(folder: Path, *names: str) -> int | None:
    """The number in the first of these files that holds one."""
    return next((int(text) for name in names if (text := read(folder / name).strip()).isdigit()), None)


def _reclaimable(group: Path) -> int:
    """Cached file pages that the kernel drops on demand: counted as used, yet free for the asking."""
    told = dict(re.findall(r"^(\w+) (\d+)$", read(group / "memory.stat"), re.MULTILINE))
    return int(told.get("total_inactive_file") or told.get("inactive_file") or 0)


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


@dataclass(frozen=True)
class Cpu:
    name: str
    bf16: tuple[str, ...]  # its instructions that compute in bfloat16, as Linux names them
    vendor: str = ""  # `GenuineIntel`, `AuthenticAMD`; empty where it is not told


def cpu(root: Path = ROOT) -> Cpu:
    """The processor. Instructions are known on Linux only; Windows ends its description with the vendor."""
    text = read(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE) or re.search(r"(\S+)$", platform.processor())
    known = set(flags[1].split()) if flags else set()
    return Cpu(
        name[1].strip() if name else platform.processor() or platform.machine() or "unknown",
        tuple(flag for flag in ("amx_tile", "amx_bf16", "avx512_bf16", "bf16") if flag in known),
        vendor[1] if vendor else "",
    )


# ---------------------------------------------------------------------------------------------- disks


@dataclass(frozen=True)
class Disk:
    path: str
    free: int | None
    writable: bool


def disk(path: Path) -> Disk:
    """Room where `path` is, or would be made. Tries it with a nameless file, since permissions do not tell all."""
    here = path.expanduser().absolute()
    while not os.path.exists(here) and here != here.parent:
        here = here.parent
    try:
        free: int | None = shutil.disk_usage(here).free
    except OSError:
        free = None
    try:
        with tempfile.TemporaryFile(dir=here):
            return Disk(str(path), free, True)
    except OSError:
        return Disk(str(path), free, False)


def tree_size(path: Path) -> int:
    """Bytes of all files below `path`; links count for themselves."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


def shared_memory(root: Path = ROOT) -> int | None:
    """Size of /dev/shm, through which processes share tensors on Linux."""
    try:
        return shutil.disk_usage(root / "dev/shm").total
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------- NVIDIA's driver


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int | None
    free: int | None
    driver: str


def nvidia_gpus(timeout: float = 5.0) -> tuple[list[Gpu], str | None]:
    """GPUs that NVIDIA's own tool sees, and its complaint if it has one; neither where there is no such tool."""
    asked = "name,memory.total,memory.free,driver_version"
    argv = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL, encoding="utf-8",
            errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gives no answer in {timeout:g} s"
    except OSError:
        return [], None
    if done.returncode:
        return [], (done.stdout or done.stderr).strip().split("\n")[0] or f"nvidia-smi ends with {done.returncode}"
    rows = [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if len(row) == 4]
    return [Gpu(name, _mebibytes(total), _mebibytes(free), driver) for name, total, free, driver in rows], None


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None  # [N/A] where GPU and processor share memory


# ---------------------------------------------------------------------------------------------- packages


@dataclass(frozen=True)
class Package:
    name: str
    installed: str | None  # version
    wanted: str  # range, `>=2.10,<2.14`
    fits: bool


def requirements(distribution: str) -> dict[str, list[Package]] | None:
    """What a distribution asks for, beside what is here: Python and packages under "", others by the name of the extra.

    None when its metadata cannot be read: it was not installed, or `packaging` was not.
    """
    from importlib.metadata import metadata

    try:
        from packaging.requirements import Requirement

        meta = metadata(distribution)
    except ModuleNotFoundError:
        return None
    wanted: dict[str, list[Package]] = {"": [], **{extra: [] for extra in meta.get_all("Provides-Extra") or []}}
    python, here = "".join(meta.get_all("Requires-Python") or []), platform.python_version()
    wanted[""].append(Package("python", here, python, version_fits(here, python)))
    for line in meta.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        applies = [e for e in wanted if requirement.marker is None or requirement.marker.evaluate({"extra": e})]
        for extra in [""] if "" in applies else applies:  # what is always needed is no part of an extra
            wanted[extra].append(_package(requirement.name, str(requirement.specifier)))
    return {extra: packages for extra, packages in wanted.items() if packages}


def _package(name: str, wanted: str) -> Package:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed: str | None = version(name) or None
    except PackageNotFoundError:
        installed = None
    return Package(name, installed, wanted, installed is not None and version_fits(installed, wanted))


def version_fits(version: str, wanted: str) -> bool:
    """True when a version, also one before its release or of a local build, lies in a range."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


# ---------------------------------------------------------------------------------------------- servers


@dataclass(frozen=True)
class Answer:
    url: str  # without credentials
    seconds: float | None  # until it answered; None when it did not
    fault: str | None


def reach(url: str, timeout: float) -> Answer:
    """Ask a server for its headers. Any answer but a server's or a proxy's own failure counts."""
    url = public_url(url)
    if not url.lower().startswith(("http://", "https://")):
        return Answer(url, None, "is no http address")
    began = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            pass
    except urllib.error.HTTPError as e:
        e.close()
        if e.code >= 500 or e.code == 407:
            return Answer(url, None, f"answers {e.code} {e.reason}".rstrip())
    except TimeoutError:
        return Answer(url, None, no_answer(timeout))
    except OSError as e:
        reason = getattr(e, "reason", e)
        timed_out = isinstance(reason, TimeoutError)
        return Answer(url, None, no_answer(timeout) if timed_out else f"cannot be reached: {_plain(reason)}")
    except (ValueError, http.client.HTTPException):
        return Answer(url, None, "is no usable address, or no web server")
    return Answer(url, round(time.monotonic() - began, 3), None)


def ask(url: str, timeout: float) -> Callable[[], Answer]:
    """Begin to ask a server; what is handed back waits for its answer, `timeout` seconds from now at the most."""
    end = time.monotonic() + timeout
    wait = later(lambda: reach(url, timeout))
    return lambda: wait(end + 0.2 - time.monotonic()) or Answer(public_url(url), None, no_answer(timeout))


def no_answer(timeout: float) -> str:
    return f"gives no answer in {timeout:g} s"


def _plain(reason: object) -> str:
    """The words of an error without its numbers."""
    return (isinstance(reason, OSError) and reason.strerror) or str(reason)


def later(work: Callable[[], T]) -> Callable[[float], T | None]:
    """Begin `work` at once, beside the rest; the function handed back waits up to so many seconds for its result.

    The thread is a daemon: a name server that stays silent beyond every timeout does not hold up the program's end.
    """
    box: list[T] = []
    thread = threading.Thread(target=lambda: box.append(work()), daemon=True)
    thread.start()

    def result(seconds: float) -> T | None:
        thread.join(max(0.0, seconds))
        return box[0] if box else None

    return result


# ---------------------------------------------------------------------------------------------- environment

_PREFIXES = ("MINIGPT_", "HF_")
_NAMES = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NO_COLOR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH|COOKIE)(_|$)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"(hf_|sk-|ghp_|ms-)[\w-]{16,}|bearer\s", re.IGNORECASE)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that change what minigpt does, in a form that can be shown to others."""
    names = sorted(n for n in environ if n.upper() in _NAMES or n.startswith(_PREFIXES))
    return {name: shown(name, environ[name]) for name in names}


def setting(name: str, value: str) -> str:
    """The shell's line that sets a variable."""
    return f"set {name}={value}" if os.name == "nt" else f"export {name}={value}"


def shown(name: str, value: str) -> str:
    """The value; `(set)` for a token or key; an address without its user name and password."""
    if value and (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value)):
        return "(set)"
    return public_url(value) if "://" in value or name.upper().endswith("_PROXY") else value


def public_url(url: str) -> str:
    """An address without user name, password, query and fragment.

    Cut at the last @, since a password that nobody escaped may hold any character; a query may be a signature.
    """
    scheme = "".join(re.findall(r"^[a-z][a-z0-9+.-]*://", url, re.IGNORECASE))
    return scheme + re.split(r"[?#]", url[len(scheme) :].rpartition("@")[2])[0]
