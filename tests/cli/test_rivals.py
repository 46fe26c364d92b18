"""Two options that say the same thing in two ways: one is given, and it acts."""

import pytest

from minigpt.cli import flags
from minigpt.core.errors import UsageError
from tests.conftest import run_cli

PAIRS = [
    ({"size": "1m", "model": "m"}, ("--size", "--model")),
    ({"vocab_size": "400", "model": "m"}, ("--vocab-size", "--model")),
    ({"vocab_size": "400", "tokenizer": "t"}, ("--vocab-size", "--tokenizer")),
    ({"steps": "5", "epochs": "1"}, ("--steps", "--epochs")),
    ({"steps": "5", "tokens": "1M"}, ("--steps", "--tokens")),
    ({"tokens": "1M", "epochs": "2"}, ("--tokens", "--epochs")),
]


def resolve(given, environ=None, **files):
    return flags.resolve(flags.Request(flags.stage_commands("pretrain")[""], {**given, **files}), environ or {})


def write(path, **pairs):
    path.write_text("".join(f"{k}: {v}\n" for k, v in pairs.items()))
    return [str(path)]


@pytest.mark.parametrize(("given", "names"), PAIRS)
def test_both_of_a_pair_are_refused(given, names, tmp_path):
    """As flags, in the environment and in a file alike, and whichever is the default's value: both are named."""
    for attempt in (
        lambda: resolve(given),
        lambda: resolve({}, {f"MINIGPT_PRETRAIN_{k.upper()}": v for k, v in given.items()}),
    ):
        with pytest.raises(UsageError, match="exclude each other") as e:
            attempt()
        assert all(name.strip("-").replace("-", "_") in e.value.message.replace("-", "_") for name in names)
    file = write(tmp_path / "c.yaml", **{**given, **({"epochs": "7"} if "epochs" in given else {})})
    with pytest.raises(UsageError, match="exclude each other"):
        resolve({}, config=file)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_command_line_says_so_with_code_2(stage, tmp_path):
    code, _, err = run_cli(stage, "-m", "m", "-d", "x", "--steps", "5", "--epochs", "1", "-o", tmp_path / "run")
    assert code == 2 and "--steps and --epochs exclude each other" in err and not (tmp_path / "run").exists()


def test_a_default_or_a_preset_stands_back():
    """Nothing that does not act is recorded: no size beside a model, no epochs beside steps, no preset's row length."""
    cfg, origins = resolve({"model": "m", "steps": "5"})
    assert (cfg.size, cfg.train.epochs, cfg.data.max_len) == (None, None, None)
    assert origins["size"] == "replaced by --model" and origins["epochs"] == "replaced by --steps"
    cfg, _ = resolve({"size": "1m"})
    assert cfg.data.max_len is not None and cfg.train.epochs == 1.0


def test_a_flag_replaces_what_a_file_says(tmp_path):
    """The stronger source wins whole, and it is told which option of the weaker one it replaces."""
    file = write(tmp_path / "c.yaml", epochs=4, size="1m", vocab_size=400)
    cfg, origins = resolve({"steps": "5", "model": "m"}, config=file)
    assert (cfg.train.steps, cfg.train.epochs, cfg.model, cfg.size, cfg.vocab_size) == (5, None, "m", None, None)
    assert origins["epochs"] == f"{file[0]}, replaced by --steps"
    cfg, _ = resolve({"size": "3m"}, config=write(tmp_path / "d.yaml", model="m"))
    assert (cfg.size, cfg.model) == ("3m", None)
    code, _, err = run_cli("pretrain", "-c", file[0], "--steps", "5", "-d", tmp_path / "no", "-o", tmp_path / "run")
    assert code == 2 and f"unused --epochs ({file[0]}, replaced by --steps)" in err


def test_a_file_may_list_defaults(tmp_path):
    """As the config.yaml of a run does: a default written down is no wish."""
    cfg, _ = resolve({}, config=write(tmp_path / "c.yaml", size="3m", model="m", epochs=1.0, steps=5, tokens="null"))
    assert (cfg.model, cfg.size, cfg.train.steps, cfg.train.epochs) == ("m", None, 5, None)


def test_neither_of_a_pair_is_refused_too(tmp_path):
    code, _, err = run_cli("pretrain", "-c", *write(tmp_path / "c.yaml", size="null"), "-d", "x")
    assert code == 2 and "--size" in err and "--model" in err
