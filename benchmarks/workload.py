"""The load that the benchmarks put on a model: prompt lengths, prompts, arrivals. All drawn from one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Its tokens are the vocabulary of the prompts: ordinary ones, and none that controls anything.
SAMPLE_TEXT = "The quick brown fox jumps over the lazy dog while nine small planets travel around one bright star. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests with lognormal prompt lengths and a fixed number of output tokens.

    Attributes:
        median_prompt, max_prompt: tokens; lengths above the maximum are cut to it.
        sigma: of the lognormal; 0.7 puts 95 % of the lengths within a factor of 4 of the median.
        output_tokens: a request; end-of-sequence is ignored so that every run does the same work.
    """

    num_requests: int
    median_prompt: int = 128
    max_prompt: int = 512
    sigma: float = 0.7
    output_tokens: int = 64
    seed: int = 0

    def prompt_lens(self) -> np.ndarray:
        """int [num_requests], each from 1 to max_prompt."""
        rng = np.random.default_rng(self.seed)
        lengths = rng.lognormal(np.log(self.median_prompt), self.sigma, self.num_requests)
        return np.clip(lengths.round(), 1, self.max_prompt).astype(int)

    def prompts(self, vocabulary: Sequence[int]) -> list[list[int]]:
        """Random token ids out of `vocabulary`: no two prompts share a prefix, so no cache can help."""
        rng = np.random.default_rng(self.seed + 1)
        return [rng.choice(np.asarray(vocabulary), length).tolist() for length in self.prompt_lens()]

    def arrivals_s(self, rate: float) -> np.ndarray:
        """Seconds from the start at which each request arrives: a Poisson process of `rate` a second."""
        rng = np.random.default_rng(self.seed + 2)
        return rng.exponential(1.0 / rate, self.num_requests).cumsum()
