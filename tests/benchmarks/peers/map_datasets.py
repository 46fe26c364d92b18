"""jsonl to token ids by datasets: load_dataset("json") and a batched map with a fast tokenizer; then save_to_disk.

argv[1]: a JSON object: data (jsonl of {text}), tokenizer (directory), out (directory), num_proc (null = the default).
Prints a JSON object: seconds of every part.
"""

from __future__ import annotations

import json
import sys
import time

_BEGAN = time.perf_counter()

import pyarrow.compute as pc  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

_IMPORTED = time.perf_counter()


def main() -> None:
    job = json.loads(sys.argv[1])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["tokenizer"])
    frame = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[frame, *row, frame] for row in ids]}

    documents = load_dataset("json", data_files=job["data"], split="train")
    mapped = documents.map(encode, batched=True, num_proc=job["num_proc"], remove_columns=documents.column_names)
    done = time.perf_counter()
    mapped.save_to_disk(job["out"])
    saved = time.perf_counter()
    tokens = pc.sum(pc.list_value_length(mapped.data.column("input_ids"))).as_py()
    facts = {
        "imports": _IMPORTED - _BEGAN,
        "made": done - _IMPORTED,
        "save": saved - done,
        "check": time.perf_counter() - saved,
        "documents": len(mapped),
        "tokens": tokens,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
