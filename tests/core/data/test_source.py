"""The order of rows is a function of seed and number; batches are what the plan says."""

import numpy as np
import pytest
import torch

from minigpt.core.data.batch import IGNORED
from minigpt.core.data.source import Order, PackedSource, eval_batches, plan_rows

PAD = 999


class Documents:
    """A store in memory: document d is d * 100, d * 100 + 1, …; every third token after the first is untrained."""

    def __init__(self, lengths, sources=None):
        self.lengths = np.array(lengths)
        self.docs = np.zeros(len(lengths), dtype=[("source", "u2")])
        self.docs["source"] = 0 if sources is None else sources

    def indices(self, split):
        everything = np.arange(len(self.lengths))
        held = everything % 5 == 4
        return {"all": everything, "val": everything[held], "train": everything[~held]}[split]

    def positions(self, docs):
        return self.lengths[docs] - 1

    def piece(self, doc, start, count):
        tokens = doc * 100 + np.arange(start, start + count)
        return tokens, tokens % 3 != 0


def make(store, rows=None, *, micro=2, step=6, **options):
    rows = plan_rows(store, "all", 16) if rows is None else rows
    return PackedSource(store, rows, rows_per_step=step, micro_rows=micro, seed=7, pad_id=PAD, **options)


STORE = Documents(np.random.default_rng(0).integers(2, 40, 60))


def rows_seen(source, steps):
    return [[r for b in source.next_step() for r in b.rows] for _ in range(steps)]


def test_every_row_once_an_epoch_in_another_order_each_time():
    n = len(plan_rows(STORE, "all", 16))
    order = Order(np.zeros(n, dtype=np.int64), {}, seed=3)
    epochs = [[order(k) for k in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert [Order(np.zeros(n, dtype=np.int64), {}, seed=3)(k) for k in range(n)] == epochs[0]
    assert [Order(np.zeros(n, dtype=np.int64), {}, seed=4)(k) for k in range(n)] != epochs[0]


def test_batches_hold_the_documents_as_planned():
    """Tokens, shifted labels, restarting positions, segments, padding and units, read back document by document."""
    source = make(STORE, epochs=1.0)
    seen = {}
    while True:
        try:
            batches = source.next_step()
        except StopIteration:
            break
        for b in batches:
            assert b.units == (b.labels != IGNORED).sum()
            for ids, labels, positions, segments in zip(b.input_ids, b.labels, b.position_ids, b.segments, strict=True):
                padding = segments == -1
                assert (ids[padding] == PAD).all() and (labels[padding] == IGNORED).all()
                for s in segments[~padding].unique():
                    inside = segments == s
                    assert positions[inside].tolist() == list(range(int(inside.sum())))
                    tokens = ids[inside]
                    assert torch.equal(tokens, torch.arange(len(tokens)) + tokens[0])
                    expected = torch.where((tokens + 1) % 3 != 0, tokens + 1, IGNORED)
                    assert torch.equal(labels[inside], expected)
                    seen.setdefault(int(tokens[0]) // 100, []).append((int(tokens[0]) % 100, len(tokens)))
    for doc, n in enumerate(STORE.lengths.tolist()):
        at = 0
        for start, length in sorted(seen[doc]):
            assert start == at
            at += length
        assert at == n - 1


def test_segments_are_unique_in_a_step():
    for batches in (make(STORE).next_step(), make(STORE, micro=6).next_step()):
        names = [int(s) for b in batches for row in b.segments for s in row.unique() if s >= 0]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("micro", [1, 2, 4, 6, 50])
def test_micro_batch_size_changes_no_row(micro):
    assert rows_seen(make(STORE, micro=micro), 5) == rows_seen(make(STORE, micro=6), 5)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("fixed", [False, True])
def test_ranks_share_the_same_global_rows(world, fixed):
    whole = rows_seen(make(STORE, epochs=2.0), 5)
    ranks = [rows_seen(make(STORE, epochs=2.0, rank=r, world=world, fixed=fixed), 5) for r in range(world)]
    for step in range(5):
        assert sorted(k for rank in ranks for k in rank[step]) == sorted(whole[step])


def test_fixed_shapes_are_equal_on_every_rank_even_in_a_short_last_step():
    n = len(plan_rows(STORE, "all", 16))
    steps = -(-n // 6)
    for _ in range(1):
        sources = [make(STORE, epochs=1.0, rank=r, world=4, fixed=True, step=6) for r in range(4)]
        for _ in range(steps):
            shapes = [[tuple(b.input_ids.shape) for b in s.next_step()] for s in sources]
            assert all(x == shapes[0] for x in shapes)


def test_resuming_is_a_cursor():
    straight = make(STORE, epochs=3.0)
    straight.next_step(), straight.next_step()
    state = straight.state_dict()
    resumed = make(STORE, epochs=3.0)
    resumed.load_state_dict(state)
    for _ in range(6):
        for a, b in zip(straight.next_step(), resumed.next_step(), strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) and a.rows == b.rows


def test_world_size_may_change_on_the_way():
    """1 → 2 → 4 ranks: no row repeated, none skipped."""
    state, seen = {"row": 0}, []
    for world in (1, 2, 4):
        sources = [make(STORE, rank=r, world=world) for r in range(world)]
        for s in sources:
            s.load_state_dict(state)
        for _ in range(2):
            seen += sorted(k for s in sources for b in s.next_step() for k in b.rows)
        assert len({s.row for s in sources}) == 1
        state = sources[0].state_dict()
    assert seen == list(range(36))


def test_last_step_holds_what_is_left():
    n = len(plan_rows(STORE, "all", 16))
    source = make(STORE, epochs=1.5)
    sizes = []
    with pytest.raises(StopIteration):
        while True:
            sizes.append(sum(len(b.rows) for b in source.next_step()))
    assert sum(sizes) == round(1.5 * n) and set(sizes[:-1]) == {6}
    assert source.epoch == pytest.approx(1.5, abs=1 / n)


def test_weights_mix_sources_and_lose_no_row():
    """0.5 of one source and twice another: the shares hold every epoch, and two epochs at 0.5 cover every row once."""
    store = Documents([10] * 40 + [12] * 20, sources=[0] * 40 + [1] * 20)
    rows = plan_rows(store, "all", 16, by_source=True)
    order = Order(rows.group, {0: 0.5, 1: 2.0}, seed=0)
    assert order.rows_per_epoch == 20 + 40
    epochs = [[order(k) for k in range(e * 60, (e + 1) * 60)] for e in range(2)]
    for e in epochs:
        assert [int((rows.group[e] == g).sum()) for g in (0, 1)] == [20, 40]
    first = [r for e in epochs for r in e if rows.group[r] == 0]
    assert sorted(first) == np.flatnonzero(rows.group == 0).tolist()


def test_zero_weight_leaves_a_source_out():
    order = Order(np.array([0, 0, 1]), {0: 0.0}, seed=0)
    assert order.rows_per_epoch == 1 and order(0) == 2


def test_eval_batches_are_fixed_and_of_the_held_out_split():
    first, second = (list(eval_batches(STORE, max_len=16, max_rows=5, micro_rows=2, pad_id=PAD)) for _ in range(2))
    assert [len(b.input_ids) for b in first] == [2, 2, 1]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        docs = {int(t) // 100 for t in a.input_ids[a.segments >= 0]}
        assert docs and all(d % 5 == 4 for d in docs)


def test_documents_with_nothing_left_to_learn_are_left_out_and_told():
    """Cut at 4 positions, a document whose first trained token comes later would only cost time."""

    class Late(Documents):
        def piece(self, doc, start, count):
            tokens, trained = super().piece(doc, start, count)
            return tokens, (np.arange(start, start + count) >= 10) if doc == 1 else trained

    rows = plan_rows(Late([20, 30, 3]), "all", 4, long="truncate")
    assert set(rows.doc.tolist()) == {0, 2}
    assert any("1 documents were left out" in n for n in rows.notes) and any("were cut" in n for n in rows.notes)
