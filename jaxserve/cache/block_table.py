"""`BlockTable`: which blocks hold each row's tokens, in order.

Owns the map from (row, column) to block id. It knows neither sequences nor which blocks are free.
"""

from __future__ import annotations

import numpy as np

from jaxserve.cache.blocks import NULL_BLOCK


class BlockTable:
    """The rows' block tables as one matrix that lives from step to step.

    Attributes:
        ids: int32[R, M] block ids; column c of a row holds its tokens [c * C, (c + 1) * C). The null block
            from `num_blocks` on.
        num_blocks: int32[R] columns in use.
    """

    def __init__(self, num_rows: int, max_blocks: int):
        self.ids = np.full((num_rows, max_blocks), NULL_BLOCK, np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)

    def append(self, rows: np.ndarray, cols: np.ndarray, ids: np.ndarray) -> None:
        """Sets table[row, col] = id. A row may occur often; its columns ascend from those in use.

        Args:
            rows, cols, ids: [U] each.
        """
        self.ids[rows, cols] = ids
        self.num_blocks[rows] = cols + 1  # of a row's entries the last one stays

    def blocks_of(self, rows: np.ndarray) -> np.ndarray:
        """int32[sum of num_blocks]: the rows' block ids, row after row."""
        if len(rows) == 0:
            return np.empty(0, np.int32)
        return np.concatenate([self.ids[row, : self.num_blocks[row]] for row in rows])

    def clear(self, rows: np.ndarray) -> None:
        """Empties the rows' tables."""
        for row in rows:
            self.ids[row, : self.num_blocks[row]] = NULL_BLOCK
        self.num_blocks[rows] = 0

    def holders(self, num_blocks: int) -> np.ndarray:
        """int64[P]: how many table entries name each block, counted from scratch."""
        return np.bincount(self.blocks_of(np.arange(len(self.num_blocks))), minlength=num_blocks)

    def check_integrity(self, num_blocks: int) -> None:
        """Asserts that entries in use name real blocks (I4, I10) and all others the null block."""
        in_use = np.arange(self.ids.shape[1]) < self.num_blocks[:, None]
        assert (self.ids[~in_use] == NULL_BLOCK).all(), "a table entry past the row's blocks is not the null block"
        used = self.ids[in_use]
        assert ((used > NULL_BLOCK) & (used < num_blocks)).all(), f"a table names a block outside (0, {num_blocks})"
