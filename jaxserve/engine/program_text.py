"""What a compiled program's text (HLO) says of it: collectives, copies, the compiler's estimate of its cycles.

Each instruction counts once, whatever loops and branches it stands in, but for the loop that runs stacked layers: there
it counts once a layer, so that the figures are those of the same layers one after another.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_NO_ESTIMATE = 2**60  # what the compiler writes where it has none
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(rf"\s({'|'.join(COLLECTIVES)})(?:-start)?\(")
_BEGINS = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")  # a computation
_CALLED = re.compile(r"%([\w.\-]+)")
_LOOP = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_COUNTS = re.compile(r"ROOT \S+ = pred\[\]\S* compare\(.*direction=LT")  # a loop's condition that only counts


class ProgramText:
    """The text of one program.

    Args:
        hlo: as `jax.stages.Compiled.as_text` gives it.
        cache_dims: of each array of the cache, on one device. Where layers are stacked it holds all of them.
        num_layers: that a loop over that array runs; 1 where layers are not stacked.
    """

    def __init__(self, hlo: str, cache_dims: Sequence[int] = (), num_layers: int = 1) -> None:
        self._cache_dims, self._num_layers = tuple(cache_dims), num_layers
        self._computations: dict[str, list[str]] = defaultdict(list)  # "" has what stands in none
        name = ""
        for line in hlo.splitlines():
            if begins := _BEGINS.match(line):
                name = begins.group(1)
            self._computations[name].append(line)
        self._in_layers = self._called_from(self._layer_loops()) if num_layers > 1 else set()

    def collectives(self) -> tuple[tuple[str, int], ...]:
        """How many instructions of each of `COLLECTIVES`; an asynchronous one counts at its start."""
        found: Counter[str] = Counter()
        for line, times in self._lines():
            for kind in _COLLECTIVE.findall(line):
                found[kind] += times
        return tuple((kind, found[kind]) for kind in COLLECTIVES if found[kind])

    def cache_copies(self) -> int:
        """How many copies of an array of the cache, in whatever order, or of a layer's part of one."""
        blocks, *block = self._cache_dims
        return sum(self.copies((size, *block)) for size in {blocks, blocks // self._num_layers})

    def copies(self, dims: Sequence[int]) -> int:
        """How many copies of an array of these dimensions, in whatever order."""
        found = 0
        for line, times in self._lines():
            for shape in re.findall(r"=\s*\(?\w+\[([\d,]+)\][^=]*?\s(?:copy|copy-start)\(", line):
                found += times * (sorted(map(int, shape.split(","))) == sorted(dims))
        return found

    def cycles(self) -> int:
        """The sum of the compiler's estimates; those of kernels are not among them."""
        return sum(
            times * cycles
            for line, times in self._lines()
            for cycles in map(int, _CYCLES.findall(line))
            if cycles < _NO_ESTIMATE
        )

    @property
    def has_layer_loop(self) -> bool:
        """Whether a loop over stacked layers was found."""
        return bool(self._in_layers)

    def _lines(self) -> Iterator[tuple[str, int]]:
        """Each line, and how often it counts."""
        for name, lines in self._computations.items():
            times = self._num_layers if name in self._in_layers else 1
            yield from ((line, times) for line in lines)

    def _layer_loops(self) -> list[str]:
        """Bodies of the loops that carry the cache and have a turn for each layer."""
        cache, found = f"[{','.join(map(str, self._cache_dims))}]", []
        for line in (line for lines in self._computations.values() for line in lines):
            loop = _LOOP.search(line)
            if loop and cache in line.partition(" while(")[0]:
                known, condition = _KNOWN_TURNS.search(line), "\n".join(self._computations[loop.group(1)])
                bounds = _CONSTANT.findall(condition) if _COUNTS.search(condition) else []
                if str(self._num_layers) in ([known.group(1)] if known else bounds):
                    found.append(loop.group(2))
        return found

    def _called_from(self, names: list[str]) -> set[str]:
        """These computations and all that they call."""
        seen, left = set(), list(names)
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                called = _CALLED.findall("\n".join(self._computations[name][1:]))
                left += [other for other in called if other in self._computations]
        return seen
