"""Describe a model, run, tokenizer or data store; list runs.

Without a path the newest run is described.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from minigpt.core.config import group, opt
from minigpt.core.errors import DataError, MinigptError, UsageError
from minigpt.core.files import quoted, read_json
from minigpt.core.groups import CommonConfig
from minigpt.core.report import Context, Result
from minigpt.core.train.run import is_run, runs_below, runs_folder
from minigpt.stages import run_list

EXAMPLES = (
    "minigpt info runs",
    "minigpt info runs/poems",
    "minigpt info runs/poems --json | jq .model.parameters",
)

BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
}
WORDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
SHAPE = (
    ("hidden_size", "hidden"),
    ("num_hidden_layers", "layers"),
    ("num_attention_heads", "heads"),
    ("num_key_value_heads", "key/value heads"),
    ("head_dim", "a head"),
    ("intermediate_size", "feed-forward"),
)


@dataclass
class Config:
    path: str | None = opt(
        None,
        "run, step, folder of runs, model folder, tokenizer folder or data store",
        argument=True,
        metavar="PATH",
        shown="the newest run",
    )
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Say what the path is. Reads configurations, headers and logs; never weights or tokens."""
    from minigpt.core.convert import hub
    from minigpt.core.convert.open import open_model

    given = cfg.path if cfg.path is not None else str(newest_of(runs_folder()))
    path = Path(given).expanduser()
    foreign = hub.is_spec(given) or (path.is_file() and path.suffix.lower() in FOREIGN)
    facts = describe(open_model(given, context.report).path if foreign else path)
    article = "the newest run" if cfg.path is None else ARTICLE[facts["kind"]]
    lines = [f"{given} is {article}" + (f", read from {facts['path']}" if foreign else "")]
    for part in ("runs", "run", "model", "tokenizer", "store"):
        if part in facts:
            lines += ["", *LINES[part](facts[part])]
    return Result("\n".join(lines), facts)


def newest_of(folder: Path) -> Path:
    """The run that wrote last. UsageError when there is none."""
    runs = runs_below(folder)
    if not runs:
        raise UsageError(f"there is no run below {folder}", fix="name a path, or make a run: minigpt quickstart")
    return max(runs, key=run_list.last_sign)


FOREIGN = (".gguf", ".pth", ".pt")
ARTICLE = {
    "run": "a run", "step": "a step of a run", "model": "a model folder", "tokenizer": "a tokenizer",
    "store": "a data store", "weights": "a weights file", "runs": "a folder of runs",
}  # fmt: skip


def describe(path: Path) -> dict[str, Any]:
    """{"kind", "path", and what was found of "runs", "run", "model", "tokenizer", "store"}. UsageError: it is none."""
    if path.is_file():
        return describe_file(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist", fix="give a run, a step, a model, a tokenizer or a data store")
    facts: dict[str, Any] = {"kind": "", "path": str(path)}
    if is_run(path):
        return facts | {"kind": "run", "run": run_facts(path)} | newest(path)
    if (path / "config.json").is_file():
        kind = "step" if (path / "trainer").is_dir() else "model"
        return facts | {"kind": kind, "model": model_facts(path, path.parent)} | tokenizer_part(path)
    if (path / "meta.json").is_file() and (path / "tokens.bin").is_file():
        return facts | {"kind": "store", "store": store_facts(path)}
    if (path / "tokenizer.json").is_file():
        return facts | {"kind": "tokenizer"} | tokenizer_part(path)
    if runs := runs_below(path):
        return facts | {"kind": "runs", "runs": run_list.listed(runs, path)}
    raise UsageError(
        f"{path} is nothing that minigpt knows",
        found="looked for run.json, config.json, tokenizer.json, meta.json with tokens.bin, and runs below it",
        fix=f"data files are shown by: minigpt data preview {quoted(path)}",
    )


def describe_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return {"kind": "weights", "path": str(path), "model": weights_facts([path])}
    if path.name == "tokenizer.json":
        return {"kind": "tokenizer", "path": str(path)} | tokenizer_part(path.parent)
    raise UsageError(f"{path} is a file", fix=f"if it holds data, look at it with: minigpt data preview {quoted(path)}")


# ---------------------------------------------------------------------------------------------- runs


def run_facts(path: Path) -> dict[str, Any]:
    """What run.json, metrics.jsonl and the step directories tell."""
    from minigpt.core.train.run import Run

    known = read_json(path / "run.json") if (path / "run.json").is_file() else {}
    rows = [row for row in Run(path).rows() if isinstance(row.get("step"), int)]
    losses = [row for row in rows if row.get("loss") is not None]
    checks = [row for row in rows if row.get("val_loss") is not None]
    steps = sorted(p.name for p in path.glob("step-*") if p.is_dir())
    best = min(checks, key=lambda row: row["val_loss"], default=None)
    return {
        **{k: known.get(k) for k in ("stage", "status", "error", "device", "seed", "parent", "steps")},
        "started": (known.get("sessions") or [{}])[0].get("started"),
        "ended": (known.get("sessions") or [{}])[-1].get("ended"),
        "sessions": len(known.get("sessions") or []),
        "data": [s.get("path") for s in known.get("data") or [] if isinstance(s, dict)],
        "step": rows[-1]["step"] if rows else 0,
        "tokens": rows[-1].get("tokens") if rows else None,
        "loss": losses[-1]["loss"] if losses else None,
        "val_loss": checks[-1]["val_loss"] if checks else None,
        "val_bpb": checks[-1].get("val_bpb") if checks else None,
        "best": {"step": best["step"], "val_loss": best["val_loss"]} if best else None,
        "checkpoints": steps,
    }


def newest(path: Path) -> dict[str, Any]:
    """Model and tokenizer of a run's newest complete step; nothing when it has none yet."""
    from minigpt.core.models.folder import resolve

    try:
        step = resolve(path)
    except MinigptError:
        return tokenizer_part(path / "tokenizer")
    return {"model": model_facts(step, path)} | tokenizer_part(step)


def run_lines(run: dict[str, Any]) -> Iterator[str]:
    from minigpt.core.train.metrics import short

    status = run["status"] or "unknown"
    yield line("run", f"{run['stage'] or 'unknown stage'}, {status}" + (f": {run['error']}" if run["error"] else ""))
    if run["started"]:
        again = f", {run['sessions']} sessions" if run["sessions"] > 1 else ""
        until = f" to {run['ended']}" if run["ended"] else ""
        yield line("time", f"{run['started']}{until}{again}" + (f" on {run['device']}" if run["device"] else ""))
    tokens = f", {short(run['tokens'])} tokens" if run["tokens"] else ""
    yield line("step", f"{run['step']:,}" + (f" of {run['steps']:,}" if run["steps"] else "") + tokens)
    if run["loss"] is not None:
        yield line("loss", f"{run['loss']:.4f}")
    if run["val_loss"] is not None:
        bits = f", {run['val_bpb']:.4f} bits/byte" if run["val_bpb"] is not None else ""
        yield line(
            "validation",
            f"{run['val_loss']:.4f}{bits}; best {run['best']['val_loss']:.4f} at step {run['best']['step']:,}",
        )
    yield line("data", ", ".join(filter(None, run["data"])) or "unknown")
    if run["parent"]:
        yield line("from", run["parent"].get("path", "unknown"))
    yield line("checkpoints", ", ".join(run["checkpoints"]) or "none yet")


# ---------------------------------------------------------------------------------------------- models


def model_facts(folder: Path, run: Path) -> dict[str, Any]:
    """Configuration and weight headers of a model folder. run: the folder of the run that made it, if one did."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'config.json'} is not a model's configuration", found=json.dumps(config)[:200])
    keys = ("model_type", "vocab_size", "max_position_embeddings", "tie_word_embeddings", *(k for k, _ in SHAPE))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "path": str(folder),
        **{k: config.get(k) for k in keys},
        "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "trained_length": trained_length(run),
        **weights_facts(sorted(folder.glob("*.safetensors"))),
    }


def trained_length(run: Path) -> int | None:
    """Tokens of the rows that a run trained on; None where that is not known, as of a folder that no run made."""
    if not is_run(run):
        return None
    try:
        options = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    length = options.get("max_len") if isinstance(options, dict) else None
    return length if isinstance(length, int) else None


def weights_facts(files: list[Path]) -> dict[str, Any]:
    """Counts over the tensors of some safetensors files, from their headers alone."""
    shapes = {name: entry for file in files for name, entry in header(file).items()}
    sizes = {name: prod(entry["shape"]) for name, entry in shapes.items()}
    types = Counter({WORDS.get(e["dtype"], e["dtype"]): 0 for e in shapes.values()})
    for name, entry in shapes.items():
        types[WORDS.get(entry["dtype"], entry["dtype"])] += sizes[name]
    return {
        "parameters": sum(sizes.values()),
        "embeddings": sum(n for name, n in sizes.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))),
        "tensors": len(shapes),
        "dtype": ", ".join(types) or None,
        "bytes": sum(file.stat().st_size for file in files),
        "files": [file.name for file in files],
    }


def header(file: Path) -> dict[str, Any]:
    """Tensor names with dtype and shape: the JSON at the start of a safetensors file (8 bytes of length before it)."""
    try:
        with open(file, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            found = json.loads(f.read(length))
        found.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in found.values()]
        for entry in found.values():
            if prod(entry["shape"]) * BYTES[entry["dtype"]] != entry["data_offsets"][1] - entry["data_offsets"][0]:
                raise ValueError("a tensor's shape does not fit its bytes")
        if 8 + length + max(ends, default=0) != file.stat().st_size:
            raise ValueError("the file does not end where its last tensor does")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as e:
        raise DataError(
            f"{file} is not a whole safetensors file", found=f"{type(e).__name__}: {e}", fix="copy it again"
        ) from None
    return found


def model_lines(model: dict[str, Any]) -> Iterator[str]:
    from minigpt.core.train.metrics import short

    if "model_type" in model:
        yield line("model", f"{model['model_type'] or 'unknown type'} in {model['path']}")
    share = f", {short(model['embeddings'])} of them embeddings" if model["embeddings"] else ""
    tied = " (tied)" if model.get("tie_word_embeddings") else ""
    yield line("parameters", f"{model['parameters']:,}{share}{tied}")
    shape = ", ".join(f"{word} {model[key]:,}" for key, word in SHAPE if isinstance(model.get(key), int))
    if shape:
        yield line("shape", shape)
    if "vocab_size" in model:
        yield line(
            "context",
            f"{model['max_position_embeddings']} tokens, rope {model['rope_type']}, theta {model['rope_theta']}"
            + (f"; trained on rows of {model['trained_length']}" if model["trained_length"] else ""),
        )
        yield line("vocabulary", str(model["vocab_size"]))
    plural = "s" * (len(model["files"]) != 1)
    yield line("weights", f"{model['dtype'] or 'none'}, {size(model['bytes'])} in {len(model['files'])} file{plural}")


# ---------------------------------------------------------------------------------------------- tokenizers


def tokenizer_part(folder: Path) -> dict[str, Any]:
    """{"tokenizer": facts}, or nothing when the folder has none."""
    return {"tokenizer": tokenizer_facts(folder)} if (folder / "tokenizer.json").is_file() else {}


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """Vocabulary and the roles its special tokens play."""
    from minigpt.core.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)

    def spelled(token: int | None) -> dict[str, Any] | None:
        return None if token is None else {"id": token, "text": tokenizer.token(token)}

    return {
        "path": str(folder),
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": len(tokenizer.special_ids),
        "document": spelled(tokenizer.document_id),
        "padding": spelled(tokenizer.pad_id),
        "turn_end": spelled(tokenizer.turn_end_id),
        "ends_generation": [spelled(token) for token in tokenizer.eos_ids],
        "chat_template": tokenizer.chat_template is not None,
        "fingerprint": tokenizer.fingerprint,
    }


def tokenizer_lines(tokenizer: dict[str, Any]) -> Iterator[str]:
    def name(role: dict[str, Any] | None) -> str:
        return f"{role['text']} ({role['id']})" if role else "none"

    yield line("tokenizer", f"{tokenizer['vocab_size']:,} tokens, {tokenizer['special_tokens']} of them special")
    yield line("document", f"{name(tokenizer['document'])}, padding {name(tokenizer['padding'])}")
    yield line("ends", ", ".join(map(name, tokenizer["ends_generation"])) or "none")
    yield line(
        "chat",
        f"has a template, turns end with {name(tokenizer['turn_end'])}"
        if tokenizer["chat_template"]
        else "no template",
    )
    yield line("fingerprint", tokenizer["fingerprint"][:16])


# ---------------------------------------------------------------------------------------------- stores


def store_facts(folder: Path) -> dict[str, Any]:
    """What a data store holds. DataError when a file of it is missing or too short."""
    from minigpt.core.data.store import Store

    meta = Store.load(folder).meta
    on_disk = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    return {"path": str(folder), "bytes": on_disk, **meta}


def store_lines(store: dict[str, Any]) -> Iterator[str]:
    from minigpt.core.data.schema import reasons

    use = {"text": "text to pretrain on", "chat": "conversations to fine-tune on"}.get(store["kind"], store["kind"])
    yield line("store", f"{use}, {size(store['bytes'])}")
    yield line("documents", f"{store['documents']:,} from {store['rows']:,} rows")
    yield line("tokens", f"{store['tokens']:,}, {store['supervised']:,} of them learnt")
    for source in store["sources"]:
        yield line("source", f"{source['path']}, {source['rows']:,} rows")
    if store["bad"]:
        yield line("skipped", reasons(store["bad"]))
    yield line("tokenizer", store["tokenizer"][:16])


def line(label: str, text: str) -> str:
    return f"{label:<12} {text}"


def size(count: int) -> str:
    """Bytes for people, powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


LINES: dict[str, Callable[[Any], Iterable[str]]] = {
    "runs": run_list.table,
    "run": run_lines,
    "model": model_lines,
    "tokenizer": tokenizer_lines,
    "store": store_lines,
}
