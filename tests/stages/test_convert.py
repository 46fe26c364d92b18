"""`minigpt convert` from the command line: every form, the check, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minigpt.core.convert import gguf_arch, gguf_write, hf, minimind
from minigpt.core.convert.gguf_file import GGUFFile
from minigpt.core.convert.open import open_model
from minigpt.core.models import folder
from tests.conftest import run_cli
from tests.core.convert.test_minimind import save, state_dict
from tests.core.convert.test_to_hf import own


@pytest.fixture
def model(tmp_path) -> Path:
    """With constants as MiniMind's, so that every form can hold it."""
    return own(tmp_path / "m", "qwen3", rope_theta=1e6)


def weights_of(path: Path | str) -> dict[str, torch.Tensor]:
    return folder.load(open_model(path).path)[0].state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- forms


def test_to_hf(tmp_path, model):
    """stdout is the folder; stderr tells what the check measured; transformers opens it in the precision asked for."""
    out = tmp_path / "deep" / "out"
    code, stdout, stderr = run_cli("convert", "-m", model, "--to", "hf", "-o", out, "--dtype", "bfloat16",
                                   "--license", "mit")  # fmt: skip
    assert (code, stdout) == (0, f"{out}\n"), stderr
    assert "logits in transformers differ by at most" in stderr and "rounding to bfloat16" in stderr
    assert "5 conversations give the same tokens" in stderr
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert (out / "README.md").read_text().startswith("---\nlicense: mit\n")
    assert same({n: t.bfloat16().float() for n, t in weights_of(model).items()}, weights_of(out))
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_to_gguf_and_back(tmp_path, model, quant):
    """One file and what Ollama wants; the file is a model for --model."""
    out = tmp_path / "m.gguf"
    code, stdout, stderr = run_cli("convert", "-m", model, "--to", "gguf", "-o", out, "--quant", quant)
    assert (code, stdout) == (0, f"{out}\n"), stderr
    assert "logits in the file differ by at most" in stderr
    assert "FROM ./m.gguf" in (tmp_path / "m.Modelfile").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.Modelfile", "m.gguf"]
    code, _, stderr = run_cli("convert", "-m", out, "--to", "hf", "-o", tmp_path / "back")
    assert code == 0, stderr
    assert same(weights_of(model), weights_of(tmp_path / "back")) == (quant == "f32")


def test_the_licence_travels(tmp_path, model):
    """Given once, it is in the card of a folder and in a GGUF file, whichever is made of which."""
    steps = (("m", "hf", "a", "--license", "mit"), ("a", "gguf", "b.gguf"), ("b.gguf", "gguf", "c.gguf"),
             ("c.gguf", "hf", "d"))  # fmt: skip
    for source, form, out, *flags in steps:
        code, _, stderr = run_cli("convert", "-m", tmp_path / source, "--to", form, "-o", tmp_path / out, *flags,
                                  "--no-check")  # fmt: skip
        assert code == 0, stderr
    for name in ("b.gguf", "c.gguf"):
        assert GGUFFile.open(tmp_path / name).keys["general.license"] == "mit"
    assert (tmp_path / "d" / "README.md").read_text().startswith("---\nlicense: mit\n")
    gguf_write.write(model, tmp_path / "none.gguf")
    assert "general.license" not in GGUFFile.open(tmp_path / "none.gguf").keys


def test_to_pth_and_back(tmp_path, model):
    """MiniMind's users move both ways; what their code needs to open it is told."""
    out = tmp_path / "x" / "m.pth"
    args = ("convert", "-m", model, "--to", "pth", "-o", out, "--set", "model.num_attention_heads=4")
    code, stdout, stderr = run_cli(*args)
    assert (code, stdout) == (0, f"{out}\n"), stderr
    assert "MiniMindConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4" in stderr
    code, stdout, stderr = run_cli("convert", "-m", out, "-t", model, "--to", "hf", "-o", tmp_path / "back")
    assert code == 0, stderr
    assert same({n: t.half().float() for n, t in weights_of(model).items()}, weights_of(tmp_path / "back"))


def test_minimind_file(tmp_path, model):
    """A `.pth` with the number of heads said by a flag."""
    path = save(tmp_path / "full_sft_64.pth", state_dict(2, heads=4))
    code, _, stderr = run_cli("convert", "-m", path, "-t", model, "--set", "model.num_attention_heads=4", "--to", "hf",
                              "-o", tmp_path / "out")  # fmt: skip
    assert code == 0, stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"], config["dtype"]) == ("llama", 4, "float16")


def test_what_takes_a_while_is_said_before(tmp_path, model):
    """What is made of which model stands there first, and the check, which starts transformers, before it runs."""
    _, _, stderr = run_cli("convert", "-m", model, "--to", "hf", "-o", tmp_path / "out")
    lines = stderr.splitlines()
    assert lines[0].startswith("minigpt convert · ")
    before, measured = [n for n, line in enumerate(lines) if line.startswith("check")]
    assert "opening it in transformers" in lines[before] and "differ by at most" in lines[measured]


def test_json(tmp_path, model):
    """One object: where it is, how large, what the check measured."""
    code, stdout, _ = run_cli("convert", "-m", model, "--to", "hf", "-o", tmp_path / "out", "--json")
    found = json.loads(stdout)
    assert code == 0 and found["path"] == str(tmp_path / "out") and found["precision"] == "float32"
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert 0 < found["check"]["logits"] <= 1e-5 and found["check"]["chats"] == 5


# ---------------------------------------------------------------------------------------------- the check


def break_hf(monkeypatch):
    real = hf.write

    def write(source, out, **options):
        kept = real(source, out, **options)
        raw = json.loads((out / "config.json").read_text())
        raw["rms_norm_eps"] = 1e-2
        (out / "config.json").write_text(json.dumps(raw))
        return kept

    monkeypatch.setattr(hf, "write", write)


def break_gguf(monkeypatch):
    real = gguf_arch.to_keys
    monkeypatch.setattr(gguf_arch, "to_keys", lambda config: real(config) | {"attention.layer_norm_rms_epsilon": 1e-2})


def break_pth(monkeypatch):
    real = minimind.write

    def write(source, out, **options):
        config = real(source, out, **options)
        state = torch.load(out, weights_only=True)
        state["model.norm.weight"][0] += 0.5
        torch.save(state, out)
        return config

    monkeypatch.setattr(minimind, "write", write)


@pytest.mark.parametrize(("form", "spoil"), [("hf", break_hf), ("gguf", break_gguf), ("pth", break_pth)])
def test_a_failed_check(tmp_path, model, monkeypatch, form, spoil):
    """Exit code 7, and nothing is left under the name; --no-check takes what was written as it is."""
    spoil(monkeypatch)
    args = ["convert", "-m", model, "--to", form, "-o", tmp_path / "out"]
    args += ["--set", "model.num_attention_heads=4"] if form == "pth" else []
    code, stdout, stderr = run_cli(*args)
    assert (code, stdout) == (7, ""), stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    code, _, stderr = run_cli(*args, "--no-check")
    assert code == 0 and "logits" not in stderr and (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (["--to", "hf"], 2, "--out"),
        (["-o", "x"], 2, "--to"),
        (["--to", "onnx", "-o", "x"], 2, "onnx"),
        (["--to", "hf", "-o", "x", "--quant", "q8_0"], 2, "--quant is for --to gguf"),
        (["--to", "gguf", "-o", "x", "--dtype", "float16"], 2, "--dtype is for --to hf and pth"),
        (["--to", "pth", "-o", "x", "--license", "mit"], 2, "--license is for --to hf and gguf"),
        (["--to", "hf", "-o", "x", "-t", "tok"], 2, "--tokenizer says what a .pth file does not tell"),
        (["--to", "hf", "-o", "x", "--set", "model.num_attention_heads=4"], 2, "--set says what a .pth file"),
        (["--to", "pth", "-o", "x", "--set", "model.num_heads=4"], 2, "unknown key `num_heads`"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, model, monkeypatch, flags, code, word):
    """Each is told; nothing is written."""
    monkeypatch.chdir(tmp_path)
    found, stdout, stderr = run_cli("convert", "-m", model, *flags)
    assert (found, stdout) == (code, ""), stderr
    assert word in " ".join(stderr.split())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_nothing_is_overwritten_silently(tmp_path, model):
    """--overwrite replaces what was converted before: no run, no step, no other directory, not the model itself."""
    out = tmp_path / "out"
    base = ("convert", "-m", model, "--to", "hf", "--no-check", "-o")
    assert run_cli(*base, out)[0] == 0
    (out / "old.txt").touch()
    code, _, stderr = run_cli(*base, out)
    assert code == 2 and "--overwrite" in stderr
    assert run_cli(*base, out, "--overwrite")[0] == 0 and not (out / "old.txt").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "step" / "trainer").mkdir(parents=True)
    (tmp_path / "step" / "config.json").touch()
    (tmp_path / "file").touch()
    for other in ("photos", "step", "file", "m"):
        code, _, stderr = run_cli(*base, tmp_path / other, "--overwrite")
        assert code == 2, stderr
    assert (tmp_path / "photos" / "cat.jpg").exists() and (model / "tokenizer.json").exists()
    (tmp_path / "x.Modelfile").write_text("mine")
    gguf = ("convert", "-m", model, "--to", "gguf", "--no-check", "-o", tmp_path / "x.gguf")
    assert run_cli(*gguf)[0] == 2 and (tmp_path / "x.Modelfile").read_text() == "mine"


def test_a_model_of_another_class(tmp_path, model):
    """The supported classes are listed."""
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**raw, "model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"]})
    )
    code, _, stderr = run_cli("convert", "-m", model, "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert code == 3 and "Gemma3ForCausalLM" in stderr and "Qwen3ForCausalLM" in stderr


# ---------------------------------------------------------------------------------------------- kills


FORK = """
import json, os, signal, sys
from minigpt.cli.app import main
from minigpt.core.convert import card, gguf_read, gguf_write, hf, minimind, modelfile, open  # once, for all children
from minigpt.core.models import decoder, llama, qwen3

def doomed(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

codes = []
for step in range(1, 100):
    if not (child := os.fork()):
        left = step
        os.replace, os.fsync, os.mkdir = doomed(os.replace), doomed(os.fsync), doomed(os.mkdir)
        os._exit(main([word.replace("STEP", str(step)) for word in sys.argv[1:]]))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if codes[-1] >= 0:
        break
print(json.dumps(codes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "gguf", "pth"])
def test_killed_anywhere(tmp_path, model, form):
    """SIGKILL before any one of its file-system steps: what stands under the name is whole, or not there."""
    name = "out" if form == "hf" else f"out.{form}"
    args = ["convert", "-m", str(model), "--to", form, "--no-check", "-o", str(tmp_path / "STEP" / name)]
    told = {"num_attention_heads": 4} if form == "pth" else None
    args += ["--set", "model.num_attention_heads=4"] if told else []
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FORK, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert len(codes) > 3 and codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    outs = [tmp_path / str(step) / name for step in range(1, len(codes) + 1)]
    assert outs[-1].exists() and not outs[0].exists()
    for out in filter(Path.exists, outs):
        opened = open_model(out, tokenizer=model if told else None, overrides=told)
        assert weights_of(opened.path).keys() == weights_of(model).keys()
        assert (opened.path / "tokenizer.json").exists()
