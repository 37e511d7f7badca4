"""The load that the benchmarks put on a model: prompt lengths, prompts, arrivals. All drawn from one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Its tokens are the vocabulary of the prompts: ordinary ones, and none that controls anything.
SAMPLE_TEXT = "The quick brown fox jumps over the lazy dog while nine small planets travel around one bright star. "

REQUEST_SETS = ("batch", "shared", "stream", "long")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSet:
    """Requests that are all there at once, answered greedily to a fixed length.

    Attributes:
        name: of `REQUEST_SETS`.
        output_tokens: of each request.
        num_shared: tokens with which all prompts begin.
    """

    name: str
    prompts: list[list[int]]
    output_tokens: int
    num_shared: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return len(self.prompts) * self.output_tokens

    @property
    def num_rated_tokens(self) -> int:
        """What its tokens a second count: output, but of `long`, where prompts are nearly all the work, both."""
        return self.num_output_tokens + (self.num_prompt_tokens if self.name == "long" else 0)

    @property
    def rate_name(self) -> str:
        return "total" if self.name == "long" else "output"

    @property
    def num_distinct_prompt_tokens(self) -> int:
        """Prompt tokens that are left to compute where the shared ones are computed once."""
        return self.num_prompt_tokens - self.num_shared * (len(self.prompts) - 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(map(len, self.prompts)) + self.output_tokens


def request_set(
    name: str, vocabulary: Sequence[int], *, seed: int = 0, quick: bool = False, num_requests: int = 64
) -> RequestSet:
    """One of `REQUEST_SETS`, its prompts drawn from `vocabulary`.

    `batch`: 64 lognormal prompts (median 128, at most 512) and 64 output tokens. `shared`: 48 prompts that share 384 of
    416 tokens, and 32 output tokens. `stream`: one of 128 + 128. `long`: four prompts of 2,048, and 8 output tokens, as
    many as show that the answers come and few enough that the prompts remain the work.

    Args:
        quick: a tenth of the sizes or less.
        num_requests: of `batch`.
    """
    rng = np.random.default_rng(seed + 1)

    def draw(length: int) -> list[int]:
        return rng.choice(np.asarray(vocabulary), length).tolist()

    match name:
        case "batch":
            small = {"median_prompt": 16, "max_prompt": 40, "output_tokens": 8} if quick else {}
            work = Workload(num_requests=min(num_requests, 8) if quick else num_requests, seed=seed, **small)
            return RequestSet(name=name, prompts=work.prompts(vocabulary), output_tokens=work.output_tokens)
        case "shared":
            count, shared, own, outputs = (6, 32, 16, 4) if quick else (48, 384, 32, 32)
            prefix = draw(shared)
            prompts = [prefix + draw(own) for _ in range(count)]
            return RequestSet(name=name, prompts=prompts, output_tokens=outputs, num_shared=shared)
        case "stream":
            length = 16 if quick else 128
            return RequestSet(name=name, prompts=[draw(length)], output_tokens=length)
        case "long":
            length, outputs = (96, 2) if quick else (2048, 8)
            return RequestSet(name=name, prompts=[draw(length) for _ in range(4)], output_tokens=outputs)
    raise ValueError(f"There is no set of requests {name!r}. Choose of {', '.join(REQUEST_SETS)}.")
