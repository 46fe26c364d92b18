"""`minigpt plot`: runs in, a drawing out; what cannot be drawn is said, and nothing is overwritten unasked."""

import io
import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from minigpt.cli.console import Console
from minigpt.core.report import Context, Report
from minigpt.core.train.curves import columns
from minigpt.stages import plot
from tests.conftest import run_cli

SVG = "{http://www.w3.org/2000/svg}"


def make_run(path, rows=12, level=5.0, tail="", **more):
    """A run directory of `rows` log rows, with a validation in every fourth."""
    path.mkdir(parents=True)
    lines = []
    for i in range(1, rows + 1):
        row = {"step": i, "tokens": 100 * i, "loss": level / i + 1, "lr": 1e-3, "tok_s": 50.0, **more}
        lines.append(row | ({"val_loss": level / i + 2} if i % 4 == 0 else {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + tail, encoding="utf-8")
    argv = ["minigpt", "pretrain", "-d", str(path.parent / "x.txt")]
    known = {"stage": "pretrain", "status": "running", "sessions": [{"started": "2026-01-01T00:00:00", "argv": argv}]}
    (path / "run.json").write_text(json.dumps(known), encoding="utf-8")
    (path / "config.yaml").write_text(f"lr: {level}  # default\n", encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", level=9.0, tail='{"step": 13, "lo')
    return tmp_path / "runs"


# ---------------------------------------------------------------------------------------------- in the terminal


def test_a_pipe_gets_plain_text_that_fits(runs):
    """No escape codes, at most 100 columns and about 25 lines, both losses of a single run in one panel."""
    code, out, err = run_cli("plot", runs / "a")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert max(map(columns, out.splitlines())) <= 100
    assert 20 <= len(out.splitlines()) <= 25
    assert "training 1.417" in out and "validation 2.417" in out


def test_which_metrics_are_drawn_from_zero():
    """Amounts, of which a reader asks how much; a loss is read by its last decimals."""
    cfg = plot.Config(x="step")
    record = plot.Record(
        "a", Path("a"), [{"step": 1, "loss": 5.0, "tok_s": 9.0, "mfu": 0.4, "mem_gb": 1.8}], [], {}, {}
    )
    panels = plot.choose(cfg, [record], ["loss", "tok_s", "mfu", "mem_gb"])
    assert [panel.from_zero for panel in panels] == [False, True, True, True]


def test_several_runs_have_a_panel_for_each_metric(runs):
    code, out, _ = run_cli("plot", runs / "a", runs / "b", "--y", "loss,val_loss", "--y", "lr")
    assert code == 0
    assert re.findall(r"^(\w[\w ]+), over", out, re.M) == ["Training loss", "Validation loss", "Learning rate"]
    assert out.count("▪ a ") == out.count("+ b ") == 3


def test_ascii_where_stdout_holds_no_more(runs, monkeypatch):
    """An output of another encoding gets markers that it can hold."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    config = plot.Config(runs=[str(runs / "a"), str(runs / "b")])
    assert plot.run(config, Context()).text.isascii()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("no_color", "silent", "coloured"), [("", False, True), ("1", False, False), ("", True, False)]
)
def test_colour_on_a_terminal_that_wants_it(runs, monkeypatch, no_color, silent, coloured):
    """Colours reach a terminal unless NO_COLOR or a silent reporter forbids; the width is the terminal's."""
    screen, report = Terminal(), Report() if silent else Console()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "30")
    result = plot.run(plot.Config(runs=[str(runs)]), Context(report))
    drawn = screen.getvalue()
    assert ("\x1b[38;5;" in drawn) == coloured == (result.text is None)
    bare = re.sub(r"\x1b\[[\d;]*m", "", drawn or result.text)
    assert 50 < max(map(columns, bare.splitlines())) <= 60


def test_json_has_the_newest_values(runs):
    """A script gets figures, not a drawing."""
    code, out, _ = run_cli("plot", runs, "--json", "--y", "val_loss")
    told = json.loads(out)
    assert code == 0
    assert told["metrics"] == ["val_loss"]
    assert told["runs"][1] == {
        "name": "b",
        "run_dir": str(runs / "b"),
        "last": {"step": 12, "val_loss": pytest.approx(2.75)},
    }


# ---------------------------------------------------------------------------------------------- which runs


def test_runs_are_found(runs, monkeypatch):
    """A run, a step of it, its parent, a pattern; each once, whatever names it."""
    (runs / "a" / "step-0000010").mkdir()
    (runs / "notes").mkdir()
    a, b = runs / "a", runs / "b"
    assert plot.find([str(a / "step-0000010")]) == [a]
    assert plot.find([str(runs)]) == [a, b]
    assert plot.find([str(runs / "[ab]"), str(a)]) == [a, b]
    monkeypatch.chdir(a)
    assert plot.find([".", str(b)]) == [a, b]


def test_equal_names_are_told_apart(tmp_path):
    paths = [tmp_path / "x" / "poems", tmp_path / "y" / "poems", tmp_path / "y" / "other"]
    assert [name for _, name in plot.named(paths)] == ["x/poems", "y/poems", "other"]


def test_no_run_is_a_usage_error():
    code, _, err = run_cli("plot")
    assert code == 2
    assert "minigpt plot runs/poems" in err


def test_what_is_no_run_is_said(tmp_path):
    """A directory without runs, a file, and nothing at all."""
    (tmp_path / "file").touch()
    code, _, err = run_cli("plot", tmp_path)
    assert code == 2 and "looked for run.json and config.yaml" in err
    code, _, err = run_cli("plot", tmp_path / "file")
    assert code == 2 and "is a file, not a run" in err
    code, _, err = run_cli("plot", tmp_path / "nowhere")
    assert code == 2 and "does not exist" in err


def test_a_run_without_metrics_says_so(runs):
    """Alone it is an error; beside others it is left out with a warning."""
    make_run(runs / "young", rows=0, tail='{"step": 1')
    code, out, err = run_cli("plot", runs / "young")
    assert (code, out) == (3, "")
    assert "no metrics yet in young" in err and "running" in err
    code, out, err = run_cli("plot", runs)
    assert code == 0
    assert "young has no metrics yet" in err and "young" not in out


# ---------------------------------------------------------------------------------------------- which metrics


def test_unknown_metric_names_the_nearest(runs):
    code, _, err = run_cli("plot", runs, "--y", "loss,vall_loss")
    assert code == 2
    assert "--y vall_loss" in err and "did you mean val_loss?" in err and "tok_s" in err


def test_a_metric_that_one_run_lacks(runs):
    """It is drawn for those that have it; the other is named."""
    make_run(runs / "c", reward=1.0)
    code, out, err = run_cli("plot", runs, "--y", "reward")
    assert code == 0
    assert "nothing measured in a, b" in err and "c 1" in out


def panels(runs, **changes):
    config = plot.Config(runs=[str(runs / "a")], **changes)
    records = [plot.Record.load(runs / "a", "a")]
    return plot.choose(config, records, plot.wanted(config, records))


def test_over_tokens_and_time(runs):
    """The last row has 1,200 tokens, at 50 a second."""
    assert [panels(runs, x=x)[0].curves[0].points[-1][0] for x in ("step", "tokens", "time")] == [12, 1200, 24]


def test_from_step_begins_there(runs):
    """The axis begins with what is left, and a start beyond the end is an error."""
    (panel,) = panels(runs, from_step=7)
    assert (panel.start, panel.curves[0].points[0][0]) == (7, 7)
    code, _, err = run_cli("plot", runs, "--from-step", 99)
    assert code == 2 and "--from-step 99" in err


def test_nothing_but_nan_is_said(tmp_path):
    """A run that never had a number says so, and blames no flag that was not given."""
    code, _, err = run_cli("plot", make_run(tmp_path / "c", loss=float("nan"), level=float("nan")), "--y", "loss")
    assert code == 2
    assert "loss over step has no number" in err and "--from-step" not in err


def test_smoothing_is_said_and_leaves_validation_alone(runs):
    """Validation is measured on the same rows each time: averaging would only make it late."""
    (panel,) = panels(runs, smooth=4)
    training, validation = panel.curves
    assert training.raw is not None and training.points[-1][1] > training.raw[-1][1]
    assert validation.raw is None
    assert panel.heading == "Loss, averaged over 4 points"


def test_log_of_what_is_never_above_zero_stays_linear(runs):
    make_run(runs / "c", reward=-1.0)
    code, _, err = run_cli("plot", runs / "c", "--y", "reward", "--log")
    assert code == 0
    assert "reward has no value above zero" in err


# ---------------------------------------------------------------------------------------------- to a file


def test_svg(runs, tmp_path):
    """stdout is the path alone; the runs are overlaid in one picture a metric."""
    out = tmp_path / "curves.svg"
    code, text, _ = run_cli("plot", runs, "-o", out)
    assert (code, text) == (0, f"{out}\n")
    root = ET.fromstring(out.read_text(encoding="utf-8"))
    assert len([*root.iter(f"{SVG}polyline")]) == 4
    assert root.find(f"{SVG}title").text == "a · b"


def test_html_shows_every_metric_and_no_path_of_this_machine(runs, tmp_path):
    """Beside the losses also learning rate and pace; of absolute paths only what lies beside the runs."""
    out = tmp_path / "report.html"
    assert run_cli("plot", runs, "-o", out)[0] == 0
    html = out.read_text(encoding="utf-8")
    root = ET.fromstring(html)
    assert [f.find(f"{SVG}svg/{SVG}title").text for f in root.iter("figure")] == [
        "Training loss",
        "Validation loss",
        "Learning rate",
        "Tokens a second",
    ]
    assert str(tmp_path) not in html
    assert "minigpt pretrain -d x.txt" in html


def test_nothing_is_overwritten_unasked(runs, tmp_path):
    """The file stays as it is until --overwrite replaces it."""
    out = tmp_path / "curves.svg"
    out.write_text("mine", encoding="utf-8")
    code, text, err = run_cli("plot", runs, "-o", out)
    assert (code, text) == (2, "") and "--overwrite" in err
    assert out.read_text(encoding="utf-8") == "mine"
    assert run_cli("plot", runs, "-o", out, "--overwrite")[0] == 0
    ET.parse(out)


def test_other_kinds_of_file_are_refused_before_anything_is_read(tmp_path):
    code, _, err = run_cli("plot", tmp_path / "nowhere", "-o", tmp_path / "curves.png")
    assert code == 2
    assert ".svg" in err and ".html" in err and "nowhere" not in err


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="needs names of any bytes")
def test_names_of_any_bytes(tmp_path):
    """A directory whose name is not UTF-8, or full of markup, is drawn everywhere."""
    make_run(tmp_path / "runs" / os.fsdecode(b"\xff<script>\x1b[2J"))
    code, out, _ = run_cli("plot", tmp_path / "runs", "--y", "loss")
    assert code == 0 and "\x1b" not in out
    for kind in ("svg", "html"):
        assert run_cli("plot", tmp_path / "runs", "-o", tmp_path / f"x.{kind}")[0] == 0
        assert "<script" not in ET.tostring(ET.parse(tmp_path / f"x.{kind}").getroot(), "unicode")
