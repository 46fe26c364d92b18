"""Numbers chosen for the user stay sensible over sizes and corpora."""

import pytest

from minigpt.core.report import Report
from minigpt.core.train.defaults import suggested_batch, suggested_lr, suggested_rows, warn_lr


def test_rate_falls_with_size_and_for_fine_tuning():
    assert suggested_lr(3_000_000, "pretrain") == 3e-3
    sizes = [suggested_lr(n, "pretrain") for n in (10**6, 10**7, 10**8)]
    assert sizes == sorted(sizes, reverse=True)
    assert suggested_lr(10**7, "sft") < suggested_lr(10**7, "pretrain")


@pytest.mark.parametrize("parameters", [10**5, 3 * 10**6, 10**8])
@pytest.mark.parametrize("rows", [1, 150, 10**6])
def test_batch_is_whole_rows_and_leaves_enough_updates(parameters, rows):
    for stage, least in (("pretrain", 200), ("sft", 50)):
        tokens = suggested_batch(parameters, rows, 512, stage)
        assert tokens % 512 == 0 and tokens >= 512
        assert rows / (tokens / 512) >= min(rows, least) or tokens == 512


def test_batch_grows_with_size():
    sizes = [suggested_batch(n, 10**9, 256, "pretrain") for n in (10**6, 10**7, 10**8)]
    assert sizes == sorted(sizes) and sizes[0] == 4096 and sizes[-1] <= 131_072


def test_rows_at_once():
    assert suggested_rows(512, "cpu") == 8 and suggested_rows(10**6, "cpu") == 1
    assert suggested_rows(512, "cuda") > suggested_rows(512, "cpu")


@pytest.mark.parametrize(("lr", "word"), [(1e-5, "below"), (0.5, "above"), (3e-3, None), (1e-3, None)])
def test_rates_far_off_are_named(lr, word):
    heard = []

    class Ears(Report):
        def warn(self, text, *, fix=None):
            heard.append(text)

    warn_lr(lr, 3_000_000, "pretrain", Ears())
    assert [word] == [w for w in ("below", "above") if heard and w in heard[0]] if word else heard == []
