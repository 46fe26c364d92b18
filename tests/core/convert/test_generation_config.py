"""The sampling values that a model brings are its defaults: below every flag, above ours, and told."""

import json

import pytest

from minigpt.core.convert import generation_config
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import UsageError
from minigpt.core.groups import SampleConfig
from minigpt.core.models import folder
from tests.conftest import run_cli, tiny


@pytest.fixture
def model(tmp_path):
    made = tiny("llama")
    folder.write(tmp_path / "m", made, made.config, bos_token_id=0, eos_token_id=[2, 0], pad_token_id=0)
    Tokenizer.train(["the quick brown fox " * 9], 300).save(tmp_path / "m")
    return tmp_path / "m"


def say(model, **values):
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_our_own_folders_change_nothing(model):
    assert generation_config.sampling(model) == {}


@pytest.mark.parametrize(("said", "values"), [
    ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
    ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ({"temperature": None, "max_length": 20, "repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
    ({"temperature": 1}, {"temperature": 1.0}),
])  # fmt: skip
def test_what_is_read(model, said, values):
    """Under transformers' names; greedy is temperature 0; what this program has not is left alone."""
    say(model, **said)
    assert generation_config.sampling(model) == values


def test_flags_are_stronger(model):
    say(model, temperature=0.6, top_k=20)
    sample, origins = SampleConfig(temperature=0.3), {"temperature": "flag", "top_k": "default"}
    assert generation_config.apply(sample, origins, model) == ["top_k 20"]
    assert (sample.temperature, sample.top_k) == (0.3, 20)
    assert origins == {"temperature": "flag", "top_k": "generation_config.json"}


def test_nonsense_names_the_file(model):
    say(model, top_p=7)
    with pytest.raises(UsageError, match=r"generation_config\.json: top_p"):
        generation_config.sampling(model)
    sample = SampleConfig(top_p=0.5)
    assert generation_config.apply(sample, {"top_p": "flag"}, model) == []  # whoever gives the flag gets by


def test_seen_from_outside(model):
    """`generate` says what it took over, and --show-config where each value is from."""
    say(model, temperature=0.6, top_k=20)
    code, _, err = run_cli("generate", "-m", model, "-p", "fox", "--max-tokens", "2", "--top-k", "5")
    assert code == 0 and "generation_config.json says temperature 0.6" in err and "top_k" not in err
    code, out, _ = run_cli("generate", "-m", model, "--top-k", "5", "--show-config")
    lines = {line.split(":")[0].strip(): line for line in out.splitlines()}
    assert code == 0 and "0.6  # generation_config.json" in lines["temperature"] and "5  # flag" in lines["top_k"]
    assert run_cli("generate", "-m", "nowhere", "--show-config")[0] == 0
