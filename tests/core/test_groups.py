"""Options that several stages share."""

from dataclasses import dataclass

import pytest

from minigpt.core.config import Layer, build, dump, group
from minigpt.core.errors import UsageError
from minigpt.core.groups import DeviceConfig, TrainConfig, meeting_point


@dataclass
class Some:
    train: TrainConfig = group(TrainConfig)


@pytest.mark.parametrize(("typed", "meant"), [("auto", 0), ("8", 8), (8, 8), ("1k", 1000), ("4.0", 4)])
def test_a_number_or_auto(typed, meant):
    train = build(Some, [Layer("flag", {"nproc": typed, "batch_size": typed})])[0].train
    assert train.nproc == train.batch_size == meant


@pytest.mark.parametrize("typed", ["many", "2.5", 2.5, "inf", "nan", "", True])
def test_neither_a_number_nor_auto(typed):
    with pytest.raises(UsageError, match="--nproc is neither a whole number nor auto"):
        build(Some, [Layer("flag", {"nproc": typed})])


@pytest.mark.parametrize("typed", [0, "0", -1])
def test_only_the_word_means_auto(typed):
    """0 is what `auto` is held as, and is not accepted for it; a config that is written down says `auto`."""
    with pytest.raises(UsageError, match="out of range") as e:
        build(Some, [Layer("flag", {"batch_size": typed})])
    assert e.value.fix == "--batch-size takes at least 1, or auto"
    assert 'batch_size: "auto"' in dump(*build(Some, [Layer("flag", {"batch_size": "auto"})]))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("fp32", "float32"), ("BF16", "bfloat16"), ("fp16", "float16"), ("float16", "float16"), ("auto", "auto")],
)
def test_short_names_of_precisions(typed, meant):
    """What our own lines print is accepted, and recorded under torch's name."""
    assert build(DeviceConfig, [Layer("flag", {"dtype": typed})])[0].dtype == meant


@pytest.mark.parametrize("typed", ["node0:29400", "10.0.0.7:1", "train-0.train:65535", "[fe80::1]:29400"])
def test_a_host_and_a_port(typed):
    assert meeting_point(typed) == meeting_point(f" {typed} ") == typed


@pytest.mark.parametrize(
    "typed", ["node0", "node0:", ":29400", "node0:0", "node0:65536", "node0:x", "fe80::1:29400", "a b:1"]
)
def test_neither_a_host_nor_a_port(typed):
    with pytest.raises(ValueError, match="node0:29400"):
        meeting_point(typed)
