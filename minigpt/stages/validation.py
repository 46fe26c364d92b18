"""What a training run looks at between steps: validation loss, and answers to the same few prompts every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from minigpt.core.data.batch import IGNORED
from minigpt.core.infer.text import BROKEN

if TYPE_CHECKING:
    from minigpt.core.data.batch import Batch
    from minigpt.stages.supervised import Session

SHOWN = 2  # prompts taken from the validation data when none is given
OPENING = 8  # tokens of a text document that serve as its prompt
QUESTION, ANSWER = 50, 110  # characters that the sample line shows


class Validation:
    """Fixed rows and fixed prompts, so that every evaluation of a run compares with the others."""

    def __init__(self, session: Session):
        from minigpt.core.data.source import eval_batches

        self.session = session
        cfg, corpus, world = session.cfg, session.corpus, session.world

        def held_out(rank: int = 0, world: int = 1) -> Iterator[Batch]:
            return eval_batches(
                corpus.val_store,
                max_len=cfg.data.max_len,
                max_rows=cfg.train.eval_rows,
                micro_rows=session.pacing.micro_rows,
                split=corpus.val_split,
                pad_id=session.tokenizer.pad_id,
                rank=rank,
                world=world,
            )

        self.batches = list(held_out(world.rank, world.size))
        self.prompts = self._prompts(next(held_out(), None))

    def scores(self) -> dict[str, float]:
        from minigpt.core.eval.harness import Sums, evaluate

        s = self.session
        mine = evaluate(s.model, self.batches, s.tokenizer.token_bytes, s.runtime.device)
        nll, tokens, text_nll, size = s.world.sum([mine.nll, mine.tokens, mine.text_nll, mine.bytes])
        found = Sums(nll, int(tokens), text_nll, int(size))
        return {"val_loss": found.loss, "val_ppl": found.perplexity, "val_bpb": found.bits_per_byte}

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Rows of samples.jsonl; the first one is shown."""
        from minigpt.core.infer.engine import Engine
        from minigpt.core.infer.sampling import SamplingParams

        s = self.session
        if not self.prompts:
            return []
        s.model.eval()
        engine = Engine(s.model, s.tokenizer)
        params = SamplingParams(max_tokens=60, temperature=0.7, top_p=0.95, seed=s.cfg.device.seed)
        with s.parallel.generating():
            done = engine.generate([ids for _, ids in self.prompts], params)
        s.model.train()
        rows: list[dict[str, Any]] = [
            {
                "prompt": self.prompts[c.prompt_index][0],
                "text": c.text,
                "tokens": len(c.ids),
                "finish_reason": c.finish_reason,
            }
            for c in done
        ]
        s.report.note("sample", f"{_short(rows[0]['prompt'], QUESTION)} → {_short(rows[0]['text'], ANSWER)}")
        return rows

    def _prompts(self, first: Batch | None) -> list[tuple[str, list[int]]]:
        """(text to show, token ids) of each sample prompt: the given ones, else beginnings of validation documents."""
        from minigpt.core.data.chat import render

        s = self.session
        if not s.cfg.train.sample_prompt:
            return self._beginnings(first)[:SHOWN] if first is not None else []
        if s.job.kind == "text":
            return [(p, [s.tokenizer.opening_id, *s.tokenizer.encode(p)]) for p in s.cfg.train.sample_prompt]
        return [
            (p, render(s.tokenizer, [{"role": "user", "content": p}], generation_prompt=True).ids)
            for p in s.cfg.train.sample_prompt
        ]

    def _beginnings(self, batch: Batch) -> list[tuple[str, list[int]]]:
        """Each document of a batch up to where the model would take over: its first tokens, or the question."""
        found = []
        for ids, labels, segments in zip(batch.input_ids, batch.labels, batch.segments, strict=True):
            for piece in segments.unique().tolist():
                inside = segments == piece
                learnt = (labels[inside] != IGNORED).nonzero()
                if piece < 0 or not len(learnt):
                    continue
                length = int(learnt[0]) + 1 if self.session.job.kind == "chat" else OPENING
                prompt = self._whole(ids[inside][:length].tolist())
                found.append((self._shown(prompt), prompt))
        return found

    def _whole(self, ids: list[int]) -> list[int]:
        """Without half a character at the end: a prompt of bytes nobody can read says nothing."""
        while len(ids) > 1 and self.session.tokenizer.decode(ids).endswith(BROKEN):
            ids = ids[:-1]
        return ids

    def _shown(self, ids: list[int]) -> str:
        """A prompt for people: without markers, and of a conversation the last question alone."""
        tokenizer = self.session.tokenizer
        if self.session.job.kind == "chat":
            turns = tokenizer.decode(ids, skip_special=False).split("<|im_start|>")
            questions = [t.removeprefix("user\n").split("<|im_end|>")[0] for t in turns if t.startswith("user\n")]
            if questions:
                return questions[-1]
        return tokenizer.decode(ids)


def _short(text: str, most: int) -> str:
    """One line of at most `most` characters."""
    line = text.replace("\n", " ⏎ ")
    return line if len(line) <= most else line[: most - 1] + "…"
