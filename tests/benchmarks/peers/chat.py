"""One greedy answer of a chat model by transformers, streamed to stdout as a short script of its users would.

argv[1]: a JSON object: model (directory), prompt, max_tokens, streamer: `text` = TextStreamer, which holds text back
until a space or a Chinese character; `token` = every token is printed as soon as it is there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer


class TokenStreamer(TextStreamer):
    """Prints at once."""

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.on_finalized_text(str(self.tokenizer.decode(value.flatten().tolist(), skip_special_tokens=True)))


def main() -> None:
    job = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    messages = [{"role": "user", "content": job["prompt"]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    kind = TextStreamer if job["streamer"] == "text" else TokenStreamer
    streamer = kind(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=job["max_tokens"], do_sample=False, streamer=streamer)


if __name__ == "__main__":
    main()
