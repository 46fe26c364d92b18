"""The rows of every part, from the wordings of one language. Every function is pure: (language, generator) → rows."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from os.path import commonprefix
from random import Random
from typing import Any

from minigpt.core.data.sample.world import ANIMALS, COUNTRIES, LANGS, THINGS, Fact, Tongue, Wordings, facts

Row = dict[str, Any]
Part = Callable[[Tongue, Random], list[Row]]

STORIES, FACT_TEXTS, SUM_TEXTS = 1800, 1500, 900  # documents of `text`, a language
FACT_TIMES = 3  # every fact in every wording, that often in `chat`
SUM_WAYS = 10  # every one-digit sum in that many wordings in `chat`
OPENED_QUESTIONS = 0.3  # share of the questions for facts and sums in `chat` with some words before them
BIG_SUMS = 500  # conversations about two-digit sums in `chat`: too few to learn them, so there is something left for RL
FORMATTED = 600  # conversations that ask for a form of the answer in `chat` …
OBEYED = 0.45  # … and the share of them that gets it, so there is something left for RL
OPENED = 0.5  # share of the facts in `chat` that are told with the friendly opening, which pairs then prefer
CALLED = 0.5  # share of the sums in `tools` for which the calculator is called, which RL then rewards
TURNS = (0.5, 0.3, 0.2)  # shares of the conversations in `chat` with one, two and three questions
SHORT = 60  # characters of an answer that others may stand beside, so that a conversation fits a small row
SMALL_TALK = {"greeting": 12, "identity": 16, "able": 8, "thanks": 8, "goodbye": 8}  # each wording's times in `chat`
STORY_CHATS = 200
TOOL_CHATS, THOUGHTS, PAIRS, PROMPTS, HELD = 700, 1200, 1000, 1200, 150
TOOLS = ("calculator", "weather", "clock")


# ------------------------------------------------------------------------------------------------ pieces


def tell(template: str, **values: object) -> str:
    """A filled template with a capital first letter."""
    text = template.format(**values)
    return text[:1].upper() + text[1:]


def answer_to(tongue: Tongue, fact: Fact) -> str:
    """The sentence that answers a question for a fact."""
    return tell(tongue.says[fact.relation][0], x=fact.topic, y=fact.answer)


def talk(question: str, answer: str, **more: Any) -> Row:
    """A conversation of one question and its answer; more: further keys of the row."""
    return {"messages": [_user(question), _assistant(answer)], **more}


def _user(text: str) -> Row:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def _ways(wording: Wordings, held: bool) -> tuple[str, ...]:
    return wording.held if held else wording.train


def _big(rng: Random, held: bool) -> tuple[int, int]:
    """Two numbers of two digits. A fifth of all such pairs is kept for evaluation."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if ((3 * a + 7 * b) % 5 == 0) == held:
            return a, b


# ------------------------------------------------------------------------------------------------ texts


def text(tongue: Tongue, rng: Random) -> list[Row]:
    """Stories, and facts and sums as prose."""
    return _texts(tongue, rng, STORIES, FACT_TEXTS, SUM_TEXTS, False)


def text_eval(tongue: Tongue, rng: Random) -> list[Row]:
    """More documents of the same kinds. A document's content decides whether it is held out, so none is in `text`."""
    return _texts(tongue, rng, HELD, HELD, HELD, True)


def _texts(tongue: Tongue, rng: Random, stories: int, about: int, sums: int, held: bool) -> list[Row]:
    known = list(facts(tongue.name))
    ways = (*tongue.says["sum"], *tongue.prose["sum"])
    (glue,) = tongue.words["glue"]

    def some_facts() -> Iterator[str]:
        while True:  # shuffled anew each round, so that all facts come equally often
            rng.shuffle(known)
            for n in range(0, len(known), 6):
                yield glue.join(_stated(tongue, fact, rng) for fact in known[n : n + 6])

    def some_sums() -> Iterator[str]:
        while True:
            yield glue.join(_sum(rng.choice(ways), rng, tongue) for _ in range(6))

    def some_stories() -> Iterator[str]:
        while True:
            yield story(tongue, rng)

    docs: list[str] = []
    for source, wanted in ((some_stories(), stories), (some_facts(), about), (some_sums(), sums)):
        kept = (doc for doc in source if (zlib.crc32(doc.encode("utf-8")) % 10 == 0) == held)
        docs += itertools.islice(kept, wanted)
    return [{"text": doc} for doc in docs]


def _stated(tongue: Tongue, fact: Fact, rng: Random) -> str:
    ways = (*tongue.says[fact.relation], *tongue.prose[fact.relation])
    return tell(rng.choice(ways), x=fact.topic, y=fact.answer)


def _sum(template: str, rng: Random, tongue: Tongue) -> str:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if "{name}" in template:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
    return tell(template, a=a, b=b, y=a + b, name=rng.choice(tongue.words["names"]))


def story(tongue: Tongue, rng: Random, about: int | None = None) -> str:
    """A short story in which every fact is one of the world's. about: the animal's number, else an animal or a trip."""
    at = LANGS.index(tongue.name)
    name, friend = rng.sample(tongue.words["names"], 2)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    values: dict[str, object] = {"name": name, "friend": friend, "a": a, "b": b, "y": a + b}
    values["berries"] = rng.choice(tongue.words["berries"])
    kind = "animal" if about is not None or rng.random() < 0.6 else "trip"
    if kind == "animal":
        n = rng.randrange(len(ANIMALS)) if about is None else about
        animal, thing = ANIMALS[n], rng.choice(THINGS)
        values |= {"x": animal[0][at], "food": animal[1][at], "home": animal[2][at], "one": tongue.words["ones"][n]}
        values |= {"thing": thing[0][at], "colour": thing[1][at]}
    else:
        country, capital, language, food = (pair[at] for pair in rng.choice(COUNTRIES))
        values |= {"x": country, "capital": capital, "language": language, "food": food}
    (glue,) = tongue.words["glue"]
    return glue.join(tell(rng.choice(slot), **values) for slot in tongue.story[kind])


# ------------------------------------------------------------------------------------------------ conversations


def chat(tongue: Tongue, rng: Random) -> list[Row]:
    """Facts, sums, formats, greetings, identity, small talk and stories; up to three questions in a conversation."""
    asks, rows = tongue.asks, []
    for fact in facts(tongue.name):
        for way in asks[fact.relation].train * FACT_TIMES:
            opening = tongue.opening if rng.random() < OPENED else ""
            question = _opened(tongue, rng, tell(way, x=fact.topic))
            rows.append(talk(question, opening + answer_to(tongue, fact)))
    for a, b in itertools.product(range(10), repeat=2):
        for way in rng.sample(asks["sum"].train, SUM_WAYS):
            rows.append(_sum_talk(tongue, _opened(tongue, rng, way), a, b))
    rows += [_sum_talk(tongue, rng.choice(asks["sum"].train), *_big(rng, False)) for _ in range(BIG_SUMS)]
    known = list(facts(tongue.name))
    for _ in range(FORMATTED):
        question, fact, formed = _formatted(tongue, rng, known, False)
        rows.append(talk(question, formed if rng.random() < OBEYED else answer_to(tongue, fact)))
    for kind, times in SMALL_TALK.items():
        rows += [talk(way, rng.choice(tongue.says[kind])) for way in asks[kind].train * times]
    for _ in range(STORY_CHATS):
        n = rng.randrange(len(ANIMALS))
        question = tell(rng.choice(asks["story"].train), x=tongue.words["ones"][n])
        rows.append(talk(question, story(tongue, rng, n)))
    return _joined(rows, rng)


def _joined(rows: list[Row], rng: Random) -> list[Row]:
    """Some of the conversations as turns of one, so that a model answers the newest question. Each stays there once."""
    rng.shuffle(rows)
    found = [row for row in rows if len(row["messages"][-1]["content"]) > SHORT]
    short = iter([row for row in rows if len(row["messages"][-1]["content"]) <= SHORT])
    for first in short:
        (turns,) = rng.choices(range(len(TURNS)), TURNS)
        more = itertools.islice(short, turns)
        found.append({"messages": [message for row in (first, *more) for message in row["messages"]]})
    return found


def chat_eval(tongue: Tongue, rng: Random) -> list[Row]:
    """Every fact, every one-digit sum and small talk in wordings that no training part has; the answer to look for."""
    asks, says, rows = tongue.asks, tongue.says, []
    for n, fact in enumerate(facts(tongue.name)):
        ways = asks[fact.relation].held
        row = talk(tell(ways[n % len(ways)], x=fact.topic), answer_to(tongue, fact))
        rows.append({**row, "answer": fact.answer, "kind": "fact"})
    for n, (a, b) in enumerate(itertools.product(range(10), repeat=2)):
        way = asks["sum"].held[n % len(asks["sum"].held)]
        rows.append({**_sum_talk(tongue, way, a, b), "answer": str(a + b), "kind": "sum"})
    for kind in SMALL_TALK:
        common = commonprefix(says[kind]).strip()  # noqa: RUF071  (of texts, not of paths)
        rows += [{**talk(way, says[kind][0]), "answer": common, "kind": kind} for way in asks[kind].held]
    return rows


def _sum_talk(tongue: Tongue, way: str, a: int, b: int) -> Row:
    return talk(tell(way, a=a, b=b), tell(tongue.says["sum"][0], a=a, b=b, y=a + b))


def _opened(tongue: Tongue, rng: Random, question: str) -> str:
    """Perhaps with some words before it, so that a model learns to look for the question in what is said."""
    return rng.choice(tongue.words["openers"]) * (rng.random() < OPENED_QUESTIONS) + question


def _formatted(tongue: Tongue, rng: Random, known: Sequence[Fact], held: bool) -> tuple[str, Fact, str]:
    """(a question that asks for a form, its fact, the answer in that form)."""
    fact = rng.choice(known)
    ask, shape = tongue.formats[rng.choice(list(tongue.formats))]
    question = tell(rng.choice(_ways(tongue.asks[fact.relation], held)), x=fact.topic)
    return tell(rng.choice(_ways(ask, held)), q=question), fact, shape.format(y=fact.answer)


# ------------------------------------------------------------------------------------------------ tools


def tools(tongue: Tongue, rng: Random) -> list[Row]:
    """Weather and time through a tool; sums with the calculator in CALLED of the cases, else from memory."""
    return [_tool_talk(tongue, rng, kind, False) for kind in _spread(("calculator", *TOOLS), TOOL_CHATS)]


def tools_eval(tongue: Tongue, rng: Random) -> list[Row]:
    """The same in held-out wordings, always with the tool; the answer is the tool's name."""
    rows = [_tool_talk(tongue, rng, kind, True) for kind in _spread(TOOLS, HELD)]
    return [{**row, "answer": row["messages"][1]["tool_calls"][0]["function"]["name"], "kind": "tool"} for row in rows]


def _spread(kinds: Sequence[str], total: int) -> Iterator[str]:
    return itertools.islice(itertools.cycle(kinds), total)


def described(tongue: Tongue, names: Sequence[str]) -> list[Row]:
    """Descriptions of tools, as OpenAI's interface has them."""
    arguments = {"calculator": "expression", "weather": "city", "clock": "city"}
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": tongue.words["tools"][TOOLS.index(name)],
                "parameters": {
                    "type": "object",
                    "properties": {arguments[name]: {"type": "string"}},
                    "required": [arguments[name]],
                },
            },
        }
        for name in names
    ]


def _offered(tongue: Tongue, rng: Random, kind: str) -> list[Row]:
    """The tool that is needed among one or two others."""
    names = [kind, *rng.sample([name for name in TOOLS if name != kind], rng.randint(1, 2))]
    rng.shuffle(names)
    return described(tongue, names)


def _tool_talk(tongue: Tongue, rng: Random, kind: str, held: bool) -> Row:
    way = rng.choice(_ways(tongue.asks[kind], held))
    offered = _offered(tongue, rng, kind)
    arguments: Row
    result: Row
    if kind == "calculator":
        a, b = _small(rng)
        question, final = tell(way, a=a, b=b), tell(tongue.says["sum"][0], a=a, b=b, y=a + b)
        arguments, result = {"expression": f"{a} + {b}"}, {"result": a + b}
        if not held and rng.random() >= CALLED:
            return talk(question, final, tools=offered)
    else:
        city, question = _city_question(tongue, rng, way)
        arguments = {"city": city}
        if kind == "weather":
            sky, degrees = rng.choice(tongue.words["skies"]), rng.randint(5, 30)
            result = {"weather": sky, "degrees": degrees}
            final = tell(tongue.says["weather"][0], c=city, y=sky, t=degrees)
        else:
            time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
            result, final = {"time": time}, tell(tongue.says["clock"][0], c=city, y=time)
    call = {"type": "function", "function": {"name": kind, "arguments": arguments}}
    reply = {"role": "tool", "content": json.dumps(result, ensure_ascii=False)}
    return {
        "messages": [_user(question), _assistant("", tool_calls=[call]), reply, _assistant(final)],
        "tools": offered,
    }


def _small(rng: Random) -> tuple[int, int]:
    return rng.randint(0, 9), rng.randint(0, 9)


def _city_question(tongue: Tongue, rng: Random, way: str) -> tuple[str, str]:
    city = rng.choice(COUNTRIES)[1][LANGS.index(tongue.name)]
    return city, tell(way, c=city)


# ------------------------------------------------------------------------------------------------ thinking


def think(tongue: Tongue, rng: Random) -> list[Row]:
    """Two-digit sums digit by digit, comparisons, and questions that take two facts: the reasoning, then the answer."""
    return [_thought(tongue, rng, kind, False) for kind in _spread(list(tongue.think), THOUGHTS)]


def think_eval(tongue: Tongue, rng: Random) -> list[Row]:
    """The same in held-out wordings, with the answer to look for."""
    return [_thought(tongue, rng, kind, True) for kind in _spread(list(tongue.think), HELD)]


def _thought(tongue: Tongue, rng: Random, kind: str, held: bool) -> Row:
    way = rng.choice(_ways(tongue.asks[kind], held))
    values: dict[str, Any] = {}
    if kind == "hop":
        country, city, language, _ = (pair[LANGS.index(tongue.name)] for pair in rng.choice(COUNTRIES))
        values, found = {"x": country, "c": city, "y": language}, language
    else:
        a, b = _big(rng, held)
        while a == b:
            a, b = _big(rng, held)
        values = {"a": a, "b": b, "high": max(a, b), "low": min(a, b), "y": a + b}
        values |= {"a1": a % 10, "b1": b % 10, "s1": a % 10 + b % 10}
        values |= {"a10": a // 10, "b10": b // 10, "s10": a // 10 + b // 10}
        found = str(a + b if kind == "sum" else max(a, b))
    reasoning, answer = (tell(template, **values) for template in tongue.think[kind])
    row: Row = {"messages": [_user(tell(way, **values)), _assistant(answer, reasoning_content=reasoning)]}
    return {**row, "answer": found, "kind": f"think-{kind}"} if held else row


# ------------------------------------------------------------------------------------------------ preferences and RL


def pairs(tongue: Tongue, rng: Random) -> list[Row]:
    """The same answer with the friendly opening, which is preferred, and without it."""
    return _pairs(tongue, rng, PAIRS, False)


def pairs_eval(tongue: Tongue, rng: Random) -> list[Row]:
    """The same in held-out wordings."""
    return _pairs(tongue, rng, HELD, True)


def _pairs(tongue: Tongue, rng: Random, total: int, held: bool) -> list[Row]:
    known = list(facts(tongue.name))
    rng.shuffle(known)
    rows = []
    for fact in itertools.islice(itertools.cycle(known), total):
        question = tell(rng.choice(_ways(tongue.asks[fact.relation], held)), x=fact.topic)
        plain = answer_to(tongue, fact)
        chosen, rejected = [_assistant(tongue.opening + plain)], [_assistant(plain)]
        rows.append({"prompt": [_user(question)], "chosen": chosen, "rejected": rejected})
    return rows


def rl(tongue: Tongue, rng: Random) -> list[Row]:
    """Questions whose answer can be checked: two-digit sums, answers in a form, and calls of the right tool."""
    return _prompts(tongue, rng, PROMPTS, False)


def rl_eval(tongue: Tongue, rng: Random) -> list[Row]:
    """The same in held-out wordings and with held-out numbers."""
    return _prompts(tongue, rng, HELD, True)


def _prompts(tongue: Tongue, rng: Random, total: int, held: bool) -> list[Row]:
    known, rows = list(facts(tongue.name)), []
    for kind in _spread(("sum", "format", "tool"), total):
        if kind == "format":
            question, _, answer = _formatted(tongue, rng, known, held)
            rows.append({"prompt": [_user(question)], "answer": answer, "kind": kind})
            continue
        ask = tongue.asks["sum" if kind == "sum" else "calculator"]
        a, b = _big(rng, held) if kind == "sum" else _small(rng)
        question = tell(rng.choice(_ways(ask, held)), a=a, b=b)
        row: Row = {"prompt": [_user(question)], "answer": str(a + b), "kind": kind}
        if kind == "tool":
            row |= {"answer": "calculator", "tools": _offered(tongue, rng, "calculator")}
        rows.append(row)
    return rows


PARTS: dict[str, tuple[Part, str]] = {  # part: (its rows, what it is for)
    "text": (text, "stories, facts and sums to pretrain on"),
    "chat": (chat, "conversations to fine-tune on"),
    "tools": (tools, "conversations with tool calls and their results"),
    "think": (think, "answers with their reasoning"),
    "pairs": (pairs, "preference pairs: a friendly opening is preferred"),
    "rl": (rl, "prompts with checkable answers"),
    "text-eval": (text_eval, "held-out documents"),
    "eval": (chat_eval, "facts, sums and small talk in held-out wordings, with answers"),
    "tools-eval": (tools_eval, "tool calls in held-out wordings"),
    "think-eval": (think_eval, "reasoning in held-out wordings"),
    "pairs-eval": (pairs_eval, "preference pairs in held-out wordings"),
    "rl-eval": (rl_eval, "prompts in held-out wordings and with held-out numbers"),
}
