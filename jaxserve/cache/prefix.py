"""`PrefixIndex`: which block holds which tokens after which prefix.

A trie over whole blocks, kept in one dictionary: (parent node, tokens of the block) -> block. A node is a number that
is given once and never again, so a node stands for one exact chain of tokens under one salt, and a dictionary compares
the whole key: two prefixes are the same if and only if all their tokens and their salt are. No hash decides.

Owns names and content, not blocks: what is held, evicted or free is `blocks`' business.

Source: the chained block hashes of vLLM's prefix cache, and RadixAttention (arXiv:2312.07104 §3), made exact.
"""

from __future__ import annotations

import struct
from collections import defaultdict

import numpy as np

from jaxserve.cache.blocks import NULL_BLOCK

_NO_NODE = 0
_NODE = struct.Struct("<q")
_ROOT = struct.Struct("<qI")  # no node, then the salt's length: no salt's key can be another's, or a node's


class PrefixIndex:
    """Finds the blocks of a prompt's longest known prefix.

    A block is in the index only while its content is: the caller enters it when the step that wrote it has been
    answered, and takes it out when the block is handed out anew. A child is taken out before its parent.

    Attributes:
        block_size: tokens a block.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: list[bytes | None] = [None] * num_blocks
        self._prefix_of_block: list[bytes] = [b""] * num_blocks  # its node: what its children's keys begin with
        self._num_children: dict[bytes, int] = {}  # by node; nodes without children are not in it
        self._num_nodes = 0  # given so far

    def __len__(self) -> int:
        return len(self._block_of_key)

    def __contains__(self, block: int) -> bool:
        return self._key_of_block[block] is not None

    def match(self, token_ids: np.ndarray, salt: bytes) -> list[int]:
        """Blocks of the longest prefix, in whole blocks, that is known under the salt. Changes nothing.

        Args:
            token_ids: int32[n].

        Cost: about 0.25 us a block.
        """
        data, size = np.ascontiguousarray(token_ids, np.int32).tobytes(), 4 * self.block_size
        blocks: list[int] = []
        prefix = _root(salt)
        find, prefix_of_block = self._block_of_key.get, self._prefix_of_block
        for end in range(size, len(data) + 1, size):
            block = find(prefix + data[end - size : end])
            if block is None:
                break
            blocks.append(block)
            prefix = prefix_of_block[block]
        return blocks

    def enter(self, token_ids: np.ndarray, blocks: list[int], num_known: int, salt: bytes) -> list[int]:
        """Makes blocks findable that hold a sequence's tokens.

        Where the index has a block with the same content already, that one stays, and the caller should use it
        in place of its own.

        Args:
            token_ids: int32[len(blocks) * block_size] from the sequence's beginning.
            blocks: its blocks, all full.
            num_known: how many of them came from the index, or have been entered, already.

        Returns: the index' blocks of `blocks[num_known:]`; empty if the block before them is not in the index.
        Cost: about 0.6 us a block.
        """
        if num_known and self._key_of_block[blocks[num_known - 1]] is None:
            return []
        prefix = self._prefix_of_block[blocks[num_known - 1]] if num_known else _root(salt)
        size = 4 * self.block_size
        data = np.ascontiguousarray(token_ids[num_known * self.block_size :], np.int32).tobytes()
        find, prefix_of_block = self._block_of_key.get, self._prefix_of_block
        entered = []
        for offset, block in enumerate(blocks[num_known:]):
            key = prefix + data[offset * size : (offset + 1) * size]
            found = find(key)
            if found is None:
                found = block
                self._insert(key, block)
            entered.append(found)
            prefix = prefix_of_block[found]
        return entered

    def _insert(self, key: bytes, block: int) -> None:
        assert block != NULL_BLOCK
        assert self._key_of_block[block] is None, f"block {block} has another content in the index"
        self._block_of_key[key] = block
        self._key_of_block[block] = key
        parent = key[: _NODE.size]
        self._num_children[parent] = self._num_children.get(parent, 0) + 1
        self._num_nodes += 1
        self._prefix_of_block[block] = _NODE.pack(self._num_nodes)

    def forget(self, blocks: np.ndarray) -> None:
        """Takes blocks out that are in it. Their children must have been, or be among them."""
        for block in blocks.tolist():
            key = self._key_of_block[block]
            assert key is not None, f"block {block} is not in the index"
            del self._block_of_key[key]
            self._key_of_block[block] = None
            parent = key[: _NODE.size]
            num_left = self._num_children.pop(parent) - 1
            if num_left:
                self._num_children[parent] = num_left

    def orphans_of(self, blocks: np.ndarray) -> np.ndarray:
        """intp[n]: what is left of the continuations of blocks that have just been taken out.

        A row can hold a block without the one that the index has before it: siblings share a block that one of them
        entered after another's copy of the block before.
        """
        lost = {self._prefix_of_block[block] for block in blocks.tolist()} & self._num_children.keys()
        if not lost:
            return np.empty(0, np.intp)
        found = [block for key, block in self._block_of_key.items() if key[: _NODE.size] in lost]
        return self.with_descendants(np.array(found, np.intp))

    def with_descendants(self, blocks: np.ndarray) -> np.ndarray:
        """intp[n]: those of the blocks that are in the index, and all that continue them, ascending.

        Cost: a pass over the index; for faults, not for the loop.
        """
        children: defaultdict[bytes, list[int]] = defaultdict(list)  # by what their keys begin with
        for key, block in self._block_of_key.items():
            children[key[: _NODE.size]].append(block)
        found = [block for block in blocks.tolist() if block in self]
        for block in found:  # it grows meanwhile
            found += children.pop(self._prefix_of_block[block], ())
        return np.unique(np.array(found, np.intp))

    def all_blocks(self) -> np.ndarray:
        """intp[n]: every block in the index, ascending."""
        return np.sort(np.array(list(self._block_of_key.values()), np.intp))

    def check_integrity(self) -> None:
        """Asserts I5 and I6: names and blocks are one to one, and every parent is here."""
        nodes = {self._prefix_of_block[block] for block in self._block_of_key.values()}
        assert len(nodes) == len(self), "two names for a block, or two blocks of one node"
        nodes.add(_NODE.pack(_NO_NODE))
        for key, block in self._block_of_key.items():
            assert self._key_of_block[block] == key
            assert key[: _NODE.size] in nodes, f"block {block} lost its parent"
        num_named = sum(key is not None for key in self._key_of_block)
        assert num_named == len(self), f"{num_named} blocks have a name, {len(self)} are found by one"


def _root(salt: bytes) -> bytes:
    """What the key of a sequence's first block begins with."""
    return _ROOT.pack(_NO_NODE, len(salt)) + salt


def namespace(model_version: str, salt: bytes) -> bytes:
    """A salt for `PrefixIndex` that is another for each pair of model version and salt: lengths stand before both."""
    version = model_version.encode()
    return struct.pack("<II", len(version), len(salt)) + version + salt
