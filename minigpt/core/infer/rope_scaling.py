"""A longer context for a model that was trained on a shorter one, by other rotary frequencies."""

from __future__ import annotations

from minigpt.core.errors import UsageError
from minigpt.core.groups import rope_scaling
from minigpt.core.models.config import normalise_rope
from minigpt.core.models.decoder import Decoder
from minigpt.core.nn.rope import RotaryEmbedding


def apply(model: Decoder, scaling: str) -> None:
    """Stretch the context the model was trained on, in place (YaRN: Peng et al., 2023, arXiv:2309.00071).

    A model that is stretched already starts from its own original context again, so factors do not multiply.
    UsageError for what is no scaling, and for a model that has one of another kind.
    """
    try:
        kind, factor = rope_scaling(scaling)
    except ValueError as fault:
        raise UsageError(f"--rope-scaling {fault}", found=scaling) from None
    config = model.config
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        raise UsageError("this model's own RoPE scaling, llama3, cannot be combined with --rope-scaling", found=scaling)
    context = rope.get("original_max_position_embeddings")
    if context is None:
        context = config.max_position_embeddings
        if rope["rope_type"] == "linear":
            context = int(context / rope["factor"])
    wanted = {"rope_type": kind, "rope_theta": rope["rope_theta"], "factor": factor}
    if kind == "yarn":
        wanted["original_max_position_embeddings"] = context
    config.max_position_embeddings = int(context * factor)
    config.rope_parameters = normalise_rope(wanted, config.max_position_embeddings)
    model.rotary = RotaryEmbedding(config.rope_parameters, config.head_size)
