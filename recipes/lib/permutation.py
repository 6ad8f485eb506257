"""A shuffled order, computed element by element: no array of the data's size, the same on every machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 6


def permuted(values: npt.NDArray[np.uint64], size: int, *, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """Where one pseudo-random permutation of range(size) takes each of `values`.

    A Feistel network permutes the next power of four; values that land outside are sent through again until
    they are inside, which keeps it a permutation. No array of `size` elements exists, and no random
    generator of a library whose next version draws otherwise.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    name = _mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch)
    keys = _mix(_mix(name) + np.array(range(_ROUNDS), np.uint64))

    def network(inside: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = inside >> half, inside & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << half) | right

    images = network(values)
    while (outside := images >= np.uint64(size)).any():
        images[outside] = network(images[outside])
    return images


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer: every bit of a value changes half of the bits of its image."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
