"""Tokens a second of one engine: a process of its own for each block of generate_speed.py.

argv[1]: a JSON object: side (`transformers`, `llama.cpp`, `minigpt`), model (a folder, or a .gguf file), dtype, quant,
compile, device, threads, prompt (tokens), new (tokens), rows, repeats, prefill. Prints a JSON object with the seconds
of every repeat after a warm-up: from the asking until the last token of the last answer is there, prompts included;
with `prefill`, until the first token.
Every answer is greedy and has exactly `new` tokens on every side. Prompts are random tokens, the same on every side.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Job = dict[str, Any]
Answer = Callable[[list[list[int]], int], list[int]]  # prompts, new tokens → the first answer's tokens


def transformers_side(job: Job) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    model = model.to(job["device"])

    def answer(prompts: list[list[int]], new: int) -> list[int]:
        ids = torch.tensor(prompts, device=job["device"])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )
        return [int(id) for id in out[0, ids.shape[1] :]]

    return answer


def minigpt_side(job: Job) -> Answer:
    import torch

    import minigpt
    from minigpt.core.infer.sampling import SamplingParams

    torch.set_num_threads(job["threads"])
    model = minigpt.load(job["model"], job["device"], job["dtype"], job["quant"] or "none", compile=job["compile"])
    engine = minigpt.Engine(model, rows=job["rows"], prefix_tokens=0, compile=job["compile"])

    def answer(prompts: list[list[int]], new: int) -> list[int]:
        done = engine.generate(prompts, SamplingParams(max_tokens=new, min_tokens=new, temperature=0))
        assert all(len(c.ids) == new for c in done)
        return done[0].ids

    return answer


def llama_cpp_side(job: Job) -> Answer:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["rows"] * (job["prompt"] + job["new"] + 64)
    params.n_parallel, params.warmup, params.verbosity = job["rows"], True, 0
    params.n_batch = params.n_ubatch = 512
    params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.cache_prompt = False
    server = xllamacpp.Server(params)

    def ask(prompt: list[int], new: int) -> list[int]:
        body = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "return_tokens": True,
                "cache_prompt": False}  # fmt: skip
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            found = json.load(reply)
        assert len(found["tokens"]) == new, found
        return [int(id) for id in found["tokens"]]

    def answer(prompts: list[list[int]], new: int) -> list[int]:
        with ThreadPoolExecutor(len(prompts)) as together:
            said = list(together.map(lambda prompt: ask(prompt, new), prompts))
        return said[0]

    return answer


SIDES = {"transformers": transformers_side, "minigpt": minigpt_side, "llama.cpp": llama_cpp_side}


def main() -> None:
    import random

    job = json.loads(sys.argv[1])
    answer = SIDES[job["side"]](job)
    dice = random.Random(0)

    def prompts() -> list[list[int]]:
        return [[dice.randrange(100, job["vocab"]) for _ in range(job["prompt"])] for _ in range(job["rows"])]

    new = 1 if job["prefill"] else job["new"]
    answer(prompts(), new)
    seconds, said = [], []
    for _ in range(job["repeats"]):
        given = prompts()
        began = time.perf_counter()
        said.append(answer(given, new))
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds, "said": said}))


if __name__ == "__main__":
    main()
