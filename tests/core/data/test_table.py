"""Tables: the rows that a spreadsheet or pandas wrote, with the lines they begin in, and faults that cost one row."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from minigpt.core.data import reader, table
from minigpt.core.data.formats import read as as_record
from minigpt.core.data.schema import BadRow
from minigpt.core.data.store import build
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError
from tests.core.data.test_corpora import real


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path, content):
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def read(name):
    """(where, value) of every row; a faulty one as (where, reason)."""
    (source,) = reader.expand([name])
    return [(r.where, r.fault.reason if r.fault else r.value) for r in reader.rows(source)]


ROWS = [
    {"instruction": "Say hi", "input": None, "output": "Hi!"},
    {"instruction": 'quotes ", commas, and', "input": "two\nlines\n\nand a blank one", "output": "三 😀"},
    {"instruction": "end", "input": "\ttab", "output": "x;y"},
]
LINES = [2, 3, 7]


def written(rows, separator=",", end="\n", index=False, **how):
    """The rows as Python's csv module writes them."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end, **how)
    writer.writerow([*([""] if index else []), *rows[0]])
    writer.writerows([*([n] if index else []), *row.values()] for n, row in enumerate(rows))
    return out.getvalue()


LAYOUTS = {
    "a.csv": written(ROWS),
    "crlf.csv": written(ROWS, end="\r\n").replace("two\nlines\n\nand", "two\r\nlines\r\n\r\nand"),
    "bom.csv": "\ufeff" + written(ROWS),
    "quoted.csv": written(ROWS, quoting=csv.QUOTE_ALL),
    "semicolon.csv": written(ROWS, ";"),
    "tabs.tsv": written(ROWS, "\t"),
    "index.csv": written(ROWS, index=True),
    "no-newline.csv": written(ROWS).rstrip("\n"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("pack", [None, gzip], ids=["plain", "gz"])
def test_every_layout_gives_the_same_rows_with_their_lines(here, name, pack):
    raw = LAYOUTS[name].encode()
    name += ".gz" if pack else ""
    put(here / name, pack.compress(raw) if pack else raw)
    assert read(name) == [(f"{name}:{line}", row) for line, row in zip(LINES, ROWS, strict=True)]


def test_pandas_reads_the_same(here):
    pandas = pytest.importorskip("pandas")
    put(here / "a.csv", LAYOUTS["a.csv"])
    theirs = pandas.read_csv("a.csv", keep_default_na=False).to_dict("records")
    assert [{k: v or None for k, v in row.items()} for row in theirs] == [row for _, row in read("a.csv")]


def test_blank_lines_and_empty_rows_are_passed_over(here):
    put(here / "a.csv", '\n\na,b\n\n1,2\n,\n"",""\n3,\n')
    assert read("a.csv") == [("a.csv:5", {"a": "1", "b": "2"}), ("a.csv:8", {"a": "3", "b": None})]
    for empty in ("", "\n\n"):
        put(here / "e.csv", empty)
        assert read("e.csv") == []


def test_a_fault_costs_one_row(here):
    """Too few or many cells, wrong quotes, other encodings and nameless columns; the rows after them are read."""
    gbk = "你好".encode("gbk")
    lines = [b"a,b,", b"1,2,", b"1", b"1,2,3,4", b'"x" y,2,', b"\xff" + gbk + b",2,", b"1,2,3", b'"7\n8",9,']
    put(here / "a.csv", b"\n".join(lines) + b"\n")
    assert read("a.csv") == [
        ("a.csv:2", {"a": "1", "b": "2"}),
        ("a.csv:3", "another number of cells than the header"),
        ("a.csv:4", "another number of cells than the header"),
        ("a.csv:5", "a quote in the wrong place"),
        ("a.csv:6", "bytes that are not UTF-8"),
        ("a.csv:7", "a cell in a column without a name"),
        ("a.csv:8", {"a": "7\n8", "b": "9"}),
    ]


def test_a_quote_that_is_never_closed_is_noticed(here):
    put(here / "a.csv", 'a,b\n1,2\n"3,4\n5,6\n')
    assert read("a.csv") == [("a.csv:2", {"a": "1", "b": "2"}), ("a.csv:3", "a quote in the wrong place")]


def test_cells_may_be_huge_and_are_bounded(here, monkeypatch):
    """Beyond the 131,072 characters that Python's csv allows."""
    put(here / "a.csv", "text\n" + "x" * 300_000 + "\n")
    assert read("a.csv") == [("a.csv:2", {"text": "x" * 300_000})]
    monkeypatch.setattr(table, "LONGEST_ROW", 1000)
    put(here / "b.csv", 'text\n"' + "x\n" * 5000 + '"\nend\n')
    assert read("b.csv")[0] == ("b.csv:2", "a quote in the wrong place")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,a\n1,2\n", "two columns of one name"),
        (",\n1,2\n", "names no columns"),
        ("问题,答案\n1,2\n".encode("gbk"), "is not UTF-8"),
        ('"a" b,c\n1,2\n', "the header is not one of a table"),
    ],
)
def test_a_header_that_names_no_columns_is_refused(here, content, message):
    put(here / "a.csv", content)
    with pytest.raises(DataError, match=message):
        read("a.csv")


def test_columns_of_messages_hold_json(here):
    talk = [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": "c"}]
    put(here / "a.csv", written([{"messages": json.dumps(talk)}, {"messages": "[{"}]))
    assert read("a.csv") == [("a.csv:2", {"messages": talk}), ("a.csv:3", "invalid JSON in messages")]


def test_usual_shapes_come_out_of_columns(here, monkeypatch):
    """Alpaca, question and answer, text; an empty text is an empty row, not a bad one."""
    monkeypatch.setenv("MINIGPT_CACHE", str(here / "cache"))
    put(here / "a.csv", LAYOUTS["a.csv"])
    assert {as_record(row)[1] for _, row in read("a.csv")} == {"Alpaca"}
    put(here / "q.tsv", "question\tanswer\nWho?\tMe\n")
    assert as_record(read("q.tsv")[0][1])[1] == "question and answer"
    put(here / "t.csv", 'id,text\n1,one\n2,\n3,"three, four"\n')
    made = build(["t.csv"], Tokenizer.train(["one two"], 310), val_share=0.0)
    assert made.meta["documents"] == 2 and made.notes == ["1 empty row skipped"]
    assert reader.reading(*reader.expand(["t.csv"]), "auto") != "json"


# ------------------------------------------------------------------------------------------------ exams

QUESTION = "Which is a fruit?\nA. stone\nB. pear\nC. 7"


@pytest.mark.parametrize(
    "row",
    [
        {"Question": "Which is a fruit?", "A": "stone", "B": "pear", "C": "7", "D": None, "Answer": "B"},
        {"question": "Which is a fruit?", "a": "stone", "b": "pear", "c": "7", "answer": " b "},
        {"question": "Which is a fruit?", "choices": ["stone", "pear", 7], "answer": 1, "subject": "x"},
        {"question": "Which is a fruit?", "choices": ["stone", "pear", "7"], "answer": "pear"},
    ],
)
def test_an_exam_question_shows_its_choices(row):
    """The user asks with the choices by letter, the answer is a letter."""
    reading = as_record(row)
    assert reading.shape == "exam" and reading.unread == ()
    assert reading.record.messages == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "B"}]


@pytest.mark.parametrize("answer", ["E", "", "none", 4, -1, 1.5])
def test_an_answer_that_is_no_choice_is_a_fault(answer):
    with pytest.raises(BadRow, match="none of the choices"):
        as_record({"Question": "Which?", "A": "one", "B": "two", "C": "3", "Answer": answer})


@pytest.mark.parametrize("subject", ["anatomy", "astronomy", "logical"])
def test_published_exams_are_read_whole(subject):
    """CMMLU's own files: every question, its four choices and the right letter."""
    file = real(f"cmmlu/{subject}.csv")
    theirs = list(csv.DictReader(io.StringIO(Path(file).read_text(encoding="utf-8-sig"))))
    (source,) = reader.expand([file])
    ours = [as_record(row.value)[0] for row in reader.rows(source)]
    assert len(ours) == len(theirs) > 100
    for record, row in zip(ours, theirs, strict=True):
        asked, answer = (m["content"] for m in record.messages)
        assert asked == "\n".join([row["Question"], *(f"{c}. {row[c]}" for c in "ABCD")])
        assert answer == row["Answer"]
