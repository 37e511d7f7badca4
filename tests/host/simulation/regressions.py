"""Histories that once failed, cut to what made them fail. `test_regressions.py` replays them."""

from __future__ import annotations

from .history import Add, History

_SMALL = {
    "block_size": 4,
    "max_num_seqs": 3,
    "max_model_len": 16,
    "max_num_batched_tokens": 8,
    "num_swap_blocks": 0,
    "enable_prefix_caching": True,
}

REGRESSIONS = {
    # The first of two siblings fills the block that both share, ends, and has it cached; the second one then wrote its
    # own token into it.
    "a sibling wrote to what an ended one had cached": History(
        limits={**_SMALL, "num_blocks": 32, "block_size": 2, "max_num_batched_tokens": 46},
        costs={},
        depth=0,
        is_slow=False,
        events=(Add("a", (483, 344, 66, 535, 10, 957, 440, 123, 889), 11, n=2),),
    ),
    # d leaves a row in the very step in which the first two siblings part: the first one gets a copy, so that the third
    # one, which forks from it, shares the block with the second one, who did not know.
    "a fork's co-holder changed within one commit": History(
        limits={**_SMALL, "num_blocks": 20},
        costs={},
        depth=0,
        is_slow=False,
        events=(Add("d", (9,), 3), Add("a", (5,), 10, n=3)),
    ),
    # After a lost device the first sibling's outputs are prompt-like: they are entered chunk by chunk, past the prompt.
    # The one that forks from it has only the prompt's blocks.
    "a fork took over the count of more blocks than it has": History(
        limits={**_SMALL, "num_blocks": 20, "block_size": 2, "max_num_seqs": 2},
        costs={},
        depth=0,
        is_slow=False,
        events=(
            Add("d", (9,), 16),
            Add("a", (5, 6), 12, n=2),
            ("steps", 6),
            ("abort", "d"),
            ("lose",),
            ("steps", 3),
        ),
    ),
    # The token sampled last is known, and its KV is not written yet: at the end it is no part of what is cached.
    "the last token was cached before it was written": History(
        limits={**_SMALL, "num_blocks": 11, "block_size": 1, "max_num_seqs": 1, "max_num_batched_tokens": 6},
        costs={},
        depth=0,
        is_slow=False,
        events=(Add("a", (510, 37, 906, 712, 538, 835), 7),),
    ),
}
