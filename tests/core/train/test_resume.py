"""Which options may change at resume, and where a run lives."""

from dataclasses import dataclass

import pytest

from minigpt.core.config import Layer, build, dump, group, opt
from minigpt.core.errors import UsageError
from minigpt.core.groups import CommonConfig, DataConfig, DeviceConfig, OptimConfig, TrainConfig
from minigpt.core.train import resume


@dataclass
class Config:
    size: str = opt("3m", "size")
    model: str | None = opt(None, "model")
    data: DataConfig = group(DataConfig)
    optim: OptimConfig = group(OptimConfig)
    train: TrainConfig = group(TrainConfig)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def configure(**flags):
    return build(Config, [Layer("flag", flags)])


@pytest.fixture
def run(tmp_path):
    cfg, origins = configure(lr=1e-3, data=["a.jsonl"], batch_tokens=1000, epochs=2)
    (tmp_path / "config.yaml").write_text(dump(cfg, origins))
    return tmp_path


def merge(run, allow=False, **flags):
    cfg, origins = configure(**flags)
    return resume.merge(cfg, origins, run, allow)


def test_saved_options_return_without_being_given_again(run):
    cfg, origins, changes = merge(run)
    assert (cfg.optim.lr, cfg.data.data, cfg.train.batch_tokens, cfg.train.epochs) == (1e-3, ["a.jsonl"], 1000, 2.0)
    assert changes == [] and "config.yaml" in origins["lr"]


def test_the_same_command_again_changes_nothing(run):
    assert merge(run, lr=1e-3, data=["a.jsonl"], batch_tokens=1000, epochs=2)[2] == []


@pytest.mark.parametrize(
    "flags",
    [{"lr": 2e-3}, {"batch_tokens": 2000}, {"seed": 1}, {"max_len": 64}, {"size": "1m"},
     {"optimizer": "muon"}, {"schedule": "cosine"}, {"pack": "pad"}, {"dtype": "float32"}, {"weight_decay": 0.0}],
)  # fmt: skip
def test_anything_that_changes_the_maths_is_refused_with_a_diff(run, flags):
    with pytest.raises(UsageError) as e:
        merge(run, **flags)
    assert e.value.code == 2
    assert e.value.found.startswith("--" + next(iter(flags)).replace("_", "-") + ": ") and "→" in e.value.found
    assert merge(run, allow=True, **flags)[2]


@pytest.mark.parametrize(
    "flags",
    [{"save_every": 5}, {"log_every": 1}, {"device": "cpu"}, {"batch_size": 3}, {"keep": 9}, {"max_time": "9m"}],
)
def test_housekeeping_changes_freely(run, flags):
    cfg, _, changes = merge(run, **flags)
    assert changes == []
    name = next(iter(flags))
    group_of = cfg.device if name == "device" else cfg.train
    assert getattr(group_of, name) == (540 if name == "max_time" else flags[name])


def test_length_changes_are_told(run):
    cfg, _, changes = merge(run, steps=50)
    assert cfg.train.steps == 50 and changes == ["--steps: None → 50"]
    cfg, _, changes = merge(run, epochs=4)
    assert cfg.train.epochs == 4 and changes == ["--epochs: 2.0 → 4.0"]


def test_moved_files_are_told_and_judged_by_their_content(run):
    assert merge(run, data=["moved.jsonl"])[2] == ["--data: ['a.jsonl'] → ['moved.jsonl']"]


def test_place(tmp_path):
    done = tmp_path / "r"
    (done / "step-0000007").mkdir(parents=True)
    (done / "run.json").write_text("{}")
    assert resume.place("sft", str(tmp_path / "x"), None) == resume.Place(tmp_path / "x", False)
    assert resume.place("sft", str(tmp_path / "x"), "auto") == resume.Place(tmp_path / "x", False)
    assert resume.place("sft", str(done), "auto") == resume.Place(done, True)
    assert resume.place("sft", None, str(done)) == resume.Place(done, True)
    assert resume.place("sft", None, str(done / "step-0000007")) == resume.Place(done, True, 7)
    for out, name, word in [
        (None, "auto", "--out"),
        (None, str(tmp_path / "no"), "not a run"),
        ("y", str(done), "differ"),
    ]:
        with pytest.raises(UsageError, match=word):
            resume.place("sft", out, name)


def test_a_run_of_another_stage_says_which(tmp_path):
    """Both ways, for --resume DIR, a step of it and --resume auto, in words that a shell takes."""
    done = tmp_path / "a run"
    (done / "step-0000007").mkdir(parents=True)
    (done / "run.json").write_text('{"stage": "pretrain"}')
    for out, name in [(None, str(done)), (None, str(done / "step-0000007")), (str(done), "auto")]:
        with pytest.raises(UsageError, match="is a run of pretrain, not of sft") as e:
            resume.place("sft", out, name)
        assert f"minigpt pretrain --resume '{done}'" in e.value.fix
        assert resume.place("pretrain", out, name).resuming


def test_changed_files_are_named():
    """By content: a file that moved has not changed. What became of each is said in rows."""
    a, b, c = ({"path": f"{n}.jsonl", "sha256": n, "rows": 3} for n in "abc")
    assert resume.changed_files([a, b], [{**a, "path": "moved.jsonl"}, b]) == {}
    assert resume.changed_files([a, b], [{**a, "sha256": "x", "rows": 4}, c]) == {
        "a.jsonl": "had 3 rows and has 4",
        "b.jsonl": "is not read any more",
        "c.jsonl": "was not read before",
    }
    assert resume.changed_files([a], [{**a, "sha256": "x"}]) == {"a.jsonl": "has as many rows, and other ones"}
    many = {f"{i}.txt": "was not read before" for i in range(9)}
    with pytest.raises(UsageError, match=r"changed: data \(0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 4 more\)"):
        resume.compare({"data": 1}, {"data": 2}, False, many)


def test_compare_names_what_changed():
    assert resume.compare({"a": 1, "b": 2}, {"a": 1, "b": 2}, False) == []
    with pytest.raises(UsageError, match="tokenizer"):
        resume.compare({"data": 1, "tokenizer": "x"}, {"data": 1, "tokenizer": "y"}, False)
    assert resume.compare({"tokenizer": "x"}, {"tokenizer": "y"}, True) == ["tokenizer: x → y"]
