"""A pseudo-random order of n things that needs no memory: position -> thing, computed where it is asked for.

A Feistel network over pairs (a, b) in [0, A) x [0, B), A B >= n: each round adds a hash of one half to the other half, modulo
its size, so every round can be undone and the whole is a permutation of A B numbers. Numbers >= n are sent through again until
they fall below n ("cycle walking"), which makes it a permutation of n numbers; A B - n < A <= sqrt(n) + 1 are so few that this
is rare.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Uint64s = npt.NDArray[np.uint64]

_ROUNDS = 6


def _mix(x: Uint64s) -> Uint64s:
    """Hash each number: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """A permutation of range(count) that is decided by the words of `key` alone."""

    def __init__(self, count: int, *key: int | str) -> None:
        digest = hashlib.shake_256(repr(key).encode()).digest(8 * 2 * _ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self._count = count
        self._a = max(math.isqrt(max(count - 1, 0)) + 1, 1)
        self._b = max(-(-count // self._a), 1)

    def __call__(self, positions: Int64s) -> Int64s:
        """Return which thing stands at each position, both int64 in [0, count), any shape."""
        things = self._once(positions.astype(np.uint64))
        while (outside := things >= np.uint64(self._count)).any():
            things[outside] = self._once(things[outside])
        return things.astype(np.int64)

    def _once(self, x: Uint64s) -> Uint64s:
        size_a, size_b = np.uint64(self._a), np.uint64(self._b)
        a, b = x // size_b, x % size_b
        for key_a, key_b in self._keys.reshape(_ROUNDS, 2):
            a = (a + _mix(b ^ key_a) % size_a) % size_a
            b = (b + _mix(a ^ key_b) % size_b) % size_b
        return a * size_b + b


class Lanes:
    """The order of contiguous streams: `lanes` equal parts of the rows side by side, each from its first row to its last.

    Sample i is of lane i % lanes, so with as many lanes as rows in a batch, each row of a batch continues the same row of the batch
    before, as Transformer-XL trains (Dai et al. 2019, arXiv:1901.02860). `count` must be a multiple of `lanes`.
    """

    def __init__(self, count: int, lanes: int) -> None:
        self._lanes, self._steps = lanes, count // lanes

    def __call__(self, positions: Int64s) -> Int64s:
        """Return which row stands at each position, both int64 in [0, count), any shape."""
        return positions % self._lanes * self._steps + positions // self._lanes
