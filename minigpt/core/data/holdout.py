"""Which documents are kept from training, to validate on.

Shapes: N documents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AUTO_DOCUMENTS = 200  # documents that --val-split auto holds out …
AUTO_SHARE = (0.005, 0.05)  # … within these shares
_LARGEST = 20  # no document with copies is more than one in so many of what should be held out


class Holdout(NamedTuple):
    """val: (N,) which documents are validation. note: a sentence on why they are far fewer than they should be."""

    val: NDArray[np.bool_]
    note: str | None = None


def hold_out(hashes: NDArray[np.uint64], share: float | None) -> Holdout:
    """Validation documents: those whose 64-bit hash of content lies in the first `share` of all hashes.

    A document therefore keeps its side when rows are added, removed or moved, and copies of one are on the same side.
    One that is repeated so often that its copies would be a good part of the validation is always trained on: to leave
    it out is to lose what the data wants to be remembered. share: None = 200 documents, but from 0.5 to 5 %. With two
    different documents and a share above 0 each side has at least one; a single one is trained on.
    """
    n = len(hashes)
    if n < 2 or share == 0:
        return Holdout(np.zeros(n, dtype=np.bool_))
    if share is None:
        share = min(max(AUTO_DOCUMENTS / n, AUTO_SHARE[0]), AUTO_SHARE[1])
    distinct, document, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    may = copies <= max(1.0, share * n / _LARGEST)
    chosen = may & (distinct < np.uint64(min(int(share * 2**64), 2**64 - 1)))
    if not chosen.any() and may.any() and len(distinct) > 1:
        chosen[np.flatnonzero(may)[0]] = True  # distinct hashes ascend: the first of them
    if chosen.all():
        chosen[-1] = False
    val: NDArray[np.bool_] = chosen[document]
    repeated = n - int(copies[may].sum())
    note = None
    if repeated > n / 2:
        note = (
            f"{repeated:,} of {n:,} documents are copies of {int((~may).sum()):,}, which are all trained on: "
            f"{int(val.sum()):,} held out where {round(share * n):,} should be (--val-data names others)"
        )
    return Holdout(val, note)
