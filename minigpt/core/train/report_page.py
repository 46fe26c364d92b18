"""One page about one run or several, to send to a colleague: a single file, no network, no script.

Samples are a model's words and names come from disk: everything passes `text()`, and the page forbids scripts besides.
It is XML as well as HTML, so that any parser can tell whether it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minigpt.core.train.curves import Panel
from minigpt.core.train.plot import pen, picture, text
from minigpt.core.train.record import Record, command, differences, events, facts, model, took, when

MOST_SAMPLES = 8  # of one prompt, spread over the run; the first and the last are among them
MOST_LETTERS = 800  # of one sample
SIZE = (540, 240)  # of a picture: two stand side by side
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_HAN, _KANA = re.compile("[\u3400-\u9fff\uf900-\ufaff]"), re.compile("[\u3041-\u30ff]")


def report_page(records: Sequence[Record], panels: Sequence[Panel], made: str) -> str:
    """The page as HTML. panels: one picture each, curves in the order of the records. made: by what and when."""
    title = heading([r.name for r in records])
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head>\n<meta charset="utf-8"/>',
            f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}"/>',
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
            f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
            f"<header>\n<h1>{text(title)}</h1>",
            *_keys(records),
            "</header>\n<main>",
            *_curves(panels),
            *_summary(records),
            *_events(records),
            *_differences(records),
            *_samples(records),
            *_commands(records),
            f"</main>\n<footer>{text(made)}</footer>\n</body>\n</html>\n",
        ]
    )


def heading(names: Sequence[str]) -> str:
    """The names as one title: all of a few, else the first ones and how many more."""
    if len(names) <= 4:
        return " · ".join(names)
    return " · ".join(names[:3]) + f" and {len(names) - 3} more"


def _swatch(slot: int) -> str:
    line = f'<line x1="0" x2="24" y1="4" y2="4" {pen(slot, 3)}/>'
    return f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true">{line}</svg>'


def _named(records: Sequence[Record], slot: int) -> str:
    """A run's name, with its colour where there are several."""
    return (_swatch(slot) if len(records) > 1 else "") + text(records[slot].name)


def _keys(records: Sequence[Record]) -> Iterator[str]:
    """What each colour stands for; of a single run, what it is."""
    if len(records) == 1:
        info = records[0].info
        words = [str(info[key]) for key in ("stage", "status") if info.get(key)]
        yield f'<p class="quiet">{text(" · ".join(filter(None, [*words, model(info)])))}</p>'
    else:
        yield '<ul class="keys">'
        yield from (f"<li>{_named(records, slot)}</li>" for slot in range(len(records)))
        yield "</ul>"


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """A label and one cell a run in each row. heads are markup already, labels and cells are not."""
    yield '<div class="wide">\n<table>'
    if heads:
        columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
        yield f"<thead><tr><td></td>{columns}</tr></thead>"
    yield "<tbody>"
    for label, cells in rows:
        values = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        yield f'<tr><th scope="row">{text(label)}</th>{values}</tr>'
    yield "</tbody>\n</table>\n</div>"


def _heads(records: Sequence[Record]) -> list[str]:
    return [_named(records, slot) for slot in range(len(records))] if len(records) > 1 else []


def _summary(records: Sequence[Record]) -> Iterator[str]:
    known = [facts(record) for record in records]
    order = max(known, key=len)
    labels = [*order, *dict.fromkeys(label for one in known for label in one if label not in order)]
    yield "<section>\n<h2>Summary</h2>"
    yield from _table(_heads(records), [(label, [one.get(label, "–") for one in known]) for label in labels])
    yield "</section>"


def _events(records: Sequence[Record]) -> Iterator[str]:
    """Stops, damaged files, steps left out: what the runs went through."""
    if not any(events(record) for record in records):
        return
    yield "<section>\n<h2>What it went through</h2>"
    for slot, record in enumerate(records):
        found = spread(events(record), MOST_SAMPLES * 4)
        if found and len(records) > 1:
            yield f"<h3>{_named(records, slot)}</h3>"
        rows = [
            (str(e.get("time", "")).replace("T", " ")[:16], [e["kind"], record.prose(str(e["text"]))]) for e in found
        ]
        yield from _table([], rows)
    yield "</section>"


def _curves(panels: Sequence[Panel]) -> Iterator[str]:
    yield '<section>\n<h2>Curves</h2>\n<div class="panels">'
    for number, panel in enumerate(panels):
        drawn = picture([panel], panel.title, size=SIZE, style="", name=f"plot-{number}")
        yield f"<figure>\n{drawn}</figure>"
    yield "</div>\n</section>"


def _differences(records: Sequence[Record]) -> Iterator[str]:
    if len(records) < 2:
        return
    found = differences(records)
    yield "<section>\n<h2>Where the options differ</h2>"
    if found:
        yield from _table(_heads(records), [*found.items()])
    else:
        yield "<p>In nothing: the runs were given the same options.</p>"
    yield "</section>"


# ---------------------------------------------------------------------------------------------- samples


def _samples(records: Sequence[Record]) -> Iterator[str]:
    if not any(record.samples for record in records):
        return
    yield "<section>\n<h2>What the model wrote on the way</h2>"
    for slot, record in enumerate(records):
        if record.samples and len(records) > 1:
            yield f"<h3>{_named(records, slot)}</h3>"
        prompts = dict.fromkeys(str(row.get("prompt", "")) for row in record.samples)
        for prompt in prompts:
            rows = [row for row in record.samples if str(row.get("prompt", "")) == prompt]
            yield from _answers(prompt, spread(rows, MOST_SAMPLES))
    yield "</section>"


def _answers(prompt: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One prompt and what came after it, step by step."""
    yield f'<p class="prompt" dir="auto"{_language(prompt)}>{text(cut(lines(prompt)))}</p>'
    yield '<table class="samples"><tbody>'
    for row in rows:
        words = f'<p dir="auto"{_language(row["text"])}>{text(cut(lines(row["text"])))}</p>'
        yield f'<tr><th scope="row">step {text(str(row.get("step", "?")))}</th><td>{words}</td></tr>'
    yield "</tbody></table>"


def _language(words: str) -> str:
    """Chinese is said to be so: the same code points are drawn otherwise in Japanese fonts."""
    return ' lang="zh"' if _HAN.search(words) and not _KANA.search(words) else ""


def lines(words: str) -> str:
    """The words with line ends of one kind: XML knows no other, and the style sheet shows each of them."""
    return words.replace("\r\n", "\n").replace("\r", "\n")


def cut(words: str) -> str:
    return words if len(words) <= MOST_LETTERS else words[:MOST_LETTERS] + " …"


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


# ---------------------------------------------------------------------------------------------- commands


def _commands(records: Sequence[Record]) -> Iterator[str]:
    if not any(record.sessions for record in records):
        return
    yield "<section>\n<h2>How it was run</h2>"
    yield '<p class="quiet">Paths of the machine that ran it are shortened.</p>'
    for slot, record in enumerate(records):
        if record.sessions and len(records) > 1:
            yield f"<h3>{_named(records, slot)}</h3>"
        for number, session in enumerate(record.sessions, 1):
            yield from _session(record, session, f"Session {number}, " if len(record.sessions) > 1 else "")
    yield "</section>"


def _session(record: Record, session: dict[str, Any], label: str) -> Iterator[str]:
    lasted = took(session)
    started = when(session) or "at an unknown time"
    words = f"{label}started {started}" + (f", took {lasted}" if lasted else ", not ended")
    yield f'<p class="quiet">{text(words[0].upper() + words[1:])}</p>'
    yield f"<pre><code>{text(command(record, session))}</code></pre>"
