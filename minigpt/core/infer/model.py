"""A model ready for use: weights, tokenizer and where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError
from minigpt.core.infer import lean
from minigpt.core.infer.rope_scaling import apply as stretch
from minigpt.core.models import folder
from minigpt.core.models.decoder import Decoder
from minigpt.core.runtime import Runtime


@dataclass
class Model:
    """decoder: on the runtime's device, in eval mode. config: the folder's config.json."""

    decoder: Decoder
    tokenizer: Tokenizer
    path: Path
    config: dict[str, Any]
    runtime: Runtime

    @property
    def is_chat(self) -> bool:
        """Fine-tuned on conversations: it came with a chat template."""
        return self.tokenizer.chat_template is not None


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    quant: str = "none",
    rope_scaling: str | None = None,
    compile: bool = False,
) -> Model:
    """Load a run directory (its newest step), a step directory or a Hugging Face folder.

    The model computes, and is not trained or saved any more: on a CPU its matrices are laid out for products, and are
    no parameters (`minigpt.core.models.folder.load` keeps them as they are).

    quant: weights in fewer bits, on a CPU: `int8`, `fp16`. rope_scaling: `yarn:4` makes the context four times as long.
    compile: lay weights out for an Engine that compiles.
    DataError when files are missing, damaged or do not fit each other; UsageError for options that do not go together.
    """
    where = folder.resolve(str(path))
    runtime = Runtime.open(device, "float32" if quant != "none" and dtype == "auto" else dtype)
    decoder, config = folder.load(where, device=runtime.device, dtype=runtime.dtype)
    tokenizer = Tokenizer.load(where)
    check_fit(decoder, tokenizer, where)
    decoder.eval()
    if rope_scaling is not None:
        stretch(decoder, rope_scaling)
    if quant == "int8":
        lean.int8(decoder, compile=compile)
    elif quant == "fp16":
        lean.fp16(decoder)
    else:
        lean.pack(decoder)
    decoder.requires_grad_(False)
    return Model(decoder, tokenizer, where, config, runtime)


def check_fit(decoder: Decoder, tokenizer: Tokenizer, where: Path | str) -> None:
    """A tokenizer with more tokens than the embedding has rows would index past its end."""
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise DataError(
            f"the tokenizer of {where} has {tokenizer.vocab_size:,} tokens, its model {decoder.config.vocab_size:,}",
            fix="use the tokenizer that the model was trained with",
        )
