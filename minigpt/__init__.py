"""Small language models that one person can train, understand and own.

import minigpt
done = minigpt.train("pretrain", data=["poems.jsonl"], size="1m", out="runs/poems")
model = minigpt.load("runs/poems")
print(minigpt.Engine(model).complete("春風"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from minigpt.core.infer.engine import Engine as Engine
    from minigpt.core.infer.model import Model as Model
    from minigpt.core.report import Report

__version__ = "0.1.0.dev0"
__all__ = ["Engine", "Model", "__version__", "load", "train"]

_TRAINING = ("pretrain", "sft")
_LAZY = {
    "Engine": ("minigpt.core.infer.engine", "Engine"),
    "Model": ("minigpt.core.infer.model", "Model"),
}


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    quant: str = "none",
    rope_scaling: str | None = None,
    compile: bool = False,
) -> Model:
    """Open a model: a run, a step, a Hugging Face folder, a `.gguf` or `.pth` file, or `hf:org/name`.

    quant: weights in fewer bits, on a CPU: `int8`, `fp16`. rope_scaling: `yarn:4` makes the context four times as long.
    compile: lay weights out for an `Engine(model, compile=True)`.
    Raises the errors of `minigpt.core.errors`: what is missing, damaged, or not supported.
    """
    from minigpt.core.convert.open import open_model
    from minigpt.core.groups import precision
    from minigpt.core.infer.model import load as load_folder

    return load_folder(open_model(path).path, device, precision(dtype), quant, rope_scaling, compile)


def train(stage: str, report: Report | None = None, **options: Any) -> dict[str, Any]:
    """Run a training stage in this process, with the command line's option names in snake_case.

    stage: `pretrain` or `sft`. report: where progress goes; silent by default.
    Returns what `--json` prints: `run_dir`, `model`, `metrics`. Raises the errors of `minigpt.core.errors`.
    """
    from minigpt.cli import flags
    from minigpt.core.errors import UsageError
    from minigpt.core.report import Context
    from minigpt.core.report import Report as Silent

    if stage not in _TRAINING:
        raise UsageError(f"minigpt.train has no stage {stage!r}", fix=f"choose {' or '.join(_TRAINING)}")
    command = flags.stage_commands(stage)[""]
    cfg, origins = flags.resolve(flags.Request(command, options), environ={})
    context = Context(report or Silent(), origins, ["minigpt.train", stage])
    return command.run(cfg, context).data


def __getattr__(name: str) -> Any:
    """`Engine` and `Model` are imported when first used: `import minigpt` stays free of torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
