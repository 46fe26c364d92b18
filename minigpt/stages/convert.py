"""Write a model for other programs: Hugging Face, llama.cpp, MiniMind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.config import assignments, group, opt
from minigpt.core.errors import UsageError
from minigpt.core.files import new_dir, new_file
from minigpt.core.groups import DTYPES, CommonConfig, SampleConfig, precision
from minigpt.core.report import Context, Report, Result

if TYPE_CHECKING:
    from minigpt.core.convert.check import Difference
    from minigpt.core.convert.open import Opened

EXAMPLES = (
    "minigpt convert -m runs/chat --to hf -o chat-hf --dtype bfloat16 --license apache-2.0",
    "minigpt convert -m runs/chat --to gguf --quant q8_0 -o chat.gguf",
    "minigpt convert -m full_sft_768.pth --tokenizer minimind/model --to hf -o minimind-hf",
)
FORMS = ("hf", "gguf", "pth")
READ_BY = {"dtype": ("hf", "pth"), "quant": ("gguf",), "license": ("hf", "gguf")}


@dataclass
class Config:
    model: str | None = opt(
        None, "run, step, Hugging Face directory, .pth, .gguf, hf:org/name or ms:org/name", short="-m", panel="Model",
        metavar="PATH",
    )  # fmt: skip
    tokenizer: str | None = opt(
        None, "tokenizer directory of a .pth file that has none beside it", short="-t", panel="Model", metavar="DIR"
    )
    set: list[str] = opt(
        [],
        "what a .pth file does not tell, as in model.num_attention_heads=12",
        panel="Model",
        metavar="KEY=VALUE",
    )
    to: str | None = opt(
        None,
        "hf = a folder for transformers, vLLM and SGLang; gguf = a file for llama.cpp, Ollama and LM Studio; "
        "pth = a file for MiniMind",
        choices=FORMS,
        panel="Output",
    )
    out: str | None = opt(None, "the folder, or the file", short="-o", panel="Output", metavar="PATH")
    dtype: str = opt(
        "auto",
        "precision of hf and pth; auto = as it is stored, and float16 for pth",
        choices=DTYPES,
        parse=precision,
        panel="Output",
    )
    quant: str = opt(
        "f16", "type of the numbers in a gguf file", choices=("f32", "f16", "bf16", "q8_0", "q4_0"), panel="Output"
    )
    license: str | None = opt(
        None,
        "licence named in the model card or the gguf file, such as apache-2.0",
        panel="Output",
        metavar="ID",
        shown="the model's own",
    )
    check: bool = opt(True, "open what was written and compare logits and tokens; exit code 7 when they differ")
    overwrite: bool = opt(False, "replace what is in --out", panel="Output")
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Convert a model. The result is the path written; nothing is there before it is whole and checked."""
    out = preflight(cfg, context.origins)
    context.report.title(f"minigpt convert · {cfg.model} → {cfg.to} · {out}")
    from minigpt.core.convert.open import is_pth, open_model

    assert cfg.model is not None and cfg.to is not None
    # to .pth, --set says what the file's reader will be told; from .pth, what we are told
    told = assignments(cfg.set) if is_pth(cfg.model) or cfg.to != "pth" else {}
    opened = open_model(cfg.model, context.report, overrides=told, tokenizer=cfg.tokenizer)
    if opened.path.resolve().is_relative_to(out.resolve()) or Path(cfg.model).resolve() == out.resolve():
        raise UsageError(f"--out {out} is where the model itself lies", fix="choose another --out")
    make = {"hf": to_hf, "gguf": to_gguf, "pth": to_pth}[cfg.to]
    found = make(cfg, opened, out, context.report)
    size = total_bytes(out)
    context.report.note("saved", f"{out}: {size / 1e6:,.1f} MB, {found['precision']}")
    return Result(str(out), {"path": str(out), "to": cfg.to, "model": str(opened.path), "bytes": size, **found})


def preflight(cfg: Config, origins: dict[str, str]) -> Path:
    """Where to write, once all that the flags alone can tell is right."""
    if cfg.model is None or cfg.to is None or cfg.out is None:
        raise UsageError("convert needs --model, --to and --out", fix=EXAMPLES[0])
    for flag, forms in READ_BY.items():
        if cfg.to not in forms and origins.get(flag, "default") != "default":
            raise UsageError(f"--{flag} is for --to {' and '.join(forms)}", fix=f"leave it out with --to {cfg.to}")
    out = Path(cfg.out).expanduser()
    for path in (out, modelfile_of(out)) if cfg.to == "gguf" else (out,):
        if path.exists() and not cfg.overwrite:
            raise UsageError(f"{path} already exists", fix="choose another --out, or replace it with --overwrite")
    if out.exists() and not replaceable(out, str(cfg.to)):
        raise UsageError(
            f"--out {out} is nothing that was converted, so it is not replaced", fix="choose another --out"
        )
    return out


def replaceable(out: Path, form: str) -> bool:
    """A file where a file goes; an empty directory, or a model's that holds no training state and no run."""
    if form != "hf" or not out.is_dir():
        return form != "hf" and out.is_file()
    return not any(out.iterdir()) or ((out / "config.json").is_file() and not (out / "trainer").exists())


# ---------------------------------------------------------------------------------------------- the forms


def to_hf(cfg: Config, opened: Opened, out: Path, report: Report) -> dict[str, Any]:
    """A folder, checked by transformers before it gets its name."""
    from minigpt.core.convert import card, hf, weights

    dtype = weights.dtype_of(weights.checked(opened.path)) if cfg.dtype == "auto" else cfg.dtype
    text = card.write(opened.path, out.name, dtype=dtype, origin=opened.origin, license=cfg.license)
    found: dict[str, Any] = {"precision": dtype}
    with new_dir(out) as work:
        hf.write(opened.path, work, dtype=dtype, card=text)
        if cfg.check:
            report.note("check", "opening it in transformers, to compute the same texts with both")
            from minigpt.core.convert.check import against_transformers

            found |= tell(against_transformers(opened.path, work, dtype), dtype, "transformers", report)
    return found


def to_gguf(cfg: Config, opened: Opened, out: Path, report: Report) -> dict[str, Any]:
    """One file, checked by reading it back, and beside it what Ollama wants to know."""
    from minigpt.core.convert.open import need_gguf

    need_gguf()
    from minigpt.core.convert import card, generation_config, gguf_read, gguf_write, modelfile
    from minigpt.core.data.tokenizer import Tokenizer

    beside = modelfile_of(out)
    with new_file(out) as work:
        license = cfg.license or card.license_of(opened.path)
        gguf_write.write(opened.path, work, quant=cfg.quant, license=license, report=report)
        found = checked(cfg, opened, work, gguf_read.unpack, cfg.quant, report)
        sample = SampleConfig()
        generation_config.apply(sample, {}, opened.path)
        modelfile.write(beside, out.name, Tokenizer.load(opened.path), report, sample)
    return {"precision": cfg.quant, "modelfile": str(beside), **found}


def modelfile_of(out: Path) -> Path:
    return out.with_suffix(".Modelfile")


def to_pth(cfg: Config, opened: Opened, out: Path, report: Report) -> dict[str, Any]:
    """One file, checked by reading it back as any MiniMind file."""
    from minigpt.core.convert import minimind
    from minigpt.core.data.tokenizer import Tokenizer

    dtype = "float16" if cfg.dtype == "auto" else cfg.dtype
    said, tokenizer = assignments(cfg.set), Tokenizer.load(opened.path)

    def unpack(path: Path, folder: Path) -> None:
        minimind.unpack(path, folder, tokenizer, said)

    with new_file(out) as work:
        config = minimind.write(opened.path, work, dtype=dtype, overrides=said)
        report.note("config", minimind.as_python(config))
        return {"precision": dtype} | checked(cfg, opened, work, unpack, dtype, report)


def checked(
    cfg: Config, opened: Opened, work: Path, unpack: Callable[[Path, Path], None], precision: str, report: Report
) -> dict[str, Any]:
    """What the check of a file measured; nothing with --no-check. unpack: makes a model folder of the file."""
    if not cfg.check:
        return {}
    report.note("check", "reading it back, to compute the same texts with both")
    from minigpt.core.convert.check import against_folder

    folder = work.with_name("read-back")
    unpack(work, folder)
    return tell(against_folder(opened.path, folder, precision), precision, "the file", report)


def tell(difference: Difference, precision: str, where: str, report: Report) -> dict[str, Any]:
    """Report what the check measured."""
    d = difference
    cause = f", all but {d.fault:.1e} of it by rounding to {precision}" if d.logits > 2 * d.fault else ""
    chats = f" and {d.chats} conversations" if d.chats else ""
    report.note(
        "check",
        f"logits in {where} differ by at most {d.logits:.1e}{cause}; {d.texts} texts{chats} give the same tokens",
    )
    return {"check": d._asdict()}


def total_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
