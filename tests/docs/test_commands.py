"""What the documentation tells its reader to type works: each command parses, and each page runs from top to bottom."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt.cli.flags import stage_commands
from minigpt.stages import STAGES
from tests.conftest import run_cli
from tests.docs import fixtures, running, shell
from tests.docs.blocks import PAGES, Block, blocks, mentions, name, original, read

ASKS = {"--help", "-h", "--help-all", "--version", "-V"}  # such a command stops by itself before it does anything

# ------------------------------------------------------------------------------------------------ every command parses


def found(text: str) -> Iterator[tuple[int, list[str]]]:
    """Each command of a page with the line of its block."""
    for block in blocks(text):
        for words in shell.commands(block.shell):
            yield block.line, words
    for line, mention in mentions(text):
        for words in shell.commands(mention):
            yield line, [*words, "--help"] if len(words) == 1 else words  # only its name: it may lack a verb or a path


def fault(words: list[str]) -> str | None:
    """What the command line says against these words, without doing what they ask. Makes files it wants to read."""
    for flag, file in itertools.pairwise(words):
        if flag in ("-c", "--config"):  # read even now; that it holds sense is for the page to show when it runs
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).touch()
    if "--resume" in words and words[words.index("--resume") + 1] != "auto":  # a run whose options would be read
        words = [*words, "-o", "new"]
        words[words.index("--resume") + 1] = "auto"
    end = words.index("--") if "--" in words else len(words)
    stop = [] if ASKS & set(words) else ["--show-config"]
    code, _, stderr = run_cli(*words[:end], *stop, *words[end:])
    return None if code == 0 else f"minigpt {' '.join(words)}\n{stderr}"


def faults(page: str, text: str) -> list[str]:
    told = ((line, fault(words)) for line, words in found(text) if not shell.is_pattern(words))
    return [f"{page}:{line}  {said}" for line, said in told if said]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_of_a_page_parses(page, workplace):
    """Also those in running text, tables and blocks that are not run."""
    assert not (wrong := faults(name(page), read(page))), "\n".join(wrong)


@pytest.mark.parametrize("stage", STAGES)
def test_every_example_of_a_command_parses(stage, workplace):
    """What `--help` shows to copy."""
    for command in stage_commands(stage).values():
        for example in command.examples:
            parsed = list(shell.commands(example))
            assert parsed, f"no minigpt command in: {example}"
            assert not (wrong := [said for words in parsed if (said := fault(words))]), "\n".join(wrong)


def test_hardly_a_command_is_skipped():
    """Patterns such as `minigpt COMMAND --help` are not checked, so they must stay rare."""
    every = [words for page in PAGES for _, words in found(read(page))]
    patterns = [words for words in every if shell.is_pattern(words)]
    assert len(every) - len(patterns) >= 80
    assert len(patterns) <= len(every) / 10, patterns


# ------------------------------------------------------------------------------------------------ every page runs


def to_run(page: Path) -> list[Block]:
    """Not those of a translation: what they type runs on its original, and a test compares the two."""
    return [] if original(page) else [block for block in blocks(read(page)) if block.runs]


def shape(words: list[str]) -> list[str]:
    """A command without the words of a language: its name and its flags."""
    return [words[0], *(word for word in words[1:] if word.startswith("-"))]


@pytest.mark.parametrize("page", [p for p in PAGES if original(p)], ids=name)
def test_translations_type_what_their_original_does(page):
    """The same commands with the same flags, in order: a page that changes takes its translation along."""
    both = []
    for path in (page, original(page)):
        assert path is not None and path.is_file()
        typed = [block for block in blocks(read(path)) if block.shell or block.python]
        both.append([(block.language, block.runs, [*map(shape, shell.commands(block.shell))]) for block in typed])
    assert both[0] == both[1]


@pytest.fixture(scope="session")
def made_runs(tmp_path_factory):
    """A run of each kind, for pages that go on from another page."""
    return fixtures.make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def session(tmp_path):
    """A reader's directory and shell environment: (folder whose `work` the shell starts in, environment)."""
    fixtures.put_files(tmp_path / "work")
    fixtures.put_programs(tmp_path / "bin")
    return tmp_path, fixtures.environment(tmp_path / "bin")


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if to_run(p)], ids=name)
def test_every_block_of_a_page_runs(page, session, request):
    """In order, in one directory, with settings that make every run tiny."""
    folder, env = session
    wanted = fixtures.runs_needed("".join(block.text for block in to_run(page)))
    if wanted:
        fixtures.put_runs(folder / "work", wanted, request.getfixturevalue("made_runs"))
    assert not (wrong := running.run(name(page), to_run(page), folder, env)), wrong


def test_most_blocks_run():
    """A marker is an exception: the blocks of commands that carry one are few."""
    pages = [page for page in PAGES if not original(page)]
    typed = [block for page in pages for block in blocks(read(page)) if block.shell or block.python]
    assert len([block for block in typed if block.runs]) >= 15
    assert len([block for block in typed if not block.runs]) <= len(typed) / 4


# ------------------------------------------------------------------------------------------------ the tools themselves


def test_blocks_of_a_page():
    """Longer fences hold shorter ones, tildes are fences, a list's indentation goes, a marker stands directly above."""
    page = """\
````markdown
```bash
minigpt nested
```
````
~~~sh
a
```
~~~
- item

  ```bash
  if b; then
    c
  fi
  ```
<!-- not run: needs a GPU -->
```python
d
```
<!-- not run: too far above -->

``` console
$ e \\
> --flag
out
$ f
```
```
g
```
`inline ``` is not a fence`
"""
    assert list(blocks(page)) == [
        Block(1, "markdown", "```bash\nminigpt nested\n```\n"),
        Block(6, "sh", "a\n```\n"),
        Block(12, "bash", "if b; then\n  c\nfi\n"),
        Block(18, "python", "d\n", "needs a GPU"),
        Block(23, "console", "$ e \\\n> --flag\nout\n$ f\n"),
        Block(29, "", "g\n"),
    ]
    assert [block.shell for block in blocks(page)] == [
        "",
        "a\n```\n",
        "if b; then\n  c\nfi\n",
        "",
        "e \\\n--flag\nf\n",
        "",
    ]
    assert [block.runs for block in blocks(page)] == [False, True, True, False, True, False]


def test_a_block_that_never_closes_holds_the_rest():
    assert [block.text for block in blocks("text\n```bash\na\n``\nb\n")] == ["a\n``\nb\n"]


def test_commands_named_in_running_text():
    page = """\
Type `minigpt data demo -o
demo`, not `minigpt` or `pip install minigpt `; | `N=1 minigpt sft` |, `cat x | minigpt chat`

```bash
`minigpt not-prose`
```
```
minigpt eval   loss
minigpt eval · a report
```
"""
    assert sorted(mentions(page)) == [
        (1, "minigpt data demo -o demo"),
        (2, "N=1 minigpt sft"),
        (2, "cat x | minigpt chat"),
        (8, "minigpt eval"),
    ]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("minigpt a  # it's minigpt b\nminigpt c", ["a", "c"]),
        ("minigpt a -p '# no comment' --name=x#y", ["a|-p|# no comment|--name=x#y"]),
        ("pip install . && minigpt a -o b && X=1 minigpt c; minigpt d&", ["a|-o|b", "c", "d"]),
        ('M=$(minigpt a -d b) && N="$(minigpt c -m "$M")"', ["a|-d|b", "c|-m|$M"]),
        ("cat q | minigpt a -m m 2>&1 < in > out | jq .x", ["a|-m|m"]),
        ("minigpt a \\\n  --long\nuntil minigpt b; do\n  minigpt c\ndone", ["a|--long", "b", "c"]),
        ("if ! minigpt a; then minigpt b; fi", ["a", "b"]),
        ("cat > c.yaml <<'END'\nit's minigpt a\nEND\nminigpt b -c c.yaml", ["b|-c|c.yaml"]),
        ("minigpt a -p '' 'two\nlines'", ["a|-p||two\nlines"]),
        ("cd minigpt && echo minigpt a; ./minigpt", []),
    ],
)
def test_commands_in_shell_text(script, expected):
    assert ["|".join(words) for words in shell.commands(script)] == expected


def test_a_wrong_command_is_found(workplace):
    """An unknown flag, value or verb on a page is a fault of the fast check, whatever stands around it."""
    page = """\
```bash
M=$(minigpt pretrain --nonsense 1) && minigpt info x
```
`minigpt eval --kind poem`
`minigpt data chew`
"""
    wrong = faults("page.md", page)
    assert [text.split("  ")[0] for text in wrong] == ["page.md:1", "page.md:4", "page.md:5"]
    assert "--nonsense" in wrong[0] and "poem" in wrong[1] and "chew" in wrong[2]
    assert not faults("page.md", "`minigpt data`, `minigpt COMMAND --nonsense`, `minigpt sft -c new.yaml`")


def test_a_block_that_fails_is_told(session):
    """The place, the block and what it wrote to stderr; nothing behind it runs, not even on the block's next line."""
    folder, env = session
    page = """\
```bash
touch first
```
```bash
true && minigpt info --nonsense && true
touch second
```
```sh
touch third
```
"""
    wrong = running.run("page.md", blocks(page), folder, env)
    assert wrong is not None and wrong.startswith("page.md:4 ended with 2") and "touch second" in wrong
    assert "has no flag --nonsense" in wrong
    assert [(folder / "work" / made).exists() for made in ("first", "second", "third")] == [True, False, False]


def test_a_session_is_the_readers(session):
    """Variables go on to the next block, nothing is installed, and `minigpt` and `python` are those under test."""
    folder, env = session
    page = """\
```bash
pip install . && git clone nowhere && X=1  # note
```
```bash
[ "$X" = 1 ] && minigpt --version > version && python -c 'import sys; print(sys.prefix)' > prefix
```
```python
open("third", "w").write("&&")
```
"""
    assert running.run("page.md", blocks(page), folder, env) is None
    work = folder / "work"
    assert (work / "version").read_text().startswith("minigpt ") and (work / "third").read_text() == "&&"
    assert (work / "prefix").read_text().strip() == sys.prefix


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("a && b\nc", "a\nb\nc"),
        ("pip install '.[dev]' && pytest", "true\npytest"),
        ("a -p '&&' && b \"x && y\"  # it's && so\nc && d", "a -p '&&'\nb \"x && y\"  # it's && so\nc\nd"),
        ("if a && b; then\n  c && d\nfi", "if a && b; then\n  c\nd\nfi"),
        ("a && b || c", "a && b || c"),
        ("cat <<END\na && b\nEND\nc && d", "cat <<END\na && b\nEND\nc\nd"),
        ("a &&\n  b", "a\nb"),
    ],
)
def test_chains_stop_where_they_fail(script, expected):
    assert running.runnable(script) == expected


def test_a_block_that_never_ends_is_told(session, monkeypatch):
    """With all that it started: nothing is left running."""
    folder, env = session
    monkeypatch.setattr(running, "LIMIT", 1)
    wrong = running.run("page.md", blocks("```bash\nsleep 600 & echo $! > pid\nwait\n```\n"), folder, env)
    assert wrong is not None and wrong.startswith("page.md:1 took more than 1 s")
    deadline = time.monotonic() + 10
    while alive(int((folder / "work" / "pid").read_text())):
        assert time.monotonic() < deadline


def alive(pid: int) -> bool:
    """Runs, and is not only waiting to be buried."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_runs_a_page_goes_on_from():
    script = "minigpt sft -m runs/a -o runs/b\nminigpt chat -m runs/b\nminigpt info runs/b/step-1 runs/quickstart/chat."
    assert fixtures.runs_needed(script) == {"runs/a", "runs/quickstart/chat"}
    assert fixtures.runs_needed(script + "\nminigpt quickstart") == {"runs/a"}


@pytest.mark.slow
def test_a_page_that_goes_on_from_another(session, made_runs):
    """The runs it uses are there, fine-tuned ones under names with `chat`."""
    folder, env = session
    page = """\
```bash
minigpt generate -m runs/poems -p x
minigpt generate -m runs/chat --json -p x | jq -r .model > model
```
"""
    fixtures.put_runs(folder / "work", fixtures.runs_needed(page), made_runs)
    assert running.run("page.md", blocks(page), folder, env) is None
    assert (folder / "work" / "model").read_text() == "runs/chat/step-0000001\n"
    assert [
        json.loads((folder / "work" / "runs" / n / "run.json").read_text())["stage"] for n in ("poems", "chat")
    ] == ["pretrain", "sft"]


def test_jq_where_there_is_none(tmp_path, monkeypatch):
    """The stand-in looks values up as jq does."""
    monkeypatch.setenv("PATH", "/bin/nothing")
    fixtures.put_programs(tmp_path / "bin")
    (tmp_path / "rows.json").write_text('{"a": {"b": [1, "é"]}}\n{"a": null}', encoding="utf-8")
    for flags, said in (["-r"], "é\nnull\n"), ([], '"é"\nnull\n'):
        done = subprocess.run(
            [tmp_path / "bin" / "jq", *flags, ".a.b[1]", tmp_path / "rows.json"], capture_output=True, encoding="utf-8"
        )
        assert done.stdout == said, done.stderr
