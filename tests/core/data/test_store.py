"""Stores: every token where it should be, made once, and held-out documents that stay held out."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from minigpt.core import files
from minigpt.core.data import chat, formats, store_builder
from minigpt.core.data.store import Store, build
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, UsageError
from minigpt.core.report import Progress, Report

TEXTS = [f"Document {i}: " + "the quick brown fox, 春風 " * (i % 7 + 1) for i in range(300)]
CHATS = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}!" * (i % 3 + 1)} for i in range(50)]


@pytest.fixture(scope="module")
def base():
    """A tokenizer without a chat template."""
    return Tokenizer.train(TEXTS, 330)


@pytest.fixture(scope="module")
def talker(base):
    """The same with our template."""
    tokenizer = Tokenizer(json.dumps(base._json), base.config)
    tokenizer.chat_template = chat.template()
    return tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(name, rows):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return name


def write_texts(name, texts):
    return write(name, [{"text": t} for t in texts])


def whole(made, doc):
    return made.piece(doc, 0, int(made.docs["length"][doc]))


@pytest.fixture
def no_tokenising(monkeypatch):
    """From here on any tokenising is an error."""

    def arm():
        def refuse(*_):
            raise AssertionError("tokenised again")

        monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
        monkeypatch.setattr(files, "sha256", refuse)

    return arm


# ------------------------------------------------------------------------------------------------ contents


STRICT = (  # refuses system messages, as Gemma's template does
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_row_that_the_template_refuses_is_a_bad_row(cache, talker):
    """Named by file and line with the template's own words, and skipped and counted within --max-bad."""
    strict = Tokenizer(json.dumps(talker._json), talker.config)
    strict.chat_template = STRICT
    write("strict.jsonl", [CHATS[0], {**CHATS[1], "system": "Be kind."}, CHATS[2]])
    with pytest.raises(DataError, match=r"strict\.jsonl:2 has .*does not accept: System role not supported") as caught:
        build(["strict.jsonl"], strict, kind="chat")
    assert "--max-bad" in caught.value.fix
    made = build(["strict.jsonl"], strict, kind="chat", max_bad="1")
    assert len(made.docs) == 2
    assert made.notes == ["1 row skipped: 1 with a conversation that the chat template does not accept"]


def test_what_nobody_will_learn_is_told(cache, talker):
    """Columns, parts that the template does not write, placeholders; also by a store that was made before, under the
    name that its file has then.
    """
    row = {"instruction": "Hi", "output": "<think>hm</think>I am {{name}}.", "passage": "A tale."}
    write("a.jsonl", [*CHATS, row])
    expected = [
        "{}: not read: passage (1 row)",
        "the chat template does not write, so nobody learns: reasoning (1 row, first {}:51); sft and pack write "
        "reasoning with --thinking on",
        "1 row holds placeholders such as {{{{name}}}} (first {}:51): learnt as they stand; --fill name=… fills them",
    ]
    assert build(["a.jsonl"], talker, kind="chat").notes == [line.format("a.jsonl") for line in expected]
    os.rename("a.jsonl", "b.jsonl")
    assert build(["b.jsonl"], talker, kind="chat").notes == [line.format("b.jsonl") for line in expected]


def test_masked_answers_are_not_learnt(cache, talker):
    """`weight` 0 in a row, in the store: the ids stand, the mask does not."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "BAD", "weight": 0}]
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good", "weight": 1}]
    made = build([write("a.jsonl", [{"messages": turns + good}])], talker, kind="chat")
    tokens, learnt = whole(made, 0)
    assert talker.decode(tokens[learnt].tolist(), skip_special=False) == "good<|im_end|>"
    assert "BAD" in talker.decode(tokens.tolist())
    with pytest.raises(DataError, match=r"b\.jsonl:1 has no assistant message that is learnt"):
        build([write("b.jsonl", [{"messages": turns}])], talker, kind="chat")


def test_a_text_store_holds_every_token_framed_and_learnt(cache, base):
    made = build([write_texts("a.jsonl", TEXTS)], base)
    assert len(made.docs) == len(TEXTS)
    for doc, text in enumerate(TEXTS):
        tokens, trained = whole(made, doc)
        assert tokens.tolist() == [base.document_id, *base.encode(text), base.document_id]
        assert trained.all() and tokens.dtype == np.int64
    assert (made.docs["supervised"] == made.docs["length"] - 1).all()
    assert made.docs["bytes"].tolist() == [len(t.encode()) for t in TEXTS]
    assert made.positions(np.array([3, 5])).tolist() == [len(base.encode(TEXTS[d])) + 1 for d in (3, 5)]
    tokens, trained = made.piece(7, 2, 4)
    assert tokens.tolist() == whole(made, 7)[0][2:6].tolist() and len(trained) == 4


def test_a_chat_store_holds_what_the_template_renders(cache, talker):
    made = build([write("a.jsonl", CHATS)], talker, kind="chat")
    for doc, row in enumerate(CHATS):
        messages = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        rendered = chat.render(talker, messages)
        tokens, trained = whole(made, doc)
        assert tokens.tolist() == rendered.ids and trained.tolist() == rendered.mask
        assert made.docs["supervised"][doc] == sum(rendered.mask)
        assert made.docs["bytes"][doc] == len(row["output"].encode())
    assert made.meta["shapes"] == {"Alpaca": 50}


def test_the_account_is_exact(cache, base):
    """meta counts rows, documents, tokens, characters and sources as they are in the files."""
    write_texts("a.jsonl", TEXTS[:100])
    Path("b.txt").write_text("one\ntwo\n", encoding="utf-8")
    made = build(["a.jsonl:0.5", "b.txt"], base)
    texts = [*TEXTS[:100], "one", "two"]
    tokens = sum(len(base.encode(t)) + 2 for t in texts)
    expected = {
        "kind": "text",
        "rows": 102,
        "documents": 102,
        "tokens": tokens,
        "supervised": tokens - 102,
        "characters": sum(map(len, texts)),
        "bad": {},
        "unsupervised": 0,
        "shapes": {"text": 100, "plain text": 2},
        "tokenizer": base.fingerprint,
    }
    assert {k: made.meta[k] for k in expected} == expected
    assert made.meta["sources"] == [
        {
            "path": name,
            "sha256": hashlib.sha256(Path(name).read_bytes()).hexdigest(),
            "rows": n,
            "weight": w,
            "times": 1,
        }
        for name, n, w in (("a.jsonl", 100, 0.5), ("b.txt", 2, 1.0))
    ]
    assert made.weights == {0: 0.5, 1: 1.0} and made.notes == []
    assert np.bincount(made.docs["source"]).tolist() == [100, 2]


def test_batches_do_not_show(cache, base, monkeypatch):
    """Documents that are tokenised in small groups give the same store."""
    write_texts("a.jsonl", TEXTS)
    one = build(["a.jsonl"], base, out=Path("one"))
    monkeypatch.setattr(store_builder, "BATCH_DOCUMENTS", 7)
    two = build(["a.jsonl"], base, out=Path("two"))
    monkeypatch.setattr(store_builder, "BATCH_BYTES", 100)
    three = build(["a.jsonl"], base, out=Path("three"))
    for name in ("tokens.bin", "mask.bin", "docs.npy", "meta.json"):
        assert len({(s.path / name).read_bytes() for s in (one, two, three)}) == 1


def test_a_large_vocabulary_is_stored_in_four_bytes(cache, base, monkeypatch):
    write_texts("a.jsonl", TEXTS[:5])
    assert (build(["a.jsonl"], base).path / "tokens.bin").stat().st_size == 2 * build(["a.jsonl"], base).meta["tokens"]
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 65_537))
    monkeypatch.setattr(store_builder.RoundTrip, "check", lambda self: None)  # of an encoder that is only played
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [[65_536, 1] for _ in texts])
    made = build(["a.jsonl"], base, out=Path("wide"))
    assert whole(made, 0)[0].tolist() == [base.document_id, 65_536, 1, base.document_id]
    assert (made.path / "tokens.bin").stat().st_size == 4 * made.meta["tokens"]


def test_ids_beyond_the_vocabulary_are_noticed(cache, base, monkeypatch):
    write_texts("a.jsonl", TEXTS[:5])
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [[65_536] for _ in texts])
    with pytest.raises(DataError, match="beyond its own vocabulary"):
        build(["a.jsonl"], base)


# ------------------------------------------------------------------------------------------------ kinds


def test_conversations_are_text_for_a_tokenizer_with_a_template(cache, talker):
    """kind text: rendered, every token learnt, and mixed with documents in the order of the file."""
    write("a.jsonl", [{"text": "plain"}, CHATS[0], {"text": "more"}])
    made = build(["a.jsonl"], talker)
    messages = [{"role": "user", "content": "Say 0."}, {"role": "assistant", "content": "0!"}]
    tokens, trained = whole(made, 1)
    assert tokens.tolist() == chat.render(talker, messages).ids and trained.all()
    assert whole(made, 2)[0].tolist() == [talker.document_id, *talker.encode("more"), talker.document_id]


def test_conversations_need_a_template(cache, base):
    write("a.jsonl", [{"text": "plain"}, CHATS[0]])
    with pytest.raises(DataError, match=r"a\.jsonl:2 has a conversation") as caught:
        build(["a.jsonl"], base)
    assert "minigpt sft" in caught.value.fix


def test_text_is_not_chat(cache, talker):
    write("a.jsonl", [CHATS[0], {"text": "plain"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2 has text") as caught:
        build(["a.jsonl"], talker, kind="chat")
    assert "minigpt pretrain" in caught.value.fix


# ------------------------------------------------------------------------------------------------ bad rows

BAD_LINES = '{"text": "a"}\n{"text": null}\n{"text": \n{"text": "b"}\n{"text": ""}\n{"text": "c"}\n{"text": null}\n'


def test_the_first_bad_row_stops_and_leaves_nothing_behind(cache, base):
    Path("a.jsonl").write_text(BAD_LINES)
    with pytest.raises(DataError) as caught:
        build(["a.jsonl"], base)
    assert caught.value.message == "a.jsonl:2 has null as text" and caught.value.found == '{"text": null}'
    assert not [*(cache / "stores").glob("*")] and not [*(cache / "stores").glob(".*")]


def test_skipped_rows_are_counted_by_reason(cache, base):
    Path("a.jsonl").write_text(BAD_LINES)
    for _ in range(2):  # made, then from the cache
        made = build(["a.jsonl"], base, max_bad="4")
        assert made.meta["bad"] == {"null as text": 2, "invalid JSON": 1} and made.meta["empty"] == 1
        assert made.meta["rows"] == 7 and made.meta["documents"] == 3
        assert made.notes == ["3 rows skipped: 2 with null as text, 1 with invalid JSON", "1 empty row skipped"]


@pytest.mark.parametrize("limit", ["0", "2", "40%"])
def test_a_store_with_bad_rows_does_not_hide_them_from_a_stricter_run(cache, base, limit):
    Path("a.jsonl").write_text(BAD_LINES)
    build(["a.jsonl"], base, max_bad="4")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        build(["a.jsonl"], base, max_bad=limit)


def test_rows_of_text_without_any_are_no_bad_rows(cache, base, talker):
    """A third of wikitext: passed over and counted, in a tokenizer's training too; in a conversation a fault."""
    texts = ["= Title =", "", " \n", "\u3000\u00a0", "One paragraph."]
    write_texts("a.jsonl", texts)
    made = build(["a.jsonl"], base)
    assert made.meta["documents"] == 2 and made.meta["rows"] == 5 and made.meta["bad"] == {}
    assert "3 empty rows skipped" in made.notes
    assert list(formats.texts_for_training(["a.jsonl"])) == [texts[0], texts[-1]]
    Path("b.json").write_text(json.dumps(["", "x"]))
    assert build(["b.json"], base).meta["documents"] == 1
    write("c.jsonl", [{"instruction": "Say x.", "output": ""}])
    with pytest.raises(DataError, match=r"c\.jsonl:1 has an empty assistant message"):
        build(["c.jsonl"], talker, kind="chat")


def test_json_lines_in_a_text_file_are_told(cache, base, talker):
    """They are trained on as they stand, with a hint to rename; as conversations they are refused with that hint."""
    write("poems.txt", CHATS)
    (note,) = build(["poems.txt"], base, val_share=0.0).notes
    assert note == "poems.txt holds JSON lines and is read as plain text: rename it to poems.jsonl"
    shutil.copy("poems.txt", "other.md")
    assert "other.md holds JSON lines" in build(["other.md"], base, val_share=0.0).notes[0]
    with pytest.raises(DataError, match=r"poems\.txt:1 has JSON that is read as plain text") as caught:
        build(["poems.txt"], talker, kind="chat")
    assert "rename the file to .jsonl" in caught.value.fix
    Path("plain.txt").write_text('[1] a note\n{curly}\n{"role": "x"}\n')
    assert build(["plain.txt"], base, val_share=0.0).notes == []


def test_letters_that_end_a_document_are_told_and_can_end_one(cache, base):
    """TinyStories: stories between the letters <|endoftext|>, in a text file or in a row."""
    stories = "One day.\n\nThe end.\n<|endoftext|>\nTwo days.\n<|endoftext|>\n"
    Path("t.txt").write_text(stories)
    write_texts("t.jsonl", [stories, "plain"])
    told = "the letters <|endoftext|> stand in 1 document and are learnt as letters: --split-docs endoftext"
    for name in ("t.txt", "t.jsonl"):
        as_letters = build([name], base, val_share=0.0)
        assert as_letters.notes[0].startswith(told)
        cut = build([name], base, val_share=0.0, split_docs="endoftext")
        assert cut.notes == [] and cut.path != as_letters.path
        first, second = (base.decode(whole(cut, d)[0].tolist()[1:-1]) for d in (0, 1))
        assert (first, second) == ("One day.\n\nThe end.", "Two days.")
        assert "<|endoftext|>" not in "".join(formats.texts_for_training([name], "endoftext"))


def test_a_file_that_is_named_twice_weighs_twice(cache, base):
    """As if it were read as often: its weights add up, and that is told."""
    write_texts("a.jsonl", TEXTS[:9])
    made = build(["a.jsonl", "./a.jsonl:3"], base, val_share=0.0)
    assert made.weights == {0: 4.0} and made.meta["documents"] == 9
    assert made.notes == ["a.jsonl is named 2 times: its weights add up to 4"]
    assert build(["a.jsonl"], base, val_share=0.0).notes == []


def test_conversations_without_anything_to_learn_are_left_out_and_told(cache, talker, monkeypatch):
    write("a.jsonl", CHATS)
    true = chat.encode

    def some(tokenizer, conversations):
        return [
            chat.Rendered(r.ids, [False] * len(r.ids)) if "3" in tokenizer.decode(r.ids) else r
            for r in true(tokenizer, conversations)
        ]

    monkeypatch.setattr(chat, "encode", some)
    left = sum("3" in row["instruction"] for row in CHATS)
    made = build(["a.jsonl"], talker, kind="chat")
    assert made.meta["unsupervised"] == left and len(made.docs) == 50 - left
    assert made.notes == [f"{left} conversations left out: nothing to learn in them"]
    ends = made.docs["offset"] + made.docs["length"]
    assert made.docs["offset"].tolist() == [0, *ends[:-1].tolist()] and ends[-1] == made.meta["tokens"]
    monkeypatch.setattr(chat, "encode", lambda *a: [chat.Rendered([1, 2], [False, False])])
    with pytest.raises(DataError, match="anything to learn"):
        build([write("b.jsonl", CHATS[:1])], talker, kind="chat")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_nothing_at_all_is_an_error(cache, base, name):
    Path(name).write_text("\n\n")
    with pytest.raises(DataError, match=f"{name}: there is nothing in it"):
        build([name], base)


# ------------------------------------------------------------------------------------------------ the cache


def test_a_second_build_tokenises_and_hashes_nothing(cache, base, no_tokenising):
    write_texts("a.jsonl", TEXTS)
    first = build(["a.jsonl"], base)
    no_tokenising()
    again = build(["a.jsonl"], base)
    assert again.path == first.path and (again.docs == first.docs).all() and again.fingerprint == first.fingerprint


def test_a_copy_elsewhere_is_the_same_store(cache, base):
    """Addressed by content: the path does not matter, and is told as it is today."""
    first = build([write_texts("a.jsonl", TEXTS)], base)
    shutil.copy("a.jsonl", "b.jsonl")
    again = build(["b.jsonl:2"], base)
    assert again.path == first.path
    assert again.meta["sources"][0]["path"] == "b.jsonl" and again.weights == {0: 2.0}
    assert again.fingerprint != first.fingerprint  # a resumed run would see its rows in another order


def test_every_change_that_matters_gives_another_store(cache, base, talker):
    write_texts("a.jsonl", TEXTS)
    Path("t.txt").write_text("one\ntwo\n\nthree\n")
    other = Tokenizer.train(TEXTS, 320)
    made = [
        build(["a.jsonl"], base),
        build(["a.jsonl"], other),
        build(["t.txt"], base),
        build(["t.txt"], base, split_docs="line"),
        build(["a.jsonl", "t.txt"], base),
        build(["t.txt", "a.jsonl"], base),
        build([write("c.jsonl", CHATS)], talker),
        build(["c.jsonl"], talker, kind="chat"),
    ]
    assert len({s.path for s in made}) == len(made) == len({s.fingerprint for s in made})


def test_what_a_name_says_about_the_reading_is_part_of_the_store(cache, base):
    """JSON lines read as plain text, then renamed: read anew, as JSON. How text is cut does not matter to JSON."""
    write_texts("poems.jsonl", ["one two three", "four five six"])
    shutil.copy("poems.jsonl", "poems.txt")
    shutil.copy("poems.jsonl", "poems")
    text, lines, unnamed = (build([n], base, val_share=0.0) for n in ("poems.txt", "poems.jsonl", "poems"))
    assert text.path != lines.path and text.fingerprint != lines.fingerprint
    assert whole(text, 0)[0].tolist()[1:-1] == base.encode('{"text": "one two three"}')
    assert whole(lines, 0)[0].tolist() == whole(unnamed, 0)[0].tolist() != whole(text, 0)[0].tolist()
    assert build(["poems.jsonl"], base, split_docs="file", val_share=0.0).path == lines.path
    assert build(["poems.txt"], base, split_docs="file", val_share=0.0).path != text.path


def test_what_rows_are_framed_by_is_part_of_the_store(cache, base):
    """The same tokens with other roles make other rows: ids around a document, and what a template asks for."""

    def with_roles(template=None, **roles):
        return Tokenizer(json.dumps(base._json), {**base.config, **roles}, template)

    start = with_roles(add_bos_token=True, bos_token="<|im_start|>")
    write_texts("a.jsonl", TEXTS[:9])
    plain, opened = (build(["a.jsonl"], t) for t in (base, start))
    assert whole(opened, 0)[0][0] == base.added["<|im_start|>"] != whole(plain, 0)[0][0]
    build(["a.jsonl"], base, out=Path("packed"))
    with pytest.raises(DataError, match="packed was made with another tokenizer"):
        build(["packed"], start)
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    write("c.jsonl", CHATS)
    ends = [with_roles(source, eos_token=e) for e in ("<|im_end|>", "<|box_end|>")]
    one, two = (build(["c.jsonl"], t, kind="text", val_share=0.0) for t in ends)
    assert one.path != two.path and whole(one, 0)[0].tolist() != whole(two, 0)[0].tolist()


def test_a_file_that_changed_is_read_again(cache, base):
    """Same name, same size, other content: the time of change tells."""
    write_texts("a.jsonl", ["one", "two"])
    first = build(["a.jsonl"], base, val_share=0.0)
    stat = os.stat("a.jsonl")
    write_texts("a.jsonl", ["one", "owt"])
    os.utime("a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    again = build(["a.jsonl"], base, val_share=0.0)
    assert again.path != first.path
    assert whole(again, 1)[0].tolist() == [base.document_id, *base.encode("owt"), base.document_id]


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "docs.npy", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "empty"])
def test_a_damaged_store_is_named_when_opened_and_made_again_when_built(cache, base, name, how):
    write_texts("a.jsonl", TEXTS[:20])
    made = build(["a.jsonl"], base)
    file, good = made.path / name, (made.path / name).read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(good[: len(good) - 3] if how == "cut" else b"")
    with pytest.raises(DataError, match=name):
        Store.load(made.path)
    build(["a.jsonl"], base)
    assert file.read_bytes() == good


def test_documents_of_another_store_are_noticed(cache, base):
    one, two = (build([write_texts(f"{n}.jsonl", TEXTS[:n])], base) for n in (20, 21))
    shutil.copy(one.path / "docs.npy", two.path / "docs.npy")
    with pytest.raises(DataError, match=r"docs\.npy is damaged") as caught:
        Store.load(two.path)
    assert caught.value.found == "20"


def test_progress_ends_at_the_size_of_the_sources(cache, base):
    class Bar(Progress):
        seen: list = []  # noqa: RUF012

        def update(self, done, text="", *, line=False):
            self.seen.append(done)

    class Told(Report):
        def progress(self, total, *, start=0, label=""):
            Bar.seen.append(total)
            return Bar()

    write_texts("a.jsonl", TEXTS * 9)
    Path("b.txt").write_text("one\ntwo\n")
    build(["a.jsonl", "b.txt"], base, report=Told())
    total, *steps = Bar.seen
    assert total == sum(os.path.getsize(f) for f in ("a.jsonl", "b.txt")) == steps[-1]
    assert steps == sorted(steps) and len(steps) >= 4


# ------------------------------------------------------------------------------------------------ a store as data


def test_a_packed_store_is_taken_as_data(cache, base, no_tokenising):
    write_texts("a.jsonl", TEXTS)
    made = build(["a.jsonl"], base, out=Path("packed"))
    assert made.path == Path("packed")
    no_tokenising()
    given = build(["packed"], base, val_share=0.1)
    assert (given.docs["hash"] == made.docs["hash"]).all() and given.meta["documents"] == 300
    assert 10 < given.docs["val"].sum() < 60
    assert build(["packed:0.5"], base).weights == {0: 0.5}
    build(["a.jsonl"], base, out=Path("packed"))  # the same again: nothing to do


def test_a_packed_text_store_does_not_mind_the_template(cache, base, talker):
    """Running text is tokenised alike with and without one; rendered conversations are not."""
    build([write_texts("a.jsonl", TEXTS[:9])], talker, out=Path("text"))
    assert len(build(["text"], base).docs) == 9
    build([write("c.jsonl", CHATS)], talker, out=Path("rendered"))
    with pytest.raises(DataError, match="rendered was made with another tokenizer"):
        build(["rendered"], base)


def test_a_packed_store_must_fit(cache, base, talker):
    write_texts("a.jsonl", TEXTS)
    build(["a.jsonl"], base, out=Path("packed"))
    with pytest.raises(DataError, match="packed was made with another tokenizer"):
        build(["packed"], Tokenizer.train(TEXTS, 320))
    with pytest.raises(DataError, match="packed is a text store") as caught:
        build(["packed"], talker, kind="chat")
    assert "minigpt pretrain" in caught.value.fix
    with pytest.raises(UsageError, match="cannot be mixed"):
        build(["packed", "a.jsonl"], base)


def test_out_does_not_replace_what_is_no_store(cache, base):
    write_texts("a.jsonl", TEXTS[:9])
    write_texts("mine/a.jsonl", TEXTS[:9])
    with pytest.raises(UsageError, match="--out mine exists"):
        build(["a.jsonl"], base, out=Path("mine"))
    assert os.listdir("mine") == ["a.jsonl"]
    Path("new").mkdir()
    build(["a.jsonl"], base, out=Path("new"))
    assert len(build(["mine/a.jsonl", "a.jsonl"], base, out=Path("new")).docs) == 18  # a store makes room for another


def test_a_foreign_version_is_refused(cache, base):
    made = build([write_texts("a.jsonl", TEXTS[:9])], base, out=Path("packed"))
    (made.path / "meta.json").write_text(json.dumps({**made.meta, "format": 99}))
    with pytest.raises(DataError, match="not a token store of this version"):
        build(["packed"], base)


# ------------------------------------------------------------------------------------------------ held out


def sides(made, texts):
    """Text → whether it is held out."""
    return dict(zip(texts, made.docs["val"].tolist(), strict=True))


def test_held_out_documents_stay_held_out(cache, base):
    """Whatever is added, removed or moved: a document's side depends on its content and the share alone."""
    texts = sorted(set(TEXTS))
    before = sides(build([write_texts("a.jsonl", texts)], base, val_share=0.2), texts)
    assert 30 < sum(before.values()) < 90
    backwards = [*texts[::-1], *(f"new {i}" for i in range(50))]
    after = sides(build([write_texts("b.jsonl", backwards)], base, val_share=0.2), backwards)
    assert {t: after[t] for t in texts} == before
    fewer = texts[::3]
    assert sides(build([write_texts("c.jsonl", fewer)], base, val_share=0.2), fewer) == {t: before[t] for t in fewer}
    larger = sides(build(["a.jsonl"], base, val_share=0.4), texts)
    assert all(larger[t] for t in texts if before[t])


def test_conversations_are_held_out_by_what_is_said_not_by_the_tokenizer(cache, talker):
    other = Tokenizer.train(TEXTS, 320)
    other.chat_template = chat.template(True)
    write("a.jsonl", CHATS)
    one, two = (build(["a.jsonl"], t, kind="chat", val_share=0.3) for t in (talker, other))
    assert one.docs["val"].any() and (one.docs["val"] == two.docs["val"]).all()


def test_another_share_needs_no_new_store(cache, base, no_tokenising):
    write_texts("a.jsonl", TEXTS)
    first = build(["a.jsonl"], base, val_share=0.05)
    no_tokenising()
    again = build(["a.jsonl"], base, val_share=0.3)
    assert again.path == first.path and again.docs["val"].sum() > first.docs["val"].sum()
    assert again.fingerprint != first.fingerprint  # a resumed run would train on other documents


def test_splits_are_a_partition(cache, base):
    made = build([write_texts("a.jsonl", TEXTS)], base, val_share=0.2)
    train, val, everything = (made.indices(s) for s in ("train", "val", "all"))
    assert sorted([*train, *val]) == everything.tolist() == list(range(300))
    assert made.docs["val"][val].all() and not made.docs["val"][train].any() and train.dtype == np.int64
    assert len(build(["a.jsonl"], base, val_share=0.0).indices("val")) == 0


def test_few_questions_in_many_copies_are_all_trained_on(cache, talker):
    """Two questions, 50 copies each: both are learnt, and that nothing is left to validate on is told."""
    made = build([write("a.jsonl", CHATS[:2] * 50)], talker, kind="chat")
    assert len(made.indices("train")) == 100
    assert len(made.notes) == 1 and "copies of 2, which are all trained on" in made.notes[0]
    assert build(["a.jsonl"], talker, kind="chat", val_share=0.0).notes == []
