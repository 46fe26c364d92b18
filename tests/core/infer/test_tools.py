"""The demonstration tools and their calling: right values, and faults in words instead of exceptions."""

from __future__ import annotations

import json
import random
from datetime import datetime, timedelta, timezone
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.data import chat, formats
from minigpt.core.data.sample.chinese import CHINESE
from minigpt.core.data.sample.english import ENGLISH
from minigpt.core.data.sample.parts import tools
from minigpt.core.data.sample.world import COUNTRIES
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.infer import units
from minigpt.core.infer.tools import Tool, call, demo_tools, fault_of, now

EVENING = datetime(2025, 6, 30, 23, 30, tzinfo=timezone(timedelta(hours=1), "CET"))
TOOLS = demo_tools(lambda: EVENING, random.Random(0))


def result(name, **arguments):
    return json.loads(call(TOOLS, name, arguments))


# ---------------------------------------------------------------------------------------------- units


def convert(value, source, target):
    return units.convert(Fraction(value), units.find(source), units.find(target))


@pytest.mark.parametrize(
    ("many", "small", "large"),
    [
        (12, "in", "ft"), (3, "feet", "yard"), (1760, "yd", "mile"), (1000, "m", "公里"), (10, "寸", "尺"),
        (1500, "尺", "里"), (43560, "ft²", "acre"), (640, "acres", "square mile"),
        (144, "square inches", "square foot"),
        (15, "亩", "公顷"), (100, "ha", "km2"), (10_000, "cm^2", "m^2"), (8, "pints", "gallon"), (4, "quarts", "gal"),
        (2, "cups", "pint"), (16, "tbsp", "cup"), (3, "tsp", "tbsp"), (128, "fl oz", "gallon"), (1000, "mL", "L"),
        (1000, "litres", "m3"), (16, "oz", "lb"), (14, "pounds", "stone"), (2000, "lbs", "short ton"), (2, "斤", "kg"),
        (10, "两", "斤"), (5, "carats", "g"), (1000, "kg", "吨"), (60, "seconds", "minute"), (24, "hours", "day"),
        (7, "days", "week"), ("365.25", "d", "year"), (1000, "ms", "s"), ("3.6", "km/h", "m/s"),
        ("1.852", "km/h", "knot"),
        ("1.609344", "kilometres per hour", "mph"), (8, "bits", "byte"), (8, "Mb", "MB"), (1024, "MiB", "GiB"),
        (1000, "MB", "GB"), ("1.024", "kB", "KiB"), (1000, "cal", "kcal"), (3600, "J", "Wh"), (1000, "Wh", "kWh"),
        ("101.325", "kPa", "atm"), (100, "kPa", "bar"),
    ],
)  # fmt: skip
def test_so_many_of_one_make_another(many, small, large):
    """Ratios that are exact by definition, both ways."""
    assert convert(many, small, large) == 1 and convert(1, large, small) == Fraction(many)


@pytest.mark.parametrize(
    ("celsius", "fahrenheit", "kelvin"),
    [("0", "32", "273.15"), ("100", "212", "373.15"), ("-40", "-40", "233.15"), ("-273.15", "-459.67", "0")],
)
def test_temperatures(celsius, fahrenheit, kelvin):
    assert convert(celsius, "celsius", "°F") == Fraction(fahrenheit)
    assert convert(fahrenheit, "degrees Fahrenheit", "K") == Fraction(kelvin)
    assert convert(kelvin, "开尔文", "摄氏度") == Fraction(celsius)


def test_names_in_any_letters_but_bits_are_no_bytes():
    assert units.find("Kilometers") is units.find("KM") is units.find("km") is units.find("  千米 ")
    assert units.find("square_meters") is units.find("m²")
    assert units.find("Mb") is not units.find("MB") is units.find("mb")
    assert units.find("inches").symbol == "in"


@pytest.mark.parametrize(
    ("value", "source", "target", "told"),
    [
        (1, "kg", "m", "kg measures mass and m length"),
        (1, "kilomeetr", "m", "no unit 'kilomeetr'; did you mean kilometre"),
        (1, "m/", "m", "no unit"),
        (1, "/" * 100, "m", "no unit"),
        (1, "", "m", "no unit ''"),
    ],
)
def test_what_is_no_unit_is_told(value, source, target, told):
    assert told in result("unit_converter", value=value, from_unit=source, to_unit=target)["error"]


# ---------------------------------------------------------------------------------------------- the tools


def test_a_calculation():
    assert result("calculator", expression="256 * 37") == {"result": 9472}
    assert result("calculator", expression="1/0") == {"error": "division by zero"}


def test_a_conversion():
    assert result("unit_converter", value=100, from_unit="km", to_unit="miles") == {
        "result": 62.1371192237,
        "unit": "mi",
    }
    assert result("unit_converter", value=30.5, from_unit="celsius", to_unit="F") == {"result": 86.9, "unit": "°F"}


def test_the_time_and_the_date():
    """Here, or in a city or zone, where it may be another day or summer."""
    assert result("clock") == {"time": "23:30"}
    assert result("calendar") == {"date": "2025-06-30", "weekday": "Monday"}
    for city in ("Asia/Shanghai", "Shanghai", "beijing", "北京", " Beijing, China"):
        assert result("clock", city=city) == {"time": "06:30"}
        assert result("calendar", city=city) == {"date": "2025-07-01", "weekday": "Tuesday"}
    assert result("clock", city="St. Johns")["error"].endswith("did you mean America/St_Johns?")
    assert result("clock", city="St Johns") == {"time": "20:00"}, "half an hour off, and summer time"
    assert abs(now() - datetime.now(timezone.utc)) < timedelta(minutes=1)


def test_the_cities_of_the_sample_have_their_time():
    """A model that was taught to ask for them by `sample:tools` gets an answer."""
    for _, cities, _, _ in COUNTRIES:
        english, chinese = (result("clock", city=city) for city in cities)
        assert "time" in english and english == chinese


@pytest.mark.parametrize("name", ["Shangai", "../../etc/passwd", "/etc/passwd", "Asia", "", "a\x00b", "火星"])
def test_what_is_no_city_is_told(name):
    found = result("clock", city=name)["error"]
    assert found.startswith(f"there is no city or time zone {name!r}")
    assert "such as Asia/Shanghai" in found or "did you mean" in found


def test_random_numbers():
    """Both ends come, nothing beyond; 0 to 100 unless said otherwise."""
    assert {result("random_number", min=1, max=3)["result"] for _ in range(99)} == {1, 2, 3}
    assert all(0 <= result("random_number")["result"] <= 100 for _ in range(99))
    assert result("random_number", min=3, max=1) == {"error": "min 3 is larger than max 1"}


def test_the_length_of_a_text():
    assert result("text_length", text="春風 又綠🙂") == {"characters": 6, "words": 2}


# ---------------------------------------------------------------------------------------------- calling


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("weather", {}, "there is no tool 'weather'; there are calculator"),
        ("calculator", {}, "the argument 'expression' is missing"),
        ("calculator", {"expr": "1"}, "there is no argument 'expr'; there are expression"),
        ("calculator", {"expression": 1}, "'expression' has to be of type string"),
        ("unit_converter", {"value": "1", "from_unit": "m", "to_unit": "m"}, "'value' has to be of type number"),
        ("unit_converter", {"value": True, "from_unit": "m", "to_unit": "m"}, "'value' has to be of type number"),
        ("unit_converter", {"value": 1e300, "from_unit": "m", "to_unit": "m"}, "'value' is too large"),
        ("random_number", {"max": 2.5}, "'max' has to be of type integer"),
        ("random_number", {"max": 10**4000}, "'max' is too large"),
        ("text_length", {"text": None}, "'text' has to be of type string"),
    ],
)
def test_a_wrong_call_is_told_in_words(name, arguments, told):
    assert told in json.loads(call(TOOLS, name, arguments))["error"]


def test_types_and_choices_of_a_schema():
    schema = {"properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", 1]}}, "required": ["a"]}
    assert fault_of({"a": True, "b": 1}, schema) is None
    assert fault_of({"a": 1}, schema) == "the argument 'a' has to be of type boolean"
    assert fault_of({"a": True, "b": "y"}, schema) == "the argument 'b' has to be one of [\"x\", 1]"


def test_a_tool_that_breaks_does_not_end_the_conversation():
    def broken():
        raise KeyError("inside")

    bad = {"broken": Tool("broken", "", {"type": "object", "properties": {}}, broken)}
    assert json.loads(call(bad, "broken", {})) == {"error": "broken failed: KeyError: 'inside'"}


ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9) | st.lists(st.text())
)


@given(st.sampled_from([*TOOLS]), st.data())
def test_any_arguments_get_json(name, data):
    """Whatever a model writes, there is an answer that the template can show."""
    properties = TOOLS[name].parameters["properties"]
    keys = st.sampled_from([*properties]) | st.text(max_size=3)
    answer = json.loads(call(TOOLS, name, data.draw(st.dictionaries(keys, ANYTHING, max_size=4))))
    assert isinstance(answer, dict) and answer


def test_schemas_are_openais_and_render():
    """As rows of training data have them."""
    schemas = [tool.schema for tool in TOOLS.values()]
    row = {"tools": schemas, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    assert formats.normalise(row).tools == schemas
    tokenizer = Tokenizer.train([json.dumps(schemas)] * 3, 900)
    tokenizer.chat_template = chat.template()
    text = tokenizer.decode(chat.render(tokenizer, row["messages"], schemas).ids)
    assert all(json.dumps(schema, ensure_ascii=False) in text for schema in schemas)


@pytest.mark.parametrize("tongue", [ENGLISH, CHINESE])
def test_what_the_sample_teaches_is_understood(tongue):
    """Each call of `sample:tools` but the weather's gets a result as it was taught; schemas have the same arguments."""
    seen = set()
    for row in tools(tongue, random.Random(0)):
        for asked, told in zip(row["messages"], row["messages"][1:], strict=False):
            for made in asked.get("tool_calls", ()):
                name, arguments = made["function"]["name"], made["function"]["arguments"]
                if name in TOOLS:
                    found, taught = result(name, **arguments), json.loads(told["content"])
                    assert found.keys() == taught.keys() and (name == "clock" or found == taught)
                    seen.add(name)
        for description in row["tools"]:
            function = description["function"]
            if function["name"] in TOOLS:
                assert function["parameters"]["properties"] == TOOLS[function["name"]].parameters["properties"]
    assert seen == {"calculator", "clock"}
