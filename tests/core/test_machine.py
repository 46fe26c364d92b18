"""Facts about the machine, read from made-up systems."""

from __future__ import annotations

import http.server
import os
import socket
import stat
import sys
import threading
import time
from importlib.metadata import version

import pytest

from minigpt.core import machine
from minigpt.core.machine import Answer, Gpu, Memory

GiB = 1 << 30
MEMINFO = f"MemTotal:       {8 * GiB // 1024} kB\nMemFree:  1 kB\nMemAvailable:   {6 * GiB // 1024} kB\n"


def system(root, files):
    """Write {path: text} below `root`, which then stands for /."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


QUOTAS = {  # what it shows: (/proc/self/cgroup, files below /sys/fs/cgroup, cores)
    "no groups": ("", {}, None),
    "no limit": ("0::/", {"cpu.max": "max 100000\n"}, None),
    "version 2": ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
    "a mount beside version 1": ("0::/", {"unified/cpu.max": "150000 100000\n"}, 1.5),
    "a container's group is the mount": ("5:memory:/d/a\n4:cpu,cpuacct:/d/a\n", {
        "cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2.0),
    "version 1, no limit": ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    "the strictest of all ancestors": ("0::/outer/inner", {
        "outer/inner/cpu.max": "800000 100000\n", "outer/cpu.max": "300000 100000\n"}, 3.0),
    "another controller": ("4:memory:/", {
        "memory/cpu.cfs_quota_us": "100000\n", "memory/cpu.cfs_period_us": "100000\n"}, None),
}  # fmt: skip


def grouped(root, text, files):
    """A system with 8 GiB whose process is in these control groups."""
    below = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    return system(root, {"proc/meminfo": MEMINFO, "proc/self/cgroup": text, **below})


@pytest.mark.parametrize("case", QUOTAS)
def test_cpu_quota(tmp_path, case):
    """Control groups of both versions; `max` and -1 are no limit."""
    text, files, expected = QUOTAS[case]
    assert machine.cpu_quota(grouped(tmp_path, text, files)) == expected


@pytest.mark.parametrize(
    ("allowed", "quota", "usable"), [(8, None, 8), (8, 2.0, 2), (8, 2.9, 2), (8, 0.5, 1), (2, 16.0, 2)]
)
def test_usable_cores(allowed, quota, usable):
    """No more threads than the scheduler and the quota let run at once, and never none."""
    assert machine.Cores(64, allowed, quota).usable == usable


def test_cores_follow_the_affinity_mask(monkeypatch, tmp_path):
    """The mask counts where the system has one; without it, as on macOS and Windows, all cores do."""
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert machine.cores(tmp_path) == machine.Cores(12, 3, None)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores(tmp_path) == machine.Cores(12, 12, None)


LIMITS = {  # what it shows: (/proc/self/cgroup, files below /sys/fs/cgroup, memory)
    "no groups": ("", {}, Memory(8 * GiB, 6 * GiB)),
    "no limit": ("0::/", {"memory.max": "max\n", "memory.current": f"{3 * GiB}\n"}, Memory(8 * GiB, 6 * GiB)),
    "file pages that can be dropped are available": ("0::/", {
        "memory.max": f"{4 * GiB}\n", "memory.current": f"{3 * GiB}\n",
        "memory.stat": f"anon 5\nfile 7\ninactive_file {GiB}\n"}, Memory(4 * GiB, 2 * GiB)),
    "version 1, with the pages of groups below": ("4:memory:/d/a", {
        "memory/memory.limit_in_bytes": f"{2 * GiB}\n", "memory/memory.usage_in_bytes": f"{2 * GiB}\n",
        "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GiB}\n"}, Memory(2 * GiB, GiB)),
    "version 1, no limit": ("4:memory:/", {
        "memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": f"{7 * GiB}\n"},
        Memory(8 * GiB, 6 * GiB)),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_memory(tmp_path, case):
    """A container's limit takes the place of the machine's memory where it is less."""
    text, files, expected = LIMITS[case]
    assert machine.memory(grouped(tmp_path, text, files)) == expected


def test_memory_where_nothing_tells(monkeypatch, tmp_path):
    """Windows has neither /proc nor sysconf: unknown, not a crash."""
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert machine.memory(tmp_path) == Memory(None, None)


def test_memory_without_proc(monkeypatch, tmp_path):
    """macOS tells the total by sysconf; what is available is unknown, and the total is the best guess."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__, raising=False)
    assert machine.memory(tmp_path) == Memory(4_096_000, None)
    assert machine.memory(tmp_path).best_guess == 4_096_000
    assert Memory(10, 0).best_guess == 0


def test_cpu(tmp_path):
    """Name and bfloat16 instructions, whole words only."""
    text = "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx512_bf16 amx_bf16x avx512f amx_tile\n"
    told = machine.cpu(system(tmp_path, {"proc/cpuinfo": text}))
    assert told == machine.Cpu("Some CPU @ 2 GHz", ("amx_tile", "avx512_bf16"))


def test_cpu_of_another_kind(tmp_path):
    """ARM has features instead of flags and no model name; without /proc there is still a name."""
    told = machine.cpu(system(tmp_path, {"proc/cpuinfo": "Features\t: fp asimd bf16\n"}))
    assert told.bf16 == ("bf16",) and told.name
    assert machine.cpu(tmp_path / "nothing").bf16 == ()


@pytest.mark.skipif(sys.platform != "linux", reason="instructions are known on Linux only")
def test_cpu_agrees_with_the_precision_that_runs_choose():
    """What is called native here is what torch computes natively, unless its products are told to do without."""
    import torch

    from minigpt.core.runtime import native_dtype

    native = bool({"amx_tile", "avx512_bf16"} & set(machine.cpu().bf16)) and "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert (native_dtype(torch.device("cpu")) == torch.bfloat16) == native


def test_disk(tmp_path):
    """A directory yet to be made has the room of its nearest ancestor, and nothing is left behind."""
    told = machine.disk(tmp_path / "a" / "b")
    assert told.writable and told.free is not None and told.free > 0
    assert told.path == str(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_cannot_be_written(tmp_path):
    """A file in the way is found, whoever runs the test; what is below a directory is summed."""
    system(tmp_path, {"file": "12345", "b/c": "678"})
    assert not machine.disk(tmp_path / "file" / "runs").writable
    assert machine.tree_size(tmp_path) == 8 and machine.tree_size(tmp_path / "none") == 0


def test_shared_memory(tmp_path):
    """Unknown where there is none."""
    assert machine.shared_memory(tmp_path) is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert (machine.shared_memory(tmp_path) or 0) > 0


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Put a program of this shell text in the place of nvidia-smi."""

    def write(text):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return write


posix = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")


@posix
def test_nvidia_smi(smi, tmp_path):
    """Names and sizes in bytes, from the four columns asked for; N/A is unknown."""
    smi(f"echo \"$@\" > {tmp_path}/asked; echo 'NVIDIA H100, 81559, 80000, 550.54'; echo 'GB10, [N/A], [N/A], 580.1'")
    both = [Gpu("NVIDIA H100", 81559 << 20, 80000 << 20, "550.54"), Gpu("GB10", None, None, "580.1")]
    assert machine.nvidia_gpus() == (both, None)
    asked = (tmp_path / "asked").read_text().split()
    assert asked == ["--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]


@posix
def test_nvidia_smi_complains(smi, monkeypatch, tmp_path):
    """Its first line, or its code when it says nothing; that there is none is fine."""
    smi("echo 'NVIDIA-SMI has failed'; echo more; exit 9")
    assert machine.nvidia_gpus() == ([], "NVIDIA-SMI has failed")
    smi("exit 9")
    assert machine.nvidia_gpus() == ([], "nvidia-smi ends with 9")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine.nvidia_gpus() == ([], None)


@posix
def test_nvidia_smi_hangs(smi):
    """A driver that hangs does not hang the command."""
    smi("exec sleep 30")
    began = time.monotonic()
    assert machine.nvidia_gpus(0.3) == ([], "nvidia-smi gives no answer in 0.3 s")
    assert time.monotonic() - began < 10


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A distribution `fake-lm` with these lines of metadata."""

    def write(*lines):
        folder = tmp_path / "fake_lm-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", "Name: fake-lm", "Version: 1.0", *lines]))
        monkeypatch.syspath_prepend(str(tmp_path))

    return write


def test_requirements(fake):
    """Python and packages under "", optional ones under their extra; markers of other systems left out."""
    fake(
        "Requires-Python: >=3.10",
        "Requires-Dist: pytest>=1",
        "Requires-Dist: numpy>=999,<1000",
        "Requires-Dist: no-such-package-here<2; python_version >= '3'",
        "Requires-Dist: also-not-here; sys_platform == 'nowhere'",
        "Provides-Extra: more",
        "Requires-Dist: pyyaml>=6; extra == 'more'",
        "Provides-Extra: hollow",
    )
    told = machine.requirements("fake-lm")
    assert told is not None
    python, tests, numbers, absent = told.pop("")
    assert (python.name, python.wanted, python.fits) == ("python", ">=3.10", True)
    assert (tests.name, tests.installed, tests.fits) == ("pytest", version("pytest"), True)
    assert (numbers.installed, numbers.fits) == (version("numpy"), False)
    assert (absent.name, absent.installed, absent.fits) == ("no-such-package-here", None, False)
    assert list(told) == ["more"]
    assert [p.name for p in told["more"]] == ["pyyaml"]


def test_requirements_of_ours():
    """The package under test names torch with a range that its own environment meets."""
    told = machine.requirements("minigpt-lm")
    assert told is not None
    torch = next(p for p in told[""] if p.name == "torch")
    assert ">=" in torch.wanted and "<" in torch.wanted and torch.fits
    assert "dev" in told


def test_requirements_that_cannot_be_read(monkeypatch):
    """Neither a distribution that is not installed nor a missing reader of ranges ends in a stack trace."""
    assert machine.requirements("no-such-package-here") is None
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert machine.requirements("minigpt-lm") is None


@pytest.mark.parametrize("installed", ["2.10.0", "2.13.1+cu130", "2.12.0a0+git1234"])
def test_version_that_fits(installed):
    """Local builds count as their version, and versions before a release are not left out."""
    assert machine.version_fits(installed, ">=2.10,<2.14")


@pytest.mark.parametrize("installed", ["2.9.9", "2.10.0rc1", "2.14.0", "2.14.0.dev20261101", "unknown"])
def test_version_that_does_not(installed):
    """A version before a release is older than it; what is no version fits nowhere."""
    assert not machine.version_fits(installed, ">=2.10,<2.14")


@pytest.fixture
def server(monkeypatch):
    """A local web server that answers the number in the path; `/0` after a second."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            code = int(self.path.strip("/") or 200)
            asked.append((self.command, self.headers.get("Authorization")))
            if code == 0:
                time.sleep(1)
            self.send_response(code or 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    asked: list = []
    monkeypatch.setenv("no_proxy", "*")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{running.server_port}", asked
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("code", [200, 401, 404, 405])
def test_reach(server, code):
    """A server that refuses the page is still there."""
    told = machine.reach(f"http://{server[0]}/{code}", 3)
    assert told.fault is None and told.seconds is not None and told.seconds < 3


@pytest.mark.parametrize("code", [407, 502])
def test_reach_a_failing_server(server, code):
    """A gateway's or proxy's own error is no hub."""
    told = machine.reach(f"http://{server[0]}/{code}", 3)
    assert told.seconds is None and told.fault is not None and told.fault.startswith(f"answers {code}")


def test_reach_sends_and_shows_no_password(server):
    """Credentials in an address stay where they are."""
    told = machine.reach(f"http://me:secret@{server[0]}/200?sign=secret", 3)
    assert told.url == f"http://{server[0]}/200" and told.fault is None
    assert server[1] == [("HEAD", None)]


def test_reach_a_silent_server(server):
    """The time limit holds."""
    assert machine.reach(f"http://{server[0]}/0", 0.2).fault == "gives no answer in 0.2 s"


def test_reach_nobody(monkeypatch):
    """A closed port is told in words, without error numbers."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        told = machine.reach(f"http://127.0.0.1:{taken.getsockname()[1]}", 3)
    assert told.fault is not None and told.fault.startswith("cannot be reached: ") and "Errno" not in told.fault


UNUSABLE = (
    "file:///etc/passwd",
    "huggingface.co",
    "",
    "http://",
    "http://me:se cret",
    "http://host:port",
    "http://[::",
)


@pytest.mark.parametrize("url", UNUSABLE)
def test_reach_what_is_no_address(url):
    """Nothing but http is opened, and nothing raises. An unusable address is not repeated in the fault."""
    told = machine.reach(url, 0.5)
    assert told.seconds is None and told.fault
    assert "cret" not in told.fault


def test_ask_does_not_wait_for_a_name_server(monkeypatch):
    """Looking up a name knows no time limit; the command does."""
    release = threading.Event()
    monkeypatch.setattr(machine, "reach", lambda url, timeout: release.wait(20))
    began = time.monotonic()
    told = machine.ask("https://me:secret@hub.example", 0.2)()
    release.set()
    assert told == Answer("https://hub.example", None, "gives no answer in 0.2 s")
    assert time.monotonic() - began < 5


def test_later_runs_beside():
    """Work begins at once and its result can be had later."""
    began = threading.Event()
    wait = machine.later(lambda: began.set() or 7)
    assert began.wait(5)
    assert wait(5) == 7


SHOWN = (
    ("HF_TOKEN", "abc", "(set)"),
    ("HF_TOKEN", "", ""),
    ("MINIGPT_SERVE_API_KEY", "abc", "(set)"),
    ("HF_HUB_PASSWORD", "abc", "(set)"),
    ("HF_SOMETHING", "hf_abcdefghijklmnopqrstuvwxyz", "(set)"),
    ("HF_HEADER", "Bearer abc", "(set)"),
    ("HF_HOME", "/data/hf", "/data/hf"),
    ("MINIGPT_RUNS", "/home/a@b/runs", "/home/a@b/runs"),
    ("MINIGPT_GENERATE_MAX_TOKENS", "64", "64"),
    ("MINIGPT_PRETRAIN_TOKENIZER", "runs/tok", "runs/tok"),
    ("HF_ENDPOINT", "https://me:pa/ss@mirror.example/x?sign=abc#d", "https://mirror.example/x"),
    ("https_proxy", "me:pa@ss@proxy.example:80", "proxy.example:80"),
    ("HTTPS_PROXY", "http://me:p://w@proxy.example:80", "http://proxy.example:80"),
)


@pytest.mark.parametrize(("name", "value", "expected"), SHOWN)
def test_what_is_shown_of_a_variable(name, value, expected):
    """Tokens, keys and passwords never; the rest as it is."""
    assert machine.environment({name: value}) == {name: expected}


def test_other_variables_are_left_out():
    """Only what changes minigpt's work, in order."""
    environ = {"PATH": "x", "NO_COLOR": "1", "SECRET": "x", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2"}
    assert list(machine.environment(environ)) == ["CUDA_VISIBLE_DEVICES", "NO_COLOR", "OMP_NUM_THREADS"]


def test_amounts_for_people():
    """Powers of ten, as in a run's own figures."""
    told = [machine.amount(size) for size in (None, 0, 67_108_864, 10**9, 25_276_502_016)]
    assert told == ["unknown", "0 MB", "67 MB", "1.0 GB", "25.3 GB"]
