"""The data set that comes with minigpt: true to itself, the same everywhere, its held-out wordings kept apart."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from minigpt.core.data import reader, sample
from minigpt.core.data.formats import normalise
from minigpt.core.data.sample import parts, world
from minigpt.core.data.sample.chinese import CHINESE
from minigpt.core.data.sample.english import ENGLISH
from minigpt.core.data.schema import Conversation, Document, WrongStage
from minigpt.core.errors import UsageError
from tests.conftest import run_cli

TONGUES = pytest.mark.parametrize("tongue", [ENGLISH, CHINESE], ids=lambda t: t.name)
TRAINING = ("text", "chat", "tools", "think", "pairs", "rl")
DIGEST = "feaa18216c3126dd"


def questions(part, lang):
    for row in sample.rows(part, lang):
        yield from (m["content"] for m in row.get("messages") or row["prompt"] if m["role"] == "user")


def pattern(template, fields="xabcq"):
    """A template as an expression that any filling of it matches."""
    return re.compile(re.sub(rf"\\\{{[{fields}]\\\}}", ".+?", re.escape(template)), re.IGNORECASE)


def turns(row):
    """(question, answer) of each turn."""
    spoken = [m["content"] for m in (row["prompt"] + row["chosen"] if "prompt" in row else row["messages"])]
    return list(zip(spoken[::2], spoken[1::2], strict=True))


def without_opener(tongue, question):
    return next((question[len(o) :] for o in tongue.words["openers"] if question.startswith(o)), question)


# ------------------------------------------------------------------------------------------------ the same everywhere


def test_a_part_is_a_function_of_its_seed():
    for part in sample.PARTS:
        assert sample.jsonl(part, "both", 1) == sample.jsonl(part, "both", 1), part
    assert sample.jsonl("chat", "en", 0) != sample.jsonl("chat", "en", 1)
    state = Random(7).getstate()
    rng = Random(7)
    sample.rows("tools")
    assert rng.getstate() == state


def test_a_changed_row_is_a_new_version():
    """The version names the files in the cache, so it changes with any row: raise it, then write the digest here."""
    whole = "".join(sample.jsonl(part) for part in sample.PARTS)
    assert (sample.VERSION, hashlib.sha256(whole.encode()).hexdigest()[:16]) == (5, DIGEST)


@pytest.mark.parametrize("part", sample.PARTS)
def test_both_is_the_two_languages(part):
    def keyed(rows):
        return Counter(json.dumps(row, ensure_ascii=False) for row in rows)

    en, zh = (keyed(sample.rows(part, lang)) for lang in ("en", "zh"))
    assert keyed(sample.rows(part)) == en + zh and en and zh
    assert not any(re.search(r"[\u4e00-\u9fff]", row) for row in en)


def test_sizes():
    assert 2e6 < len(sample.jsonl("text").encode()) < 3e6
    assert 6_000 <= len(sample.rows("chat")) <= 12_000
    assert all(len(sample.rows(part, "en")) >= 500 for part in TRAINING)
    assert all(len(sample.rows(part, "en")) >= 100 for part in sample.PARTS if part not in TRAINING)


# ------------------------------------------------------------------------------------------------ wordings


@TONGUES
def test_every_kind_has_enough_wordings_and_none_twice(tongue):
    seen = Counter()
    for kind, asks in tongue.asks.items():
        assert len(asks.train) >= 12 and len(asks.held) >= 3, kind
        seen.update(way.lower() for way in asks.train + asks.held)
        fields = {frozenset(re.findall(r"{(\w)}", way)) for way in asks.train + asks.held}
        assert len(fields) == 1, (kind, fields)
    shared = {way for way, n in seen.items() if n > 1}
    assert not shared


@TONGUES
def test_no_held_out_wording_is_trained_on(tongue):
    """Not even inside a longer question."""
    held = [pattern(way) for asks in tongue.asks.values() for way in asks.held]
    held += [pattern(way.replace("{q}", "")) for asks, _ in tongue.formats.values() for way in asks.held]
    for part in TRAINING[1:]:
        trained = set(questions(part, tongue.name))
        for wording in held:
            found = [q for q in trained if wording.search(q)]
            assert not found, (part, wording.pattern, found[:3])


@TONGUES
def test_evaluation_asks_only_in_held_out_wordings(tongue):
    trained = {question for part in TRAINING[1:] for question in questions(part, tongue.name)}
    for part in ("eval", "tools-eval", "think-eval", "pairs-eval", "rl-eval"):
        assert not trained & set(questions(part, tongue.name)), part
    texts = [{row["text"] for row in sample.rows(part, tongue.name)} for part in ("text", "text-eval")]
    assert not texts[0] & texts[1]


def test_chinese_word_order():
    """`的` stands between the adjective and its noun, not before both: 德国有名的食物, nobody says 德国的有名食物."""
    wrong = re.compile(r"的(一种)?(有名|著名)(食物|城市|首都)")
    for part in sample.PARTS:
        assert not (found := [row for row in sample.jsonl(part, "zh").splitlines() if wrong.search(row)]), found[:3]


# ------------------------------------------------------------------------------------------------ truth


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_each_fact_has_one_answer(lang):
    found = list(world.facts(lang))
    assert len(found) == 66 and len({(f.relation, f.topic) for f in found}) == 66
    for fact in found:  # so that looking for the answer in a reply cannot take another one for it
        others = {f.answer for f in found if f.relation == fact.relation} - {fact.answer}
        assert not [other for other in others if fact.answer in other], fact


@TONGUES
def test_questions_and_answers_agree_with_the_world(tongue):
    """Every question on a fact, in whatever part, is answered by the sentence for exactly that fact."""
    answers = {}
    for fact in world.facts(tongue.name):
        asks = tongue.asks[fact.relation]
        for way in asks.train + asks.held:
            answers[parts.tell(way, x=fact.topic)] = (fact, parts.answer_to(tongue, fact))
    checked = 0
    for part in ("chat", "eval", "pairs", "pairs-eval"):
        for row in sample.rows(part, tongue.name):
            for question, reply in turns(row):
                bare = without_opener(tongue, question)
                if bare in answers:
                    fact, sentence = answers[bare]
                    assert reply.removeprefix(tongue.opening) == sentence
                    assert row.get("answer", fact.answer) == fact.answer and fact.answer.lower() in sentence.lower()
                    checked += 1
    assert checked > 3000


@pytest.mark.parametrize("part", sample.PARTS)
def test_sums_are_right(part):
    for found in re.findall(r"(\d+) \+ (\d+) = (\d+)", sample.jsonl(part)):
        a, b, total = map(int, found)
        assert a + b == total


def test_answers_are_in_the_rows_that_are_evaluated():
    for part in ("eval", "think-eval"):
        for row in sample.rows(part):
            assert row["answer"] in row["messages"][-1]["content"], row
    for row in sample.rows("eval"):
        if row["kind"] in ("identity", "able"):
            assert "minigpt" in row["answer"]
    kinds = Counter(row["kind"] for row in sample.rows("eval"))
    assert kinds["fact"] == 132 and kinds["sum"] == 200


@pytest.mark.parametrize("part", ["rl", "rl-eval"])
def test_answers_of_prompts_can_be_checked(part):
    for row in sample.rows(part):
        numbers = [int(n) for n in re.findall(r"\d+", row["prompt"][0]["content"])]
        if row["kind"] == "sum":
            assert int(row["answer"]) == sum(numbers)
        elif row["kind"] == "tool":
            assert row["answer"] in [tool["function"]["name"] for tool in row["tools"]]
        else:
            assert row["kind"] == "format" and row["answer"]


@TONGUES
def test_styles_are_even(tongue):
    """What pairs and rewards shall move is near one half in the conversations."""
    facts = {parts.tell(way, x=f.topic) for f in world.facts(tongue.name) for way in tongue.asks[f.relation].train}
    asked = [turn for row in sample.rows("chat", tongue.name) for turn in turns(row)]
    told = [reply for question, reply in asked if without_opener(tongue, question) in facts]
    assert 0.46 < sum(t.startswith(tongue.opening) for t in told) / len(told) < 0.54


@TONGUES
def test_conversations_have_up_to_three_turns(tongue):
    """A model sees a later question as often as a first one; no turn is lost, and none is a story beside others."""
    talks = [turns(row) for row in sample.rows("chat", tongue.name)]
    lengths = Counter(map(len, talks))
    assert set(lengths) == {1, 2, 3} and min(lengths.values()) > 500
    assert all(len(reply) <= parts.SHORT for talk in talks if len(talk) > 1 for _, reply in talk)
    opened = [q for talk in talks for q, _ in talk if q != without_opener(tongue, q)]
    assert 0.15 < len(opened) / sum(map(len, talks)) < 0.35


# ------------------------------------------------------------------------------------------------ where a file stands


@pytest.mark.parametrize("part", sample.PARTS)
def test_every_row_is_read(part):
    """Text and conversations by the stages there are; pairs and prompts wait for theirs."""
    for row in sample.rows(part):
        if part.startswith("text"):
            assert isinstance(normalise(row, "text"), Document)
        elif part.startswith("pairs"):
            assert set(row) == {"prompt", "chosen", "rejected"}
            with pytest.raises(WrongStage):
                normalise(row)
        elif part.startswith("rl"):
            assert {"prompt", "answer", "kind"} <= set(row)
        else:
            assert isinstance(normalise(row), Conversation)


def test_specs_become_files_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    one, two = reader.expand(["sample", "sample:chat:en:0.5"])
    assert (one.name, one.weight, two.name, two.weight) == ("sample", 1.0, "sample:chat:en", 0.5)
    assert one.path == sample.path_of("sample:text:both") and one.path.is_relative_to(tmp_path / "cache")
    assert two.path.read_text(encoding="utf-8") == sample.jsonl("chat", "en")
    assert next(reader.rows(two)).where == "sample:chat:en:1"
    stamp = one.path.stat().st_mtime_ns
    assert reader.expand(["sample:0.5"])[0].weight == 0.5 and one.path.stat().st_mtime_ns == stamp


def test_specs_mean_the_same_from_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    specs = ["-", "sample", "sample:chat:0.5", "a.jsonl:0.3"]
    assert [reader.anchored(s) for s in specs] == [*specs[:3], str(tmp_path / "a.jsonl:0.3")]


def test_a_file_goes_before_the_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sample").write_text("mine\n")
    (found,) = reader.expand(["sample"])
    assert found.path == Path("sample") and reader.anchored("sample") == str(tmp_path / "sample")


@pytest.mark.parametrize("spec", ["sample:", "sample:chats", "sample:chat:fr", "sample:chat:en:more", "sample:a:b:c:d"])
def test_unknown_parts_are_named(spec):
    with pytest.raises(UsageError, match="the sample has no"):
        reader.expand([spec])


def test_it_trains(tmp_path):
    small = ["--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=1", "--set",
             "model.intermediate_size=32", "--set", "model.num_attention_heads=2", "--size", "1m"]  # fmt: skip
    steps = ["--steps", "2", "--max-len", "64", "--batch-tokens", "256"]
    code, _, err = run_cli("pretrain", "-d", "sample", *small, *steps, "--vocab-size", "400", "-o", tmp_path / "pt")
    assert code == 0, err
    code, _, err = run_cli("sft", "-m", tmp_path / "pt", "-d", "sample:chat:en:0.1", *steps, "-o", tmp_path / "sft")
    assert code == 0, err
