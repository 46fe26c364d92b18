"""Exported folders: the native class in transformers 5 and 4.57, whole, small in memory, with a card of the run."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt.core.convert import card, check, hf, weights
from minigpt.core.data.chat import render, template
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import CheckFailed, DataError
from minigpt.core.models import folder
from tests.conftest import tiny
from tests.core.convert.families import RELEASED, write_tokenizer
from tests.core.convert.test_from_hf import release

ROPE = {
    "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 5e5,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "untied": {"tie_word_embeddings": False},
}  # fmt: skip


def own(path: Path, arch: str = "llama", **overrides: object) -> Path:
    """A step's folder of ours: random weights, a tokenizer with our template."""
    model = tiny(arch, **overrides)
    tokenizer = Tokenizer.train(["Hello there! 你好，有什麼可以幫您？"] * 40, 320)
    tokenizer.chat_template = template(thinking=True)
    ends = {"bos_token_id": tokenizer.document_id, "eos_token_id": tokenizer.eos_ids, "pad_token_id": tokenizer.pad_id}
    folder.write(path, model, model.config, **ends)
    tokenizer.save(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_opens_in_transformers(tmp_path, arch, dtype):
    """The architecture's own class, no code, every tensor found, in the precision asked for; both end tokens."""
    source = own(tmp_path / "ours", arch)
    hf.write(source, tmp_path / "out", dtype=dtype)
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    assert type(theirs).__name__ == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[arch]
    assert theirs.dtype == getattr(torch, dtype)  # what config.json says, as no dtype was asked for
    assert theirs.generation_config.eos_token_id == [2, 0]
    assert not list((tmp_path / "out").glob("*.py")) and "auto_map" not in theirs.config.to_dict()
    state = folder.load(source)[0].state_dict()
    assert all(torch.equal(p, state[n].to(p.dtype)) for n, p in theirs.named_parameters())
    difference = check.against_transformers(source, tmp_path / "out", dtype)
    assert difference.fault <= 1e-5 and difference.chats == len(check.CHATS)
    assert (difference.logits > 1e-4) == (dtype != "float32")


@pytest.mark.parametrize("name", ROPE)
def test_check_passes_for_every_rope(tmp_path, name):
    """Frequencies survive the way to transformers, whatever their scaling."""
    source = own(tmp_path / "ours", "qwen3", **ROPE[name])
    hf.write(source, tmp_path / "out")
    assert check.against_transformers(source, tmp_path / "out", "float32").logits <= 1e-5


@pytest.mark.parametrize("name", RELEASED)
def test_foreign_models_pass_through(tmp_path, name):
    """A released model converted to Hugging Face is itself again: precision, numbers, tokens, what ends generation."""
    source = release(tmp_path / "theirs", name)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [2, 3]}')
    dtype = hf.write(source, tmp_path / "out")
    assert dtype == RELEASED[name].get("dtype", RELEASED[name].get("torch_dtype"))
    difference = check.against_transformers(source, tmp_path / "out", dtype)
    assert difference.logits <= 1e-5 and difference.chats >= 2
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6 and {2, 3} <= set(generation["eos_token_id"])


def test_shards(tmp_path):
    """Above the limit, files and an index that transformers and we read; no file is larger, no tensor is split."""
    source = own(tmp_path / "ours", num_hidden_layers=4)
    hf.write(source, tmp_path / "out", shard_bytes=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(f.stat().st_size < 102_000 for f in files)
    index = json.loads((tmp_path / "out" / folder.INDEX).read_text())
    stored = weights.checked(source)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(4 * t.shape[0] * t.row for t in stored.values())
    for file in files:
        with safe_open(file, framework="pt") as f:
            assert set(f.keys()) == {n for n, where in index["weight_map"].items() if where == file.name}
    assert check.against_transformers(source, tmp_path / "out", "float32").logits <= 1e-5
    hf.write(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / folder.WEIGHTS).is_file()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """The same refusals as in loading: here nothing is loaded."""
    source = own(tmp_path / "ours")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 1}))
    with pytest.raises(DataError, match="do not fit") as e:
        hf.write(source, tmp_path / "out")
    assert "unexpected: model.layers.1." in e.value.found
    (source / "config.json").write_text(json.dumps({**raw, "intermediate_size": 96}))
    with pytest.raises(DataError, match="another shape"):
        hf.write(source, tmp_path / "out")


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path):
    """It would index past the embedding's end."""
    source = own(tmp_path / "ours", vocab_size=300)
    with pytest.raises(DataError, match="320 tokens, its model 300"):
        hf.write(source, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- the check itself


def spoil_a_weight(out):
    file = out / folder.WEIGHTS
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40  # the exponent of the last norm's last number
    file.write_bytes(bytes(data))


def spoil_theta(out):
    for key in ("rope_parameters", "rope_theta"):
        path = out / "config.json"
        raw = json.loads(path.read_text())
        raw[key] = {**raw[key], "rope_theta": 5e3} if key == "rope_parameters" else 5e3
        path.write_text(json.dumps(raw))


def spoil_a_name(out):
    file = out / folder.WEIGHTS
    file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.form.weight"))


def spoil_the_template(out):
    path = out / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_start|>"))


def spoil_the_vocabulary(out):
    path = out / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["merges"] = raw["model"]["merges"][:-5]
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("spoil", [spoil_a_weight, spoil_theta, spoil_a_name, spoil_the_template, spoil_the_vocabulary])
def test_the_check_sees_what_is_wrong(tmp_path, spoil):
    """One number, one constant, one name, the template, the merges: each is a CheckFailed (exit 7)."""
    source = own(tmp_path / "ours")
    hf.write(source, tmp_path / "out")
    spoil(tmp_path / "out")
    with pytest.raises(CheckFailed):
        check.against_transformers(source, tmp_path / "out", "float32")


def test_the_check_looks_at_added_tokens(tmp_path):
    """A word and a marker beyond the vocabulary come back with their ids, or the check fails."""
    source = own(tmp_path / "ours", vocab_size=330)
    raw = Tokenizer.load(source).raw
    word, marker = ({**raw["added_tokens"][-1], "content": c, "special": False} for c in ("covidvirus", "<fim>"))
    top = Tokenizer.load(source).vocab_size
    for wrong in (word, marker):
        kept = [{**t, "id": top + i} for i, t in enumerate((word, marker))]
        (source / "tokenizer.json").write_text(json.dumps({**raw, "added_tokens": [*raw["added_tokens"], *kept]}))
        out = tmp_path / wrong["content"].strip("<>")
        hf.write(source, out)
        assert check.against_folder(source, out, "float32").texts == len(check.TEXTS) + len(raw["added_tokens"]) + 2
        lost = [t for t in json.loads((out / "tokenizer.json").read_text())["added_tokens"]
                if t["content"] != wrong["content"]]  # fmt: skip
        (out / "tokenizer.json").write_text(json.dumps({**raw, "added_tokens": lost}))
        for against in (check.against_folder, check.against_transformers):
            with pytest.raises(CheckFailed, match=wrong["content"]):
                against(source, out, "float32")


@pytest.mark.parametrize("spoil", [spoil_a_weight, spoil_theta, spoil_the_template, spoil_the_vocabulary])
def test_the_check_of_a_folder_sees_it_too(tmp_path, spoil):
    """As it is used for files, which are opened as a folder of ours."""
    source = own(tmp_path / "ours")
    hf.write(source, tmp_path / "out")
    assert check.against_folder(source, tmp_path / "out", "float32").logits == 0
    spoil(tmp_path / "out")
    with pytest.raises(CheckFailed):
        check.against_folder(source, tmp_path / "out", "float32")


# ---------------------------------------------------------------------------------------------- the card


def run_of(path: Path, stage: str, parent: Path | None = None) -> Path:
    """What a run writes beside its steps."""
    step = own(path / "step-0000020")
    info = {
        "stage": stage, "seed": 7, "device": "cpu fp32, 1 thread", "versions": {"minigpt-lm": "0.1", "torch": "2.13"},
        "parent": {"path": str(parent)} if parent else None,
        "data": [{"path": f"/home/someone/{stage}.jsonl", "rows": 1234, "sha256": "ab"}],
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(info))
    rows = [{"step": 10, "loss": 3.5, "tokens": 500}, {"step": 20, "loss": 2.25, "tokens": 1000, "val_loss": 2.5}]
    rows.append({"step": 30, "loss": 1.0, "tokens": 1500})
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4')
    return step


def test_card_of_a_run(tmp_path):
    """Data, steps, losses of each stage up to the step that is exported, the licence, how to use; no path of mine."""
    step = run_of(tmp_path / "chat", "sft", run_of(tmp_path / "base", "pretrain"))
    text = card.write(step, "my-model", dtype="bfloat16", license="apache-2.0")
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0" and head["pipeline_tag"] == "text-generation"
    assert "base_model" not in head
    assert "| pretraining | pretrain.jsonl (1,234 rows) | 20 | 1,000 | 2.2500 | 2.5000 |" in text
    assert "| fine-tuning on conversations | sft.jsonl (1,234 rows) | 20 | 1,000 | 2.2500 | 2.5000 |" in text
    assert text.index("| pretraining |") < text.index("| fine-tuning")
    assert "someone" not in text and str(tmp_path) not in text
    assert "seed 7" in text and 'from_pretrained("my-model")' in text and "bfloat16" in text


def test_card_of_others(tmp_path):
    """A model of the hub is named as the base, and its licence is kept; without one it is unknown."""
    path = own(tmp_path / "m")
    assert yaml.safe_load(card.write(path, "x", dtype="float32").split("---")[1])["license"] == "unknown"
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    head = yaml.safe_load(card.write(path, "x", dtype="float32", origin="hf:org/name@abc").split("---")[1])
    assert (head["license"], head["base_model"]) == ("mit", "org/name")


def test_the_card_tells_the_truth(tmp_path, monkeypatch):
    """Its Python runs as it stands, in the directory of the export."""
    source = own(tmp_path / "ours")
    hf.write(source, tmp_path / "my-model", card=card.write(source, "my-model", dtype="float32"))
    text = (tmp_path / "my-model" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("max_new_tokens=100", "max_new_tokens=3")
    (tmp_path / "readme.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tmp_path / "readme.py"))


# ---------------------------------------------------------------------------------------------- memory, other versions

WRITE = """
import sys
from pathlib import Path
from minigpt.core.convert import hf, minimind, weights
from minigpt.core.data.tokenizer import Tokenizer

def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

kind, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
weights.checked(source), Tokenizer.load(source)  # what is imported and read once, whatever the size
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
hf.write(source, out, dtype="bfloat16") if kind == "hf" else minimind.write(source, out)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its peak memory")
@pytest.mark.parametrize("kind", ["hf", "pth"])
def test_memory(tmp_path, kind):
    """Writing takes less memory than 1.3 of the largest tensor, of which the model has a dozen."""
    sizes = {"hidden_size": 1024, "intermediate_size": 16_384, "num_attention_heads": 8, "num_key_value_heads": 8}
    source = own(tmp_path / "m", num_hidden_layers=4, rope_theta=1e6, rms_norm_eps=1e-5, **sizes)
    done = subprocess.run(
        [sys.executable, "-c", WRITE, kind, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    largest = 4 * 1024 * 16_384
    assert (source / folder.WEIGHTS).stat().st_size > 12 * largest
    taken = int(done.stdout) * 1024
    assert taken <= 1.3 * largest


OLD = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
for folder in sys.argv[1:]:
    given = torch.load(f"{folder}/given.pt", weights_only=True)
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        logits = model(given["ids"]).logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(given["chat"], add_generation_prompt=True)
    print(json.dumps({
        "difference": float((logits - given["logits"]).abs().max()),
        "texts": [tokenizer(t, add_special_tokens=False)["input_ids"] for t in given["texts"]] == given["text_ids"],
        "chat": chat == given["chat_ids"],
        "eos": model.generation_config.eos_token_id,
        "dtype": model.config.dtype is not None,
    }))
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory):
    """A Python with transformers 4.57 before this environment's packages."""
    place = tmp_path_factory.mktemp("venv") / "v"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    wanted = ["transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23"]
    done = subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot reach an index: {done.stderr.strip().splitlines()[-1]}")
    site = next(place.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return python


@pytest.mark.slow
def test_opens_in_transformers_4(tmp_path, transformers_4):
    """What we write is read alike by 4.57, where a missing spelling of RoPE would be silently wrong."""
    folders = []
    chat = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "?"},
    ]
    sources = {f"{arch}-{name}": own(tmp_path / arch / name, arch, **ROPE[name]) for arch in ("llama", "qwen3")
               for name in ROPE}  # fmt: skip
    sources |= {name: release(tmp_path / "theirs" / name, name) for name in RELEASED}
    for name, source in sources.items():
        out = tmp_path / "out" / name
        hf.write(source, out)
        ours, tokenizer = folder.load(source)[0], Tokenizer.load(source)
        ids = check._probe(ours, source)
        torch.save(
            {"ids": ids, "logits": check._logits(ours, ids), "texts": check.TEXTS, "chat": chat,
             "text_ids": [tokenizer.encode(t) for t in check.TEXTS],
             "chat_ids": render(tokenizer, chat, generation_prompt=True).ids},
            out / "given.pt",
        )  # fmt: skip
        folders.append(str(out))
    done = subprocess.run([transformers_4, "-c", OLD, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, line in zip(sources, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert found["difference"] <= 1e-5, (name, found)
        assert found["texts"] and found["chat"] and len(found["eos"]) >= 1 and found["dtype"], (name, found)


@pytest.mark.slow
def test_tokenizer_config_of_transformers_5_opens_in_4(tmp_path, transformers_4):
    """A tokenizer saved by transformers 5 has keys that 4.57 stumbles over; what we make of it has not."""
    source = release(tmp_path / "theirs", "Qwen3-0.6B")
    resaved = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "t", "qwen3"))
    resaved.add_special_tokens({"additional_special_tokens": ["<|extra|>"]}, replace_extra_special_tokens=False)
    resaved.save_pretrained(source)
    hf.write(source, tmp_path / "out")
    code = (
        "import sys; from transformers import AutoTokenizer as A; t = A.from_pretrained(sys.argv[1]); "
        "print(t.convert_tokens_to_ids('<|extra|>'), '<|extra|>' in t.all_special_tokens)"
    )
    done = subprocess.run([transformers_4, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.split() == [str(len(resaved) - 1), "True"], done.stderr[-2000:]
