"""How a model's makers want it to be sampled: the values of a folder's generation_config.json that this program has.

Free of torch, so that `--show-config` answers at once.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from pathlib import Path
from typing import Any

from minigpt.core.config import coerce, options
from minigpt.core.files import read_json
from minigpt.core.groups import SampleConfig

FILE = "generation_config.json"
KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # under transformers' names, which are ours


def sampling(folder: Path, without: Collection[str] = ()) -> dict[str, Any]:
    """Option name -> value, for what the file says. `do_sample: false` is temperature 0, as in transformers.

    A folder that this program wrote names token ids alone, and changes no default. without: options that are not
    looked at. UsageError for a value out of range.
    """
    path = folder / FILE
    said = read_json(path) if path.is_file() else {}
    values = {key: said[key] for key in KEYS if said.get(key) is not None}
    if said.get("do_sample") is False:
        values["temperature"] = 0.0
    known = {option.name: option for option in options(SampleConfig)}
    return {key: coerce(known[key], v, f"{path}: {key}") for key, v in values.items() if key not in without}


def apply(sample: SampleConfig, origins: MutableMapping[str, str], folder: Path) -> list[str]:
    """Put a model's own values where nothing was asked for, in `sample` and in the options' origins.

    Returns what was changed, `temperature 0.6` and the like.
    """
    own = sampling(folder, [key for key in KEYS if origins.get(key, "default") != "default"])
    changed = {key: value for key, value in own.items() if value != getattr(sample, key)}
    for key, value in own.items():
        setattr(sample, key, value)
        origins[key] = FILE
    return [f"{key} {value:g}" for key, value in changed.items()]
