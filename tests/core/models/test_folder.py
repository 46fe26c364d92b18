"""Model folders: finding them, and refusing what is damaged, unsafe or does not fit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.core.errors import DataError, UsageError
from minigpt.core.models import folder
from tests.conftest import tiny


@pytest.fixture
def model_dir(tmp_path):
    model = tiny("llama")
    folder.write(tmp_path / "m", model, model.config, eos_token_id=2)
    return tmp_path / "m"


def run_with_steps(path, model_dir, steps, complete=True):
    for step in steps:
        target = path / f"step-{step:07d}"
        target.mkdir(parents=True)
        (target / "config.json").write_bytes((model_dir / "config.json").read_bytes())
        if complete:
            (target / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())


def test_resolve_model_and_run(tmp_path, model_dir):
    """A model folder is itself; a run is the step named in `latest`, else its highest complete step."""
    run = tmp_path / "run"
    run_with_steps(run, model_dir, [5, 100])
    run_with_steps(run, model_dir, [900], complete=False)
    assert folder.resolve(model_dir) == model_dir
    assert folder.resolve(str(run)).name == "step-0000100"
    (run / "latest").write_text("step-0000005\n")
    assert folder.resolve(run).name == "step-0000005"
    (run / "best").write_text("step-0000100\n")
    assert folder.resolve(run / "best").name == "step-0000100"
    (run / "latest").write_text("step-0000900\n")  # died while writing, or was deleted: the newest whole one stands
    assert folder.resolve(run).name == "step-0000100"
    assert folder.resolve(run / "step-0000005").name == "step-0000005"


def test_resolve_says_what_it_looked_for(tmp_path):
    """Nothing there, an empty directory, a dangling `best`, a configuration without weights."""
    with pytest.raises(UsageError, match="does not exist"):
        folder.resolve(tmp_path / "none")
    with pytest.raises(UsageError) as empty:
        folder.resolve(tmp_path)
    assert "config.json" in empty.value.found and "latest" in empty.value.found
    (tmp_path / "best").write_text("step-0000001")
    with pytest.raises(DataError, match="not complete"):
        folder.resolve(tmp_path / "best")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        folder.resolve(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "model.pt"])
def test_pickles_are_refused(tmp_path, name):
    """A pickle can run code; it is named and never opened."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(DataError, match="pickled") as e:
        folder.load(tmp_path)
    assert name in e.value.found


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(model_dir, keep):
    """A file that was not copied whole is a DataError naming it, wherever it was cut."""
    file = model_dir / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if keep < 1 else keep])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        folder.load(model_dir)


def edit(model_dir, change) -> None:
    state = load_file(model_dir / "model.safetensors")
    change(state)
    save_file(state, model_dir / "model.safetensors")


def test_missing_and_unexpected_tensors_are_named(model_dir):
    """Both lists, at once."""

    def change(state):
        state["model.layers.0.mlp.extra.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")

    edit(model_dir, change)
    with pytest.raises(DataError) as e:
        folder.load(model_dir)
    assert "missing: model.layers.1.mlp.up_proj.weight" in e.value.found
    assert "unexpected: model.layers.0.mlp.extra.weight" in e.value.found


def test_wrong_shape_and_kind(model_dir):
    """A tensor of another shape, or of integers, is named."""
    name = "model.layers.0.mlp.up_proj.weight"
    edit(model_dir, lambda s: s.update({name: torch.zeros(3, 4)}))
    with pytest.raises(DataError, match="up_proj") as e:
        folder.load(model_dir)
    assert "(3, 4)" in e.value.found
    edit(model_dir, lambda s: s.update({name: torch.zeros(80, 48, dtype=torch.int8)}))
    with pytest.raises(DataError, match="not stored as a float"):
        folder.load(model_dir)


def test_tied_head_in_the_file(model_dir):
    """An equal copy of the embedding is fine, another head is not; old rotary buffers are ignored."""
    edit(model_dir, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    edit(model_dir, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}))
    folder.load(model_dir)
    edit(model_dir, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1}))
    with pytest.raises(DataError, match="lm_head"):
        folder.load(model_dir)


def test_shards_stay_in_the_folder(model_dir):
    """An index cannot name files elsewhere."""
    (model_dir / "model.safetensors").rename(model_dir.parent / "outside.safetensors")
    index = model_dir / "model.safetensors.index.json"
    for name in ("../outside.safetensors", "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(DataError, match="shard"):
            folder.load(model_dir)
    index.write_text("[]")
    with pytest.raises(DataError, match="weight_map"):
        folder.load(model_dir)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "bert"}', '{"model_type": 5}'])
def test_bad_config(model_dir, text):
    """A config.json that is no supported model's."""
    (model_dir / "config.json").write_text(text)
    with pytest.raises(DataError):
        folder.load(model_dir)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_files(model_dir, stored):
    """bfloat16 and float16 files load as float32 by default, with gradients on."""
    state = load_file(model_dir / "model.safetensors")
    save_file({k: v.to(stored) for k, v in state.items()}, model_dir / "model.safetensors")
    model, raw = folder.load(model_dir)
    assert raw["eos_token_id"] == 2
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, state[name].to(stored).float())
    half, _ = folder.load(model_dir, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_opening_imports_no_sympy(model_dir):
    """torch imports it to fill tensors that have no memory, which would make every start more than a second longer."""
    code = (
        f"import sys; from minigpt.core.models import folder; folder.load({str(model_dir)!r});"
        "print('sympy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
