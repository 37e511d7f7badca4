"""Which tile sizes of the attention kernel are the quickest on this device? For the tables of `pallas_kernels`.

The backend's own sizes first, then those that differ in one, then in more, as far as the time goes. Each must be right
before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from itertools import product
from typing import Any

import jax.numpy as jnp

from benchmarks.accelerator_cases import Heads
from benchmarks.accelerator_checks import ATTENTION, KERNELS, Target, check_attention, target_for
from benchmarks.accelerator_jobs import Sink
from benchmarks.accelerator_kernels import HEADS, NEEDED_S, SMALL, SMALL_HEADS, Bench, Decode


def run(sink: Sink, *, platform: str, backend: str, small: bool, ceilings: dict[str, float], seed: int) -> None:
    """Every choice that is right, at two batch sizes; the best of each at the end."""
    bench = Bench(sink, target_for(platform, backend), ceilings, seed, is_interpreted=platform == "cpu")
    cases = SMALL if small else (Decode(64, 8192), Decode(1, 16_384))
    for heads in SMALL_HEADS if small else HEADS[:2]:
        pool = bench.pool(heads, cases)
        best: dict[str, tuple[float, str]] = {}
        for tiles in tile_choices(bench.target, heads):
            name = f"tiles {_said(tiles)}, {heads.name}"
            if bench.sink.left_s < 2 * NEEDED_S:
                break
            if not bench.sink.begin(name):
                continue
            try:
                target = replace(bench.target, tiles=tiles)
                findings = check_attention(KERNELS[ATTENTION], heads, {}, target, small, bench.seed)
                wrong = [finding.what for finding in findings if not finding.value <= finding.most]
                if wrong:
                    bench.sink.note(f"{name}: FAILS: {', '.join(wrong)}")
                for case in () if wrong else cases:
                    program = bench.repeated(heads, case, case.context, tiles)
                    timing, num_bytes = bench.time_decode(heads, case, pool, program)
                    share = 100 * num_bytes / timing.seconds / bench.ceilings["copy_bytes_s"]
                    bench.sink.add(f"{name}, {case.name}: of copy bandwidth", share, "%")
                    best[case.name] = max(best.get(case.name, (0.0, "")), (share, _said(tiles)))
            except ValueError as error:  # sizes that do not fit
                bench.sink.note(f"{name}: {error}")
            bench.sink.end(name)
        for case_name, (share, said) in best.items():
            bench.sink.note(f"best tiles, {case_name}, {heads.name}: {said} ({share:.1f} %)")


def tile_choices(target: Target, heads: Heads) -> Iterator[Any]:
    """The backend's own tiles first, then those that differ in one size, then all others of the grid."""
    if target.backend == "tpu":
        from pallas_kernels.ragged_paged_attention.tuning import tiles_for

        own: Any = target.tiles or tiles_for(
            None, num_kv_heads=heads.num_kv_heads, group=heads.group, head_dim=heads.head_dim,
            block_size=heads.block_size, kv_itemsize=jnp.dtype(heads.stored).itemsize,
        )  # fmt: skip
        grid: dict[str, tuple[int, ...]] = {"kv_tile": (128, 256, 512, 1024), "q_tile": (32, 64, 128, 256)}
    else:
        from pallas_kernels.gpu_generations import generation_here
        from pallas_kernels.ragged_paged_attention.tuning_gpu import check_tiles, default_tiles

        generation = generation_here("ragged_paged_attention", interpreted=target.tiles is not None)
        own = target.tiles or default_tiles(heads.head_dim, heads.dtype, heads.stored, generation)
        grid = {"kv_split": (256, 512, 1024, 2048), "ring": (2, 3, 4, 5, 6, 8), "lanes": (1, 2), "kv_tile": (64, 128)}
        grid |= {"cut_below": (1, 2, 4, 8)}
    grid = {name: values for name, values in grid.items() if name in {field.name for field in fields(own)}}
    every = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def distance(change: dict[str, int]) -> int:
        return sum(getattr(own, name) != value for name, value in change.items())

    seen = [own]
    yield own
    for change in sorted(every, key=distance):
        try:
            tiles = replace(own, **change)
            if target.backend == "gpu":
                check_tiles(tiles, heads.head_dim, heads.dtype, heads.stored, generation)
        except ValueError:  # sizes that cannot go together, or do not fit
            continue
        if tiles not in seen:
            seen.append(tiles)
            yield tiles


def _said(tiles: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(tiles).items())
