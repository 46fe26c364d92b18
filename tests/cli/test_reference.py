"""cli.reference: the pages are what the code says, and --check knows when they are not."""

from __future__ import annotations

import pytest

from minigpt.cli import reference
from minigpt.cli.flags import stage_commands
from minigpt.core.config import options
from minigpt.core.errors import Exit
from minigpt.core.models.presets import PRESETS
from minigpt.stages import STAGES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """docs/reference of a checkout whose pages were just written."""
    path = tmp_path / "docs" / "reference"
    path.mkdir(parents=True)
    monkeypatch.setattr(reference, "FOLDER", path)
    assert reference.main([]) == 0
    return path


def test_written_pages_are_up_to_date(folder, capsys):
    assert reference.main(["--check"]) == 0
    capsys.readouterr()
    assert reference.main([]) == 0 and capsys.readouterr().out == "", "a second run writes nothing"


@pytest.mark.parametrize("width", ["40", "200"])
def test_pages_do_not_depend_on_the_terminal(folder, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    assert reference.stale(folder) == []


def test_check_names_every_stale_page(folder, capsys):
    """Changed, missing and left over: exit 7, all three named, nothing touched; then one run mends them."""
    (folder / "exit-codes.md").write_text("old")
    (folder / "cli" / "sft.md").unlink()
    (folder / "cli" / "gone.md").write_text("a command that is no more")
    capsys.readouterr()
    assert reference.main(["--check"]) == 7
    err = capsys.readouterr().err
    assert all(f"docs/reference/{name}" in err for name in ("exit-codes.md", "cli/sft.md", "cli/gone.md"))
    assert (folder / "exit-codes.md").read_text() == "old"
    assert reference.main([]) == 0 and reference.main(["--check"]) == 0
    assert not (folder / "cli" / "gone.md").exists()


def test_every_option_has_its_row(folder):
    """Each command's page names every flag, advanced ones too, with its default."""
    for stage in STAGES:
        page = (folder / "cli" / f"{stage}.md").read_text(encoding="utf-8")
        for command in stage_commands(stage).values():
            for option in options(command.config):
                assert option.meta["argument"] or f"{option.flag}" in page
                assert option.meta["help"].replace("|", "\\|").replace("<", "&lt;") in page
        rows = [line for line in page.splitlines() if line.startswith("|")]
        assert all(line.replace("\\|", "").count("|") == 4 for line in rows), "a cell holds a bare |"


def test_codes_and_sizes_are_complete(folder):
    codes = (folder / "exit-codes.md").read_text(encoding="utf-8")
    assert set(reference.EXIT_MEANING) == set(Exit) and all(f"| {code.value} |" in codes for code in Exit)
    sizes = (folder / "presets.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in sizes for name in PRESETS)


def test_wrong_words_and_places_are_refused(folder, monkeypatch, tmp_path, capsys):
    assert reference.main(["--chek"]) == 2
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "nowhere" / "docs" / "reference")
    assert reference.main([]) == 2 and "in a checkout" in capsys.readouterr().err
