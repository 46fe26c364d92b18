"""A run's logs and events on a disk that fills up: every row once, in order, whole."""

import contextlib
import errno
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from minigpt.core.errors import DataError
from minigpt.core.train import run as run_module
from minigpt.core.train.run import Run, make

resource = pytest.importorskip("resource")  # POSIX
ROWS = [{"step": step, "text": "山" * step} for step in range(1, 9)]
LINES = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]


@contextlib.contextmanager
def files_up_to(size):
    """A write takes what fits and then answers EFBIG, as a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def text(run, name="metrics"):
    path = run.path / f"{name}.jsonl"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def cut_inside(line):
    """File sizes at which a write of `line` (counted from 1) ends in the middle of it, or takes nothing."""
    before = len("".join(LINES[: line - 1]).encode())
    return [before, before + 1, before + len(LINES[line - 1].encode()) - 1]


@pytest.mark.parametrize("size", cut_inside(1) + cut_inside(3))
def test_a_patient_log_writes_each_row_once_and_in_order(tmp_path, size):
    """Rows that do not fit wait; the file holds whole lines throughout; the next row takes the others along."""
    run = Run(tmp_path, patient=True)
    with files_up_to(size):
        for row in ROWS[:5]:
            run.log(row)
            assert text(run) == "".join(LINES[: len(run.rows())])
    assert len(run.rows()) == (0 if size < 30 else 2)
    run.log(ROWS[5])
    assert text(run) == "".join(LINES[:6])
    run.log(ROWS[6])
    assert text(run) == "".join(LINES[:7])


def test_each_log_waits_for_itself(tmp_path):
    run = Run(tmp_path, patient=True)
    with files_up_to(40):
        for row in ROWS[:4]:
            run.log(row)
            run.log(row, "samples")
    run.log(ROWS[4])
    assert text(run) == "".join(LINES[:5]) and text(run, "samples") == LINES[0]
    run.sync_logs()
    assert text(run, "samples") == "".join(LINES[:4])


def test_an_impatient_log_is_an_error_and_leaves_no_half_line(tmp_path):
    run = Run(tmp_path)
    run.log(ROWS[0])
    with files_up_to(cut_inside(2)[1]), pytest.raises(DataError) as e:
        run.log(ROWS[1])
    assert str(tmp_path / "metrics.jsonl") in e.value.message and e.value.fix and text(run) == LINES[0]


def test_patience_is_for_full_disks_alone(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        Run(tmp_path, patient=True).log(ROWS[0])


def test_a_checkpoint_never_claims_steps_whose_rows_still_wait(tmp_path):
    run = Run(tmp_path, patient=True)
    with files_up_to(0):
        run.log(ROWS[0])
        with pytest.raises(DataError):
            run.sync_logs()
    run.sync_logs()
    assert text(run) == LINES[0]


def start(path, argv="first", **options):
    run = Run(path, **options)
    run.start("", {"argv": [argv]})
    return run


def info(path):
    return json.loads((path / "run.json").read_text())


def test_the_end_of_a_run_writes_what_waits(tmp_path):
    run = start(tmp_path, patient=True)
    with files_up_to(0):
        run.log(ROWS[0])
        with pytest.raises(DataError):
            run.finish("done")
        run.finish("failed", error="the disk")  # has its own error to tell
    run.finish("done")
    assert text(run) == LINES[0] and info(tmp_path)["status"] == "done"


def test_events_are_kept_over_sessions(tmp_path):
    """In order, with time, kind, step and text; those noted before `start` as well."""
    run = start(tmp_path)
    run.event("skipped", "loss nan", 7)
    run.start("again", {"argv": ["first"], "seed": 1})
    run.event("save", "no room", 8)
    run.finish("failed")
    run = Run(tmp_path)
    run.event("damaged", "step-0000004")
    assert len(info(tmp_path)["events"]) == 2  # a session that is refused leaves no trace
    run.start("", {"argv": ["second"]})
    run.finish("done")
    found = info(tmp_path)
    assert [(e["kind"], e["step"], e["text"]) for e in found["events"]] == [
        ("skipped", 7, "loss nan"),
        ("save", 8, "no room"),
        ("damaged", None, "step-0000004"),
    ]
    assert all(e["time"][:2] == "20" for e in found["events"]) and len(found["sessions"]) == 2


def test_an_event_that_the_disk_refuses_goes_with_the_next_write(tmp_path, monkeypatch):
    run = start(tmp_path)

    def full(path, value):
        raise DataError("full") from OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_json", full)
        run.event("save", "no room", 4)
    assert info(tmp_path)["events"] == []
    run.event("save", "room again", 8)
    assert [e["step"] for e in info(tmp_path)["events"]] == [4, 8]


def test_a_directory_that_several_make_at_once(tmp_path):
    """Each machine of a run looks whether it may write, and leaves nothing behind."""
    with ThreadPoolExecutor(8) as pool:
        for _ in range(200):
            list(pool.map(make, [tmp_path / "run"] * 8))
    assert list((tmp_path / "run").iterdir()) == []
