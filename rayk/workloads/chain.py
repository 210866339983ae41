"""The 64-bit chain over token sequences that the verify model and the LRU model identify prefixes by.

    chain[p] = sum over i <= p of mix(token[i], i)   (mod 2**64)

Every term is a strong mix of a token *and* its position, so two prefixes agree in their chain only when they
are equal, up to a chance of about 2**-64 for a pair. A prefix sum is one pass of numpy: no loop over tokens.
This is deliberately neither of the hashes that the cache itself uses.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix64(values: UInt64Array) -> UInt64Array:
    """splitmix64's finalizer, elementwise, a bijection of uint64; returns a new array of the same shape."""
    out = values + _GOLDEN
    out ^= out >> np.uint64(30)
    out *= _MIX_1
    out ^= out >> np.uint64(27)
    out *= _MIX_2
    out ^= out >> np.uint64(31)
    return out


def prefix_chain(tokens: npt.NDArray[np.int32]) -> UInt64Array:
    """The chain value of every prefix of `tokens` ([n] int32): [n] uint64."""
    placed = np.arange(len(tokens), dtype=np.uint64) << np.uint64(32)
    placed |= tokens.view(np.uint32) if tokens.flags.c_contiguous else np.ascontiguousarray(tokens).view(np.uint32)
    return np.cumsum(mix64(placed), dtype=np.uint64)


def page_chain(tokens: npt.NDArray[np.int32], page_size: int) -> UInt64Array:
    """The chain value at the end of every full page of `tokens`: [len(tokens) // page_size] uint64."""
    return prefix_chain(tokens)[page_size - 1 :: page_size]
