"""A model folder on disk: `config.json` and safetensors, as Hugging Face lays them out.

Importing this file does not import torch, so that paths can be checked before the slow imports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.config import unknown_key
from minigpt.core.errors import DataError, UsageError
from minigpt.core.files import read_json, write_json
from minigpt.core.models import architecture, model_types
from minigpt.core.models.presets import preset

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minigpt.core.models.config import ModelConfig
    from minigpt.core.models.decoder import Decoder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


# ---------------------------------------------------------------------------------------------- finding


def resolve(path: str | Path) -> Path:
    """The folder with `config.json` that a user's path means.

    A model folder is itself; a run directory is its newest complete step: the one named in `latest`, else the highest
    numbered; the files `latest` and `best` of a run are the steps they name. UsageError lists what was looked for.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.name in ("latest", "best"):
        named = path.parent / path.read_text(encoding="utf-8").strip()
        if is_complete(named):
            return named
        raise DataError(f"{path} names a step that is not there or not complete", found=str(named))
    if (path / "config.json").is_file():
        if not is_complete(path):
            raise _no_weights(path)
        return path
    if found := _newest_step(path):
        return found
    if not path.exists():
        raise UsageError(f"{path} does not exist", fix="--model takes a run, a step of a run, or a model folder")
    raise UsageError(
        f"{path} is no model",
        found=f"looked for config.json with {WEIGHTS} (or its index), and for {path}/latest and {path}/step-*",
        fix="--model takes a run, a step of a run, or a model folder",
    )


def is_complete(folder: Path) -> bool:
    """Has a configuration and weights."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def _newest_step(run: Path) -> Path | None:
    latest = run / "latest"
    if latest.is_file():
        named = run / latest.read_text(encoding="utf-8").strip()
        if is_complete(named):
            return named
    steps = [d for d in run.glob("step-*") if d.name[5:].isdigit() and is_complete(d)]
    return max(steps, key=lambda d: int(d.name[5:]), default=None)


def _no_weights(folder: Path) -> DataError:
    pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
    if pickles:
        return DataError(
            f"{folder} has only pickled weights, which can run any code when read",
            found=", ".join(pickles[:5]),
            fix=f"save it as {WEIGHTS} (transformers: model.save_pretrained)",
        )
    return DataError(f"{folder} has a config.json but neither {WEIGHTS} nor {INDEX}")


# ---------------------------------------------------------------------------------------------- making


def create(
    size: str | Mapping[str, Any], vocab_size: int | None = None, overrides: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The configuration of a new model.

    size: a preset's name, or a dictionary of config keys with `model_type`.
    vocab_size: the tokenizer's; a preset that fixes its own keeps it when that is no smaller.
    overrides: `model_type` or config keys, with or without `model.` in front; they win. An unknown key is a UsageError.
    """
    values = preset(size) if isinstance(size, str) else dict(size)
    values.pop("max_len", None)
    if vocab_size is not None:
        values["vocab_size"] = max(vocab_size, values.get("vocab_size") or 0)
    changed = {k.removeprefix("model."): v for k, v in (overrides or {}).items()}
    if "rope_theta" in changed or "rope_scaling" in changed:  # else the nested spelling of the base would win
        values["rope_theta"] = changed.get("rope_theta") or (values.get("rope_parameters") or {}).get(
            "rope_theta", values.get("rope_theta")
        )
        values.pop("rope_parameters", None)
    values.update(changed)
    config = architecture(str(values.pop("model_type", "llama"))).Config
    for key in values:
        if key not in config.known_keys():
            raise unknown_key(key, config.known_keys(), "--set model")
    return config.from_hf(values, "--set model")


# ---------------------------------------------------------------------------------------------- writing


def write(
    folder: Path,
    model: Decoder | Mapping[str, Tensor],
    config: ModelConfig,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    dtype: str = "float32",
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` into `folder`.

    model: a Decoder or its state dict; names are Hugging Face's already, a tied head is stored once, as `embed_tokens`.
    dtype: of the file: float32, bfloat16 or float16.
    Nothing here is atomic: build the folder inside `files.new_dir`.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    hf = config.to_hf(**tokens) | {"dtype": dtype, "torch_dtype": dtype}  # type: ignore[arg-type]
    write_json(folder / "config.json", hf)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **{k: hf[k] for k in tokens}})
    state = model if isinstance(model, Mapping) else model.state_dict()
    tensors = {k: v.detach().to("cpu", getattr(torch, dtype)).contiguous() for k, v in state.items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------- reading


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of a resolved model folder, and the raw `config.json`.

    DataError lists the supported classes when it is of another; UsageError names a key that is not implemented here.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise DataError(f"{path} names no model_type", found=json.dumps(raw)[:200])
    kind, named = raw["model_type"], raw.get("architectures")
    if kind not in model_types() or (named and architecture(kind).Config.architecture not in named):
        raise DataError(
            f"{path} is of a class that is not supported here",
            found=f"model_type {kind}" + (f", architectures {', '.join(map(str, named))}" if named else ""),
            fix=f"supported: {', '.join(f'{architecture(t).Config.architecture} ({t})' for t in model_types())}",
        )
    return architecture(kind).Config.from_hf(raw, str(path)), raw


def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, in the model's order. A tied head has none of its own."""
    return {name: tuple(p.shape) for name, p in _empty(config).state_dict().items()}


def _empty(config: ModelConfig) -> Decoder:
    """A model without memory for its parameters.

    Filling them with numbers is skipped: it does nothing without memory, but makes torch import sympy, which takes
    longer than everything else here.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    from minigpt.core.models.decoder import Decoder

    class NoFilling(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in (kwargs or {}) else args[0]
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), NoFilling():
        return Decoder(config)


def is_computed(name: str) -> bool:
    """Old exports stored what is computed: the frequencies of the rotary embedding."""
    return name.endswith("rotary_emb.inv_freq")


def check_fit(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], tied: bool, where: str | Path
) -> None:
    """Refuse weights of which a name is missing or unknown, or a shape is another. DataError lists them.

    tied: a copy of the embedding called `lm_head.weight` is no unknown name.
    """
    known = {name for name in found if not is_computed(name) and not (tied and name == HEAD)}
    missing = [name for name in expected if name not in known]
    unexpected = [name for name in found if name in known and name not in expected]
    if missing or unexpected:
        raise DataError(
            f"{where}: the weights do not fit config.json",
            found=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}",
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise DataError(
                f"{where}: `{name}` has another shape than config.json says",
                found=f"{tuple(found[name])}, expected {tuple(shape)}",
            )


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """The model at `path` (anything `resolve` takes) and its raw `config.json`.

    dtype: of the parameters, float32 unless given; bfloat16 and float16 files are read too.
    DataError names missing and unexpected tensors, wrong shapes, and a damaged file.
    """
    import torch

    folder = resolve(path)
    config, raw = read_config(folder)
    model = _empty(config)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    state = _read_weights(folder, shapes, config.tie_word_embeddings, torch.device(device), dtype or torch.float32)
    model.load_state_dict(state, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, raw


def _read_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], tied: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor in `shapes` from the folder's files. Names and shapes are checked before any is read."""
    import torch
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    state: dict[str, Tensor] = {}
    try:
        found: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(str(file), framework="pt") as f:
                found |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
        check_fit(found, shapes, tied, folder)
        for file in files:
            with safe_open(str(file), framework="pt") as f:
                for name in f.keys():  # noqa: SIM118  (not a dict)
                    if is_computed(name):
                        continue
                    tensor = f.get_tensor(name)
                    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                        raise DataError(f"{file}: `{name}` is not stored as a float", found=str(tensor.dtype))
                    state[name] = tensor.to(device, dtype)
    except (SafetensorError, OSError) as e:
        raise DataError(
            f"{file} cannot be read: it is damaged or was not copied whole", found=str(e), fix="copy it again"
        ) from None
    if tied and (head := state.pop(HEAD, None)) is not None and not torch.equal(head, state[EMBEDDING]):
        raise DataError(f"{folder}: config.json ties the embeddings, but {HEAD} differs from embed_tokens")
    return state


def weight_files(folder: Path) -> list[Path]:
    """The one safetensors file, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise DataError(f"{folder / INDEX} has no weight_map")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise DataError(f"{folder / INDEX} names a shard that is not in the folder", found=file.name)
    return files


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
