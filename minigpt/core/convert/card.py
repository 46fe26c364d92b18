"""The model card: README.md of an exported folder, made from what the run wrote down.

Its head is YAML that the hub reads (https://huggingface.co/docs/hub/model-cards). Paths are cut to their last part:
a card is meant for others to read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from minigpt.core.convert import weights
from minigpt.core.convert.stream import Stored
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError
from minigpt.core.files import quoted, read_json
from minigpt.core.models import folder

STAGES = {"pretrain": "pretraining", "sft": "fine-tuning on conversations"}
MOST_PARENTS = 20  # a run that names itself as its parent must end somewhere
_SHAPE = {
    "Layers": "num_hidden_layers",
    "Width": "hidden_size",
    "Feed-forward width": "intermediate_size",
    "Attention heads": "num_attention_heads",
    "Key/value heads": "num_key_value_heads",
    "Context": "max_position_embeddings",
    "Vocabulary": "vocab_size",
}


def license_of(source: Path) -> str | None:
    """The licence that a model folder's own card names: an identifier of the hub, such as apache-2.0."""
    try:
        text = (source / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return None
    found = head.get("license") if isinstance(head, dict) else None
    return found if isinstance(found, str) and found != "unknown" else None


def front_matter(facts: dict[str, Any]) -> str:
    """The head of a card."""
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def write(source: Path, name: str, *, dtype: str, origin: str | None = None, license: str | None = None) -> str:
    """The card of the model folder `source` as it is exported under `name`.

    origin: what was converted, when that is no run of ours: `hf:org/name@commit`, or a file.
    license: an identifier of the hub, such as apache-2.0; else that of the source's own card; else `unknown`.
    """
    config, _ = folder.read_config(source)
    stored = weights.checked(source)
    chat = Tokenizer.load(source).chat_template is not None
    runs = list(_runs(source))
    base = _base_model(runs, origin)
    head = {
        "license": license or license_of(source) or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minigpt", config.model_type],
        **({"base_model": base} if base else {}),
    }
    parts = [
        front_matter(head),
        f"# {name}",
        _about(config.architecture, stored, chat, base, bool(runs)),
        f"## Use\n\n{_usage(name, chat)}",
        f"## Model\n\n{_table(_shape(config, stored, dtype))}",
    ]
    if runs:
        parts.append(f"## Training\n\n{_training(runs)}")
    return "\n\n".join(parts) + "\n"


def _about(architecture: str, stored: dict[str, Stored], chat: bool, base: str | None, trained: bool) -> str:
    kind = "chat model" if chat else "base model, which continues text"
    made = "Trained" if trained and not base else f"Made from {base}" if base else "Converted"
    return (
        f"A {kind}, of {_count(stored):,} parameters, as `{architecture}`. "
        f"{made} with [minigpt](https://pypi.org/project/minigpt-lm/)."
    )


def _count(stored: dict[str, Stored]) -> int:
    return sum(tensor.shape[0] * tensor.row for tensor in stored.values())


def _usage(name: str, chat: bool) -> str:
    if chat:
        ask = (
            'messages = [{"role": "user", "content": "Hello!"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    else:
        ask = 'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)'
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{ask}
output = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.7)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    verb = "chat" if chat else "generate"
    prompt = "" if chat else ' -p "Once upon a time"'
    return f"```python\n{code}```\n\nor `vllm serve {quoted(name)}`, or `minigpt {verb} -m {quoted(name)}{prompt}`."


def _shape(config: Any, stored: dict[str, Stored], dtype: str) -> dict[str, str]:
    rope = config.rope_parameters
    rows = {label: f"{getattr(config, key):,}" for label, key in _SHAPE.items()}
    kind = "" if rope["rope_type"] == "default" else f", {rope['rope_type']} scaling"
    return {
        "Parameters": f"{_count(stored):,}" + (", embeddings tied" if config.tie_word_embeddings else ""),
        **rows,
        "Rotary embedding": f"theta {rope['rope_theta']:,g}{kind}",
        "Precision": dtype,
    }


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows.items())])


# ---------------------------------------------------------------------------------------------- where it comes from


def _runs(source: Path) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """(step, run.json, what was measured up to it) of the run that a step belongs to, then of the run before it, …"""
    for _ in range(MOST_PARENTS):
        number = source.name.removeprefix("step-")
        if not number.isdigit() or not (source.parent / "run.json").is_file():
            return
        try:
            info = read_json(source.parent / "run.json")
        except DataError:
            return
        if not isinstance(info, dict):
            return
        yield int(number), info, _measured(source.parent / "metrics.jsonl", int(number))
        parent = info.get("parent")
        if not isinstance(parent, dict) or not parent.get("path"):
            return
        source = Path(parent["path"])


def _measured(log: Path, step: int) -> dict[str, Any]:
    """The newest value of each metric, up to a step."""
    found: dict[str, Any] = {}
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short by a crash
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            found |= {key: value for key, value in row.items() if isinstance(value, (int, float))}
    return found


def _training(runs: list[tuple[int, dict[str, Any], dict[str, Any]]]) -> str:
    lines = ["| stage | data | steps | tokens | loss | validation loss |", "|---|---|---|---|---|---|"]
    for step, info, measured in reversed(runs):
        stage = STAGES.get(str(info.get("stage")), str(info.get("stage")))
        data = "; ".join(_source(entry) for entry in info.get("data") or () if isinstance(entry, dict))
        tokens = f"{measured['tokens']:,}" if "tokens" in measured else "–"
        losses = (f"{measured[key]:.4f}" if key in measured else "–" for key in ("loss", "val_loss"))
        lines.append(f"| {stage} | {data or '–'} | {step:,} | {tokens} | {' | '.join(losses)} |")
    _, newest, _ = runs[0]
    versions = newest.get("versions") if isinstance(newest.get("versions"), dict) else {}
    made = ", ".join(f"{name.removesuffix('-lm')} {version}" for name, version in (versions or {}).items())
    facts = [f"seed {newest['seed']}" if "seed" in newest else "", str(newest.get("device") or ""), made]
    return "\n".join(lines) + f"\n\nLosses are in nats a token. {'; '.join(filter(None, facts))}."


def _source(entry: dict[str, Any]) -> str:
    path = str(entry.get("path", "unknown"))
    name = path if path.startswith("sample:") else path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    rows = f" ({entry['rows']:,} rows)" if isinstance(entry.get("rows"), int) else ""
    return name.replace("|", "\\|") + rows


def _base_model(runs: list[tuple[int, dict[str, Any], dict[str, Any]]], origin: str | None) -> str | None:
    """`org/name` of the hub's model that all of this started from; None when it started elsewhere."""
    parent = (runs[-1][1].get("parent") if runs else None) or {}
    named = parent.get("origin") if isinstance(parent, dict) else None
    for spec in (named, origin):
        if isinstance(spec, str) and spec.startswith("hf:"):
            return spec[3:].partition("@")[0]
    return None
