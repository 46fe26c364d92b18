"""The page is one whole file that runs nothing, loads nothing, and tells nothing of the machine it came from."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minigpt.core.train.curves import Curve, Panel, series
from minigpt.core.train.record import Record, command, differences, facts, took
from minigpt.core.train.report_page import MOST_SAMPLES, heading, report_page, spread

EVIL = "</td></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b\ud800\u202e"
VOID = {"meta", "line", "rect", "circle", "polyline"}


def record(name="poems", **changes):
    """A run that went wrong once, in a home directory."""
    base = {
        "name": name,
        "path": Path(f"/home/alice/work/runs/{name}"),
        "rows": [
            {"step": 10, "tokens": 1000, "tok_s": 100.0, "loss": 8.0, "mem_gb": 1.0, "epoch": 0.5},
            {"step": 20, "tokens": 3000, "tok_s": 400.0, "loss": 5.0, "val_loss": 5.5, "val_bpb": 2.25, "mem_gb": 2.0},
            {"step": 30, "tokens": 4000, "tok_s": 200.0, "loss": None, "val_loss": 5.75, "val_bpb": 2.5, "skipped": 2},
        ],
        "samples": [{"step": 20, "prompt": "春風", "text": "吹又生"}, {"step": 30, "prompt": "春風", "text": "It <b>"}],
        "info": {
            "stage": "pretrain",
            "status": "failed",
            "error": "could not write /home/alice/work/runs/poems/step-1: no space",
            "model_type": "llama",
            "parameters": 3196992,
            "parent": {"path": "/home/alice/work/runs/base/step-0000010"},
            "data": [{"path": "/home/alice/secret/poems.jsonl", "rows": 60000, "sha256": "e73e7044" + 56 * "0"}],
            "steps": 40,
            "device": "cpu bf16, 2 threads",
            "seed": 42,
            "host": "alices-laptop",
            "store": "/home/alice/.cache/minigpt/stores/4d8a",
            "versions": {"minigpt-lm": "0.1.0", "torch": "2.13.0"},
            "sessions": [
                {
                    "started": "2026-11-21T10:10:38+0000",
                    "ended": "2026-11-21T10:27:46+0000",
                    "argv": ["minigpt", "pretrain", "-d", "/home/alice/secret/my poems.jsonl", "-o", "runs/poems"],
                },
                {"started": "2026-11-21T10:28:36+0000", "argv": ["minigpt", "pretrain", "--resume", "runs/poems"]},
            ],
        },
        "config": {"lr": 0.001, "data": ["/home/alice/secret/poems.jsonl:0.3"], "seed": 42, "size": None},
    }
    return Record(**{**base, **changes})


def page(*records):
    curves = [Curve(r.name, series(r.rows, "loss"), slot) for slot, r in enumerate(records)]
    return report_page(records, [Panel("Training loss", curves), Panel("Again", curves)], "Drawn by a test")


def cells(html):
    """Text of every table row, by its label."""
    root = ET.fromstring(html)
    rows = (row for row in root.iter("tr") if row.find("th") is not None and row.find("th").get("scope") == "row")
    return {row.find("th").text: ["".join(cell.itertext()) for cell in row.findall("td")] for row in rows}


class Tags(HTMLParser):
    """What a browser would see: every tag with its attributes, and whether they are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID, f"<{tag}/> does not close itself in HTML"
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# ---------------------------------------------------------------------------------------------- the page


def test_whole():
    """It parses as XML and as HTML; everything is closed; ids are unique; language and title are there."""
    html = page(record(), record("other"))
    root = ET.fromstring(html)
    tags = Tags(html)
    assert tags.open == []
    ids = [a["id"] for _, a in tags.seen if "id" in a]
    assert len(ids) == len(set(ids)) == 4
    assert root.get("lang") == "en"
    assert root.find("head/title").text == "poems · other"
    assert html.startswith("<!DOCTYPE html>")


def test_loads_and_runs_nothing():
    """No script, no handler, no address to fetch from; and the page itself forbids what might still come in."""
    html = page(record(), record("other"))
    tags = Tags(html)
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "a", "foreignobject"}
    keys = {key for _, attributes in tags.seen for key in attributes}
    assert not {k for k in keys if k.startswith("on") or k in ("src", "href", "srcset", "xlink:href")}
    assert not re.search(r"@import|url\(", html)
    policy = next(a["content"] for t, a in tags.seen if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy


def test_what_a_model_wrote_stays_text():
    """Markup in samples, names, options, data, errors and commands is shown and not obeyed."""
    info = {
        **record().info,
        **dict.fromkeys(("stage", "status", "error", "device", "seed", "model_type"), EVIL),
        "versions": {EVIL: EVIL},
        "data": [{"path": EVIL, "sha256": EVIL}],
        "parent": {"path": EVIL},
        "sessions": [{"started": EVIL, "argv": [EVIL]}],
    }
    bad = record(
        EVIL, info=info, config={EVIL: EVIL, "lr": EVIL}, samples=[{"step": EVIL, "prompt": EVIL, "text": EVIL}] * 2
    )
    clean = page(record("x", samples=[]), record("y", samples=[]))
    html = page(record(), bad)
    html.encode("utf-8")
    ET.fromstring(html)
    assert {tag for tag, _ in Tags(html).seen} <= {tag for tag, _ in Tags(clean).seen} | {"p"}
    assert "alert(1)" in html and "\x1b" not in html and "\x00" not in html


def test_tells_nothing_of_the_machine():
    """Neither home directory nor user nor host; what lies beside the run keeps its name."""
    html = page(record(), record("other", config={"lr": 2, "model": "/home/alice/work/runs/base/step-0000010"}))
    for secret in ("alice", "/home", "secret", ".cache"):
        assert secret not in html
    assert "base/step-0000010" in html and "poems.jsonl:0.3" in html
    assert "-d &#39;my poems.jsonl&#39; -o runs/poems" in html


def test_samples_by_prompt_and_step():
    """Each prompt once, its answers in order; Chinese is marked as Chinese, so that its own fonts draw it."""
    root = ET.fromstring(page(record()))
    (prompt,) = [e for e in root.iter("p") if e.get("class") == "prompt"]
    assert (prompt.text, prompt.get("lang")) == ("春風", "zh")
    (table,) = [e for e in root.iter("table") if e.get("class") == "samples"]
    rows = [(r.find("th").text, r.find("td/p").text, r.find("td/p").get("lang")) for r in table.iter("tr")]
    assert rows == [("step 20", "吹又生", "zh"), ("step 30", "It <b>", None)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_samples_keep_their_lines(end):
    """Blank lines, also the first ones, and indentation stand on the page as the model wrote them."""
    wrote = f"{end}{end}Roses are red,{end}{end}{end}  violets blue.{end}"
    html = page(record(samples=[{"step": 1, "prompt": f"A poem:{end}{end}", "text": wrote}]))
    root = ET.fromstring(html)
    (said,) = [e.find("td/p").text for e in root.iter("tr") if e.find("td/p") is not None]
    (prompt,) = [e.text for e in root.iter("p") if e.get("class") == "prompt"]
    assert said == "\n\nRoses are red,\n\n\n  violets blue.\n" and prompt == "A poem:\n\n"
    for rule in (r"\.samples p", r"\.prompt"):  # the element itself: what stands around it is nobody's promise
        assert re.search(rule + r" {[^}]*white-space: pre-wrap", html)


def test_the_newest_sample_is_always_shown():
    many = [{"step": i, "prompt": "p", "text": f"text {i}."} for i in range(100)]
    html = page(record(samples=many))
    assert html.count('<tr><th scope="row">step ') == MOST_SAMPLES
    assert "text 0." in html and "text 99." in html
    assert spread(range(3), 8) == [0, 1, 2]


def test_one_run_is_not_compared():
    """Without a second run there is no table of differences, and with an equal one it says so."""
    assert "differ" not in page(record())
    assert "given the same options" in page(record(), record("other"))


def test_title_of_many():
    assert heading(["a", "b", "c", "d"]) == "a · b · c · d"
    assert heading([*"abcdef"]) == "a · b · c and 3 more"


def test_facts_that_one_run_lacks_are_dashes():
    """Runs of different kinds share one table."""
    html = page(record(), record("bare", info={}, rows=[{"step": 1, "loss": 2.0}]))
    assert cells(html)["Seed"] == ["42", "–"]
    assert cells(html)["Last training loss"] == ["5.0000", "2.0000"]


# ---------------------------------------------------------------------------------------------- what it says


def test_facts():
    known = facts(record())
    assert known["Status"] == "failed: could not write poems/step-1: no space"
    assert known["Model"] == "llama, 3,196,992 parameters"
    assert known["Started from"] == "base/step-0000010"
    assert known["Data"] == "poems.jsonl (60,000 rows, sha256 e73e7044…)"
    assert known["Best validation loss"] == "5.5000 at step 20"
    assert known["Last validation loss"] == "5.7500"
    assert known["Last bits per byte"] == "2.5000"
    assert known["Last training loss"] == "5.0000"
    assert known["Steps"] == "30 of 40"
    assert known["Steps left out"] == "2 (logged at step 30)"
    assert known["Tokens trained on"] == "4k"
    assert known["Training time"] == "0:20"  # 10 s, 5 s and 5 s
    assert known["Tokens a second, median"] == "200"
    assert known["Most memory"] == "2.00 GB"
    assert known["Sessions"] == "2"
    assert known["Versions"] == "minigpt 0.1.0, torch 2.13.0"
    assert known["Started"] == "2026-11-21 10:10"


@pytest.mark.parametrize("value", [None, 5, "x", [1], {"a": 1}, [{"a": 1}], float("nan")])
def test_odd_run_json_does_not_stop_the_page(value):
    """Every field of run.json may be of another kind than it should be."""
    odd = record(info=dict.fromkeys(record().info, value), config={"lr": value})
    ET.fromstring(page(odd, record("other")))


def test_differences():
    """Only what differs; an option that a run does not have is one left open."""
    other = record("other", config={"lr": 0.002, "data": ["/mnt/poems.jsonl:0.3"], "seed": 42, "epochs": 2})
    assert differences([record(), other]) == {"lr": ["0.001", "0.002"], "epochs": ["–", "2"]}


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("runs/poems", "runs/poems"),
        ("/home/alice/work/runs/base/step-1", "base/step-1"),
        ("/home/alice/work/data.jsonl:0.3", "data.jsonl:0.3"),
        ("/home/alice/my data/x y.jsonl", "x y.jsonl"),
        ("/home/alice/folder/", "folder"),
        ("~/x.jsonl", "x.jsonl"),
        ("~alice/data/x.jsonl", "x.jsonl"),
        ("../../home/alice/x.jsonl", "x.jsonl"),
        ("../data/x.jsonl", "../data/x.jsonl"),
        ("C:\\Users\\alice\\x.jsonl", "x.jsonl"),
        ("\\\\server\\alice\\x.jsonl", "x.jsonl"),
        ("file:///home/alice/x.jsonl", "x.jsonl"),
        ("--data=/home/alice/x.jsonl", "--data=x.jsonl"),
        ("-d/home/alice/x.jsonl", "-dx.jsonl"),
        ("https://huggingface.co/datasets/a/b", "https://huggingface.co/datasets/a/b"),
        ("</s>", "</s>"),
        ("bits/byte", "bits/byte"),
    ],
)
def test_paths_are_shortened(word, shown):
    """An absolute path keeps what lies beside the run, else its last part; all else stays."""
    assert record().shorten(word) == shown
    if " " not in word and not word.startswith(("..", "-", "file")):
        assert record().prose(f"could not read '{word}'") == f"could not read '{shown}'"


def test_sessions():
    """The command is ready to be typed again; a session that was killed has no length."""
    first, second = record().sessions
    assert command(record(), first) == "minigpt pretrain -d 'my poems.jsonl' -o runs/poems"
    assert (took(first), took(second)) == ("17:08", None)


def test_load_takes_what_is_there(tmp_path):
    """A half-written last line, rows that are no rows and a broken config.yaml do not hide the rest."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n7\n{"loss": 3}\n{"step": 2, "lo', encoding="utf-8")
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 1, "text": "a"}) + '\n{"step": 2}\n', encoding="utf-8")
    (tmp_path / "config.yaml").write_text("a: [", encoding="utf-8")
    loaded = Record.load(tmp_path, "x")
    assert loaded.rows == [{"step": 1, "loss": 2}]
    assert loaded.samples == [{"step": 1, "text": "a"}]
    assert (loaded.info, loaded.config) == ({}, {})
