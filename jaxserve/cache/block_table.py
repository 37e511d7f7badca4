"""`BlockTable`: which blocks hold each row's tokens, in order.

Owns the map from (row, column) to block id. It knows neither sequences nor which blocks are free.
"""

from __future__ import annotations

import numpy as np

from jaxserve.cache.blocks import NULL_BLOCK

Entries = tuple[np.ndarray, np.ndarray]  # rows, columns


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
        self._replaced: list[tuple[int, int]] = []

    def append(self, rows: np.ndarray, cols: np.ndarray, ids: np.ndarray) -> None:
        """Sets table[row, col] = id. A row may occur often; its columns ascend from those in use.

        Args:
            rows, cols, ids: [U] each.
        """
        self.ids[rows, cols] = ids
        self.num_blocks[rows] = cols + 1  # of a row's entries the last one stays

    def set_row(self, row: int, ids: np.ndarray) -> None:
        """Gives an empty row its first blocks."""
        assert self.num_blocks[row] == 0, f"row {row} has blocks"
        self.ids[row, : len(ids)] = ids
        self.num_blocks[row] = len(ids)

    def replace(self, row: int, cols: list[int], ids: list[int]) -> None:
        """Changes columns in use; the device hears of it with the next step (`take_replaced`)."""
        assert not cols or max(cols) < self.num_blocks[row], f"columns {cols} of row {row} are not in use"
        self.ids[row, cols] = ids
        self._replaced += [(row, col) for col in cols]

    @property
    def has_replaced(self) -> bool:
        """Whether `take_replaced` has any to return."""
        return bool(self._replaced)

    def take_replaced(self) -> Entries:
        """int32[n] rows and columns that were replaced since the last call, without repetition."""
        entries = list(dict.fromkeys(self._replaced))
        self._replaced = []
        pairs = np.array(entries, np.int32).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def row(self, row: int) -> np.ndarray:
        """int32[num_blocks]: a row's block ids; a view."""
        return self.ids[row, : self.num_blocks[row]]

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
        if self._replaced:
            gone = set(rows.tolist())
            self._replaced = [entry for entry in self._replaced if entry[0] not in gone]

    def holders(self, num_blocks: int) -> np.ndarray:
        """int64[P]: how many table entries name each block, counted from scratch."""
        return np.bincount(self.blocks_of(np.arange(len(self.num_blocks))), minlength=num_blocks)

    def check_integrity(self, num_blocks: int) -> None:
        """Asserts that entries in use name real blocks (I4, I10) and all others the null block."""
        in_use = np.arange(self.ids.shape[1]) < self.num_blocks[:, None]
        assert (self.ids[~in_use] == NULL_BLOCK).all(), "a table entry past the row's blocks is not the null block"
        used = self.ids[in_use]
        assert ((used > NULL_BLOCK) & (used < num_blocks)).all(), f"a table names a block outside (0, {num_blocks})"
        assert all(col < self.num_blocks[row] for row, col in self._replaced), "an unused entry was replaced"
