"""The samples every contender of a training benchmark is given: lengths of real code, half of the tokens trained.

In: a vocabulary size, a row length, a seed. Out: token ids with the length of their input part. The ids are random (speed
does not depend on them); the lengths are a mixture fitted to three kinds of sample of Python's standard library and
site packages at 3.6 characters a token: signature -> body, docstring -> function, head of a file -> rest of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIXTURE = ((0.79, 122, 0.87), (0.14, 299, 0.91), (0.07, 1888, 1.27))
"""(share, median in tokens, sigma of the logarithm) of each kind."""
SHORTEST = 16


@dataclass(frozen=True)
class Sample:
    """One document: token ids, of which the first `num_inputs` are not trained."""

    tokens: np.ndarray
    num_inputs: int

    @property
    def predictions(self) -> int:
        """Positions that have a next token: what is counted as useful, the same for every contender."""
        return len(self.tokens) - 1

    @property
    def targets(self) -> int:
        """Labels that are trained."""
        return len(self.tokens) - self.num_inputs


def draw(num_samples: int, *, vocab_size: int, longest: int, seed: int = 1234) -> list[Sample]:
    """Samples of SHORTEST to `longest` tokens, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    shares, medians, sigmas = (np.array(column) for column in zip(*MIXTURE, strict=True))
    kinds = rng.choice(len(MIXTURE), num_samples, p=shares / shares.sum())
    lengths = np.exp(rng.normal(np.log(medians[kinds]), sigmas[kinds])).round().clip(SHORTEST, longest).astype(int)
    return [Sample(rng.integers(1, vocab_size, length), length // 2) for length in lengths.tolist()]
