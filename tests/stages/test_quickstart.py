"""`minigpt quickstart`: everything runs, goes on where it stopped, and is the same as the commands it prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from minigpt.stages import quickstart
from tests.conftest import run_cli


def weights(run: Path) -> bytes:
    return (run / (run / "latest").read_text().strip() / "model.safetensors").read_bytes()


def test_smoke_and_again(tmp_path):
    """Every step runs and the score is on stdout; the second call finds all done and asks again."""
    out = tmp_path / "first"
    code, stdout, stderr = run_cli("quickstart", "--smoke", "-o", out, "--lang", "en")
    assert code == 0, stderr
    assert [line.split()[0] for line in stdout.splitlines()[:3]] == ["facts", "one-digit", "answers"]
    assert "below the 95% it should reach" in stdout  # ten steps teach nothing, and the score says so
    assert all(f"{n}/5" in stderr for n in range(1, 6)) and f"minigpt chat -m {out}/chat" in stderr
    before = weights(out / "chat")
    code, again, stderr = run_cli("quickstart", "--smoke", "-o", out, "--lang", "en")
    assert code == 0 and again == stdout and stderr.count("done before") == 2
    assert weights(out / "chat") == before

    (out / "note.txt").write_text("mine")
    code, _, stderr = run_cli("quickstart", "--smoke", "-o", out, "--lang", "zh", "--json")
    assert code == 0, stderr  # a smoke run has taught nothing, so it gives way to other options
    assert (out / "note.txt").read_text() == "mine"  # only what quickstart made is taken away


def test_other_options_do_not_replace_a_real_one(tmp_path):
    """What took minutes is not thrown away unasked."""
    marker = tmp_path / "quickstart.json"
    marker.write_text(json.dumps({"data": 0, "smoke": False, "steps": []}))
    (tmp_path / "chat").mkdir()
    code, _, stderr = run_cli("quickstart", "--smoke", "-o", tmp_path)
    assert code == 2 and "--overwrite" in stderr and (tmp_path / "chat").is_dir()


def test_a_strange_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, stderr = run_cli("quickstart", "--smoke", "-o", tmp_path, "--overwrite")
    assert code == 2 and "not a quickstart's" in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_steps_are_commands_that_parse():
    """Each printed line, read back by a shell and by the command line, means what the step does."""
    code, stdout, _ = run_cli("quickstart", "--steps", "--lang", "zh", "--seed", "7")
    assert code == 0
    lines = [shlex.split(line) for line in stdout.splitlines()]
    assert [words[1] for words in lines] == ["tokenize", "pretrain", "sft", "eval", "chat"]
    for words in lines:
        code, _, stderr = run_cli(*words[1:], "--show-config")
        assert code == 0, stderr
    assert all("--seed 7" in shlex.join(words) for words in lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize("lang", ["both", "zh"])
def test_steps_give_the_same_model(tmp_path, monkeypatch, lang):
    """The commands of --steps, run one by one, end with the same bits and the same score."""
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run_cli("quickstart", "--smoke", "--lang", lang, "--json")
    assert code == 0, stderr
    done = json.loads(stdout)
    (tmp_path / "runs").rename(tmp_path / "whole")
    _, lines, _ = run_cli("quickstart", "--smoke", "--lang", lang, "--steps")
    for words in [shlex.split(line) for line in lines.splitlines()][:4]:
        code, stdout, stderr = run_cli(*words[1:], "--json")
        assert code == 0, stderr
    made = Path(done["run_dir"]).name
    assert made == ("quickstart" if lang == "both" else "quickstart-zh")
    for name in ("pretrain", "chat"):
        assert weights(tmp_path / "runs" / made / name) == weights(tmp_path / "whole" / made / name)
    assert json.loads(stdout)["metrics"] == done["metrics"]["questions"]


@pytest.mark.slow
def test_stopped_in_the_middle_goes_on(tmp_path, monkeypatch):
    """A Ctrl-C during fine-tuning exits with 75; the same command ends where an undisturbed one does."""
    from minigpt.core.train.trainer import Trainer

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run_cli("quickstart", "--smoke", "-o", straight, "--lang", "en")[0] == 0
    after, stops = Trainer._after, []

    def interrupt(self, bar):
        after(self, bar)
        if self.counters.step == 7 and "chat" in str(self.run.path) and not stops:
            stops.append(1)
            self._stop(type("Now", (), {"reason": "SIGINT"})())

    monkeypatch.setattr(Trainer, "_after", interrupt)
    code, _, stderr = run_cli("quickstart", "--smoke", "-o", broken, "--lang", "en")
    assert code == 75 and "the same command goes on" in stderr
    code, _, stderr = run_cli("quickstart", "--smoke", "-o", broken, "--lang", "en")
    assert code == 0 and "step 7 of 10" not in stderr and stderr.count("done before") == 1
    assert weights(broken / "chat") == weights(straight / "chat")


def test_goals_are_told_honestly():
    fact, total = {"accuracy": 0.96, "right": 96, "asked": 100}, {"accuracy": 0.5, "right": 5, "asked": 10}
    metrics = {"by_kind": {"fact": fact, "sum": total}, "stops": 1.0, "asked": 110}
    lines = list(quickstart.card(metrics, []))
    assert "96 of  100    96.0%" in lines[0] and "below" not in lines[0]
    assert "5 of   10    50.0%   below the 90% it should reach" in lines[1]
    assert "110 of  110   100.0%" in lines[2]


@pytest.mark.exam
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_the_score_holds(tmp_path, seed):
    """The full recipe reaches its goals from three seeds. About four minutes each."""
    code, stdout, stderr = run_cli("quickstart", "-o", tmp_path / "run", "--seed", seed, "--json")
    assert code == 0, stderr
    for name, found in json.loads(stdout)["metrics"]["goals"].items():
        assert found["reached"] >= found["goal"], name
