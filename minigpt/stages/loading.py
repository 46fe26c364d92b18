"""How the commands that ask a model name it and load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.config import opt
from minigpt.core.errors import MinigptError
from minigpt.core.groups import DeviceConfig, LoadConfig, SampleConfig
from minigpt.core.report import Report

if TYPE_CHECKING:
    from minigpt.core.infer.model import Model


def model_option(**more: Any) -> Any:
    """The option that names the model."""
    words = "run, step, Hugging Face folder, .gguf or .pth file, or hf:org/name"
    return opt(None, words, short="-m", panel="Model", metavar="PATH", **more)


def load_model(folder: Path, load: LoadConfig, device: DeviceConfig, report: Report) -> Model:
    """The model in a folder, laid out as the options say. Raises what `minigpt.core.infer.model.load` raises."""
    from minigpt.core.infer import model

    made = model.load(folder, device.device, device.dtype, load.quant, load.rope_scaling, load.compile)
    if emulation := made.runtime.emulation:
        report.warn(emulation)
    return made


def sample_as_its_makers(sample: SampleConfig, origins: dict[str, str], folder: Path, report: Report) -> None:
    """Take the sampling values that a model brings, where nothing else was asked for, and say which."""
    from minigpt.core.convert import generation_config

    if changed := generation_config.apply(sample, origins, folder):
        report.note("model", f"{generation_config.FILE} says {', '.join(changed)}")


def shown_sampling(config: Any, origins: dict[str, str]) -> None:
    """The same for `--show-config`, as far as a model lies in a folder: nothing is converted or downloaded for it."""
    from minigpt.core.convert import generation_config
    from minigpt.core.models import folder

    try:
        where = folder.resolve(config.model)
    except MinigptError:  # a file, a hub name, or nothing yet
        return
    generation_config.apply(config.sample, origins, where)
