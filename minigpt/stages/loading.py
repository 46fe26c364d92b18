"""How the commands that ask a model name it and load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.config import opt
from minigpt.core.groups import DeviceConfig, LoadConfig

if TYPE_CHECKING:
    from minigpt.core.infer.model import Model


def model_option(**more: Any) -> Any:
    """The option that names the model."""
    words = "run, step, Hugging Face folder, .gguf or .pth file, or hf:org/name"
    return opt(None, words, short="-m", panel="Model", metavar="PATH", **more)


def load_model(folder: Path, load: LoadConfig, device: DeviceConfig) -> Model:
    """The model in a folder, laid out as the options say. Raises what `minigpt.core.infer.model.load` raises."""
    from minigpt.core.infer import model

    return model.load(folder, device.device, device.dtype, load.quant, load.rope_scaling, load.compile)
