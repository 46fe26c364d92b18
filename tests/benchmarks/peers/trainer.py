"""transformers.Trainer on documents, as its users set it up. One measured block; prints a JSON object.

argv[1]: a JSON object: config (a Llama's, as in config.json), tokenizer (directory), data (jsonl of {text}),
max_len, padding (longest | max_length), bf16, batch, accumulation, warmup, steps (optimizer steps).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

PAD = "<|buffer9|>"  # not the document token: the collator would leave the end of every document out of the loss


class Times(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.at.append(time.perf_counter())


def encoded(job: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """Documents as ids, framed as minigpt frames them, cut at max_len; padded here only for `max_length`."""
    with open(job["data"], encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    frame = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    rows = [{"input_ids": [frame, *row, frame][: job["max_len"]]} for row in ids]
    if job["padding"] == "longest":
        return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return [dict(tokenizer.pad(row, padding="max_length", max_length=job["max_len"])) for row in rows]


def counting(collate: Callable[[Any], Any], counts: list[int]) -> Callable[[Any], Any]:
    """The collator, noting how many tokens each batch learns."""

    def call(rows: Any) -> Any:
        batch = collate(rows)
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    return call


def main() -> None:
    job = json.loads(sys.argv[1])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["tokenizer"], pad_token=PAD)
    model = LlamaForCausalLM(LlamaConfig(**job["config"]))
    counts: list[int] = []
    times = Times()
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            use_cpu=True,
            bf16=job["bf16"],
            per_device_train_batch_size=job["batch"],
            gradient_accumulation_steps=job["accumulation"],
            max_steps=job["warmup"] + job["steps"],
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=encoded(job, tokenizer),
            data_collator=counting(collate, counts),
            callbacks=[times],
        )
        trainer.train()
    warmup, accumulation = job["warmup"], job["accumulation"]
    tokens = sum(counts[warmup * accumulation : (warmup + job["steps"]) * accumulation])
    facts = {
        "tokens": tokens,
        "seconds": times.at[-1] - times.at[warmup - 1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "attention": model.config._attn_implementation,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
