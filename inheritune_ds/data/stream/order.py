"""Selects the window of a source at each of its turns: pure functions of seed and turn, for any turn at once.

An order covers several sources, each with its own sequence. Turn t of a source with n windows belongs to its epoch
t // n. The integer mixing is implemented here because numpy's generators may change between versions.

Shapes: B turns, S sources.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
# splitmix64: the golden-ratio increment and the two multipliers of its finalizer
# (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"; Stafford's mix 13).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Found = tuple[NDArray[np.int64], NDArray[np.int64]]
Order = Callable[[NDArray[np.int64], NDArray[np.int64]], Found]
"""Maps source numbers (B,) and their turns (B,) to epochs (B,) and places (B,), all from 0."""


def order_seeds(seed: int, names: Sequence[str]) -> list[int]:
    """Seed of every source's order.

    A single source has the run's seed. Several have one each, from the run's seed and the name alone: adding or moving
    a source does not change the order of the others.
    """
    if len(names) == 1:
        return [seed]
    digests = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]
    return [int.from_bytes(digest, "little") for digest in digests]


def shuffled_order(sizes: Sequence[int], seeds: Sequence[int]) -> Order:
    """A new permutation of all windows of the source in every epoch; a place is a window's number.

    Inside an epoch, the permutation is a Feistel network keyed by (seed, epoch) over the pairs (left, right), left < a,
    right < b, with a * b the smallest such product not below n; values outside [0, n) are permuted again along their
    cycle (Black, Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3). Seeds are in [0, 2**64).
    """
    lefts = [math.isqrt(size - 1) + 1 for size in sizes]
    rights = [-(-size // left) for size, left in zip(sizes, lefts, strict=True)]
    sizes_S, states_S = np.array(sizes, np.int64), _seed_states(seeds)  # noqa: N806 - shape suffix
    lefts_S, rights_S = np.array(lefts, np.uint64), np.array(rights, np.uint64)  # noqa: N806
    rounds_R1 = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None]  # noqa: N806

    def at(sources: NDArray[np.int64], turns: NDArray[np.int64]) -> Found:
        sizes = sizes_S[sources]
        epochs, offsets = np.divmod(turns, sizes)
        left_sizes, right_sizes = lefts_S[sources], rights_S[sources]
        keys = _mix(_mix(states_S[sources] + epochs.astype(np.uint64) * _GOLDEN) + rounds_R1 * _GOLDEN)
        places = _permute(offsets.astype(np.uint64), keys, left_sizes, right_sizes)
        outside = np.flatnonzero(places >= sizes)
        while outside.size:
            places[outside] = _permute(places[outside], keys[:, outside], left_sizes[outside], right_sizes[outside])
            outside = outside[places[outside] >= sizes[outside]]
        return epochs, places.astype(np.int64)

    return at


def sequential_order(sizes: Sequence[int]) -> Order:
    """The windows of a source in their own order, the same in every epoch; a place is a window's number."""
    sizes_S = np.array(sizes, np.int64)  # noqa: N806 - shape suffix
    return lambda sources, turns: np.divmod(turns, sizes_S[sources])


def random_order(sizes: Sequence[int], places: Sequence[int], seeds: Sequence[int]) -> Order:
    """Windows at random places, with replacement, as in nanoGPT's get_batch; a place is the number of a first token.

    Turn t takes the 64-bit word t of the source's splitmix64 stream modulo `places` = tokens - T, the range of nanoGPT
    (`torch.randint(len(data) - block_size, ...)`, train.py): the bias is below places / 2**64, so for ten billion
    places probabilities differ by less than one in a billion. An epoch has as many turns as the source has windows.
    """
    sizes_S, states_S = np.array(sizes, np.int64), _seed_states(seeds)  # noqa: N806 - shape suffix
    places_S = np.array(places, np.uint64)  # noqa: N806

    def at(sources: NDArray[np.int64], turns: NDArray[np.int64]) -> Found:
        words = _mix(states_S[sources] + (turns.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        return turns // sizes_S[sources], (words % places_S[sources]).astype(np.int64)

    return at


def _seed_states(seeds: Sequence[int]) -> NDArray[np.uint64]:
    return _mix(np.array(seeds, dtype=np.uint64) + _GOLDEN)


def _permute(
    values: NDArray[np.uint64], keys: NDArray[np.uint64], left_size: NDArray[np.uint64], right_size: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Apply the Feistel network once to values in [0, left_size * right_size)."""
    left, right = np.divmod(values, right_size)
    for number, key in enumerate(keys):
        if number % 2:
            right = (right + _mix(left + key) % right_size) % right_size
        else:
            left = (left + _mix(right + key) % left_size) % left_size
    return left * right_size + right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalize as splitmix64 does: a bijection of 64-bit integers that mixes every bit into all others."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
