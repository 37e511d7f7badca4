"""The prefix index against a dictionary of whole prefixes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.prefix import PrefixIndex, namespace


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def entered(index: PrefixIndex, values: np.ndarray, blocks: list[int], salt: bytes = b"", num_known: int = 0):
    return index.enter(values, blocks, num_known, salt)


def test_finds_the_longest_prefix_in_whole_blocks() -> None:
    index = PrefixIndex(10, 2)
    assert entered(index, tokens(1, 2, 3, 4, 5, 6), [4, 7, 2]) == [4, 7, 2]
    assert index.match(tokens(1, 2, 3, 4, 5, 6, 7, 8), b"") == [4, 7, 2]
    assert index.match(tokens(1, 2, 3, 4, 5, 9), b"") == [4, 7]
    assert index.match(tokens(1, 2, 3), b"") == [4], "a part of a block is no block"
    assert index.match(tokens(1), b"") == []
    assert index.match(tokens(3, 4), b"") == [], "tokens alone are nothing: what stands before them counts"
    index.check_integrity()


def test_a_known_content_keeps_its_block() -> None:
    index = PrefixIndex(10, 2)
    entered(index, tokens(1, 2, 3, 4), [4, 7])
    assert entered(index, tokens(1, 2, 3, 4, 5, 6), [1, 2, 3]) == [4, 7, 3]
    assert index.match(tokens(1, 2, 3, 4, 5, 6), b"") == [4, 7, 3]
    assert entered(index, tokens(1, 2, 3, 4, 8, 8), [4, 7, 5], num_known=2) == [5]
    index.check_integrity()


def test_nothing_is_entered_after_a_block_that_is_gone() -> None:
    index = PrefixIndex(10, 2)
    entered(index, tokens(1, 2), [4])
    index.forget(tokens(4))
    assert entered(index, tokens(1, 2, 3, 4), [4, 7], num_known=1) == []
    assert len(index) == 0
    index.check_integrity()


def test_a_block_has_one_content() -> None:
    index = PrefixIndex(10, 2)
    entered(index, tokens(1, 2), [4])
    with pytest.raises(AssertionError, match="block 4 has another content"):
        entered(index, tokens(3, 4), [4])
    with pytest.raises(AssertionError, match="block 5 is not in the index"):
        index.forget(tokens(5))


def test_no_two_pairs_of_salt_and_tokens_meet() -> None:
    """Every salt and every token sequence of a small alphabet whose bytes are easily mistaken for each other."""
    as_bytes = tokens(1).tobytes()
    salts = [b"", b"\0", b"\0\0", b"\1", as_bytes, as_bytes * 2, as_bytes + b"\0" * 4, b"a" * 12, b"\0" * 12]
    words = [tokens(*word) for length in (1, 2) for word in itertools.product([0, 1, 256, 2**24], repeat=length)]
    pairs = [(salt, word) for salt in salts for word in words]
    index = PrefixIndex(len(pairs) * 2 + 1, 1)
    free, chains = iter(range(1, len(pairs) * 2 + 1)), {}
    for salt, word in pairs:
        known = index.match(word, salt)
        blocks = known + [next(free) for _ in range(len(word) - len(known))]
        entered(index, word, blocks, salt, len(known))
        chains[salt, word.tobytes()] = blocks
    for (salt, data), blocks in chains.items():
        assert index.match(np.frombuffer(data, np.int32), salt) == blocks
    assert len({tuple(blocks) for blocks in chains.values()}) == len(pairs)
    assert len(index) == len(salts) * (4 + 16)
    index.check_integrity()


@given(a=st.tuples(st.text(max_size=6), st.binary(max_size=6)), b=st.tuples(st.text(max_size=6), st.binary(max_size=6)))
def test_namespaces_differ_where_model_or_salt_do(a: tuple[str, bytes], b: tuple[str, bytes]) -> None:
    assert (namespace(*a) == namespace(*b)) == (a == b)


def test_namespaces_are_framed() -> None:
    assert namespace("ab", b"c") != namespace("a", b"bc")
    assert namespace("a", b"") != namespace("", b"a")


@pytest.mark.parametrize("seed", range(8))
def test_against_a_dictionary_of_prefixes(seed: int) -> None:
    """Model: (salt, whole prefix) -> block. A block is forgotten with everything that continues it."""
    dice = random.Random(seed)
    size, num_blocks = dice.choice([1, 2, 3]), 40
    index, model = PrefixIndex(num_blocks, size), {}
    for _ in range(300):
        salt = dice.choice([b"", b"a"])
        word = tokens(*(dice.randrange(2) for _ in range(dice.randint(0, 5 * size))))
        full = len(word) // size
        prefixes = [(salt, tuple(word[: (i + 1) * size].tolist())) for i in range(full)]
        hits = [model[prefix] for prefix in itertools.takewhile(model.__contains__, prefixes)]
        assert index.match(word, salt) == hits
        free = [block for block in range(1, num_blocks) if block not in index]
        if dice.random() < 0.5 and len(free) >= full:
            blocks = hits + dice.sample(free, full - len(hits))
            num_known = dice.randint(0, len(hits))
            expected = blocks[num_known:]
            assert index.enter(word[: full * size], blocks, num_known, salt) == expected
            model |= dict(zip(prefixes, blocks, strict=True))
        elif model:
            roots = dice.sample(sorted(model.values()), 1)
            (name,) = (name for name, block in model.items() if block == roots[0])
            below = {b for (s, p), b in model.items() if s == name[0] and p[: len(name[1])] == name[1]}
            found = index.with_descendants(np.array(roots))
            assert set(found.tolist()) == below
            index.forget(found)
            model = {name: block for name, block in model.items() if block not in below}
        assert len(index) == len(model)
        assert index.all_blocks().tolist() == sorted(model.values())
        index.check_integrity()


def test_descendants_of_blocks_that_are_not_here_are_none() -> None:
    index = PrefixIndex(10, 1)
    entered(index, tokens(1, 2, 3), [4, 5, 6])
    entered(index, tokens(1, 9), [4, 7], num_known=1)
    assert index.with_descendants(tokens(5)).tolist() == [5, 6]
    assert index.with_descendants(tokens(4, 8)).tolist() == [4, 5, 6, 7]
    assert index.with_descendants(tokens(8, 9)).tolist() == []


def test_integrity_sees_an_orphan() -> None:
    index = PrefixIndex(10, 1)
    entered(index, tokens(1, 2), [4, 5])
    index.forget(tokens(4))
    with pytest.raises(AssertionError, match="lost its parent"):
        index.check_integrity()


def test_what_continues_a_block_that_is_taken_out_is_found() -> None:
    """Siblings share block 2; one enters it behind block 1, which is another request's, and lets that one go."""
    index = PrefixIndex(8, 2)
    tokens = np.arange(8, dtype=np.int32)
    assert index.enter(tokens, [1, 2, 3, 4], 0, b"") == [1, 2, 3, 4]
    assert index.enter(np.array([0, 1, 9, 9], np.int32), [1, 5], 1, b"") == [5]
    index.forget(np.array([1]))
    assert index.orphans_of(np.array([1])).tolist() == [2, 3, 4, 5]
    index.forget(np.array([2, 3, 4, 5]))
    assert index.orphans_of(np.array([2])).tolist() == []
    index.check_integrity()
    assert len(index) == 0
