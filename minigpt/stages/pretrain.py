"""Train a language model from scratch on text."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt.core.config import group, opt
from minigpt.core.errors import UsageError
from minigpt.core.groups import CommonConfig, DataConfig, DeviceConfig, OptimConfig, TrainConfig
from minigpt.core.models.presets import PRESETS
from minigpt.core.report import Context, Result

EXAMPLES = (
    "minigpt pretrain -d poems.jsonl --size 3m -o runs/poems",
    "minigpt pretrain -d book.txt --size 1m --epochs 4 --resume auto -o runs/book",
    "cat *.txt | minigpt pretrain -d - --size 1m --json",
)


@dataclass
class Config:
    size: str | None = opt("3m", "model size", panel="Model", choices=tuple(PRESETS), instead_of=("model",))
    model: str | None = opt(
        None, "go on from these weights instead of from scratch", short="-m", panel="Model", metavar="PATH"
    )
    vocab_size: int | None = opt(
        None,
        "tokens of a tokenizer that is trained here",
        panel="Model",
        low=320,
        shown="by corpus, up to 6,400",
        instead_of=("model", "tokenizer"),
    )
    set: list[str] = opt(
        [], "any key of the new model, as in model.num_hidden_layers=4", panel="Model", metavar="KEY=VALUE"
    )
    data: DataConfig = group(DataConfig)
    optim: OptimConfig = group(OptimConfig)
    train: TrainConfig = group(TrainConfig)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Pretrain. Returns the last step directory, with its losses under `metrics`."""
    if cfg.size is None and cfg.model is None and cfg.train.resume is None:
        raise UsageError("pretrain needs a size or a model", fix="name one: --size 3m, or weights with --model")
    from minigpt.stages.supervised import Job, train

    return train(Job("pretrain", "text", cfg, context))
