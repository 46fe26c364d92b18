"""cli.flags: what is typed becomes a config, and says where each value came from."""

from __future__ import annotations

import json

import pytest

from minigpt.core.config import values
from tests.conftest import run_cli


def resolved(demo, *args):
    code, _, err = run_cli("demo", *args)
    assert code == 0, err
    return values(demo.seen[0]), demo.seen[1].origins


def test_nothing_given_is_all_defaults(demo):
    config, origins = resolved(demo)
    assert config["batch_size"] == 8 and config["words"] == [] and config["think"] is None
    assert set(origins.values()) == {"default", "preset:1m"} and origins["max_len"] == "preset:1m"


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--batch-size", "4"], "batch_size", 4),
        (["--batch_size=4"], "batch_size", 4),
        (["--batch_size", "2k"], "batch_size", 2000),
        (["--lr", "1e-4"], "lr", 1e-4),
        (["-d", "a", "--data", "b"], "data", ["a", "b"]),
        (["--think"], "think", True),
        (["--no-think"], "think", False),
        (["--pause", "2m"], "pause", 120.0),
        (["hello", "world"], "words", ["hello", "world"]),
        (["--lr", "1", "-", "x"], "words", ["-", "x"]),
        (["--", "--lr"], "words", ["--lr"]),
        (["--shape", "linear"], "shape", "linear"),
        (["-odir"], "out", "dir"),
    ],
)
def test_every_way_to_type_an_option(demo, args, name, value):
    """Long, short, underscores, =, switches, repetition, positional words, suffixes."""
    config, origins = resolved(demo, *args)
    assert config[name] == value and origins[name] == "flag"


def test_precedence_through_the_command_line(demo, tmp_path, monkeypatch):
    """flag > environment > later file > earlier file > preset > default, each with its origin."""
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("lr: 1\nbatch_size: 1\nshape: linear\nsize: 3m\n")
    b.write_text("lr: 2\nbatch-size: 2\n")
    monkeypatch.setenv("MINIGPT_DEMO_LR", "3")
    monkeypatch.setenv("MINIGPT_DEMO_OUT", "env")
    config, origins = resolved(demo, "-c", a, "-c", b, "--out", "typed")
    assert [config[k] for k in ("out", "lr", "batch_size", "shape", "size", "max_len")] == [
        "typed", 3.0, 2, "linear", "3m", 512,
    ]  # fmt: skip
    assert [origins[k] for k in ("out", "lr", "batch_size", "shape", "max_len", "think")] == [
        "flag", "environment", str(b), str(a), "preset:3m", "default",
    ]  # fmt: skip


def test_show_config_is_yaml_that_config_reads(demo, tmp_path):
    """--show-config runs nothing, tells origins, and its text gives the same config again."""
    args = ["--lr", "1e-4", "-d", "x y", "-o", "runs/a"]
    code, out, err = run_cli("demo", *args, "--show-config")
    assert (code, err, demo.seen) == (0, "", None)
    assert "lr: 0.0001  # flag" in out and "max_len: 256  # preset:1m" in out and "show_config" not in out
    path = tmp_path / "again.yaml"
    path.write_text(out)
    assert resolved(demo, "-c", path)[0] == resolved(demo, *args, "-c", path)[0] == {
        **resolved(demo, *args)[0], "config": [str(path)],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["demo", "--lrr", "1"], "minigpt demo has no flag --lrr", "did you mean --lr?"),
        (["demo", "--learning_rate", "1"], "minigpt demo has no flag --learning-rate", "did you mean --lr?"),
        (["demo", "--zzzzz"], "minigpt demo has no flag --zzzzz", "minigpt demo --help-all"),
        (["demo", "-z"], "minigpt demo has no flag -z", "--help-all"),
        (["demo", "--lr"], "--lr needs a value", "--help-all"),
        (["demo", "--json=1"], "--json takes no value", "--help-all"),
        (["demo", "--lr", "fast"], "--lr is not a number", None),
        (["demo", "--size", "2m"], "--size is not one of the choices", "choose 1m, 3m"),
        (["demoo"], "minigpt has no command 'demoo'", "did you mean minigpt demo?"),
        (["train"], "minigpt has no command 'train'", "did you mean minigpt pretrain?"),
        (["book.txt"], "minigpt has no command 'book.txt'", "the commands are quickstart, "),
        (["pair"], "minigpt pair needs a verb", "one, two"),
        (["pair", "twoo"], "minigpt pair has no verb 'twoo'", "did you mean minigpt pair two?"),
        (["pair", "one"], "PATH is missing", None),
        (["pair", "one", "a", "b"], "minigpt pair one does not take 'b'", "minigpt pair one --help"),
        (["--hlep"], "minigpt has no flag --hlep", "did you mean --help?"),
        (["demo", "-c", "none.yaml"], "--config none.yaml does not exist", None),
    ],
)
def test_usage_errors_in_one_voice(demo, args, message, hint):
    """Exit 2, one sentence naming the thing, and the nearest thing that exists; as JSON when asked."""
    code, out, err = run_cli(*args)
    assert (code, out) == (2, "") and err.startswith(f"error: {message}") and "Usage" not in err
    assert hint is None or hint in err
    code, out, err = run_cli(args[0], "--json", *args[1:])
    told = json.loads(out)
    assert (code, err) == (2, "") and told["message"].startswith(message)
    assert (told["status"], told["code"], told["kind"]) == ("error", 2, "usage")


def test_json_stands_behind_the_command(demo):
    """Before the command it belongs to --version; elsewhere it would be silently lost."""
    code, out, _ = run_cli("--json", "demo")
    assert code == 2 and json.loads(out)["message"].startswith("--json stands behind the command")
    assert demo.seen is None


def test_stray_data_is_told_its_flag(demo):
    """The commonest mistake, a file without its flag, is answered with the flag."""
    code, _, err = run_cli("info", "a", "b.jsonl")
    assert code == 2 and "does not take 'b.jsonl'" in err
    code, _, err = run_cli("sft", "b.jsonl")
    assert code == 2 and "-d b.jsonl" in err


def test_verbs_run(demo):
    code, out, _ = run_cli("pair", "two", "x")
    assert (code, out) == (0, "done\n") and demo.seen[0].path == "x"
    assert demo.seen[1].argv == ["minigpt", "pair", "two", "x"]


def test_completion_offers_commands_flags_and_choices(demo, monkeypatch):
    """The shell's completion knows the registry without a list of its own."""

    def complete(words: str) -> list[str]:
        monkeypatch.setenv("_MINIGPT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        return run_cli()[1].split()

    assert complete("minigpt dem") == ["demo"]
    assert "--batch-size" in complete("minigpt demo --ba")
    assert complete("minigpt demo --shape l") == ["linear"]
    assert complete("minigpt pair t") == ["two"]
