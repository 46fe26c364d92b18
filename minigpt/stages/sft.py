"""Fine-tune a model on conversations."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt.core.config import group, opt
from minigpt.core.errors import UsageError
from minigpt.core.groups import CommonConfig, DataConfig, DeviceConfig, OptimConfig, TrainConfig
from minigpt.core.report import Context, Result

EXAMPLES = (
    "minigpt sft -m runs/poems -d alpaca.json -o runs/chat",
    'M=$(minigpt pretrain -d a.jsonl --size 1m) && M=$(minigpt sft -m "$M" -d chat.jsonl) && minigpt chat -m "$M"',
    "minigpt sft -m runs/poems -d a.json -d b.jsonl:0.5 --epochs 3 --lr 3e-4",
)


@dataclass
class Config:
    model: str | None = opt(
        None, "model to start from: run, step or Hugging Face directory", short="-m", panel="Model", metavar="PATH"
    )
    thinking: str = opt(
        "auto",
        "whether the chat template has a thinking block; auto = when the data has reasoning",
        panel="Data",
        choices=("auto", "on", "off"),
        advanced=True,
    )
    data: DataConfig = group(DataConfig, long="truncate")
    optim: OptimConfig = group(OptimConfig)
    train: TrainConfig = group(TrainConfig, epochs=3.0)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Fine-tune. Returns the last step directory, with its losses under `metrics`."""
    if cfg.model is None and cfg.train.resume is None:
        raise UsageError("sft needs a model to start from", fix="name one with --model, such as -m runs/poems")
    from minigpt.stages.supervised import Job, train

    return train(Job("sft", "chat", cfg, context))
