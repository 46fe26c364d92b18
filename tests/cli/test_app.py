"""cli.app: every way out of the program is a documented exit code and a sentence."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

import minigpt
from minigpt.cli.app import install_hint
from minigpt.core import errors
from minigpt.core.errors import MinigptError
from minigpt.core.report import Result
from tests.conftest import run_cli

FAULTS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MinigptError)]


def raising(error):
    def run(cfg, context):
        raise error

    return run


def test_a_result_is_one_line_on_stdout(demo):
    assert run_cli("demo") == (0, "done\n", "")
    code, out, err = run_cli("demo", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "") and told["status"] == "ok" and told["answer"] == 42 and told["seconds"] >= 0


def test_a_result_without_text_prints_nothing_more(demo):
    def run(cfg, context):
        context.report.out("row")
        return Result(data={"rows": 1})

    demo.run = run
    assert run_cli("demo") == (0, "row\n", "")
    assert json.loads(run_cli("demo", "--json")[1])["rows"] == 1


@pytest.mark.parametrize("cls", FAULTS)
def test_every_fault_ends_with_its_code(demo, cls):
    """message, found and fix reach the user, as text and as an object, with the class's exit code."""
    demo.run = raising(cls("a.jsonl:3 is odd", found="{}", fix="mend it"))
    code, out, err = run_cli("demo")
    assert (code, out) == (cls.code, "") and "a.jsonl:3 is odd\n  found  {}\n  fix    mend it\n" in err
    code, out, err = run_cli("demo", "--json")
    assert (code, err) == (cls.code, "")
    assert json.loads(out) == {
        "status": "error", "code": cls.code, "kind": cls.kind, "message": "a.jsonl:3 is odd", "found": "{}",
        "hint": "mend it",
    }  # fmt: skip


def test_json_asked_for_by_the_environment_is_obeyed(demo, monkeypatch):
    monkeypatch.setenv("MINIGPT_DEMO_JSON", "1")
    demo.run = raising(errors.DataError("odd"))
    assert json.loads(run_cli("demo")[1])["code"] == 3


def test_a_bug_shows_its_trace_and_where_to_report(demo):
    demo.run = raising(ZeroDivisionError("division by zero"))
    code, out, err = run_cli("demo")
    assert (code, out) == (1, "") and "Traceback" in err and "test_app.py" in err and "CONTRIBUTING.md" in err
    code, out, err = run_cli("demo", "--json")
    assert (code, json.loads(out)["kind"]) == (1, "bug") and "Traceback" in err


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which is found by name so that torch need not be imported."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "--batch-size"),
        (OutOfMemoryError("CUDA out of memory."), 5, "--batch-size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            5,
            "--batch-size",
        ),
        (RuntimeError("something else"), 1, "Traceback"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 4, "[gguf]'"),
        (ModuleNotFoundError("No module named 'plotly'", name="plotly"), 4, "pip install plotly"),
        (ModuleNotFoundError("No module named 'minigpt.core.x'", name="minigpt.core.x"), 1, "Traceback"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 3, "could not write runs/a"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 3, "may write to"),
        (EOFError("end"), 1, "Traceback"),
        (OSError(errno.EIO, "Input/output error"), 1, "Traceback"),
    ],
)
def test_faults_of_the_machine_are_known_by_name(demo, error, code, words):
    """Interrupts, memory, missing packages and full disks are no bugs; what is not known is one."""
    demo.run = raising(error)
    got, out, err = run_cli("demo")
    assert (got, out) == (code, "") and words in err
    assert ("Traceback" in err) == (code == 1)


def test_the_hint_for_a_package_names_its_extra():
    """A package of an extra is installed through it; `types-PyYAML` stands for any spelling of a name."""
    try:
        from importlib.metadata import requires

        listed = requires("minigpt-lm")
    except Exception:
        pytest.skip("the package is not installed, so it has no metadata")
    assert any("hypothesis" in line for line in listed)
    assert install_hint("hypothesis.strategies") in ("pip install '.[dev]'", "pip install 'minigpt-lm[dev]'")
    assert install_hint("some_thing") == "pip install some-thing"


def test_version():
    assert run_cli("--version") == (0, f"minigpt {minigpt.__version__}\n", "")
    told = json.loads(run_cli("--version", "--json")[1])
    assert told["minigpt"] == minigpt.__version__ and told["torch"] and told["python"].count(".") == 2


# ---------------------------------------------------------------------------------------------- as a process

LAZY = """
import sys
from minigpt.cli.app import main
code = main(sys.argv[1:])
heavy = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "jinja2"}
heavy = sorted({m.split(".")[0] for m in sys.modules} & heavy)
print(code, heavy, file=sys.stderr)
"""


def process(*args, code=None, env=None, **kwargs):
    line = [sys.executable, *(["-c", code] if code else ["-m", "minigpt"]), *args]
    environ = {**os.environ, **(env or {})}
    return subprocess.run(line, capture_output=True, env=environ, timeout=60, **kwargs)


@pytest.mark.parametrize(
    "args",
    [
        ["--help"], ["--version", "--json"], ["sft", "--help"], ["pretrain", "--show-config"], ["sft", "--lrr", "1"],
        ["sft"], ["tokenize", "--help"], ["data", "check", "-h"], ["chat", "--help-all"],
    ],
)  # fmt: skip
def test_nothing_heavy_is_imported(args):
    """Help, versions, --show-config and usage errors answer without torch, numpy, transformers or tokenizers."""
    told = process(*args, code=LAZY).stderr.decode().splitlines()[-1]
    assert told in ("0 []", "2 []")


def test_python_m_minigpt():
    done = process("--version")
    assert (done.returncode, done.stdout.decode().strip()) == (0, f"minigpt {minigpt.__version__}")


def test_a_reader_that_leaves_ends_the_program_quietly():
    """`minigpt … | head`: no trace, no complaint of Python's own at exit, code 0."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "minigpt", "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


WAIT = """
import sys, time
from minigpt.cli import app
def wait(*_):
    print("ready", flush=True)
    time.sleep(60)
app._dispatch = wait
sys.exit(app.main([]))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_is_one_line_and_130():
    """Outside of training an interrupt ends the program at once, without a trace."""
    with subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler){WAIT}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:  # a shell's background job would be born deaf to the signal
        assert running.stdout.readline() == b"ready\n"
        running.send_signal(signal.SIGINT)
        err = running.stderr.read()
        assert (running.wait(timeout=30), err) == (130, b"stopped: interrupted\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("args", [["--help"], ["--version", "--json"], ["--nonsense", "--json"]])
def test_a_full_disk_behind_stdout_is_told(args):
    """`minigpt … > file` on a full disk: exit 3 and a sentence, not a trace and not success."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "minigpt", *args], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert done.returncode == (2 if "--nonsense" in args else 3)


def test_any_output_encoding_works():
    """A Windows code page cannot hold every character; nothing crashes."""
    done = process("generate", "--help", env={"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and b"\\u6625" in done.stdout and done.stderr == b""


def test_show_config_of_a_resumed_run_is_the_runs_own(tmp_path):
    """With --resume the run's options and where they come from are shown; nothing changes."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text('lr: 0.005\nsize: "1m"\nepochs: 4.0\ndata: ["a.jsonl"]\n')
    (run / "run.json").write_text('{"stage": "pretrain"}')
    for named in (["--resume", run], ["--resume", "auto", "-o", run]):
        code, out, err = run_cli("pretrain", *named, "--steps", "9", "--show-config")
        assert code == 0, err
        assert f"lr: 0.005  # {run / 'config.yaml'}" in out and f'size: "1m"  # {run / "config.yaml"}' in out
        assert (
            "steps: 9  # command line" in out and f"epochs: null  # {run / 'config.yaml'}, replaced by --steps" in out
        )
    code, _, err = run_cli("pretrain", "--resume", run, "--lr", "1e-3", "--show-config")
    assert code == 2 and "--lr: 0.005 → 0.001" in err
    assert {p.name for p in run.iterdir()} == {"config.yaml", "run.json"}
