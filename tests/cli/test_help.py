"""cli.help: one screen, nothing hidden that matters, examples that can be copied."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from minigpt.cli.flags import stage_commands
from minigpt.core.config import options
from minigpt.stages import STAGES
from tests.conftest import run_cli

COMMANDS = [(stage, verb) for stage in STAGES for verb in stage_commands(stage)]


def page(*args):
    code, out, err = run_cli(*args)
    assert (code, err) == (0, "")
    return out


def test_the_root_page_lists_every_command():
    """minigpt, minigpt -h and minigpt --help are the same page, with each command and its line."""
    out = page("--help")
    assert out == page() == page("-h")
    for name, (_, text) in STAGES.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", out, re.M)
    assert len(out.splitlines()) <= 30


def test_a_page_shows_defaults_choices_and_panels(demo):
    out = page("demo", "-h")
    assert "minigpt demo [WORD…] [OPTIONS]" in out
    assert re.search(r"--shape TEXT +how it falls; one of cosine, linear \[cosine\]", out)
    assert re.search(r"--batch-size N +rows at once \[8\]", out)
    assert re.search(r"--lr X +peak rate \[auto\]", out)
    assert re.search(r"^  -d, --data PATH… +files$", out, re.M)
    assert "--think/--no-think" in out and "--no-json" not in out
    assert re.findall(r"^(\w+)$", out, re.M) == [
        "Arguments", "Model", "Data", "Optimisation", "Sampling", "Run", "Output", "Examples",
    ]  # fmt: skip


def test_rare_options_are_behind_help_all(demo):
    short, full = page("demo", "--help"), page("demo", "--help-all")
    assert "--pause" not in short and "2 more options" in short
    assert "--pause" in full and "--verbose" in full and "more options" not in full


def test_help_wins_over_other_mistakes(demo):
    """Someone who asks for help gets it, whatever else the line holds."""
    assert page("demo", "--lr", "nonsense", "--help") == page("demo", "--help")


def test_verbs_have_a_page_each(demo):
    out = page("pair", "-h")
    assert "one" in out and "Look two." in out and "minigpt pair one x" in out
    assert "minigpt pair two PATH [OPTIONS]" in page("pair", "two", "-h")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_examples_survive_any_width(demo, monkeypatch, width):
    """Nothing but examples is wider than the terminal, and examples are whole lines without escape codes."""
    monkeypatch.setenv("COLUMNS", str(width))
    lines = page("demo", "-h").splitlines()
    assert lines[-3:] == ["  minigpt demo a", "  minigpt demo b", "  minigpt demo c"]
    assert all(len(line) <= max(width, 40) and "\x1b" not in line for line in lines)


@pytest.mark.parametrize(("stage", "verb"), COMMANDS)
def test_every_real_command_has_a_fitting_page(stage, verb):
    """Each command: one screen of 60 lines at 100 columns, three examples that name it, no option without help."""
    command = stage_commands(stage)[verb]
    out = page(*command.name.split(), "--help")
    assert len(out.splitlines()) <= 60
    assert len(command.examples) == 3 and all("minigpt " + command.name in e for e in command.examples)
    assert out.rstrip("\n").endswith("\n".join(f"  {e}" for e in command.examples))
    shown = page(*command.name.split(), "--help-all")
    for option in options(command.config):
        assert option.meta["help"]
        if not option.meta["argument"]:
            assert option.flag in shown


@pytest.mark.parametrize(("stage", "verb"), COMMANDS)
def test_every_example_is_accepted(stage, verb):
    """The examples of a page parse and resolve: no flag in them is misspelt or has moved."""
    for example in stage_commands(stage)[verb].examples:
        for part in re.findall(r"minigpt ((?:[^|<>&$)'\"]|'[^']*'|\"[^\"]*\")+)", example):
            code, _, err = run_cli(*shlex.split(part), "--show-config")
            assert code == 0, f"{example}: {err}"


def test_the_registry_says_what_the_modules_say():
    """The table in minigpt.stages equals each module's docstring, so that root help needs no import."""
    for name, text in STAGES.values():
        assert importlib.import_module(f"minigpt.stages.{name}").__doc__.splitlines()[0] == text
