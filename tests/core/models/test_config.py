"""Configurations: what is accepted, what is refused by name, what is written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minigpt.core.errors import DataError, UsageError
from minigpt.core.models import architecture, folder, model_types
from minigpt.core.models.presets import PRESETS


def test_importable_without_torch():
    """Presets, configuration files and paths answer before the slow imports."""
    code = (
        "import sys, minigpt.core.models.presets, minigpt.core.models.config\n"
        "from minigpt.core.models.folder import resolve\n"
        "try: resolve('/nowhere')\n"
        "except Exception as e: print(type(e).__name__)\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["UsageError", "[]"]


@pytest.mark.parametrize(
    ("arch", "key", "value"),
    [
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "pretraining_tp", 2),
        ("llama", "hidden_act", "gelu"),
        ("llama", "quantization_config", {"bits": 4}),
        ("qwen3", "attention_bias", True),
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "hidden_act", "relu"),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention"]),
        ("llama", "partial_rotary_factor", 0.5),
    ],
)
def test_unsupported_maths_is_refused_by_name(arch, key, value):
    """A key that changes the maths is never ignored."""
    with pytest.raises(UsageError, match=key):
        architecture(arch).Config.from_hf({key: value}, "config.json")


def test_harmless_keys_are_ignored():
    """Keys without influence on inference, and refused keys at their neutral value, load."""
    raw = {"attention_bias": False, "use_cache": False, "attention_dropout": 0.1, "_name": "x", "sliding_window": 4096}
    architecture("qwen3").Config.from_hf({**raw, "layer_types": ["full_attention"], "hidden_size": 64})


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fastt": 3}, "beta_fast"),
        ({"rope_type": "linear", "factor": -2.0}, "factor"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_unknown_rope_is_refused_by_name(rope, word):
    """A frequency read wrongly is a model that is silently wrong."""
    with pytest.raises(UsageError) as e:
        folder.create("1m", 400, {"rope_parameters": rope})
    assert word in f"{e.value.message} {e.value.found} {e.value.fix}"


def test_old_and_new_spelling_of_rope():
    """rope_theta + rope_scaling (transformers 4) and rope_parameters (5) are the same model."""
    scaling = {"type": "yarn", "factor": 4.0}
    old = architecture("llama").Config.from_hf({"rope_theta": 5e5, "rope_scaling": scaling})
    new = architecture("llama").Config.from_hf(
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}, "rope_theta": 1e4}
    )
    assert old == new
    assert old.rope_parameters["original_max_position_embeddings"] == 2048
    assert old.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("arch", model_types())
def test_config_json_says_everything_twice(arch):
    """Both spellings of RoPE and dtype, so that transformers 4.57 and 5 read the same; and it reads back equal."""
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    config = folder.create({"model_type": arch, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
                           500, {"rope_parameters": rope, "rope_theta": 2e5})  # fmt: skip
    hf = config.to_hf(bos_token_id=1, eos_token_id=(2, 0), pad_token_id=0)
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 2e5
    assert hf["rope_scaling"] == rope
    assert hf["dtype"] == hf["torch_dtype"] == "float32"
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (1, [2, 0], 0)
    assert architecture(arch).Config.from_hf(hf) == config


def test_overrides():
    """--set model.KEY wins over the preset; an unknown key names the nearest."""
    config = folder.create("3m", 1000, {"model.num_hidden_layers": 2, "rope_theta": 5e4, "head_dim": 64})
    assert (config.num_hidden_layers, config.head_dim, config.vocab_size) == (2, 64, 1000)
    assert config.rope_parameters["rope_theta"] == 5e4
    assert folder.create("1m", 400, {"model_type": "qwen3"}).model_type == "qwen3"
    with pytest.raises(UsageError) as e:
        folder.create("3m", 1000, {"model.num_layers": 2})
    assert "num_hidden_layers" in e.value.fix


def test_vocabulary_of_presets():
    """A preset with a vocabulary of its own keeps it; a larger tokenizer needs more rows."""
    assert folder.create("minimind3", 5000).vocab_size == 6400
    assert folder.create("minimind3", 7000).vocab_size == 7000
    assert folder.create("1m", 777).vocab_size == 777


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ],
)
def test_impossible_sizes(overrides, word):
    """Sizes that cannot be built are named before torch is asked."""
    with pytest.raises(UsageError, match=word):
        folder.create("1m", 400, overrides)


def test_unknown_names():
    """An unknown size or architecture names what there is."""
    with pytest.raises(UsageError) as size:
        folder.create("minimind", 400)
    assert all(name in size.value.fix for name in PRESETS)
    for name in ("gpt2", "decoder", "../llama", "folder"):
        with pytest.raises(DataError) as arch:
            architecture(name)
        assert "llama, qwen3" in arch.value.fix
