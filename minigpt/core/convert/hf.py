"""To Hugging Face: a folder that `transformers` opens by itself, in the architecture's native class.

Parameter and configuration names are Hugging Face's throughout, so nothing is renamed. What a folder needs so that
transformers 4.57 and 5 read the same: both spellings of RoPE and of the dtype (`ModelConfig.to_hf`), and
`PreTrainedTokenizerFast`, which both know. vLLM and SGLang read the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minigpt.core.convert import weights
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError
from minigpt.core.files import read_json, write_json
from minigpt.core.models import folder

OF_ITS_FOLDER = ("_from_model_config", "transformers_version")  # of a generation_config.json: untrue in another folder


def write(
    source: Path, out: Path, *, dtype: str | None = None, card: str = "", shard_bytes: int = weights.SHARD
) -> str:
    """Write the model folder `source` into the directory `out`: weights, configurations, tokenizer, template, card.

    dtype: float32, bfloat16 or float16; None keeps the source's. card: text of README.md; none when empty.
    Returns the dtype written. DataError: weights that do not fit, or a tokenizer with more tokens than the model.
    Nothing here is atomic: build `out` inside `files.new_dir`.
    """
    config, raw = folder.read_config(source)
    stored = weights.checked(source)
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"the tokenizer of {source} has {tokenizer.vocab_size:,} tokens, its model {config.vocab_size:,}",
            fix="put the tokenizer there that the model was trained with",
        )
    kept = dtype or weights.dtype_of(stored)
    out.mkdir(parents=True, exist_ok=True)
    roles: dict[str, Any] = {
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    write_json(out / "config.json", config.to_hf(**roles) | {"dtype": kept, "torch_dtype": kept})
    write_json(out / "generation_config.json", _generation(source) | roles)
    tokenizer.save(out)
    if card:
        (out / "README.md").write_text(card, encoding="utf-8")
    weights.write(out, stored, kept, shard_bytes=shard_bytes)
    return kept


def _generation(source: Path) -> dict[str, Any]:
    """How the source's author sampled from it, when that is known."""
    path = source / "generation_config.json"
    found = read_json(path) if path.is_file() else {}
    return {k: v for k, v in found.items() if k not in OF_ITS_FOLDER} if isinstance(found, dict) else {}
