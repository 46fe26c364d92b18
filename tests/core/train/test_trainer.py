"""The loop on a toy model and a toy source: exact accounting, exact resume, and every way to end."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from minigpt.core.data.batch import Batch
from minigpt.core.errors import Aborted, DataError, Diverged, Stopped
from minigpt.core.groups import OptimConfig
from minigpt.core.report import Report
from minigpt.core.runtime import Runtime, seed_all
from minigpt.core.train import checkpoint
from minigpt.core.train.losses import StepOutput
from minigpt.core.train.optim import Optimizer
from minigpt.core.train.parallel import Alone
from minigpt.core.train.run import Run
from minigpt.core.train.schedule import Schedule
from minigpt.core.train.trainer import Hooks, Pace, Trainer
from minigpt.core.world import World

WALL_CLOCK = {"tok_s", "mem_gb", "mfu"}


class Numbers:
    """Row k holds four numbers that depend on k alone; ragged labels, so that units differ."""

    def __init__(self, rows=6, micro=2, poison=()):
        self.rows, self.micro_rows, self.poison, self.step = rows, micro, set(poison), 0

    @property
    def epoch(self):
        return self.step / 10

    def next_step(self):
        first = self.step * self.rows
        ids = list(range(first, first + self.rows))
        self.step += 1
        return [self.batch(ids[i : i + self.micro_rows]) for i in range(0, self.rows, self.micro_rows)]

    def batch(self, ids):
        x = torch.tensor([[(7 * k + 3 * j) % 11 for j in range(4)] for k in ids])
        labels = torch.tensor([[j if j <= k % 4 else -100 for j in range(4)] for k in ids])
        if self.poison & set(ids):
            x[0, 0] = -1
        return Batch(x, labels, x, x, units=float((labels >= 0).sum()), rows=tuple(ids))

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.out = nn.Linear(8, 4, bias=False)

    def forward(self, batch):
        noise = torch.rand(batch.input_ids.shape)  # uses torch's generator, so its state must be restored
        x = self.table(batch.input_ids.clamp(min=0))
        logits = self.out(torch.tanh(x * (0.5 + noise[..., None])).to(self.out.weight.dtype)).float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")


def step(model, batch):
    loss = model(batch).sum()
    return StepOutput(loss * float("nan") if (batch.input_ids < 0).any() else loss)


def make(path, *, total=20, source=None, report=None, clip=1.0, on_eval=None, noise=True, dtype=torch.float32, **pace):
    path.mkdir(exist_ok=True, parents=True)
    seed_all(0)
    model = Toy()
    runtime = Runtime(torch.device("cpu"), dtype)
    parallel = Alone(World(), runtime)
    masters = parallel.masters(model)
    run = Run(path)
    run.start("", {"argv": []})

    def write_model(folder, weights):
        from safetensors.torch import save_file

        save_file({k: v.detach().contiguous() for k, v in weights.items()}, folder / "model.safetensors")

    evaluate = None
    if on_eval is not None:

        def evaluate():
            return {"val_loss": model.out.weight.detach().norm().item()}

    return Trainer(
        model=model,
        masters=masters,
        optimizer=Optimizer(masters.named, OptimConfig()),
        schedule=Schedule(0.05, total, "cosine", warmup=3),
        source=source or Numbers(),
        step=step,
        run=run,
        runtime=runtime,
        parallel=parallel,
        pace=Pace(**{"total": total, "log": 3, "eval": 5, "save": 4, "keep": 3, "clip": clip, **pace}),
        hooks=Hooks(write_model, evaluate, on_eval),
        report=report or Report(),
    )


def rows(path, name="metrics"):
    lines = [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in lines]


def same(a, b):
    """Two step directories hold the same bits."""
    for name in ("model.safetensors", "trainer/optim.safetensors", "trainer/rng.safetensors", "trainer/state.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resumed_equals_straight_to_the_bit(tmp_path, dtype):
    """Stopped at 7 of 20 (between saves, inside a log window, with an evaluation behind it), resumed: same weights,
    optimizer, generators, counters, and each metrics and samples row exactly once."""

    def samples(step):
        return [{"text": str(step)}]

    straight = make(tmp_path / "a", on_eval=samples, dtype=dtype).fit()

    class StopAt7(Numbers):
        def next_step(self):
            if self.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_step()

    with pytest.raises(Stopped) as e:
        make(tmp_path / "b", on_eval=samples, dtype=dtype, source=StopAt7()).fit()
    assert "after step 7" in e.value.message and "--resume" in e.value.fix
    again = make(tmp_path / "b", on_eval=samples, dtype=dtype)
    torch.rand(100)  # whatever happened to the generator before resuming must not matter
    again.load(checkpoint.load_newest(tmp_path / "b", Report()))
    same(straight, again.fit())
    for name in ("metrics", "samples"):
        assert rows(tmp_path / "a", name) == rows(tmp_path / "b", name)
    assert (tmp_path / "a" / "best").read_text() == (tmp_path / "b" / "best").read_text()


def test_rows_after_the_checkpoint_are_logged_once(tmp_path):
    """A crash after logging step 15 and before its save: the rows of 13 to 15 appear once."""
    make(tmp_path / "a").fit()

    class Crash(Numbers):
        def next_step(self):
            if self.step == 16:
                raise KeyboardInterrupt
            return super().next_step()

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b", source=Crash(), save=5).fit()
    assert rows(tmp_path / "b")[-1]["step"] == 15
    (tmp_path / "b" / "metrics.jsonl").open("a").write('{"step": 16, "lo')
    again = make(tmp_path / "b", save=5)
    again.load(checkpoint.load_newest(tmp_path / "b", Report()))
    again.fit()
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_micro_batches_do_not_change_the_gradient(tmp_path, monkeypatch):
    """1 x 6 = 3 x 2 = 6 x 1 rows on ragged rows, dropout-like noise off: same weights to 1e-6."""
    monkeypatch.setattr(torch, "rand", lambda shape: torch.full(shape, 0.5))
    results = []
    for micro in (6, 2, 1):
        trainer = make(tmp_path / str(micro), source=Numbers(micro=micro), total=5)
        trainer.fit()
        results.append([p.detach().clone() for p in trainer.masters.named.values()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_logged_loss_is_the_token_mean_of_its_window(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape: torch.full(shape, 0.5))
    trainer = make(tmp_path, total=3)
    trainer.schedule = Schedule(1e-12, 3, "constant")  # weights stand still: every step can be recomputed
    trainer.fit()
    source, total, units = Numbers(micro=6), 0.0, 0.0
    for _ in range(3):
        (batch,) = source.next_step()
        total += trainer.model(batch).sum().item()
        units += batch.units
    (row,) = rows(tmp_path)
    assert row["loss"] == pytest.approx(total / units, rel=1e-5) and row["tokens"] == units


def test_clipping_bounds_the_gradient(tmp_path):
    trainer = make(tmp_path, clip=1e-3, total=1)
    seen = []
    monkey = trainer.optimizer.step
    trainer.optimizer.step = lambda lr: (
        seen.append(torch.nn.utils.get_total_norm(trainer.masters.gradients()).item()),
        monkey(lr),
    )
    trainer.fit()
    assert seen[0] == pytest.approx(1e-3, rel=1e-3) and rows(tmp_path)[0]["grad_norm"] > 0.01


class Ears(Report):
    def __init__(self):
        self.heard = []

    def warn(self, text, *, fix=None):
        self.heard.append(text)


def test_bad_step_is_left_out_counted_and_named(tmp_path):
    """NaN in row 13 (step 3): a warning with its rows, weights untouched by it, never saved, and the run goes on."""
    ears = Ears()
    trainer = make(tmp_path, source=Numbers(poison=[13]), report=ears, total=6)
    trainer.fit()
    assert ears.heard == [h for h in ears.heard if "step 3" in h and "rows 12 to 17" in h] and len(ears.heard) == 1
    assert [r.get("skipped") for r in rows(tmp_path)] == [1, None]
    assert trainer.counters.skipped == 1 and trainer.counters.streak == 0
    for p in trainer.masters.named.values():
        assert p.isfinite().all()


def test_three_bad_steps_end_the_run_and_name_the_last_good_checkpoint(tmp_path):
    with pytest.raises(Diverged) as e:
        make(tmp_path, source=Numbers(poison=[30, 36, 42]), report=Ears()).fit()
    assert "step-0000004" in e.value.fix and "rows 42 to 47" in e.value.found
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [4]


def test_every_validation_and_save_still_to_come_is_in_the_time_left(tmp_path):
    """20 steps, validated after 6, 12, 18, 20, saved after 8, 16, 20: counted at each logged step."""
    trainer, asked = make(tmp_path, on_eval=lambda step: [], total=20, log=6, eval=6, save=8), []
    real = trainer.clock.eta
    trainer.clock.eta = lambda left, **pauses: asked.append((left, pauses["evaluation"], pauses["save"])) or real(left)
    trainer.fit()
    assert asked == [(14, 3, 3), (8, 2, 2), (2, 1, 1), (0, 0, 1)]
    trainer.counters.step = 16
    trainer._eta()
    assert asked[-1] == (4, 2, 2)


def test_time_limit_stops_and_saves(tmp_path):
    with pytest.raises(Stopped, match="max-time"):
        make(tmp_path, max_seconds=0.0).fit()
    assert checkpoint.load_newest(tmp_path, Report()).step == 0


def test_second_signal_ends_at_once_and_handlers_are_restored(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    class Twice(Numbers):
        def next_step(self):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().next_step()

    with pytest.raises(Aborted):
        make(tmp_path, source=Twice()).fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert not checkpoint.steps(tmp_path)


def test_best_and_flat_steps_survive_pruning(tmp_path):
    trainer = make(tmp_path, on_eval=lambda step: [], total=20, save=2, eval=2, keep=1, flat=7)
    best = iter([3.0, 1.0, 2.0, 2.5] + [9.0] * 10)
    trainer.hooks.evaluate = lambda: {"val_loss": next(best)}
    trainer.fit()
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [20, 7, 4]
    assert (tmp_path / "best").read_text().strip() == "step-0000004"


def test_longer_run_goes_on_from_the_flat_part(tmp_path):
    """12 steps, then 20 from the kept flat step = 20 straight, to the bit (wsd without warm-up)."""

    def wsd(path, total, flat):
        t = make(path, total=total, flat=flat)
        t.schedule = Schedule(0.05, total, "wsd", decay=0.25)
        assert t.schedule.decay_start == flat
        return t

    straight = wsd(tmp_path / "a", 20, 15).fit()
    wsd(tmp_path / "b", 12, 9).fit()
    checkpoint.set_aside(tmp_path / "b", 9, Report())
    again = wsd(tmp_path / "b", 20, 15)
    again.load(checkpoint.load_newest(tmp_path / "b", Report()))
    same(straight, again.fit())
    assert (tmp_path / "b" / "aside-step-0000012" / "model.safetensors").exists()


def test_first_loss_is_reported_once(tmp_path):
    heard = []
    trainer = make(tmp_path)
    trainer.hooks.first_loss = heard.append
    trainer.fit()
    assert len(heard) == 1 and 0.5 < heard[0] < 4


def test_float16_overflow_halves_the_loss_scale_and_costs_no_bad_step(tmp_path):
    """A scale that float16 cannot hold: gradients overflow, the scale falls until they fit, and training goes on."""
    ears = Ears()
    trainer = make(tmp_path, dtype=torch.float16, report=ears, total=20)
    trainer.counters.loss_scale = 2.0**24
    trainer.fit()
    c = trainer.counters
    assert c.loss_scale < 2.0**24 and c.skipped == 0 and ears.heard == []
    assert 0 < c.good_steps < 20 and c.tokens > 0
    exact = make(tmp_path / "exact", total=20)
    exact.fit()
    assert rows(tmp_path)[-1]["loss"] < rows(tmp_path / "exact")[0]["loss"]


class Cramped(Toy):
    """Holds no more than so many rows."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, batch):
        if len(batch.input_ids) > self.most:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return super().forward(batch)


def cramped(path, most, micro, monkeypatch, report=None):
    """A trainer whose model holds at most `most` rows, asked for `micro` at once. No noise: rows alone decide."""
    monkeypatch.setattr(torch, "rand", lambda shape: torch.full(shape, 0.5))
    trainer = make(path, source=Numbers(rows=8, micro=micro), report=report, total=5)
    trainer.model.__class__ = Cramped
    trainer.model.most = most
    return trainer


def test_out_of_memory_once_goes_on_with_half_the_rows(tmp_path, monkeypatch):
    """4 rows do not fit, 2 do: told with the flag, and from then on the same bits as with 2 rows from the beginning."""
    ears = Ears()
    again = cramped(tmp_path / "a", 2, 4, monkeypatch, ears).fit()
    straight = cramped(tmp_path / "b", 2, 2, monkeypatch).fit()
    assert ears.heard == ["step 1 ran out of memory with 4 rows at once: going on with 2"]
    assert json.loads((tmp_path / "a" / "run.json").read_text())["events"][0]["kind"] == "memory"
    same(again, straight)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_out_of_memory_twice_ends_the_run(tmp_path, monkeypatch):
    trainer = cramped(tmp_path, 1, 4, monkeypatch)
    with pytest.raises(RuntimeError, match="can't allocate"):
        trainer.fit()
    assert trainer.source.micro_rows == 2 and not checkpoint.steps(tmp_path)


def test_other_faults_are_not_taken_for_a_want_of_memory(tmp_path):
    trainer = make(tmp_path)
    trainer.step_fn = lambda model, batch: (_ for _ in ()).throw(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.fit()


class Spiky(Numbers):
    """Rows of step 50 pull a hundred times harder."""

    def batch(self, ids):
        batch = super().batch(ids)
        if ids[0] // self.rows == 50:
            batch.weights = torch.full(batch.labels.shape, 100.0)
        return batch


def weighted(model, batch):
    loss = model(batch)
    return StepOutput((loss if batch.weights is None else loss * batch.weights).sum())


@pytest.mark.parametrize(("sigmas", "skipped"), [(6.0, 1), (0.0, 0)])
def test_spikes_are_left_out_when_asked_for(tmp_path, sigmas, skipped):
    ears = Ears()
    trainer = make(tmp_path, source=Spiky(), total=60, spike=sigmas, report=ears)
    trainer.step_fn = weighted
    trainer.fit()
    assert trainer.counters.skipped == skipped
    assert [h for h in ears.heard if "step 51" in h and "a leap" in h] == ears.heard[:skipped] and len(
        ears.heard
    ) == skipped


def test_spike_history_is_part_of_the_state(tmp_path):
    """Resumed at step 40 of 60, the guard knows the steps before: same bits as a straight run."""

    def spiky(name):
        trainer = make(tmp_path / name, source=Spiky(), total=60, spike=6.0, report=Ears())
        trainer.step_fn = weighted
        return trainer

    straight = spiky("a").fit()
    part = spiky("b")
    part.pace = Pace(total=40, log=3, eval=5, save=4, spike=6.0)
    part.fit()
    again = spiky("b")
    again.load(checkpoint.load_newest(tmp_path / "b", Report()))
    assert len(again.counters.history.loss) == 40
    last = again.fit()
    assert (last / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_refused_checkpoint_can_be_lived_with(tmp_path, monkeypatch):
    """The disk is full at steps 4 and 8 and has room again at 12: two warnings, two events, the run ends well."""
    real, ears = checkpoint.save, Ears()

    def save(run, step, *args):
        if step in (4, 8):
            raise DataError(f"could not write {run}/step-{step:07d}: No space left on device")
        return real(run, step, *args)

    monkeypatch.setattr(checkpoint, "save", save)
    make(tmp_path / "a", patient=True, report=ears).fit()
    assert [h.split(":")[0] for h in ears.heard] == ["step 4 is not saved", "step 8 is not saved"]
    assert [s for s, _ in checkpoint.steps(tmp_path / "a")] == [20, 16, 12]
    assert [e["step"] for e in json.loads((tmp_path / "a" / "run.json").read_text())["events"]] == [4, 8]
    with pytest.raises(DataError, match="No space"):
        make(tmp_path / "b", report=Ears()).fit()


def test_mfu_is_the_share_of_what_the_device_could_do(tmp_path):
    trainer = make(tmp_path, total=6)
    trainer.hooks.flops, trainer.hooks.peak_flops = lambda batch: 1e6 * len(batch.input_ids), 1e9
    trainer.fit()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps = row["tok_s"] / (row["tokens"] / row["step"])  # a second, near enough: rows differ a little in tokens
        assert row["mfu"] == pytest.approx(steps * 6e6 / 1e9, rel=0.2)
