"""core.config: one dataclass, many sources, one meaning."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.config import (
    Layer,
    assignments,
    build,
    dump,
    duration,
    env_layer,
    group,
    number,
    opt,
    options,
    values,
    yaml_layer,
)
from minigpt.core.errors import DataError, UsageError


@dataclass
class Inner:
    lr: float | None = opt(None, "rate", low=0.0)
    steps: int = opt(10, "steps", low=1, high=1000)
    set: list[str] = opt([], "any key")


@dataclass
class Config:
    name: str = opt("x", "a name")
    kind: str = opt("cosine", "a shape", choices=("cosine", "linear"))
    data: list[str] = opt([], "files", short="-d")
    fast: bool = opt(False, "hurry")
    think: bool | None = opt(None, "think")
    seconds: float | None = opt(None, "time", parse=duration, low=1.0)
    inner: Inner = group(Inner, steps=20)
    out: str | None = opt(None, "where", save=False)


def flags(**given):
    return build(Config, [Layer("flag", given)])[0]


# ---------------------------------------------------------------------------------------------- reading the class


def test_groups_are_flat_and_a_group_may_change_defaults():
    """Options of a group stand beside the others, with the default the stage gave them."""
    found = {o.name: o for o in options(Config)}
    assert list(found) == ["name", "kind", "data", "fast", "think", "seconds", "lr", "steps", "set", "out"]
    assert found["steps"].default == 20 and found["steps"].path == ("inner", "steps")
    assert found["data"].many and found["think"].optional and not found["fast"].optional


def test_list_defaults_are_not_shared():
    """Two configs never hold the same list."""
    a, b = flags(), flags()
    a.data.append("x")
    assert b.data == []


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [("16k", 16_000), ("1.5M", 1_500_000), ("1e-4", 1e-4), ("1_000", 1000), (" 3 ", 3), ("2G", 2e9), ("2b", 2e9)],
)
def test_number(text, value):
    """Suffixes are powers of ten; underscores and exponents are read."""
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "k", "12x", "one", "--lr", "1k2"])
def test_number_refuses(text):
    """What is no number is a ValueError, never a guess."""
    with pytest.raises(ValueError, match="no number"):
        number(text)


@given(st.integers(min_value=-(10**30), max_value=10**30))
def test_whole_numbers_are_exact(n):
    """An integer survives as text whatever its size: a float in between would change large seeds."""

    @dataclass
    class Seeded:
        seed: int = opt(0, "seed")

    assert build(Seeded, [Layer("flag", {"seed": str(n)})])[0].seed == n


@pytest.mark.parametrize(
    ("value", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("45", 45), (7, 7), ("1.5h", 5400)]
)
def test_duration(value, seconds):
    assert duration(value) == seconds


@pytest.mark.parametrize("value", ["", "soon", "10 minutes", "m", True, "-5s"])
def test_duration_refuses(value):
    with pytest.raises(ValueError, match="is not a time"):
        duration(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "ten"}, "--steps is not a whole number"),
        ({"steps": "1.5"}, "--steps is not a whole number"),
        ({"steps": float("inf")}, "--steps is not a whole number"),
        ({"steps": "inf"}, "--steps is not a whole number"),
        ({"steps": "1e999999999"}, "--steps is not a whole number"),
        ({"steps": True}, "--steps is not a whole number"),
        ({"steps": 0}, "--steps is out of range"),
        ({"steps": "2k"}, "--steps is out of range"),
        ({"lr": "nan"}, "--lr is not a number"),
        ({"lr": "-1"}, "--lr is out of range"),
        ({"lr": [1]}, "--lr is not a number"),
        ({"fast": "maybe"}, "--fast is not true or false"),
        ({"name": False}, "--name is a truth value, not text"),
        ({"name": {"a": 1}}, "--name is not text"),
        ({"kind": "cosin"}, "--kind is not one of the choices"),
        ({"seconds": "soon"}, "--seconds is not a time"),
        ({"seconds": "0s"}, "--seconds is out of range"),
        ({"name": None}, "--name has no value"),
    ],
)
def test_bad_values_name_the_flag(given, message):
    """A value that does not fit is a UsageError whose sentence begins with the flag."""
    with pytest.raises(UsageError) as e:
        flags(**given)
    assert e.value.message.startswith(message)


def test_a_near_choice_is_offered():
    with pytest.raises(UsageError) as e:
        flags(kind="cosin")
    assert e.value.found == "cosin" and "did you mean cosine?" in e.value.fix


def test_one_value_of_a_repeatable_option_is_a_list():
    assert flags(data="a.txt").data == ["a.txt"]
    assert flags(data=["a", "b"]).data == ["a", "b"]


# ---------------------------------------------------------------------------------------------- layers


def test_precedence_and_provenance():
    """Each value comes from the strongest layer that has it, and says so."""
    layers = [
        Layer("flag", {"name": "flag"}),
        Layer("environment", {"name": "env", "kind": "linear"}),
        Layer("b.yaml", {"kind": "cosine", "steps": 30}),
        Layer("a.yaml", {"steps": 40, "lr": 0.5}),
        Layer("preset:1m", {"lr": 0.25, "fast": True}),
    ]
    config, origins = build(Config, layers)
    assert (config.name, config.kind, config.inner.steps, config.inner.lr, config.fast) == (
        "flag", "linear", 30, 0.5, True,
    )  # fmt: skip
    assert [origins[k] for k in ("name", "kind", "steps", "lr", "fast", "data")] == [
        "flag", "environment", "b.yaml", "a.yaml", "preset:1m", "default",
    ]  # fmt: skip


def test_values_reverses_build():
    config = flags(name="y", lr="1e-3", data=["a"])
    assert values(config)["lr"] == 1e-3 and values(config)["data"] == ["a"]
    assert build(Config, [Layer("again", values(config) | {"kind": "cosine"})])[0] == config


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UsageError, match=r"a\.yaml has an unknown key `step`") as e:
        build(Config, [Layer("a.yaml", {"step": 3})])
    assert e.value.fix == "did you mean `steps`?"


def test_a_missing_argument_is_named():
    """An argument that is neither given nor optional is asked for by name."""

    @dataclass
    class Needy:
        path: str = opt(None, "what to describe", argument=True, metavar="PATH")

    with pytest.raises(UsageError, match="PATH is missing: what to describe"):
        build(Needy, [])


def test_environment():
    """MINIGPT_<STAGE>_<FLAG>, lists at commas, empty = unset, other stages' variables not read."""
    environ = {
        "MINIGPT_SFT_NAME": "n",
        "MINIGPT_SFT_DATA": "a,b",
        "MINIGPT_SFT_KIND": "",
        "MINIGPT_CHAT_NAME": "other",
        "PATH": "/bin",
    }
    assert env_layer(Config, "sft", environ).values == {"name": "n", "data": ["a", "b"]}
    assert env_layer(Config, "data check", {"MINIGPT_DATA_CHECK_NAME": "n"}).values == {"name": "n"}


def test_a_misspelt_environment_variable_is_refused():
    """A typo must not be silently without effect."""
    with pytest.raises(UsageError, match="unknown key `stepz`"):
        build(Config, [env_layer(Config, "sft", {"MINIGPT_SFT_STEPZ": "3"})])


# ---------------------------------------------------------------------------------------------- YAML


def test_yaml_values_mean_what_they_say(tmp_path):
    """`1e-5` is a number although YAML 1.1 reads text; keys may be kebab-case; nested `set` becomes pairs."""
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-5\nname: 10\nset:\n  model:\n    head_dim: 8\n    tie: true\n  b: null\n", encoding="utf-8")
    config, origins = build(Config, [yaml_layer(path)])
    assert config.inner.lr == 1e-5 and config.name == "10" and origins["lr"] == str(path)
    assert assignments(config.inner.set) == {"model.head_dim": 8, "model.tie": True, "b": None}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a: b: c\n", UsageError, r"a.yaml:1 is not valid YAML"),
        ("x: 1\ny: [1\n", UsageError, r"a.yaml:\d is not valid YAML"),
        ("- a\n", UsageError, "no `key: value` pairs"),
        ("config: b.yaml\n", UsageError, "only the command line can"),
        ("show-config: true\n", UsageError, "only the command line can"),
        (b"\xff\xfe\x00", DataError, "cannot be read"),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path, text, error, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=message):
        yaml_layer(path)


def test_a_missing_yaml_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        yaml_layer(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").touch()
    assert yaml_layer(tmp_path / "empty.yaml").values == {}


@settings(max_examples=200, deadline=None)
@given(
    name=st.text(),
    data=st.lists(st.text(), max_size=3),
    lr=st.none() | st.floats(min_value=0, max_value=1e300),
    think=st.none() | st.booleans(),
    steps=st.integers(1, 1000),
    origin=st.text(max_size=20),
)
def test_a_dump_reads_back(tmp_path_factory, name, data, lr, think, steps, origin):
    """Whatever the values and the names of files, --show-config's text is YAML that gives the same config."""
    config = flags(name=name, data=data, lr=lr, think=think, steps=steps, out="o")
    text = dump(config, {"name": origin}, everything=True)
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(text, encoding="utf-8")
    assert build(Config, [yaml_layer(path)])[0] == config
    assert text.count("\n") == len(list(options(Config)))  # one line each, whatever it holds


def test_dump_tells_origin_and_leaves_out():
    """A run's config.yaml has no `out`; everything=True has it; skip takes a name out again."""
    config, origins = build(Config, [Layer("flag", {"name": "n", "out": "o"})])
    short = dump(config, origins)
    assert 'name: "n"  # flag' in short and "out:" not in short
    assert "out:" in dump(config, origins, everything=True)
    assert "name:" not in dump(config, origins, skip={"name"})
    assert set(yaml.safe_load(short)) == {o.name for o in options(Config)} - {"out"}


@pytest.mark.parametrize(
    ("pair", "value"),
    [("a=1", 1), ("a=1e-4", 1e-4), ("a=true", True), ("a=", None), ("a=x=y", "x=y"), ("a=[1, 2]", [1, 2])],
)
def test_assignments(pair, value):
    assert assignments([pair]) == {"a": value}


@pytest.mark.parametrize("pair", ["a", "=1", ""])
def test_assignments_refuse(pair):
    with pytest.raises(UsageError, match="--set takes key=value"):
        assignments([pair])
