"""minigpt doctor: what it finds, what it advises, and that it survives what it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from minigpt.core import machine
from minigpt.core.errors import MissingError
from minigpt.core.machine import Answer, Cores, Cpu, Gpu, Memory, Package
from minigpt.core.models.presets import PRESETS
from minigpt.core.report import Context, Report
from minigpt.stages import doctor, suggestion, torch_facts
from minigpt.stages.doctor import Check, Torch
from minigpt.stages.suggestion import Fit, Plan, Room
from tests.conftest import run_cli

GB = 10**9
CPU_ONLY = Torch(version="2.13.0+cpu", dtype="bfloat16", threads=2, flops=1e12)
H100 = {"name": "NVIDIA H100", "memory": 80 * GB, "free": 79 * GB, "capability": "9.0", "bf16": True}
ON_GPU = Torch(version="2.13.0", cuda="13.0", device="cuda", dtype="bfloat16", gpus=[H100], flops=600e12)
SEEN = [Gpu("NVIDIA H100", 80 * GB, 79 * GB, "550.54")]


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch, tmp_path):
    """No server is asked by accident, and no variable of the developer's is in the way."""
    for name in machine.environment(os.environ):
        if name != "MINIGPT_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MINIGPT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(machine, "reach", lambda url, timeout: Answer(machine.public_url(url), None, "was asked"))


@pytest.fixture
def working_torch(monkeypatch):
    """torch as it would be on a machine of known speed, so that the command takes no time."""
    monkeypatch.setattr(doctor, "probe", lambda: CPU_ONLY)
    monkeypatch.setattr(suggestion, "measuring", lambda: unmeasured)


def unmeasured(fit: Fit, reached: float) -> float | None:
    """A machine that there is no time to measure."""
    return None


def rows(checks):
    """{label: (status, found, fix)}; every row keeps the promise that what is not ok says what to do."""
    checks = list(checks)
    for c in checks:
        assert c.status in ("ok", "note", "warn", "fail") and c.label and c.found
        assert bool(c.fix) == (c.status != "ok"), c
    return {c.label: (c.status, c.found, c.fix) for c in checks}


def test_json(monkeypatch):
    """One object: the checks, the machine, sizes and a suggestion, with torch's own choice of device and precision.

    At least the smallest size is measured, however little time there is.
    """
    import torch

    from minigpt.core.runtime import Runtime

    monkeypatch.setattr(suggestion, "STEP", 0.05)
    monkeypatch.setattr(suggestion, "ATTEMPT", 0.1)
    code, out, _ = run_cli("doctor", "--offline", "--json")
    assert code == 0
    told = json.loads(out)
    assert set(told) == {"status", "checks", "machine", "sizes", "suggestion", "seconds"} and told["status"] == "ok"
    assert all(set(check) == {"status", "label", "found", "fix"} for check in told["checks"])
    found = rows([Check(**check) for check in told["checks"]])
    assert {"minigpt", "torch", "packages", "gpu", "cpu", "memory", "runs", "cache", "hub"} <= set(found)
    runtime = Runtime.open()
    assert told["machine"]["torch"]["version"] == torch.__version__
    assert told["machine"]["torch"]["dtype"] == str(runtime.dtype).removeprefix("torch.")
    assert told["machine"]["torch"]["device"] == runtime.device.type
    assert told["machine"]["torch"]["flops"] > 0
    assert told["suggestion"] in told["sizes"] and told["suggestion"]["size"] in PRESETS
    assert told["sizes"][0]["size"] == "1m" and told["sizes"][0]["speed"] == "measured"
    assert told["suggestion"]["command"].startswith(f"minigpt pretrain -d FILE --size {told['suggestion']['size']}")


def test_text(working_torch):
    """Rows of aligned columns on stdout, no escape codes; stderr says what there is to wait for."""
    code, out, err = run_cli("doctor", "--offline")
    assert code == 0 and "\x1b" not in out
    assert all(line.startswith("wait ") for line in err.splitlines()) and "PyTorch is being started" in err
    lines = out.splitlines()
    at = lines[0].index("0.")
    table = lines[: lines.index("")]
    assert all(line[:at].split() and line[at - 1] == " " and line[at] != " " for line in table if line[0] != " ")
    assert any(line.startswith("note  hub ") and line.endswith("not asked because of --offline") for line in table)
    assert "try   minigpt pretrain -d FILE --size" in out
    assert "1m" in out and "(estimated from a matrix product, easily off by two)" in out


def test_rows_are_shown_as_they_are_known(monkeypatch):
    """What needs no torch stands there before torch is imported, and why nothing else comes is said."""

    class Ears(Report):
        def out(self, text, *, end="\n"):
            heard.append(text)

        def note(self, label, text):
            heard.append(f"{label} {text}")

    def probe():
        heard.append("IMPORT")
        return Torch(fault="x")

    heard: list[str] = []
    monkeypatch.setattr(doctor, "probe", probe)
    with pytest.raises(MissingError):
        doctor.run(doctor.Config(offline=True), Context(Ears()))
    before = heard[: heard.index("IMPORT")]
    assert before[-1].startswith("wait ") and any(line.startswith("ok    memory") for line in before)
    assert any(line.startswith("fail  torch") for line in heard[len(before) :])


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "MINIGPT_OFFLINE", "MINIGPT_DOCTOR_OFFLINE"])
def test_offline_by_a_variable(monkeypatch, working_torch, variable):
    """No server is asked when the environment says so; 0 means that they are."""
    monkeypatch.setenv(variable, "1")
    assert json.loads(run_cli("doctor", "--json")[1])["machine"]["servers"] == []
    monkeypatch.setenv(variable, "0")
    servers = json.loads(run_cli("doctor", "--json")[1])["machine"]["servers"]
    assert [s["url"] for s in servers] == ["https://huggingface.co", "https://www.modelscope.cn"]


def test_an_unreachable_hub_fails_nothing(working_torch):
    """Exit code 0, with the way to the mirror."""
    code, out, _ = run_cli("doctor")
    assert code == 0 and "https://huggingface.co was asked" in out
    assert machine.setting("HF_ENDPOINT", "https://hf-mirror.com") in out


def test_servers_are_asked_together(monkeypatch, working_torch):
    """Both at once and for no longer than the time limit, though neither answers."""
    monkeypatch.setattr(machine, "reach", lambda url, timeout: time.sleep(20))
    began = time.monotonic()
    code, out, _ = run_cli("doctor", "--timeout", "0.5")
    assert code == 0 and out.count("gives no answer in 0.5 s") == 2
    assert time.monotonic() - began < 5


def test_no_secret_is_shown(monkeypatch, working_torch):
    """Tokens and passwords appear neither in the text nor in the JSON."""
    monkeypatch.setenv("HF_TOKEN", "hf_VERYSECRET")
    monkeypatch.setenv("MINIGPT_SERVE_API_KEY", "VERYSECRET")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:VERYSECRET@mirror.example")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:VERYSECRET@proxy.example:80")
    for flags in ([], ["--json"]):
        code, out, err = run_cli("doctor", *flags)
        assert code == 0 and "VERYSECRET" not in out + err
        assert "HF_TOKEN=(set)" in out and "https://mirror.example" in out


BLOCKED = "import sys; sys.modules['torch'] = None; from minigpt.cli.app import main; sys.exit(main(sys.argv[1:]))"


def without_torch(*flags):
    argv = [sys.executable, "-c", BLOCKED, "doctor", "--offline", *flags]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_without_torch():
    """The whole page and exit code 4: nothing that doctor needs to tell it imports torch."""
    done = without_torch()
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "fail  torch " in done.stdout and "ok    memory " in done.stdout and "no suggestion" in done.stdout
    assert "https://pytorch.org/get-started/locally/" in done.stdout
    assert "error: minigpt cannot run" in done.stderr and "torch" in done.stderr


def test_without_torch_in_json():
    """One object on stdout, an error with all that was found."""
    done = without_torch("--json")
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert (told["status"], told["code"], told["kind"]) == ("error", 4, "missing")
    assert {"torch": "fail", "memory": "ok"}.items() <= {c["label"]: c["status"] for c in told["checks"]}.items()
    assert told["suggestion"] is None and told["machine"]["torch"]["fault"].startswith("ModuleNotFoundError")


def test_a_package_out_of_range(monkeypatch, working_torch):
    """A torch that works and is too old still ends with 4, and says which one is wanted."""
    wanted = {"": [Package("torch", "2.9.1", ">=2.10,<2.14", False)]}
    monkeypatch.setattr(machine, "requirements", lambda distribution: wanted)
    code, out, err = run_cli("doctor", "--offline")
    assert code == 4 and "2.9.1, but minigpt needs >=2.10,<2.14" in out
    assert "pip install 'torch>=2.10,<2.14'" in err


def test_a_failure_comes_with_all_that_was_found():
    """Whoever uses the stage as a library gets the error with the data."""
    with pytest.raises(MissingError) as caught:
        doctor.finish([Check("fail", "x", "broken", "mend it")], {"checks": 1})
    assert caught.value.data == {"checks": 1} and caught.value.fix == "mend it"


def test_software():
    """Every faulty package has a row of its own and fails; the others share one."""
    python, torch = Package("python", "3.9.1", ">=3.10", False), Package("torch", "2.13.0", ">=2.10", True)
    numpy, typer = Package("numpy", "2.4", ">=1.26", True), Package("typer", None, ">=0.26,<1", False)
    packages = {"": [python, torch, numpy, typer]}
    told = rows(doctor.software_checks(packages))
    assert told["python"][0] == "fail" and "pip" not in told["python"][2]
    assert told["typer"] == ("fail", "not installed; minigpt needs >=0.26,<1", "pip install 'typer>=0.26,<1'")
    assert "torch" not in told and told["packages"] == ("ok", "numpy 2.4", "")


def test_software_of_an_unknown_range():
    """Without metadata the ranges are unknown, which is said and is no failure."""
    assert rows(doctor.software_checks(None))["packages"][0] == "warn"
    assert doctor.torch_check(CPU_ONLY, doctor.package_of(None, "torch")).status == "ok"


def test_torch_that_does_not_start():
    """Its own words, and how to install it."""
    status, found, fix = rows([doctor.torch_check(Torch(fault="OSError: libcudart.so.13"), None)])["torch"]
    assert status == "fail" and "libcudart.so.13" in found and doctor.GET_TORCH in fix


def test_torch_builds():
    """What torch was built for."""
    others = Torch(version="2.13", rocm="7.1", device="cuda"), Torch(version="2.13", device="mps")
    for torch, build in zip((CPU_ONLY, ON_GPU, *others), ("CPU", "CUDA 13.0", "ROCm 7.1", "MPS"), strict=True):
        assert f"{build} build" in doctor.torch_check(torch, None).found


GPU_CASES = {
    "used": (ON_GPU, SEEN, None, None, "ok", "80.0 GB, 79.0 GB free, capability 9.0, bfloat16 native, driver 550.54"),
    "none": (CPU_ONLY, [], None, None, "ok", "none"),
    "apple": (Torch(device="mps"), [], None, None, "ok", "Apple GPU"),
    "cpu build": (CPU_ONLY, SEEN, None, None, "warn", "torch has no CUDA in it"),
    "hidden": (Torch(cuda="13.0"), SEEN, None, "-1", "note", "hidden by CUDA_VISIBLE_DEVICES"),
    "old driver": (Torch(cuda="13.0"), SEEN, None, None, "warn", "driver 550.54: torch for CUDA 13.0 cannot use it"),
    "torch says why": (Torch(cuda="13.0", warning="driver too old"), SEEN, None, "0", "warn", "550.54: driver too old"),
    "no torch": (Torch(fault="x"), SEEN, None, None, "note", "while torch does not work"),
    "broken driver": (CPU_ONLY, [], "NVIDIA-SMI has failed", None, "warn", "nvidia-smi: NVIDIA-SMI has failed"),
}


@pytest.mark.parametrize("case", GPU_CASES)
def test_gpu(case):
    """Every way in which a GPU is used or is not."""
    torch, seen, complaint, visible, status, found = GPU_CASES[case]
    told = rows(doctor.gpu_checks(torch, seen, complaint, visible))["gpu"]
    assert told[0] == status and found in told[1]


def test_gpu_that_runs_but_not_with_this_torch():
    """The device is listed, and torch's complaint about it as well."""
    torch = Torch(cuda="13.0", device="cuda", gpus=[{**H100, "bf16": False}], warning="sm_50 is not compatible")
    listed, complained = doctor.gpu_checks(torch, SEEN, None, None)
    assert listed.status == "ok" and "bfloat16 not native" in listed.found
    assert (complained.status, complained.found) == ("warn", "sm_50 is not compatible")


def test_numerics():
    """What is emulated and what holds only to rounding is named; a GPU promises no bits, and has no such row."""
    torch = Torch(native={"float32": True, "bfloat16": False}, exact={"float32": True, "fp16": False})
    [precision, text] = doctor.numerics_checks(torch)
    assert precision.found == "native: float32; emulated, many times slower: bfloat16"
    assert text.found == "at any load, measured to the bit: float32; to rounding: fp16; with --compile to rounding"
    assert [check.label for check in doctor.numerics_checks(Torch(native={"float32": True}))] == ["precision"]


def test_numerics_are_measured():
    """Of this machine: float32 is native, and what is said of bits is a yes or a no for each kind of weights."""
    found = torch_facts.batch_invariance()
    assert {"float32"} <= set(found) <= {"float32", "bfloat16", "int8", "fp16"}


def test_cpu():
    """As many threads as cores is fine; more crowd them, as in a container with a quota."""
    cpu = Cpu("Some CPU", ("avx512_bf16",))
    told = rows(doctor.cpu_checks(cpu, Cores(64, 64, None), CPU_ONLY))["cpu"]
    assert told[0] == "ok" and "64 of 64 cores; bfloat16 by avx512_bf16" in told[1]
    status, found, fix = rows(doctor.cpu_checks(cpu, Cores(64, 64, 1.5), CPU_ONLY))["cpu"]
    assert status == "warn" and "1 of 64 cores, 1.5 by quota" in found
    assert fix == machine.setting("OMP_NUM_THREADS", "1")


def test_cpu_with_idle_cores(monkeypatch):
    """Fewer threads than cores are only worth a word when a variable is behind it: torch leaves hyperthreads alone."""
    told = rows(doctor.cpu_checks(Cpu("x", ()), Cores(8, 8, None), CPU_ONLY))["cpu"]
    assert told[:2] == ("ok", "x; 8 of 8 cores")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    told = rows(doctor.cpu_checks(Cpu("x", ()), Cores(8, 8, None), CPU_ONLY))["cpu"]
    assert told[0] == "note" and "leaves 6 idle" in told[1]


@pytest.mark.parametrize(
    ("memory", "shm", "expected"),
    [
        (Memory(8 * GB, 6 * GB), 1 << 30, {"memory": "ok", "/dev/shm": "ok"}),
        (Memory(8 * GB, GB // 2), 64 << 20, {"memory": "warn", "/dev/shm": "warn"}),
        (Memory(None, None), None, {"memory": "ok"}),
    ],
)
def test_memory(memory, shm, expected):
    """Little memory and Docker's default of shared memory are worth a warning; the unknown is none."""
    told = rows(doctor.memory_checks(memory, shm))
    assert {label: row[0] for label, row in told.items()} == expected


def test_disks(tmp_path, monkeypatch):
    """A place that cannot be written and a full disk both say how to use another."""
    (tmp_path / "file").write_text("12345")
    told = rows(doctor.disk_checks(tmp_path / "runs", tmp_path / "file" / "cache"))
    assert told["runs"][0] == "ok" and told["cache"][0] == "warn" and "cannot be written" in told["cache"][1]
    assert machine.setting("MINIGPT_CACHE", "DIR") in told["cache"][2]
    monkeypatch.setattr(machine, "disk", lambda path: machine.Disk(str(path), GB, True))
    (tmp_path / "store").write_bytes(bytes(3_000_000))
    told = rows(doctor.disk_checks(tmp_path, tmp_path))
    assert told["runs"][0] == told["cache"][0] == "warn" and "1.0 GB free" in told["runs"][1]
    assert "3 MB used by it" in told["cache"][1]


def test_extras():
    """One row for all of them; what developers need is no user's business."""
    here, absent = Package("here", "1.0", ">=1", True), Package("absent", None, "", False)
    extras = {"": [absent], "dev": [absent], "parity": [absent], "one": [here], "both": [here, absent], "two": [absent]}
    assert rows(doctor.extra_checks(extras)) == {
        "extras": ("ok", "one; to be had with pip install 'minigpt-lm[NAME]': both, two", "")
    }
    assert rows(doctor.extra_checks({"one": [here]})) == {"extras": ("ok", "one", "")}
    assert rows(doctor.extra_checks({"dev": [here]})) == {}


def test_an_extra_of_another_version():
    """A package that is there and too old has a row of its own: it will be used and may fail."""
    old = Package("old", "0.9", ">=1", False)
    told = rows(doctor.extra_checks({"one": [old]}))
    assert told == {"extra": ("note", "one: old 0.9, but minigpt needs >=1", "pip install 'minigpt-lm[one]'")}


def answered(hub, modelscope):
    return [
        Answer("https://hub.example", 0.1 if hub else None, None if hub else "gives no answer in 3 s"),
        Answer("https://ms.example", 0.2 if modelscope else None, None if modelscope else "gives no answer in 3 s"),
    ]


def test_hub():
    """Answers with their times; a silent hub names a mirror, or the mirror that was chosen, and what else answers."""
    told = rows(doctor.hub_checks(answered(True, True), None, False))
    assert told["hub"] == ("ok", "https://hub.example answers in 0.10 s", "") and told["modelscope"][0] == "ok"
    status, _, fix = rows(doctor.hub_checks(answered(False, True), None, False))["hub"]
    assert status == "warn" and doctor.MIRROR in fix and "https://ms.example answers" in fix
    fix = rows(doctor.hub_checks(answered(False, False), None, True))["hub"][2]
    assert fix == "unset HF_ENDPOINT, or name another mirror"
    assert rows(doctor.hub_checks(answered(True, False), None, False))["modelscope"][0] == "note"


def test_torch_that_cannot_compute(monkeypatch):
    """A full or unsupported device is a finding, not a stack trace."""
    import torch

    from minigpt.core.runtime import Runtime

    def refuse(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch, "randn", refuse)
    assert torch_facts.matmul_flops(Runtime.open("cpu")) == (0.0, "cpu cannot compute: no kernel image is available")


def test_broken_torch(monkeypatch):
    """Whatever the import raises is told in one line."""
    import torch

    def refuse(*args, **kwargs):
        raise OSError("libgomp.so.1:\n cannot open shared object file")

    monkeypatch.setattr(torch, "get_num_threads", refuse)
    assert torch_facts.probe() == Torch(fault="OSError: libgomp.so.1: cannot open shared object file")


# ---------------------------------------------------------------------------------------------- suggestion


def room(flops: float = 1e12, free: int | None = None, device: str = "cpu") -> Room:
    return Room(device, "bfloat16", flops, free)


def suggested(flops: float, free: int | None = None) -> Plan | None:
    return suggestion.best(list(suggestion.plans(room(flops, free), unmeasured)))


def at(reached: float):
    """A machine whose training steps reach so many operations a second, whatever the size; `asked` are the sizes."""

    def measure(fit: Fit, expected: float) -> float | None:
        measure.asked.append(fit.name)
        return reached / fit.operations

    measure.asked = []
    return measure


def test_a_suggestion_keeps_its_rule():
    """The largest size that sees 20 tokens a parameter within three hours and fits into 80 % of what is free."""
    fits = [suggestion.fitting(name, room()) for name in PRESETS]
    for flops in (10 ** (tenth / 10) for tenth in range(95, 155)):
        plan = suggested(flops, 100 * GB)
        hours = {fit.name: 20 * fit.count * fit.operations / (suggestion.SHARE * flops) / 3600 for fit in fits}
        quick = [fit for fit in fits if hours[fit.name] <= 3]
        assert plan is not None
        wanted = max(quick, key=lambda fit: fit.count) if quick else fits[0]
        assert plan.size == wanted.name and plan.seconds == pytest.approx(hours[wanted.name] * 3600, abs=1)
        assert plan.tokens == 20 * plan.parameters == 20 * wanted.count
        assert plan.memory_bytes <= 80 * GB and plan.speed == "estimated from a matrix product"


def test_what_is_measured_beats_what_is_estimated():
    """A product ten times too fast or too slow changes nothing: speeds are those of the steps."""
    measured = [list(suggestion.plans(room(flops), at(2e11))) for flops in (1e11, 1e12, 1e13)]
    assert measured[0] == measured[1] == measured[2]
    assert all(plan.speed == "measured" for plan in measured[0][:-1])
    assert [plan.seconds > suggestion.PATIENCE for plan in measured[0]] == [False] * (len(measured[0]) - 1) + [True]


def test_a_size_that_takes_far_too_long_is_not_measured():
    """A smaller one tells its speed, by the operations that both take; nothing beyond it is looked at."""
    measure = at(4e10)
    found = list(suggestion.plans(room(), measure))
    assert [plan.size for plan in found] == ["1m", "3m"] and measure.asked == ["1m"]
    assert found[1].speed == "estimated from 1m"
    fit = suggestion.fitting("3m", room())
    assert fit is not None and found[1].tokens_per_second == round(4e10 / fit.operations)


def test_measuring_ends_with_its_time():
    """A machine whose time is over is not measured any more."""
    fit = suggestion.fitting("1m", room())
    assert fit is not None and suggestion.measuring(seconds=0.0)(fit, 1e12) is None


def test_a_faster_machine_gets_a_larger_model():
    """From a laptop to a data centre."""
    sizes = [plan.parameters for flops in (1e10, 1e12, 1e13, 1e15) if (plan := suggested(flops))]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_little_memory_means_fewer_rows_then_smaller_models():
    """Rows are halved first, which the command then says; a model that fits with no row is left out."""
    roomy = suggestion.fitting("3m", room(free=100 * GB))
    assert roomy is not None and roomy.rows == roomy.usual == 8
    limit = int(roomy.memory_bytes / suggestion.MEMORY_SHARE) - 10**6
    tight = suggestion.fitting("3m", room(free=limit))
    assert tight is not None and tight.rows == 4 and tight.memory_bytes <= roomy.memory_bytes - 10**6
    commands = {plan.size: plan.command for plan in suggestion.plans(room(1e13, free=limit), unmeasured)}
    assert commands["3m"].endswith("--size 3m --batch-size 4")
    assert suggestion.fitting("3m", room(free=10**8)) is None
    assert suggested(1e12, 10**8) is None


def test_a_gpu_computes_more_rows():
    """The rows of a suggestion are those that a run chooses on that device."""

    def rows_of(name, device):
        fit = suggestion.fitting(name, room(device=device))
        return fit and fit.rows

    assert rows_of("llama-100m", "cuda") == 64
    assert rows_of("llama-100m", "cpu") == 8
    assert rows_of("1m", "cuda") == 16  # a step of so small a model has no more rows


def test_no_suggestion_without_torch():
    """Nothing is guessed about a machine that was not measured."""
    assert doctor.sizes_of(Torch(fault="x"), 100 * GB, doctor.Page(Report())) == []
    assert "no suggestion" in doctor.advice([], None)


def test_a_device_that_cannot_train(monkeypatch):
    """What torch says of it is a row, and the end of the page stands there all the same."""

    def refuse(fit, reached):
        raise RuntimeError("no kernel for this type")

    monkeypatch.setattr(suggestion, "measuring", lambda: refuse)
    page = doctor.Page(Report())
    assert doctor.sizes_of(CPU_ONLY, None, page) == []
    status, found, _ = rows(page.checks)["training"]
    assert status == "warn" and "no kernel for this type" in found


def test_a_step_is_a_training_step():
    """What is timed takes the forward pass, its gradient and the update, of full rows of two documents each."""
    from minigpt.core.train.step_speed import made_up

    batch = made_up(vocab_size=50, rows=3, max_len=8)
    assert batch.input_ids.shape == batch.labels.shape == (3, 8) and batch.units == 24
    assert (batch.input_ids[:, 1:] == batch.labels[:, :-1]).all()
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3] * 2
    assert batch.segments.unique().tolist() == list(range(6))
