"""Files and containers: the same rows come out of every layout, and every one knows its line."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from minigpt.core.data import jsonstream, plaintext, reader
from minigpt.core.errors import DataError, MissingError, UsageError
from minigpt.core.files import is_blank

ROWS = [{"text": "first"}, {"text": 'zwei\nlines {[ " \\ ]}'}, {"text": "三 😀"}]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def read(name, split_docs="auto"):
    """(where, value) of every row; a faulty one as (where, reason)."""
    (source,) = reader.expand([str(name)])
    return [(r.where, r.fault.reason if r.fault else r.value) for r in reader.rows(source, split_docs)]


def stdin(monkeypatch, content: bytes):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ containers

LAYOUTS = {
    "a.jsonl": (LINES, [1, 2, 3]),
    "crlf.jsonl": (LINES.replace("\n", "\r\n"), [1, 2, 3]),
    "bom.ndjson": ("\ufeff" + LINES, [1, 2, 3]),
    "blank.jsonl": ("\n \n" + LINES.replace("\n", "\n\n"), [3, 5, 7]),
    "no-newline-at-end.jsonl": (LINES.rstrip(), [1, 2, 3]),
    "concatenated.jsonl": (LINES.replace("\n", ""), [1, 1, 1]),
    "lines.json": (LINES, [1, 2, 3]),
    "pretty.jsonl": ("\n".join(json.dumps(r, ensure_ascii=False, indent=2) for r in ROWS), [1, 4, 7]),
    "commas.json": (",\n".join(json.dumps(r, indent=1) for r in ROWS), [1, 4, 7]),
    "array.json": (json.dumps(ROWS), [1, 1, 1]),
    "pretty-array.json": (json.dumps(ROWS, indent=2), [2, 5, 8]),
    "array.jsonl": ("\n[" + json.dumps(ROWS)[1:], [2, 2, 2]),
    "bom-array.json": ("\ufeff\n" + json.dumps(ROWS), [2, 2, 2]),
    "data.json": (json.dumps({"data": ROWS, "version": 1}), [1, 1, 1]),
    "pretty-data.json": (json.dumps({"data": ROWS, "version": 1}, indent=2), [3, 6, 9]),
    "data-last.json": (json.dumps({"version": 1, "data": ROWS}), [1, 1, 1]),
    "joined-arrays.json": (json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:]), [1, 1, 2]),
    "joined-array-and-lines.json": (json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2]), [1, 1, 2]),
    "joined-data.json": (json.dumps({"data": ROWS[:2], "v": [1]}) + "\n" + json.dumps({"data": ROWS[2:]}), [1, 1, 2]),
    "bom-within.jsonl": ("\ufeff\ufeff" + LINES.replace("\n", "\n\ufeff"), [1, 2, 3]),
    "bom-in-line.jsonl": (LINES.rstrip().replace("\n", "\ufeff"), [1, 1, 1]),
    "bom-arrays.json": ("\ufeff" + json.dumps(ROWS[:2]) + "\n\ufeff" + json.dumps(ROWS[2:]), [1, 1, 2]),
    "bom-pretty.json": ("\n\ufeff".join(json.dumps(r, ensure_ascii=False, indent=2) for r in ROWS), [1, 4, 7]),
    "wide-blanks.jsonl": (LINES.replace("\n", "\n\u3000\u00a0\n"), [1, 3, 5]),
    "no-suffix": (LINES, [1, 2, 3]),
    "no-suffix-pretty": (json.dumps(ROWS, indent=2), [2, 5, 8]),
    "odd.suffix": (json.dumps(ROWS), [1, 1, 1]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("pack", [None, gzip, bz2, lzma], ids=["plain", "gz", "bz2", "xz"])
def test_every_layout_gives_the_same_rows_with_their_lines(here, name, pack):
    content, lines = LAYOUTS[name]
    suffix = {None: "", gzip: ".gz", bz2: ".bz2", lzma: ".xz"}[pack]
    raw = content.encode("utf-8")
    put(here / (name + suffix), pack.compress(raw) if pack else raw)
    found = read(name + suffix)
    assert [value for _, value in found] == ROWS
    assert [where.split(" ")[0] for where, _ in found] == [f"{name}{suffix}:{n}" for n in lines]


def test_rows_of_an_array_are_numbered(here):
    put(here / "a.json", json.dumps(ROWS))
    assert [where for where, _ in read("a.json")] == ["a.json:1 (row 1)", "a.json:1 (row 2)", "a.json:1 (row 3)"]


def test_a_compressed_file_is_known_by_its_content(here):
    put(here / "a.jsonl", gzip.compress(LINES.encode()))
    assert [v for _, v in read("a.jsonl")] == ROWS


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("ascii", [True, False])
def test_where_the_buffer_ends_does_not_matter(here, monkeypatch, chunk, ascii):
    """Characters, escapes, literals and numbers cut in two by the buffer come out whole, with their lines."""
    monkeypatch.setattr(jsonstream, "_CHUNK", chunk)
    rows = [*ROWS, {"a": [True, False, None, -12.5e-3, "\\u00e9 é"], "b": {"c": []}}, {"text": "end"}]
    one_a_line = [json.dumps(r, ensure_ascii=ascii) for r in rows]
    put(here / "array.json", "[\n" + ",\n".join(one_a_line) + "\n]\n")
    put(here / "data.json", '{"data":\n[\n' + ",\n".join(one_a_line) + "\n]}\n")
    put(here / "pretty.jsonl", "{\n" + "\n{".join(line[1:] for line in one_a_line))
    for name, first in (("array.json", 2), ("data.json", 3), ("pretty.jsonl", 1)):
        found = read(name)
        assert [v for _, v in found] == rows
        lines = [int(w.split(":")[1].split(" ")[0]) for w, _ in found]
        assert lines == [first + i + (name == "pretty.jsonl" and i > 0) for i in range(len(rows))]


NOT_JSON = {
    "verses": "[Verse 1]\nHello\n",
    "template": "{{ name }}, hello\n",
    "footnotes": "[1] Smith, J.\n[2] Doe, J.\n",
    "number": "[1]\nfirst\n[2]\nsecond\n",
    "quote": '["Stop!" he said.]\nThe end.\n',
    "code": "{\n  int x;\n}\n",
    "list": '["a", "b"] is a list\n',
    "one example": '[Usage]\n{"text": "hello"}\nis a row.\n',
}
JSON_WITH_A_FAULT = {
    "a later line": (LINES + "[Verse 1]\n", ":4"),
    "the first line": ('{"text": "a" "b"}\n' + LINES, ":1"),
    "not json at first": ("{not json}\n" + LINES, ":1"),
    "cut off": ('[{"text": "a"},\n{"text": "b', ":2"),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_a_bracket_alone_makes_no_json(here, monkeypatch, name):
    """What comes through a pipe, or has no telling name, is text unless it can be read as JSON."""
    stdin(monkeypatch, NOT_JSON[name].encode())
    assert "\n".join(v for _, v in read("-", "line")) + "\n" == NOT_JSON[name]


@pytest.mark.parametrize("name", JSON_WITH_A_FAULT)
def test_a_fault_does_not_make_text_of_json(here, monkeypatch, name):
    content, where = JSON_WITH_A_FAULT[name]
    stdin(monkeypatch, content.encode())
    faults = [w for w, v in read("-") if v == "invalid JSON"]
    assert [w.split(" ")[0] for w in faults] == ["stdin" + where]


@pytest.mark.parametrize("row", [{"text": "x" * 9000}, {"x" * 3000: "y" * 3000}, "字" * 5000, ["a"]], ids=str)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_known_where_its_first_row_is_longer_than_what_is_looked_at(here, monkeypatch, row, indent):
    stdin(monkeypatch, json.dumps([row, row], indent=indent, ensure_ascii=False).encode())
    assert [v for _, v in read("-")] == [row, row]


def test_strings_in_an_array_are_rows(here):
    put(here / "a.json", json.dumps(["one", "two"]))
    assert [v for _, v in read("a.json")] == ["one", "two"]


# ------------------------------------------------------------------------------------------------ faults


def test_a_line_that_is_no_json_is_named_and_the_others_are_read(here):
    put(here / "a.jsonl", '{"text": "a"}\n{"text": "b"\n\n{"text": "c"} x\n{"text": "d"}\nnull\n')
    assert read("a.jsonl") == [
        ("a.jsonl:1", {"text": "a"}),
        ("a.jsonl:2", "invalid JSON"),
        ("a.jsonl:4", "invalid JSON"),
        ("a.jsonl:5", {"text": "d"}),
        ("a.jsonl:6", None),
    ]


def test_a_first_line_that_is_cut_off_does_not_take_the_next_with_it(here):
    put(here / "a.jsonl", '{"text": "b"\n{"text": "c"}\n{"text": "d"}\n')
    assert read("a.jsonl") == [
        ("a.jsonl:1", "invalid JSON"),
        ("a.jsonl:2", {"text": "c"}),
        ("a.jsonl:3", {"text": "d"}),
    ]


def test_a_fault_costs_one_row_wherever_the_buffer_ends(here, monkeypatch):
    good = [f'  {{"text": "{i}"}}' for i in range(6)]
    put(here / "a.json", "[\n" + ",\n".join([good[0], '{"text": }' + " " * 90, *good[1:]]) + "\n]")
    for chunk in range(1, 160):
        monkeypatch.setattr(jsonstream, "_CHUNK", chunk)
        assert [v for _, v in read("a.json")] == [
            {"text": "0"},
            "invalid JSON",
            *({"text": f"{i}"} for i in range(1, 6)),
        ]


def test_a_fault_in_an_array_costs_one_row(here):
    put(here / "a.json", '[\n{"text": "a"},\n{"text": },\n{"text": "c"},\n  {"text": "d"}\n]\n')
    assert read("a.json") == [
        ("a.json:2 (row 1)", {"text": "a"}),
        ("a.json:3 (row 2)", "invalid JSON"),
        ("a.json:4 (row 3)", {"text": "c"}),
        ("a.json:5 (row 4)", {"text": "d"}),
    ]


def test_an_array_that_is_cut_off_is_noticed(here):
    put(here / "a.json", '[\n{"text": "a"},\n{"text": "b"}\n')
    assert read("a.json")[2:] == [("a.json:4", "no closing bracket")]
    put(here / "b.json", '[\n{"text": "a"},\n{"text": "b')
    assert [v for _, v in read("b.json")] == [{"text": "a"}, "invalid JSON", "no closing bracket"]


def test_bytes_that_are_not_utf8_are_a_fault_of_their_row(here):
    gbk = "你好".encode("gbk")
    put(here / "a.jsonl", b'{"text": "a"}\n{"text": "' + gbk + b'"}\n{"text": "c"}\n')
    put(here / "b.json", b'[{"text": "a"},\n{"text": "' + gbk + b'"},\n{"text": "c"}]')
    put(here / "c.txt", b"one\n" + gbk + b"\nthree\n")
    put(here / "d.txt", b"one\n\ntwo\n" + gbk + b"\n")
    fault = "bytes that are not UTF-8"
    assert read("a.jsonl") == [("a.jsonl:1", {"text": "a"}), ("a.jsonl:2", fault), ("a.jsonl:3", {"text": "c"})]
    assert [v for _, v in read("b.json")] == [{"text": "a"}, fault, {"text": "c"}]
    assert read("b.json")[1][0] == "b.json:2 (row 2)"
    assert read("c.txt") == [("c.txt:1", "one"), ("c.txt:2", fault), ("c.txt:3", "three")]
    assert read("d.txt") == [("d.txt:4", fault)]


def test_json_that_is_nested_beyond_reason_is_a_fault(here):
    put(here / "a.jsonl", '{"a": 1}\n' + "[" * 200_000 + "\n" + '{"a": 2}\n')
    assert [v for _, v in read("a.jsonl")] == [{"a": 1}, "invalid JSON", {"a": 2}]


@pytest.mark.parametrize("begin", ['[{"text": "', '[{"text": ['], ids=["quote", "bracket"])
def test_a_row_without_end_does_not_pull_in_the_file(here, monkeypatch, begin):
    monkeypatch.setattr(jsonstream, "LONGEST_ROW", 1 << 15)
    monkeypatch.setattr(jsonstream, "_CHUNK", 1 << 12)
    rows = [{"text": f"{i}" + "x" * 1000} for i in range(5_000)]
    put(here / "a.json", begin + "\n" + ",\n".join(json.dumps(r) for r in rows) + "]")
    (source,) = reader.expand(["a.json"])
    tracemalloc.start()
    faults = [r.where for r in reader.rows(source) if r.fault]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert faults == ["a.json:1 (row 1)"] and peak < 1 << 20
    assert [v for _, v in read("a.json")][1:] == rows


def test_what_follows_the_last_row_is_not_ignored(here):
    put(here / "a.json", '[{"text": "a"}]\nand so on\n')
    assert [v for _, v in read("a.json")] == [{"text": "a"}, "invalid JSON"]
    put(here / "a.jsonl", json.dumps(ROWS[0], indent=1).encode() + b"\n\xe4")
    assert read("a.jsonl") == [("a.jsonl:1", ROWS[0]), ("a.jsonl:4", "invalid JSON")]


def test_a_number_is_not_cut_in_two(here, monkeypatch):
    monkeypatch.setattr(jsonstream, "_CHUNK", 3)
    put(here / "a.json", "[12345, 67, 890123]")
    assert [v for _, v in read("a.json")] == [12345, 67, 890123]


@pytest.mark.parametrize(
    ("name", "content", "error", "fix"),
    [
        ("a.parquet", b"PAR1....", MissingError, "read_parquet('a.parquet').to_json('a.jsonl'"),
        ("train", b"PAR1....", MissingError, "read_parquet"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd....", MissingError, "zstd -d a.jsonl.zst"),
        ("a.txt", "hello".encode("utf-16"), DataError, "iconv"),
        ("a.bin", b"\x01\x00\x02\x00", DataError, "JSON lines"),
    ],
)
def test_other_kinds_say_what_to_do(here, name, content, error, fix):
    put(here / name, content)
    with pytest.raises(error) as caught:
        read(name)
    assert name in caught.value.message and fix in caught.value.fix


@pytest.mark.parametrize("pack", [gzip, bz2, lzma])
def test_a_damaged_archive_names_the_file(here, pack):
    whole = pack.compress(LINES.encode() * 5000)
    put(here / "a.jsonl.gz", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        read("a.jsonl.gz")


# ------------------------------------------------------------------------------------------------ text


def test_lines_are_documents_where_no_blank_line_stands_between(here):
    put(here / "a.txt", "\n\none\ntwo\r\n three \n\n")
    assert read("a.txt") == [("a.txt:3", "one"), ("a.txt:4", "two"), ("a.txt:5", " three ")]


def test_paragraphs_are_joined_to_about_4_kb(here):
    """Whole paragraphs, in order, none lost; no document grows past the size by joining."""
    paragraphs = [f"{i} " + "字" * (37 * i % 900) + "\nmore" for i in range(40)]
    put(here / "a.md", "\n\n \n".join(paragraphs))
    found = read("a.md")
    texts = [v for _, v in found]
    assert "\n\n".join(texts).split("\n\n") == paragraphs
    assert all(len(t.encode()) <= plaintext.JOINED for t in texts) and len(texts) < len(paragraphs) / 2
    for i in range(len(texts) - 1):  # each is as full as it can be
        assert len((texts[i] + "\n\n" + texts[i + 1].split("\n\n")[0]).encode()) + 1 > plaintext.JOINED
    line = [int(where.split(":")[1]) for where, _ in found]
    assert line == [1 + 4 * int(t.split(" ")[0]) for t in texts]


def test_a_paragraph_beyond_4_kb_stays_whole(here):
    put(here / "a.txt", "a\n\n" + "b" * 9000 + "\n\nc\n")
    assert [v for _, v in read("a.txt")] == ["a", "b" * 9000, "c"]


@pytest.mark.parametrize(
    ("how", "documents"),
    [
        ("blank", [("a.txt:1", "one\ntwo"), ("a.txt:4", "three"), ("a.txt:7", "four")]),
        ("line", [("a.txt:1", "one"), ("a.txt:2", "two"), ("a.txt:4", "three"), ("a.txt:7", "four")]),
        ("file", [("a.txt:1", "one\ntwo\n\nthree\n\n\nfour")]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_split_docs_says_how(here, how, documents, end):
    put(here / "a.txt", "one\ntwo\n\nthree\n\n\nfour\n".replace("\n", end))
    assert read("a.txt", how) == documents


def test_text_that_begins_with_a_bracket_is_text(here):
    put(here / "a.txt", "{not json}\n[1]\n")
    assert [v for _, v in read("a.txt")] == ["{not json}", "[1]"]


def test_blank_lines_are_blank_in_every_script(here):
    """U+3000 and the no-break space alone make no document, and paragraphs end at them; as indents they stay."""
    put(here / "a.txt", "one\n\u3000\u3000\ntwo\n\u00a0\n\u3000三\n\u2003\u202f\n")
    assert [v for _, v in read("a.txt", "blank")] == ["one", "two", "\u3000三"]
    assert read("a.txt", "line") == [("a.txt:1", "one"), ("a.txt:3", "two"), ("a.txt:5", "\u3000三")]
    assert read("a.txt") == [("a.txt:1", "one\n\ntwo\n\n\u3000三")]
    put(here / "b.txt", "\u3000\n \u00a0\n\ufeff\n")
    assert all(read("b.txt", how) == [] for how in ("auto", "line", "blank", "file"))


def test_blank_is_what_python_calls_blank():
    """For every character, and for the byte-order mark."""
    for number in range(0x110000):
        if not 0xD800 <= number < 0xE000:
            character = chr(number)
            assert is_blank(character.encode()) == (character.isspace() or character == "\ufeff"), hex(number)
    assert is_blank(b"") and not is_blank("\u3000x".encode()) and not is_blank(b"\xe3\x80")


@pytest.mark.parametrize("how", ["line", "blank", "file"])
def test_a_byte_order_mark_at_the_beginning_of_any_line_is_dropped(here, how):
    put(here / "a.txt", "\ufeffone\n\n\ufefftwo\n")
    assert "".join(v for _, v in read("a.txt", how)).replace("\n", "") == "onetwo"


def test_documents_between_marks(here):
    """The letters <|endoftext|> end a document, wherever in a line they are; each knows the line it begins in."""
    put(here / "a.txt", "One\n\nmore\n<|endoftext|>\n\n  \nTwo<|endoftext|>Three\nfour<|endoftext|><|endoftext|>\n")
    assert read("a.txt", "endoftext") == [
        ("a.txt:1", "One\n\nmore"),
        ("a.txt:7", "Two"),
        ("a.txt:7", "Three\nfour"),
    ]
    put(here / "b.txt", "no mark\n\nat all\n")
    assert read("b.txt", "endoftext") == [("b.txt:1", "no mark\n\nat all")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_an_empty_file_has_no_rows(here, name):
    put(here / name, "")
    assert read(name) == []


# ------------------------------------------------------------------------------------------------ which files


def test_a_folder_gives_its_data_files_in_order(here):
    data = ["d/a.txt", "d/b.jsonl", "d/license.jsonl", "d/sub/c.json.gz"]
    for name in (*data, "d/README.md", "d/LICENSE.txt", "d/.git/x.txt", "d/p.png"):
        put(here / name, LINES)
    assert [i.name for i in reader.expand(["d"])] == data


def test_a_glob_gives_its_matches_in_order(here):
    for name in ("b.jsonl", "a.jsonl", "x/c.jsonl", "a.txt"):
        put(here / name, LINES)
    assert [i.name for i in reader.expand(["*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [i.name for i in reader.expand(["**/*.jsonl"])] == ["a.jsonl", "b.jsonl", "x/c.jsonl"]
    with pytest.raises(UsageError, match=r"no file matches \*\.csv"):
        reader.expand(["*.csv"])


def test_weights(here):
    put(here / "a.jsonl", LINES)
    put(here / "d/b.jsonl", LINES)
    put(here / "odd:0.5", LINES)
    found = reader.expand(["a.jsonl:0.3", "d:2", "odd:0.5"])
    assert [(i.name, i.weight) for i in found] == [("a.jsonl", 0.3), ("d/b.jsonl", 2.0), ("odd:0.5", 1.0)]
    for wrong in ("a.jsonl:0", "a.jsonl:-1", "a.jsonl:inf", "a.jsonl:nan"):
        with pytest.raises(UsageError, match=r"weight of a\.jsonl"):
            reader.expand([wrong])


def test_the_weights_of_a_file_that_is_named_twice_add_up(here):
    """By another spelling, in a folder, by a glob or through a link: one input, as if it were read as often."""
    put(here / "d/a.jsonl", LINES)
    put(here / "d/b.jsonl", LINES)
    (here / "link.jsonl").symlink_to(here / "d/b.jsonl")

    def named(*specs):
        return [(i.name, i.weight, i.times) for i in reader.expand(specs)]

    assert named("d/a.jsonl", "d/a.jsonl") == [("d/a.jsonl", 2.0, 2)]
    assert named("d/a.jsonl", "./d/../d/a.jsonl:3") == [("d/a.jsonl", 4.0, 2)]
    assert named("d", str(here / "d/b.jsonl") + ":0.5") == [("d/a.jsonl", 1.0, 1), ("d/b.jsonl", 1.5, 2)]
    assert named("d:0.5", "d/*.jsonl:0.25") == [("d/a.jsonl", 0.75, 2), ("d/b.jsonl", 0.75, 2)]
    assert named("d/b.jsonl", "link.jsonl:2") == [("d/b.jsonl", 3.0, 2)]


def test_names_are_short_below_the_working_directory(here):
    path = put(here / "a.jsonl", LINES)
    assert reader.expand([str(path.absolute())])[0].name == "a.jsonl"


def test_a_missing_file_names_the_nearest_one(here):
    put(here / "data/poems.jsonl", LINES)
    with pytest.raises(UsageError) as caught:
        reader.expand(["data/poem.jsonl"])
    assert caught.value.message == "--data: data/poem.jsonl does not exist"
    assert caught.value.fix == "did you mean data/poems.jsonl?"
    with pytest.raises(UsageError) as caught:
        reader.expand(["dat/poems.jsonl"])
    assert caught.value.fix == "did you mean data?"
    with pytest.raises(UsageError) as caught:
        reader.expand(["zzz.jsonl:0.3"])
    assert "zzz.jsonl does not exist" in caught.value.message and "data" in caught.value.fix


def test_a_folder_without_data_is_refused(here):
    put(here / "d/p.png", "x")
    with pytest.raises(UsageError, match="holds no data files") as caught:
        reader.expand(["d"])
    assert caught.value.found == "p.png"


def test_total_bytes(here):
    put(here / "a.jsonl", LINES)
    put(here / "b.txt", "12345")
    assert reader.total_bytes(["a.jsonl", "b.txt"]) == len(LINES.encode()) + 5


def test_stdin_is_read_once_and_kept_by_content(here, monkeypatch):
    """Every pass of a process sees the same rows, though a pipe can be read only once."""
    stdin(monkeypatch, LINES.encode())
    for _ in range(2):
        assert [v for _, v in read("-")] == ROWS
    assert read("-")[0][0] == "stdin:1"
    first = reader.expand(["-"])[0].path
    stdin(monkeypatch, LINES.encode())
    assert reader.expand(["-"])[0].path == first
    stdin(monkeypatch, gzip.compress(b"one\ntwo\n"))
    assert [v for _, v in read("-")] == ["one", "two"]


def test_an_empty_stdin_is_refused(here, monkeypatch):
    stdin(monkeypatch, b"")
    with pytest.raises(UsageError, match="nothing came in on stdin"):
        reader.expand(["-"])


def test_paths_are_checked_without_torch():
    """The pre-flight must answer within a moment."""
    code = "import sys; import minigpt.core.data.reader, minigpt.core.data.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ streaming


ROW = json.dumps({"text": "x" * 2000})


@pytest.mark.parametrize(
    ("name", "opening", "row", "between", "closing", "count"),
    [
        ("a.jsonl", "", ROW, "\n", "", 12_000),
        ("a.json", "[", ROW, ",\n", "]", 12_000),
        ("data.json", '{"data": [', ROW, ",", "]}", 12_000),
        ("lines.txt", "", "x" * 2000, "\n", "", 12_000),
        ("joined.txt", "", "x" * 2000, "\n\n", "", 6_000),
    ],
)
def test_memory_stays_flat(here, name, opening, row, between, closing, count):
    """A file of 24 MB is read with a few MB, and `done` goes to the size of the file."""
    with open(here / name, "w") as f:
        f.write(opening)
        f.writelines(row + between for _ in range(11_999))
        f.write(row + closing)
    (source,) = reader.expand([name])
    tracemalloc.start()
    found, done = 0, 0
    for r in reader.rows(source):
        assert r.fault is None and r.done >= done
        found, done = found + 1, r.done
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == count
    assert peak < 8 << 20
    assert done == source.path.stat().st_size
