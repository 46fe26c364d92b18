"""Tools that a model may call in a conversation, and the calling: whatever goes wrong becomes words for the model.

`calculator` and `clock` are called and answer as in `sample:tools`, the converter and those below it are called as in
MiniMind's demonstration, so models trained on those data know them. Everything is worked out here: no tool runs what a
model writes, or asks a network.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction
from typing import Any

from minigpt.core.infer import units, zones
from minigpt.core.infer.arithmetic import calculate, shown

LARGEST = 10**15  # of the numbers that tools take
Clock = Callable[[], datetime]


@dataclass(frozen=True)
class Tool:
    """What a model is told of a function, and the function.

    parameters: a JSON schema of an object whose properties are plain values; see `fault_of`.
    function: takes the arguments by name, returns something JSON can hold. ValueError is told to the model.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any]

    @property
    def schema(self) -> dict[str, Any]:
        """OpenAI's description of a function, which chat templates show to the model."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def call(tools: Mapping[str, Tool], name: str, arguments: Mapping[str, Any]) -> str:
    """What the tool says, as JSON text. A fault of the call is `{"error": …}`, in words that help to do better."""
    return json.dumps(_result(tools, name, arguments), ensure_ascii=False)


def _result(tools: Mapping[str, Tool], name: str, arguments: Mapping[str, Any]) -> Any:
    tool = tools.get(name)
    if tool is None:
        return {"error": f"there is no tool {name!r}; there are {', '.join(tools) or 'none'}"}
    if fault := fault_of(arguments, tool.parameters):
        return {"error": fault}
    try:
        return tool.function(**arguments)
    except ValueError as fault:
        return {"error": str(fault)}
    except Exception as fault:  # of the tool itself: the conversation goes on
        return {"error": f"{name} failed: {type(fault).__name__}: {fault}"}


_TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}


def fault_of(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> str | None:
    """What a JSON schema of plain values finds wrong with arguments; None when they fit.

    Understands `properties` with `type` and `enum`, and `required`; knows no argument that is no property.
    """
    properties = parameters.get("properties", {})
    if unknown := [name for name in arguments if name not in properties]:
        return f"there is no argument {unknown[0]!r}; there are {', '.join(properties) or 'none'}"
    if missing := [name for name in parameters.get("required", ()) if name not in arguments]:
        return f"the argument {missing[0]!r} is missing"
    for name, value in arguments.items():
        schema = properties[name]
        wanted = schema.get("type")
        if wanted and (not isinstance(value, _TYPES[wanted]) or isinstance(value, bool) != (wanted == "boolean")):
            return f"the argument {name!r} has to be of type {wanted}"
        if "enum" in schema and value not in schema["enum"]:
            return f"the argument {name!r} has to be one of {json.dumps(schema['enum'], ensure_ascii=False)}"
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            return f"the argument {name!r} is too large"
    return None


# ------------------------------------------------------------------------------------------------ the tools


def now() -> datetime:
    """The time, in the zone of this machine."""
    return datetime.now(timezone.utc).astimezone()


def demo_tools(clock: Clock = now, chance: random.Random | None = None) -> dict[str, Tool]:
    """The tools by name. clock: gives a time with its zone. chance: where random numbers come from."""
    chance = chance or random.Random()
    tools = [
        Tool(
            "calculator",
            "Works out an expression exactly.",
            _parameters(expression="string"),
            lambda expression: {"result": calculate(expression)},
        ),
        Tool(
            "clock",
            "Tells the time in a city, or here.",
            _parameters(city="string", optional=True),
            lambda city=None: {"time": f"{_time(clock(), city):%H:%M}"},
        ),
        Tool(
            "calendar",
            "Tells the date in a city, or here.",
            _parameters(city="string", optional=True),
            lambda city=None: _date(_time(clock(), city)),
        ),
        Tool(
            "unit_converter",
            "Converts units such as km, miles, kg, pounds, celsius and fahrenheit.",
            _parameters(value="number", from_unit="string", to_unit="string"),
            _convert,
        ),
        Tool(
            "random_number",
            "Draws a whole number, from 0 to 100 unless told otherwise.",
            _parameters(min="integer", max="integer", optional=True),
            lambda min=0, max=100: _random(chance, min, max),
        ),
        Tool(
            "text_length",
            "Counts the characters of a text, and its words between spaces.",
            _parameters(text="string"),
            lambda text: {"characters": len(text), "words": len(text.split())},
        ),
    ]
    return {tool.name: tool for tool in tools}


def _parameters(optional: bool = False, **types: str) -> dict[str, Any]:
    """A JSON schema of arguments by name and type. Short: descriptions take room that a small model has not."""
    properties = {name: {"type": kind} for name, kind in types.items()}
    return {"type": "object", "properties": properties, "required": [] if optional else [*types]}


def _time(time: datetime, city: str | None) -> datetime:
    return time if city is None else time.astimezone(zones.find(city))


def _date(time: datetime) -> dict[str, str]:
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")  # in English in any locale
    return {"date": f"{time:%Y-%m-%d}", "weekday": days[time.weekday()]}


def _convert(value: float, from_unit: str, to_unit: str) -> dict[str, Any]:
    source, target = units.find(from_unit), units.find(to_unit)
    return {"result": shown(units.convert(Fraction(str(value)), source, target)), "unit": target.symbol}


def _random(chance: random.Random, least: int, most: int) -> dict[str, int]:
    if least > most:
        raise ValueError(f"min {least} is larger than max {most}")
    return {"result": chance.randint(least, most)}
