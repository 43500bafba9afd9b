"""Distinct rows of columns: a million boxes are a few hundred different ones."""

from __future__ import annotations

import numpy as np

from ckptd.checkpoint.indexing.columns import Int64


def distinct(label: Int64, boxes: Int64) -> tuple[Int64, Int64]:
    """Return one row of each kind, and each row's kind; rows are alike if their labels and all columns are.

    Args:
        label: Numbers >= 0, far from 2**62.
        boxes: ``[rows, columns]``, numbers >= 0.
    """
    kind = label
    for column in boxes.T:
        spread = int(column.max(initial=0)) + 1
        if (int(kind.max(initial=0)) + 1) * spread >= 1 << 62:
            # Too large to be counted in one number: the ranks of both are not.
            kind, column = (np.unique(each, return_inverse=True)[1] for each in (kind, column))  # noqa: PLW2901
            spread = len(boxes)
        kind = kind * spread + column
    _, example, kind_of = np.unique(kind, return_index=True, return_inverse=True)
    return example, kind_of
