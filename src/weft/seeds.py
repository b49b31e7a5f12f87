"""Where randomness comes from: one integer, and generators derived from it by name.

A stream that is named by what it is for (a layer, an epoch) does not depend on what was drawn before it, so a resumed
run draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from weft.errors import WeftError

__all__ = ["check_seed", "derived_seed", "generator", "mix", "seed_globals"]

_MASK = (1 << 64) - 1


def check_seed(seed: int) -> int:
    """The seed itself. Raises WeftError where numpy could not take it."""
    if not 0 <= seed < 2**32:
        raise WeftError(f"--seed is {seed}: give a number from 0 to {2**32 - 1}.")
    return seed


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator of its own for this seed and these names; the same arguments give the same numbers in every
    process.
    """
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_globals(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, which libraries that take no generator draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def mix(*numbers: int) -> int:
    """One 63-bit seed from several integers: a splitmix64 round each (Steele, Lea and Flood, 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def derived_seed(*numbers: int) -> int:
    """A 32-bit seed out of several numbers, well mixed (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
