"""A stage's dataclass is the only source of truth: flags, environment, YAML, `config.yaml` and the reference
docs are all read off it here. Standard library and PyYAML only, so errors come before torch is imported.

Precedence: flag > MINIGPT_<STAGE>_<FLAG> > --config files (later wins) > --size preset > default.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

import yaml

from minigpt.core.errors import DataError, UsageError

T = TypeVar("T")
PANELS = ("Model", "Data", "Optimisation", "Sampling", "Run", "Scale", "Output")


def opt(
    default: Any,
    help: str,
    *,
    short: str | None = None,
    panel: str = "Run",
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    auto: bool = False,
    instead_of: Sequence[str] = (),
    metavar: str | None = None,
    shown: str | None = None,
    advanced: bool = False,
    save: bool = True,
    parse: Callable[[Any], Any] | None = None,
    argument: bool = False,
) -> Any:
    """One option: a dataclass field that knows how to be a flag.

    default: value when nobody sets it; a list default makes the flag repeatable.
    shown: what help shows as the default when the value itself says little ("auto by size").
    low, high: inclusive bounds of a number.  above: a bound that is itself left out.
    auto: the word `auto` is a value too, held as 0.
    instead_of: names of options that say the same thing in another way: of such two, one may be given.
    advanced: only in --help-all.  save: stored in a run's config.yaml.
    parse: text or YAML value → field value; raises ValueError with a plain sentence.
    argument: a positional argument of the command line instead of a flag.
    """
    metadata = {
        "help": help,
        "short": short,
        "panel": panel,
        "choices": tuple(choices) if choices else None,
        "low": low,
        "high": high,
        "above": above,
        "auto": auto,
        "instead_of": tuple(instead_of),
        "metavar": metavar,
        "shown": shown,
        "advanced": advanced,
        "save": save,
        "parse": parse,
        "argument": argument,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type[T], **defaults: Any) -> Any:
    """A nested dataclass whose options stand flat beside the others. `defaults` changes some of its defaults."""
    return dataclasses.field(default_factory=lambda: cls(**defaults), metadata={"group": cls, "defaults": defaults})


@dataclass(frozen=True)
class Option:
    """One option as the command line, YAML and docs see it."""

    name: str  # snake_case, unique in a stage
    path: tuple[str, ...]  # attribute path inside the config object
    type: type  # str, int, float, bool
    many: bool  # repeatable
    optional: bool  # None is a value
    default: Any
    meta: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def options(cls: type) -> Iterator[Option]:
    """Every option of a config class in reading order, groups flattened."""
    yield from _walk(cls, (), {})


def _walk(cls: type, path: tuple[str, ...], changed: Mapping[str, Any]) -> Iterator[Option]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if inner := f.metadata.get("group"):
            yield from _walk(inner, (*path, f.name), f.metadata["defaults"])
            continue
        kind, many, optional = _kind(hints[f.name])
        default = f.default_factory() if callable(f.default_factory) else f.default
        yield Option(f.name, (*path, f.name), kind, many, optional, changed.get(f.name, default), f.metadata)


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """A type hint as (scalar type, repeatable, None allowed)."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        arms = [a for a in typing.get_args(hint) if a is not type(None)]
        optional = len(arms) < len(typing.get_args(hint))
        hint = arms[0]
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


# ---------------------------------------------------------------------------------------------- values

_SUFFIX = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "b": 1_000_000_000}


def number(text: str) -> float:
    """`16k`, `1.5M`, `1e-4`, `1_000` → a number (k, M, G are powers of ten)."""
    return float(_decimal(text))


def _decimal(text: str) -> Decimal:
    """The number a text holds, exactly: a seed above 2**53 must not lose its last digits."""
    clean = text.strip().replace("_", "").lower()
    scale = _SUFFIX.get(clean[-1:])
    try:
        return Decimal(clean[:-1]) * scale if scale else Decimal(clean)  # a product is rounded to 28 digits
    except InvalidOperation:
        raise ValueError(f"{text!r} is no number") from None


def duration(value: Any) -> float:
    """`90s`, `10m`, `2h`, `1h30m`, a plain number of seconds → seconds."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", str(value).strip())
    if not parts or not any(parts.groups()):
        raise ValueError("is not a time such as 90s, 10m or 1h30m")
    h, m, s = (float(p or 0) for p in parts.groups())
    return h * 3600 + m * 60 + s


def coerce(option: Option, value: Any, origin: str) -> Any:
    """A flag's text or a YAML value as the field's type. UsageError names where it came from."""
    if value is None:
        if option.optional or option.default is None:
            return None
        raise UsageError(f"{origin} has no value", fix=f"give {option.flag} a value or leave it out")
    if option.many:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [_scalar(option, v, origin) for v in items]
    return _scalar(option, value, origin)


def _scalar(option: Option, value: Any, origin: str) -> Any:
    meta = option.meta
    if meta["auto"] and value == "auto":
        return 0
    try:
        result = meta["parse"](value) if meta["parse"] else _convert(option.type, value)
        if isinstance(result, float) and not math.isfinite(result):
            raise ValueError
    except (ValueError, TypeError) as e:
        said, kind = str(e), _ARTICLE.get(option.type, "valid")
        plain = said if said.startswith("is ") else f"is neither {kind} nor auto" if meta["auto"] else f"is not {kind}"
        raise UsageError(f"{origin} {plain}", found=repr(value)) from None
    if meta["choices"] and result not in meta["choices"]:
        near = difflib.get_close_matches(str(result), meta["choices"], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{origin} is not one of the choices", found=str(result), fix=f"{hint}choose {', '.join(meta['choices'])}"
        )
    low, high, above = meta["low"], meta["high"], meta["above"]
    if not isinstance(result, (int, float)):
        return result
    if (
        (low is not None and result < low)
        or (high is not None and result > high)
        or (above is not None and result <= above)
    ):
        also = ", or auto" if meta["auto"] else ""
        raise UsageError(
            f"{origin} is out of range", found=str(value), fix=f"{option.flag} takes {bounds(option)}{also}"
        )
    return result


def bounds(option: Option) -> str:
    """The range of a number in words; empty when it has none."""
    low, high, above = option.meta["low"], option.meta["high"], option.meta["above"]
    if above is not None:
        return f"more than {above:g}" + (f", at most {high:g}" if high is not None else "")
    if low is None or high is None:
        return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""
    return f"{low:g} to {high:g}"


_ARTICLE = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _convert(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word in ("1", "true", "yes", "on"):
            return True
        if word in ("0", "false", "no", "off"):
            return False
        raise ValueError
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError
        exact = _decimal(value) if isinstance(value, str) else Decimal(value)
        huge = exact.is_finite() and exact.adjusted() > 300  # beyond a float, and ruinous as a whole number
        if huge or not exact.is_finite() or (kind is int and exact != exact.to_integral_value()):
            raise ValueError
        return kind(exact)
    if isinstance(value, bool):  # YAML reads an unquoted no, off or yes as a truth value
        raise ValueError("is a truth value, not text: put it in quotes")
    if isinstance(value, (dict, list)):
        raise ValueError
    return str(value)


# ---------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layer:
    """One source of values. origin names it in `--show-config` and in errors."""

    origin: str  # flag, env, a file name, preset:1m
    values: Mapping[str, Any]  # option name → raw value
    file: bool = False  # which may list defaults too, as a run's config.yaml does


def build(cls: type[T], layers: Sequence[Layer]) -> tuple[T, dict[str, str]]:
    """Resolve a config. layers: strongest first. Returns the object and, per option name, where its value came from."""
    known = {o.name: o for o in options(cls)}
    origins: dict[str, str] = {}
    chosen: dict[tuple[str, ...], Any] = {}
    others = replaced(known, layers)
    for name, option in known.items():
        origins[name] = "default"
        chosen[option.path] = list(option.default) if option.many and option.default else option.default
        if name in others:
            origins[name] = others[name]
            chosen[option.path] = None if option.optional else option.default
            continue
        for layer in layers:
            if name in layer.values:
                chosen[option.path] = coerce(option, layer.values[name], _place(layer, option))
                origins[name] = layer.origin
                break
        if option.meta["argument"] and chosen[option.path] is None and not option.optional:
            raise UsageError(f"{option.meta['metavar'] or option.name} is missing: {option.meta['help']}")
    for layer in layers:
        for key in layer.values:
            if key not in known:
                raise unknown_key(key, known, layer.origin)
    return _assemble(cls, (), chosen), origins


REPLACED = "replaced by "


def replaced(known: Mapping[str, Option], layers: Sequence[Layer]) -> dict[str, str]:
    """Options in whose place another one is given, and the origin that says so: `--steps` for `--epochs`.

    layers: strongest first. A stronger layer's option replaces a weaker one's, anything given replaces a default or
    a preset. UsageError when both are given in one layer.
    """
    ranks = {name: rank for name, option in known.items() if (rank := _rank(option, layers)) is not None}
    result: dict[str, str] = {}
    for option in known.values():
        for rival in [known[name] for name in option.meta["instead_of"] if name in known]:
            mine, theirs = ranks.get(option.name, len(layers)), ranks.get(rival.name, len(layers))
            if mine == theirs < len(layers):
                layer = layers[mine]
                raise UsageError(
                    f"{_place(layer, option)} and {_place(layer, rival)} exclude each other",
                    found=f"{layer.values[option.name]}, {layer.values[rival.name]}",
                    fix="leave one of them away",
                )
            if mine != theirs:
                winner, loser, rank = (option, rival, theirs) if mine < theirs else (rival, option, mine)
                if rank < len(layers) or loser.default is not None:
                    origin = f"{layers[rank].origin}, " if rank < len(layers) else ""
                    result.setdefault(loser.name, f"{origin}{REPLACED}{winner.flag}")
    return result


def _rank(option: Option, layers: Sequence[Layer]) -> int | None:
    """Which layer, the strongest being 0, gives an option; None for a default or a preset."""
    for rank, layer in enumerate(layers):
        value = layer.values.get(option.name)
        if value is None or layer.origin.startswith("preset:") or (layer.file and value == option.default):
            continue
        return rank
    return None


def _place(layer: Layer, option: Option) -> str:
    if layer.origin == "flag":
        return option.meta["metavar"] or option.name if option.meta["argument"] else option.flag
    return f"`{option.name}` in {layer.origin}"


def _assemble(cls: type[T], path: tuple[str, ...], values: Mapping[tuple[str, ...], Any]) -> T:
    parts = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        inner = f.metadata.get("group")
        parts[f.name] = _assemble(inner, (*path, f.name), values) if inner else values[(*path, f.name)]
    return cls(**parts)


def values(config: Any) -> dict[str, Any]:
    """Every option of a config object by name, groups flattened: the reverse of `build`."""
    result = {}
    for option in options(type(config)):
        value = config
        for part in option.path:
            value = getattr(value, part)
        result[option.name] = value
    return result


def spelled(option: Option, value: Any) -> Any:
    """A value as `coerce` reads it."""
    return "auto" if option.meta["auto"] and value == 0 else value


def unknown_key(key: str, known: Mapping[str, Any] | Sequence[str], origin: str) -> UsageError:
    near = difflib.get_close_matches(key.replace("-", "_"), list(known), n=1, cutoff=0.5)
    fix = f"did you mean `{near[0]}`?" if near else "see --help-all for every key"
    return UsageError(f"{origin} has an unknown key `{key}`", fix=fix)


def env_prefix(stage: str) -> str:
    """`data check` → `MINIGPT_DATA_CHECK_`."""
    return f"MINIGPT_{stage.replace('-', '_').replace(' ', '_').upper()}_"


def env_layer(cls: type, stage: str, environ: Mapping[str, str] | None = None) -> Layer:
    """MINIGPT_<STAGE>_<FLAG> variables; repeatable options are split at commas, an empty one counts as unset.

    A variable with the stage's prefix that is no option stays in the layer, so that `build` refuses it by name.
    """
    environ = os.environ if environ is None else environ
    prefix = env_prefix(stage)
    many = {o.name for o in options(cls) if o.many}
    values: dict[str, Any] = {}
    for variable, raw in environ.items():
        if raw and variable.startswith(prefix):
            name = variable[len(prefix) :].lower()
            values[name] = [part for part in raw.split(",") if part] if name in many else raw
    return Layer("environment", values)


def yaml_layer(path: str | Path) -> Layer:
    """One `--config` file, keys in kebab or snake case. Errors name the file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
    except FileNotFoundError:
        raise UsageError(f"--config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"--config {path} cannot be read", found=str(e)) from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{where} is not valid YAML", found=getattr(e, "problem", None) or str(e)) from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds no `key: value` pairs", found=type(loaded).__name__)
    values = {str(k).replace("-", "_"): v for k, v in loaded.items()}
    for name in ("config", "show_config"):
        if name in values:
            raise UsageError(f"{path} sets `{name}`, which only the command line can", fix=f"remove `{name}`")
    if isinstance(nested := values.get("set"), dict):  # `set: {model.num_hidden_layers: 4}` reads better than a list
        values["set"] = [f"{k}={json.dumps(v)}" for k, v in _flatten(nested)]
    return Layer(str(path), values, file=True)


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"model": {"a": 1}, "b": 2}` → ("model.a", 1), ("b", 2)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`--set a.b=c` pairs → {"a.b": value}, values read as YAML with `1e-4` as a number."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, eq, raw = pair.partition("=")
        if not eq or not key.strip():
            raise UsageError("--set takes key=value", found=pair, fix="for example --set model.num_hidden_layers=4")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError:
            value = raw
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            value = float(value)
        result[key.strip()] = value
    return result


def dump(config: Any, origins: Mapping[str, str], *, everything: bool = False, skip: Collection[str] = ()) -> str:
    """A config as YAML that `--config` reads back, each line's provenance as a comment.

    everything: also the options that a run's config.yaml leaves out. skip: names of options to leave out anyway.
    """
    lines, current = [], values(config)
    for option in options(type(config)):
        if option.name in skip or not (everything or option.meta["save"]):
            continue
        value = spelled(option, current[option.name])
        origin = " ".join(origins.get(option.name, "default").split())
        lines.append(f"{option.name}: {_yaml_text(value)}  # {_yaml_text(origin)[1:-1]}")
    return "\n".join(lines) + "\n"


# What YAML 1.1 forbids or folds inside a quoted text: control characters, its extra line breaks, lone surrogates.
_UNSAFE = re.compile("[\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff\\ufeff\\ufffe\\uffff]")


def _yaml_text(value: Any) -> str:
    """JSON is YAML, and one line whatever the value."""
    return _UNSAFE.sub(lambda m: f"\\u{ord(m[0]):04x}", json.dumps(value, ensure_ascii=False))
