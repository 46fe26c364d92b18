"""`minigpt chat`: what a person types, what comes back, and what is remembered."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from minigpt.core.data import chat as templates
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError
from minigpt.core.infer.engine import Engine
from minigpt.core.infer.tools import demo_tools
from minigpt.core.models import folder
from minigpt.stages import chat as stage
from minigpt.stages.conversation import answered, remembered, turns, without_oldest_turn
from minigpt.stages.slash import COMMANDS
from tests.conftest import run_cli, tiny

TEXT = ["the quick brown fox jumps over the lazy dog", "春風又綠江南岸"] * 20


def never_ends(decoder):
    """The same model with a logit of 0 for what ends an answer: never the likeliest."""
    with torch.no_grad():
        decoder.head_weight[[0, 2]] = 0
    return decoder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/{chat,think,base,tools}: the same random weights; ChatML without and with thinking, no template at all, and
    ChatML with room for descriptions of tools, which such a tokenizer writes in many tokens."""
    place = tmp_path_factory.mktemp("runs")
    tokenizer = Tokenizer.train(TEXT, 400)
    chatml, thinking = templates.template(), templates.template(True)
    for name, template, context in (
        ("chat", chatml, 512), ("think", thinking, 512), ("base", None, 512), ("tools", chatml, 8192),
    ):  # fmt: skip
        decoder = never_ends(tiny("llama", vocab_size=400, max_position_embeddings=context))
        step = place / name / "step-0000001"
        folder.write(step, decoder, decoder.config, eos_token_id=2, pad_token_id=0)
        tokenizer.chat_template = template
        tokenizer.save(step)
    return place


@pytest.fixture
def script(monkeypatch):
    """script.answers: what the model says next, each a list of pieces; an exception among them is raised.

    script.seen: (prompt as text, sampling parameters) of each answer asked for.
    """
    state = SimpleNamespace(answers=[], seen=[])

    def stream(self, ids, params):
        state.seen.append((self.tokenizer.decode(ids, skip_special=False), params))
        for piece in state.answers.pop(0) if state.answers else ["ok"]:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    monkeypatch.setattr(Engine, "stream", stream)
    return state


@pytest.fixture
def talk(runs, script):
    """talk(*lines) holds a conversation with the scripted model. Returns (messages, stderr)."""

    def hold(*lines, model="chat", args=()):
        code, out, err = run_cli("chat", "-m", runs / model, "--json", *args, stdin="".join(f"{x}\n" for x in lines))
        assert code == 0, err
        return [(m["role"], m["content"]) for m in json.loads(out)["messages"]], err

    hold.script = script
    return hold


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal. As stdin it also holds exceptions: each is raised instead of a line."""

    def __init__(self, lines=()):
        super().__init__(io.BytesIO(), encoding="utf-8", newline="", write_through=True)
        self.lines = list(lines)

    def isatty(self):
        return True

    def readline(self, *_):
        line = self.lines.pop(0) if self.lines else ""
        if isinstance(line, BaseException):
            raise line
        return line

    @property
    def text(self):
        return self.buffer.getvalue().decode("utf-8")


@contextlib.contextmanager
def streams(monkeypatch, **given):
    """Give the command streams of our own, once run_cli has put its own in place and before chat looks at them."""
    real = stage.model_path

    def model_path(*args):
        for name, stream in given.items():
            setattr(sys, name, stream)  # run_cli puts back what was there before
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "model_path", model_path)
        yield


@pytest.fixture
def person(runs, script, monkeypatch):
    """person(*lines) types lines at a terminal whose stdout is a pipe. Returns (code, stdout, stderr)."""

    def types(*lines, model="chat", args=()):
        typed = Terminal([line if isinstance(line, BaseException) else f"{line}\n" for line in lines])
        with streams(monkeypatch, stdin=typed):
            return run_cli("chat", "-m", runs / model, *args)

    types.script = script
    return types


# ---------------------------------------------------------------------------------------------- conversations


def test_history_is_part_of_the_next_prompt(talk):
    talk.script.answers = [["Hel", "lo."], ["Bye."]]
    messages, _ = talk("hi", "", "   ", "go", args=("--system", "Be kind."))
    assert messages == [
        ("system", "Be kind."), ("user", "hi"), ("assistant", "Hello."), ("user", "go"), ("assistant", "Bye."),
    ]  # fmt: skip
    assert len(talk.script.seen) == 2, "empty lines are no messages"
    for text in ("Be kind.", "hi", "Hello.", "go"):
        assert text in talk.script.seen[1][0]


def test_a_real_model_streams_what_generate_says(runs):
    """Piece by piece to stdout, nothing else there; the answer of `generate` to the same question."""
    args = ("--max-tokens", "12", "--temperature", "0")
    code, out, err = run_cli("chat", "-m", runs / "chat", *args, stdin="the fox\n")
    row = json.loads(run_cli("generate", "-m", runs / "chat", *args, "-p", "the fox")[1])
    assert (code, out, err) == (0, row["text"] + "\n", "")


def test_a_byte_order_mark_is_no_text(runs):
    """Windows' programs put it before a piped file."""
    args = ("chat", "-m", runs / "chat", "--max-tokens", "12", "--temperature", "0")
    assert run_cli(*args, stdin="\ufeffthe fox\n") == run_cli(*args, stdin="the fox\n")


def test_each_piece_is_out_before_the_next_is_made(runs, monkeypatch):
    """Streaming: what was said is already on stdout when the model goes on."""
    heard = []

    def stream(self, ids, params):
        for piece in ("one ", "two ", "three"):
            heard.append(sys.stdout.buffer.getvalue().decode())
            yield piece

    monkeypatch.setattr(Engine, "stream", stream)
    assert run_cli("chat", "-m", runs / "chat", "-p", "count")[1] == "one two three\n"
    assert heard == ["", "one ", "one two "]


def test_a_line_that_ends_in_a_backslash_goes_on(talk):
    """In a message, in a command, and at the end of the input."""
    messages, _ = talk("/system\\", "be \\", "kind", "one\\", "two\\", "three", "last\\")
    assert [text for role, text in messages if role != "assistant"] == ["be \nkind", "one\ntwo\nthree", "last"]


def test_two_slashes_send_one(talk):
    messages, err = talk("//etc/hosts is what?", "///x")
    assert [text for role, text in messages if role == "user"] == ["/etc/hosts is what?", "//x"]
    assert "no command" not in err


def test_a_prompt_of_the_command_line_is_never_a_command(talk):
    messages, _ = talk(args=("-p", "/exit"))
    assert messages == [("user", "/exit"), ("assistant", "ok")]


def test_a_base_model_continues_each_text_alone(runs, script):
    code, out, err = run_cli("chat", "-m", runs / "base", stdin="the quick\nthe lazy\n/tokens\n")
    assert (code, out) == (0, "ok\nok\n")
    assert "base model" in err and "minigpt sft" in err and "keeps no conversation" in err
    assert [prompt for prompt, _ in script.seen] == ["<|endoftext|>the quick", "<|endoftext|>the lazy"]


def test_a_base_model_forgets_and_thinks_nothing(runs, script):
    """There is no history to outgrow the context, and a tag at the end of a text is text."""
    code, out, err = run_cli("chat", "-m", runs / "base", "--json", stdin=f"a\n{'b ' * 220}\n<think>\n")
    assert code == 0 and "forgotten" not in err
    assert [m for m in json.loads(out)["messages"] if m["role"] == "assistant"] == 3 * [remembered("ok")]


@pytest.mark.parametrize("line", ["/system be kind", "/think on", "/load a.jsonl"])
def test_a_base_model_says_what_it_does_not_know(runs, script, line):
    code, _, err = run_cli("chat", "-m", runs / "base", stdin=f"{line}\n")
    assert code == 0 and "is a base model: it knows no" in err


# ---------------------------------------------------------------------------------------------- commands


def test_help_is_the_table(talk):
    _, err = talk("/help")
    for name, command in COMMANDS.items():
        assert re.search(
            rf"^  {re.escape(f'{name} {command.argument}'.strip())} +{re.escape(command.help)}$", err, re.M
        )
    assert "ends in \\" in err and "Ctrl-C" in err and "written with two" in err


def test_an_unknown_command_is_not_sent(talk):
    messages, err = talk("/rety", "/Reset")
    assert messages == [] and talk.script.seen == []
    assert "/rety is no command" in err and "did you mean /retry?" in err and "/help" in err
    assert "the conversation is forgotten" in err, "capitals do not matter"
    _, err = talk("/xyzzy")
    assert "/xyzzy is no command" in err and "did you mean" not in err


@pytest.mark.parametrize("name", ["/exit", "/quit"])
def test_exit_ends(talk, name):
    assert talk("hi", name, "never") == ([("user", "hi"), ("assistant", "ok")], "")


def test_values_behind_a_command_that_takes_none_are_refused(talk):
    talk.script.answers = [["one"], ["two"]]
    messages, err = talk("hi", "/retry but shorter", "/exit now", "/save", "go")
    assert "/retry takes nothing behind it\n  found  but shorter" in err
    assert "/exit takes nothing behind it" in err and "/save needs a FILE" in err
    assert [text for role, text in messages if role == "assistant"] == ["one", "two"]


def test_reset_forgets_all_but_the_system_message(talk):
    messages, _ = talk("hi", "/system Be brief.", "/reset", "go")
    assert messages == [("system", "Be brief."), ("user", "go"), ("assistant", "ok")]
    assert "hi" not in talk.script.seen[-1][0]


def test_system_is_set_shown_replaced_and_removed(talk):
    messages, err = talk("hi", "/system", "/system One.", "/system Two.", "/system")
    assert messages == [("system", "Two."), ("user", "hi"), ("assistant", "ok")]
    assert re.findall(r"^system (.*)$", err, re.M) == ["no system message", "One.", "Two.", "Two."]
    messages, _ = talk("hi", "/system -", args=("--system", "One."))
    assert messages == [("user", "hi"), ("assistant", "ok")]


def test_retry_replaces_the_last_answer_with_another_seed(talk):
    talk.script.answers = [["A"], ["B"], ["C"]]
    messages, _ = talk("hi", "go", "/retry", args=("--seed", "7"))
    assert messages == [("user", "hi"), ("assistant", "A"), ("user", "go"), ("assistant", "C")]
    prompts, params = zip(*talk.script.seen, strict=True)
    assert prompts[2] == prompts[1] and [p.seed for p in params] == [7, 8, 9]


def test_retry_needs_a_message_and_tells_of_temperature_0(talk):
    messages, err = talk("/retry")
    assert messages == [] and "no message to answer again" in err
    assert "stays the same" not in talk("hi", "/retry")[1]
    assert "stays the same" in talk("hi", "/retry", args=("--temperature", "0"))[1]


def test_retry_that_fails_keeps_the_old_answer(talk):
    talk.script.answers = [["A"], ["B", DataError("the disk is gone")]]
    messages, err = talk("hi", "/retry")
    assert messages == [("user", "hi"), ("assistant", "A")] and "the disk is gone" in err


def test_temp_is_checked_shown_and_used(talk):
    _, err = talk("/temp", "/temp 1.5", "a", "/temp hot", "/temp -1", "/temp nan", "/temp 101", "b", "/temp 0", "c")
    assert [p.temperature for _, p in talk.script.seen] == [1.5, 1.5, 0.0]
    assert re.findall(r"^temp +(.*)$", err, re.M) == ["0.7", "1.5", "0"]
    assert re.findall(r"found +(.*)", err) == ["hot", "-1", "nan", "101"]


def test_think_is_checked_shown_and_used(talk):
    """The prompt ends inside an open think block only when thinking is on."""
    _, err = talk("a", "/think on", "b", "/think maybe", "/think off", "c", "/think auto", "/think", model="think")
    opened = [prompt.rstrip().endswith("<think>") for prompt, _ in talk.script.seen]
    assert opened == [False, True, False]
    assert re.findall(r"^think +(.*)$", err, re.M) == ["on", "off", "auto", "auto"]
    assert "/think takes on, off or auto\n  found  maybe" in err


def test_think_says_when_the_template_knows_nothing_of_it(talk):
    assert "template has no thinking" in talk("/think on")[1]


def test_tokens_counts_the_conversation_and_the_last_answer(talk, runs):
    messages, err = talk("/tokens", "the fox", "/tokens")
    tokenizer = Tokenizer.load(runs / "chat" / "step-0000001")
    turns = [{"role": role, "content": text} for role, text in messages]
    used = len(templates.render(tokenizer, turns, generation_prompt=True).ids)
    counts = re.findall(r"^tokens (.*) in the conversation", err, re.M)
    assert counts == ["0 of 512", f"{used} of 512"]
    assert re.findall(r"^answer about (\d+) tokens, the first after [\d.]+ s", err, re.M) == [
        str(len(tokenizer.encode("ok")))
    ]


def test_speed_is_tokens_behind_the_first_a_second(talk, monkeypatch):
    """Ten tokens, the first after two seconds, the others within one: 9 tokens a second."""
    ticks = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr("minigpt.stages.conversation.time.perf_counter", lambda: next(ticks))
    talk.script.answers = [["@", "#" + "@#" * 4]]
    assert "answer about 10 tokens, the first after 2.00 s, 9 tokens/s" in talk("hi", "/tokens")[1]


# ---------------------------------------------------------------------------------------------- files


def test_a_saved_conversation_is_loaded_and_trained_on(talk, runs, tmp_path):
    """One row of messages with the thought apart; /load brings it back; `data check` finds nothing for sft to mind."""
    file = tmp_path / "my talks" / "one.jsonl"
    talk.script.answers = [["<think>\nwhy\n</think>\n\nbecause"], ["done"]]
    messages, err = talk("hi", f"/save {file}", "/reset", f"/load {file}", "go", model="think")
    assert messages == [("user", "hi"), ("assistant", "because"), ("user", "go"), ("assistant", "done")]
    assert f"saved  {file}" in err and "loaded 2 messages" in err
    assert file.read_text(encoding="utf-8").count("\n") == 1
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "because", "reasoning_content": "why"},
        ]
    }
    code, out, _ = run_cli("data", "check", file, "--kind", "chat", "--json")
    assert code == 0 and json.loads(out)["status"] == "ok"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_both_suffixes_are_read_back(talk, tmp_path, monkeypatch, name):
    """Also below one's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    messages, _ = talk("hi", f"/save ~/{name}", "/reset", f"/load ~/{name}")
    assert messages == [("user", "hi"), ("assistant", "ok")] and (tmp_path / name).is_file()


def test_save_refuses_to_overwrite_until_asked(talk, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("precious")
    _, err = talk("hi", f"/save {file}")
    assert file.read_text() == "precious" and "already there" in err and f"/save! {file}" in err
    talk("hi", f"/save! {file}")
    assert json.loads(file.read_text())["messages"][0]["content"] == "hi"


def test_save_says_why_it_cannot(talk, tmp_path):
    """Nothing answered, a suffix that would be read as text, a folder that is a file: told, and the talk goes on."""
    (tmp_path / "file").write_text("")
    messages, err = talk(f"/save {tmp_path}/a.jsonl", "hi", f"/save {tmp_path}/a.txt", f"/save {tmp_path}/file/a.jsonl")
    assert "nothing has been answered yet" in err and ".jsonl or .json" in err and "could not write" in err
    assert "--out" not in err, "there is no such flag here"
    assert len(messages) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_save_leaves_out_what_got_no_answer(talk, tmp_path):
    """An empty answer would be a bad row."""
    talk.script.answers = [["one"], [" \n"], ["three"]]
    _, err = talk("a", "b", "c", f"/save {tmp_path / 'a.jsonl'}")
    kept = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert [m["content"] for m in kept] == ["a", "one", "c", "three"] and "without 1 that got no answer" in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no file"),
        ("", "no conversation"),
        ('{"messages": [{"role": "user"', "JSON"),
        ('{"messages": [{"role": "bogus", "content": "x"}]}', "a message without a known role"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant message"),
        ('{"text": "once upon a time"}', "text but no conversation"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}', "more than one conversation"),
    ],
)
def test_a_file_that_cannot_be_loaded_changes_nothing(talk, tmp_path, content, told):
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_text(content)
    messages, err = talk("hi", f"/load {file}", "go")
    assert "warning: " in err and told in err
    assert [text for role, text in messages if role == "user"] == ["hi", "go"]


def test_a_conversation_that_the_template_refuses_is_not_loaded(talk, runs, tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"system": "s", "instruction": "a", "output": "b"}')
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + templates.template()
    original = Tokenizer.load.__func__

    def load(cls, path):
        made = original(cls, path)
        made.chat_template = strict
        return made

    monkeypatch.setattr(Tokenizer, "load", classmethod(load))
    messages, err = talk("hi", f"/load {file}", "go")
    assert "does not accept this conversation\n  found  no system" in err
    assert [text for role, text in messages if role == "user"] == ["hi", "go"]


def test_tools_of_a_loaded_conversation_are_shown_to_the_model_and_saved(talk, tmp_path):
    function = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    tools = [function, {"function": "odd"}]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": tools}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    talk(f"/load {tmp_path / 'a.jsonl'}", "hi", f"/save {tmp_path / 'b.jsonl'}", "/reset", "go")
    assert "weather" in talk.script.seen[0][0] and "weather" not in talk.script.seen[1][0]
    assert json.loads((tmp_path / "b.jsonl").read_text())["tools"] == tools


# ---------------------------------------------------------------------------------------------- tools


def calls(name, **arguments):
    """A call as a model writes it, in pieces that cut through its tags."""
    text = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    return [text[:5], text[5:30], text[30:]]


SUM = calls("calculator", expression="256 * 37")
CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "256 * 37"}}}
ASKED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": '{"result": 9472}'}


def messages_of(out):
    return json.loads(out)["messages"]


def test_a_tool_is_run_and_the_model_answers_with_its_result(runs, script):
    """Call and result go to stderr, the answer alone to stdout, and the second prompt holds the result."""
    script.answers = [SUM, ["It is ", "9472."]]
    code, out, err = run_cli("chat", "-m", runs / "tools", "-p", "256 * 37?", "--tools", "calculator")
    assert (code, out) == (0, "It is 9472.\n")
    assert err == 'tool   calculator {"expression": "256 * 37"} → {"result": 9472}\n'
    first, second = (prompt for prompt, _ in script.seen)
    assert '"name": "calculator"' in first and '"name": "clock"' not in first
    assert second.startswith(first) and '<tool_response>\n{"result": 9472}\n</tool_response>' in second
    assert [params.seed for _, params in script.seen] == [42, 43]


def test_calls_and_results_are_remembered_saved_loaded_and_trained_on(talk, runs, tmp_path):
    """Thought, speech and two calls of one answer; the row is one that fine-tuning reads, and /load goes on from it."""
    file = tmp_path / "a.jsonl"
    spoken = ["<think>\nhm\n</think>\n\nLet me see.\n", *SUM, "\n", *calls("text_length", text="春")]
    talk.script.answers = [spoken, ["done"], ["more"]]
    lines = ("go", f"/save {file}", "/reset", f"/load {file}", "/tools", "again")
    _, out, err = run_cli(
        "chat", "-m", runs / "tools", "--json", "--tools", "on", stdin="".join(f"{line}\n" for line in lines)
    )
    length = {"type": "function", "function": {"name": "text_length", "arguments": {"text": "春"}}}
    asked = {
        "role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [CALL, length],
    }  # fmt: skip
    counted = {"role": "tool", "content": '{"characters": 1, "words": 1}'}
    said = [{"role": "user", "content": "go"}, asked, TOLD, counted, {"role": "assistant", "content": "done"}]
    row = json.loads(file.read_text(encoding="utf-8"))
    assert row["messages"] == said and [tool["function"]["name"] for tool in row["tools"]] == [*demo_tools()]
    assert "loaded 5 messages" in err and "shows no tools" not in err and messages_of(out)[:5] == said
    assert talk.script.seen[2][0].count('"name": "clock"') == 1, "loaded descriptions and those that are on: once"
    code, out, _ = run_cli("data", "check", file, "--kind", "chat", "--json")
    assert code == 0 and json.loads(out)["status"] == "ok"


def test_tools_are_listed_and_switched(talk):
    lines = ("/tools", "a", "/tools on", "b", "/tools clock, calculator", "c", "/tools off", "d")
    _, err = talk(*lines, model="tools")
    shown = [[name for name in demo_tools() if f'"name": "{name}"' in prompt] for prompt, _ in talk.script.seen]
    assert shown == [[], [*demo_tools()], ["calculator", "clock"], []]
    assert re.findall(r"^tools  (on|off)$", err, re.M) == ["off", "on", "on", "off"]
    assert re.findall(r"^  (on|off) +clock +Tells the time", err, re.M) == ["off", "on", "on", "off"]


def test_a_tool_that_is_not_there_changes_nothing(talk, runs, script):
    _, err = talk("/tools calculator", "/tools calcluator", "/tools on clock", "/tools", model="tools")
    assert (
        "/tools knows no tool calcluator" in err and "did you mean calculator?" in err and "of calculator, clock" in err
    )
    assert "/tools knows no tool on" in err and re.findall(r"^  on +(\w+)", err, re.M) == 2 * ["calculator"]
    code, _, err = run_cli("chat", "-m", runs / "tools", "-p", "a", "--tools", "weather")
    assert code == 2 and "--tools knows no tool weather" in err and script.seen == []
    code, _, err = run_cli("chat", "-m", runs / "base", "-p", "a", "--tools", "on")
    assert code == 2 and "knows no tools" in err
    assert "knows no tools" in run_cli("chat", "-m", runs / "base", stdin="/tools on\n")[2]


def test_a_template_without_tools_says_so(talk, runs, monkeypatch):
    bare = templates.template().replace("{%- if tools -%}", "{%- if false -%}")
    original = Tokenizer.load.__func__

    def load(cls, path):
        made = original(cls, path)
        made.chat_template = bare
        return made

    monkeypatch.setattr(Tokenizer, "load", classmethod(load))
    assert "chat template shows no tools" in talk("/tools on")[1] and "shows no tools" not in talk("/tools")[1]
    assert "none will be called" in talk("a", model="tools", args=("--tools", "on"))[1]


def test_faults_of_a_call_are_told_to_the_model_or_to_you(talk):
    """A wrong name or argument is answered in words; what is no call stays text and is not run."""
    talk.script.answers = [calls("weather", city="Rome"), calls("calculator"), ["<tool_call>\n{oops}\n</tool_call>"]]
    messages, err = talk("hi", model="tools", args=("--tools", "on"))
    results = [text for role, text in messages if role == "tool"]
    assert "there is no tool 'weather'" in results[0] and "'expression' is missing" in results[1]
    assert messages[-1] == ("assistant", "<tool_call>\n{oops}\n</tool_call>")
    assert "the answer has a tool call that is not valid JSON" in err and "it stays text" in err


def test_without_tools_a_call_is_only_remembered(runs, script):
    """The text is shown as it is, nothing is run, and the history holds the call as the template knows it."""
    script.answers = [SUM]
    code, out, err = run_cli("chat", "-m", runs / "tools", "-p", "hi")
    assert (code, out, err) == (0, "".join(SUM) + "\n", "") and len(script.seen) == 1
    assert remembered("".join(SUM)) == ASKED


def test_a_model_that_only_calls_is_stopped(talk):
    talk.script.answers = [SUM] * 20
    messages, err = talk("hi", "go", model="tools", args=("--tools", "on"))
    assert len(talk.script.seen) == 16 and err.count("called tools 8 times without an answer") == 2
    roles = [role for role, _ in messages]
    assert roles == 2 * ["user", *8 * ["assistant", "tool"]]


def test_a_fault_between_calls_leaves_the_history(talk):
    talk.script.answers = [["A"], SUM, ["half", DataError("broken")], ["C"]]
    messages, err = talk("hi", "bad", "go", model="tools", args=("--tools", "calculator"))
    assert messages == [("user", "hi"), ("assistant", "A"), ("user", "go"), ("assistant", "C")] and "broken" in err


def test_tools_that_do_not_fit_the_context_can_be_fewer(talk):
    _, err = talk("hi", args=("--tools", "on"))
    assert "it is left out" in err and "fewer tools with /tools NAME" in err


def test_ctrl_c_keeps_whole_rounds_of_calls(person):
    """What was called and what it gave, and words of the answer; a call that nobody ran is gone."""
    stop = KeyboardInterrupt()
    person.script.answers = [
        SUM, ["It is", stop],
        SUM, [stop],
        ["Wait.\n", *SUM, stop],
        [*SUM[:2], stop],
        ["whole"],
    ]  # fmt: skip
    code, out, _ = person("a", "b", "c", "d", "e", model="tools", args=("--json", "--tools", "calculator"))

    def user(text):
        return {"role": "user", "content": text}

    def said(text):
        return {"role": "assistant", "content": text}

    assert code == 0 and messages_of(out) == [
        user("a"), ASKED, TOLD, said("It is"), user("b"), ASKED, TOLD, user("c"), said("Wait."),
        user("e"), said("whole"),
    ]  # fmt: skip


def test_ctrl_c_while_a_tool_runs_keeps_the_words_only(person, monkeypatch):
    def run(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt.core.infer.tools.call", run)
    person.script.answers = [["Wait.\n", *SUM], ["whole"]]
    _, out, _ = person("a", "b", model="tools", args=("--json", "--tools", "on"))
    assert [m["content"] for m in messages_of(out)] == ["a", "Wait.", "b", "whole"]
    assert not any("tool_calls" in m for m in messages_of(out))


def test_retry_asks_before_the_calls(talk):
    talk.script.answers = [SUM, ["A"], ["B"]]
    messages, _ = talk("hi", "/retry", model="tools", args=("--tools", "calculator"))
    assert messages == [("user", "hi"), ("assistant", "B")]


def test_reset_keeps_tools_on(talk):
    talk("/tools clock", "/reset", "hi", model="tools")
    assert '"name": "clock"' in talk.script.seen[0][0]


def test_an_answer_that_falls_silent_after_a_result_is_saved_without_it(talk, tmp_path):
    """An empty message would be a bad row."""
    talk.script.answers = [SUM, [""]]
    talk("hi", f"/save {tmp_path / 'a.jsonl'}", model="tools", args=("--tools", "calculator"))
    kept = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert kept == [{"role": "user", "content": "hi"}, ASKED, TOLD]


@pytest.mark.parametrize("colour", [True, False])
def test_a_thought_before_a_call_is_shown_and_the_call_is_not(runs, script, monkeypatch, colour):
    """Dimmed in colour; else between its tags, also where only a call follows."""
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    script.answers = [["<think>\nhm\n</think>\n\n", *SUM], ["<think>\nso\n</think>\n\n", "9472"]]
    with streams(monkeypatch, stdout=screen):
        assert run_cli("chat", "-m", runs / "tools", "-p", "a", "--tools", "on")[0] == 0
    plain = "<think>\nhm\n</think>\n<think>\nso\n</think>\n\n9472\n"
    assert screen.text == ("\x1b[2mhm\x1b[0m\n\x1b[2mso\x1b[0m\n\n9472\n" if colour else plain)


# ---------------------------------------------------------------------------------------------- limits and faults


def test_the_oldest_turns_are_forgotten_whole(talk):
    """Question and answer go together, the system message stays, and there is room for an answer."""
    talk.script.answers = [["one " * 30], ["two " * 30], ["three"]]
    messages, err = talk("a " * 40, "b " * 40, "c " * 40, args=("--system", "S", "--max-tokens", "120"))
    assert "the oldest turn is forgotten" in err
    assert [role for role, _ in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[1][1].startswith("b") and "a a a" not in talk.script.seen[2][0]


@pytest.mark.parametrize(("most", "forgets"), [(256, True), (10, False)])
def test_room_is_kept_for_an_answer(talk, most, forgets):
    """A prompt of 400 to 450 of 512 tokens leaves 10 but not the quarter that a long answer may ask for."""
    messages, err = talk("a", "b " * 200, "/tokens", args=("--max-tokens", most))
    assert 400 < int(re.search(r"tokens (\d+) of 512", err)[1]) < 480
    assert ("forgotten" in err) == forgets and len(messages) == (2 if forgets else 4)


def test_a_great_max_tokens_forgets_no_more(talk):
    assert "forgotten" not in talk("a", "b " * 100, args=("--max-tokens", 500))[1]


def test_a_message_beyond_the_context_is_left_out(talk):
    messages, err = talk("hi", "x " * 2000, "go")
    assert "the context has 512: it is left out\n  fix    shorten it" in err
    assert [text for role, text in messages if role == "user"] == ["hi", "go"]
    assert "forgotten" not in err, "what is not answered pushes nothing out"


def test_one_question_that_cannot_be_asked_is_an_error(runs, script):
    code, out, err = run_cli("chat", "-m", runs / "chat", "-p", "x " * 2000)
    assert (code, out) == (3, "") and "left out" in err


def test_a_failing_answer_leaves_the_history(talk):
    fault = DataError("broken", found="a\nb" + "x" * 300, fix="mend it")
    talk.script.answers = [["A"], ["half", fault], ["C"]]
    messages, err = talk("hi", "bad", "go")
    assert messages == [("user", "hi"), ("assistant", "A"), ("user", "go"), ("assistant", "C")]
    assert re.search(r"^warning: broken\n  found  a bx+…\n  fix    mend it$", err, re.M)


def test_turns():
    """A question with all that follows it; the system message is no part of a turn that is forgotten."""
    said = [{"role": role, "content": str(i)} for i, role in enumerate(("system", "user", "assistant", "tool", "user"))]
    assert [[m["role"] for m in turn] for turn in turns(said)] == [["system"], ["user", "assistant", "tool"], ["user"]]
    assert without_oldest_turn(said) == [said[0], said[4]]
    assert without_oldest_turn([said[0], said[4]]) is None
    assert answered(said) == (said[:4], 1)


# ---------------------------------------------------------------------------------------------- thinking


def test_a_thought_is_remembered_apart(talk, runs, script):
    """An open think block, also one that was cut off, is no part of what was said."""
    script.answers = [["be", "cause\n</th", "ink>\n\nyes"], ["cut off"]]
    code, out, _ = run_cli("chat", "-m", runs / "think", "--think", "--json", stdin="a\nb\n")
    assert code == 0 and [m for m in json.loads(out)["messages"] if m["role"] == "assistant"] == [
        {"role": "assistant", "content": "yes", "reasoning_content": "because"},
        {"role": "assistant", "content": "", "reasoning_content": "cut off"},
    ]
    assert remembered("<think>\na\n</think>\n\nb")["reasoning_content"] == "a"


def test_a_pipe_gets_the_exact_text(runs, script):
    script.answers = [["<thi", "nk>\nwhy\n</thi", "nk>\n\nyes"]]
    assert run_cli("chat", "-m", runs / "chat", "-p", "a")[1] == "<think>\nwhy\n</think>\n\nyes\n"


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_shows_thought_dimmed(runs, script, monkeypatch, colour):
    """In colour: dimmed, without tags, a blank line before the answer. NO_COLOR: the text as it is."""
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    script.answers = [["why", "\n</thi", "nk>\n\nyes", " sir"]]
    with streams(monkeypatch, stdout=screen):
        assert run_cli("chat", "-m", runs / "think", "--think", "-p", "a")[0] == 0
    assert screen.text == ("\x1b[2mwhy\x1b[0m\n\nyes sir\n" if colour else "why\n</think>\n\nyes sir\n")


def test_the_end_of_a_thought_cut_off_is_shown(runs, script, monkeypatch):
    """Held back as the beginning of a tag, it was text after all."""
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    script.answers = [["why </th"]]
    with streams(monkeypatch, stdout=screen):
        assert run_cli("chat", "-m", runs / "think", "--think", "-p", "a")[0] == 0
    assert screen.text == "\x1b[2mwhy \x1b[0m\x1b[2m</th\x1b[0m\n"


# ---------------------------------------------------------------------------------------------- a person


def test_prompts_go_to_stderr_when_stdout_is_a_pipe(person):
    code, out, err = person("hi\\", "there", "/exit")
    assert (code, out) == (0, "ok\n")
    assert "/help" in err and err.endswith("you> ...> you> ")


def test_in_a_pipe_there_is_no_prompt(runs, script):
    assert run_cli("chat", "-m", runs / "chat", stdin="hi\n") == (0, "ok\n", "")


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(person):
    """Back at the prompt at once, without the hint; the half answer is history."""
    person.script.answers = [["half ", "an", KeyboardInterrupt()], ["whole"]]
    code, out, err = person("hi", "go", args=("--json",))
    assert code == 0 and "press Ctrl-D" not in err
    assert [m["content"] for m in json.loads(out)["messages"]] == ["hi", "half an", "go", "whole"]


def test_ctrl_c_before_the_first_word_takes_the_question_back(person):
    person.script.answers = [["A"], [KeyboardInterrupt()], ["C"]]
    code, out, _ = person("hi", "oops", "go")
    assert (code, out) == (0, "A\n\nC\n")
    assert "oops" not in person.script.seen[2][0] and "hi" in person.script.seen[2][0]


def test_ctrl_c_at_the_prompt_tells_how_to_leave_and_twice_leaves(person):
    stop = KeyboardInterrupt
    code, out, err = person(stop(), "hi", stop(), "half\\", stop(), "never")
    assert (code, out) == (0, "ok\n") and err.count("press Ctrl-D or type /exit to leave") == 2


def test_ctrl_d_ends(person):
    assert person()[0] == 0


def test_ctrl_c_while_a_pipe_is_awaited_ends_the_program(runs, script, monkeypatch):
    pipe = Terminal([KeyboardInterrupt(), "hi\n"])
    pipe.isatty = lambda: False
    with streams(monkeypatch, stdin=pipe):
        assert run_cli("chat", "-m", runs / "chat")[:2] == (130, "")


def test_bytes_that_are_no_text_are_replaced(runs, script):
    """A pipe is UTF-8 whatever the locale says."""
    code, out, _ = run_cli("chat", "-m", runs / "chat", "--json", stdin="春".encode() + b"\xff\n")
    assert code == 0 and json.loads(out)["messages"][0]["content"] == "春\ufffd"


def test_ctrl_c_in_a_pipe_ends_the_program(runs, script):
    """Nobody is there to go on with: what was said is out, the line is ended, and a shell sees the interruption."""
    script.answers = [["half", KeyboardInterrupt()]]
    code, out, err = run_cli("chat", "-m", runs / "chat", stdin="hi\ngo\n")
    assert (code, out) == (130, "half\n") and "interrupted" in err


class Screen:
    """A program in a terminal of its own."""

    def __init__(self, *args):
        import pty

        self.handle, inner = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "NO_COLOR": "", "OMP_NUM_THREADS": "1"}

        def own_terminal():  # so that the Ctrl-C byte becomes SIGINT for it
            import fcntl
            import termios

            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "minigpt", *map(str, args)],
            stdin=inner, stdout=inner, stderr=inner, env=env, preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(inner)
        self.text = ""

    def type(self, text):
        os.write(self.handle, text.encode())

    def wait_for(self, pattern, seconds=90):
        """Read on until the pattern comes. Returns the text since the last one, up to the end of this one."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            if select.select([self.handle], [], [], 0.1)[0]:
                heard = self.text + os.read(self.handle, 1 << 16).decode("utf-8", "replace")
                self.text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", heard)  # colours, and readline's own moves
        self.text, before = self.text[found.end() :], self.text[: found.end()]
        return before

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        os.close(self.handle)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a pty")
def test_at_a_real_terminal(runs):
    """Type, edit, stop an answer with Ctrl-C, be told how to leave, leave: exit code 0."""
    screen = Screen("chat", "-m", runs / "tools", "--max-tokens", "8000", "--temperature", "0")
    try:
        screen.wait_for("you> ")
        screen.type("the foz\x7fx\r")  # a backspace
        screen.wait_for(r"the fo[^\n]*\n\r*[^\r\n]{5}")
        screen.type("\x03")
        assert "press Ctrl-D" not in screen.wait_for("you> ")
        screen.type("/tokens\r")
        told = screen.wait_for(r"about ([\d,]+) tokens")
        assert 0 < int(re.search(r"about ([\d,]+) tokens", told)[1].replace(",", "")) < 5000, "the answer was stopped"
        screen.wait_for("you> ")
        screen.type("\x1b[A\x1b[A\r")  # the line before the last one, from readline's history
        screen.wait_for(r"the fox[^\n]*\n\r*[^\r\n]{5}")
        screen.type("\x03")
        screen.wait_for("you> ")
        time.sleep(0.3)  # a Ctrl-C before readline waits for keys would be seen at the next key only
        screen.type("\x03")
        screen.wait_for("press Ctrl-D or type /exit to leave")
        screen.wait_for("you> ")
        screen.type("/exit\r")
        assert screen.process.wait(30) == 0
    finally:
        screen.close()


# ---------------------------------------------------------------------------------------------- which model


def saved(runs, place, at):
    """A copy of a chat model as a run whose newest step was saved at that time."""
    step = place / "step-0000001"
    step.mkdir(parents=True)
    for file in (runs / "chat" / "step-0000001").iterdir():
        (step / file.name).symlink_to(file)
    os.utime(step, (at, at))


def test_without_a_model_the_newest_run_answers(runs, script, tmp_path, monkeypatch):
    """By the time of the newest step, also in a folder of runs; a run that never saved one is passed over."""
    monkeypatch.setenv("MINIGPT_RUNS", str(tmp_path))
    saved(runs, tmp_path / "z-old", 1_000)
    saved(runs, tmp_path / "mine" / "new", 3_000)
    saved(runs, tmp_path / "middle", 2_000)
    (tmp_path / "unsaved" / "step-0000009").mkdir(parents=True)
    code, out, err = run_cli("chat", "-p", "hi")
    assert (code, out) == (0, "ok\n")
    assert err == f"model  {tmp_path / 'mine' / 'new'}, the newest run; --model names another\n"


def test_without_any_run_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIGPT_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("chat", "-p", "hi")
    assert code == 2 and "no run with a saved step" in err and "minigpt quickstart" in err and "--model" in err


@pytest.mark.slow
def test_the_first_word_does_not_wait_for_transformers(runs):
    code = (
        "import sys; from minigpt.cli.app import main;"
        f"code = main(['chat', '-m', {str(runs / 'chat')!r}, '-p', 'hi', '--max-tokens', '2']);"
        "sys.exit(code or 9 * ('transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0
