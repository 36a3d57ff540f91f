"""splitmix64: 64-bit numbers that follow from a state and a position, on integers and on arrays.

The generator is that of G. L. Steele, D. Lea and C. H. Flood, "Fast Splittable Pseudorandom Number
Generators" (OOPSLA 2014), with Stafford's finalizer "Mix13" (D. Stafford, "Better Bit Mixing",
2011). Output number n is computed without those before it. All is arithmetic modulo 2**64, so it is
the same on every platform.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

WORD: Final = 2**64
GOLDEN: Final = 0x9E3779B97F4A7C15
FACTORS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK: Final = WORD - 1
# Below this many numbers Python's integers are faster than NumPy's arrays.
_FEW: Final = 32


def word(value: int) -> Words:
    """Returns a number as an array without dimensions.

    NumPy takes twice as long with a Python integer or a scalar as operand.
    """
    return np.array(value, dtype=np.uint64)


_W_GOLDEN: Final = word(GOLDEN)
_W_FACTORS: Final = (word(FACTORS[0]), word(FACTORS[1]))
_W_30: Final = word(30)
_W_27: Final = word(27)
_W_31: Final = word(31)


def finish(value: int) -> int:
    """Returns the finalizer's value of a number below 2**64."""
    value = ((value ^ (value >> 30)) * FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * FACTORS[1]) & _MASK
    return value ^ (value >> 31)


def mix(state: int, index: int = 0) -> int:
    """Returns output number `index` of the generator that starts at `state`."""
    return finish((state + (index + 1) * GOLDEN) & _MASK)


def mix_range(state: int, first: int, count: int) -> list[int]:
    """Returns `mix(state, index)` for `count` indices from `first` on; `state` is below 2**64."""
    if count < _FEW:
        start = state + (first + 1) * GOLDEN
        return [finish(value & _MASK) for value in range(start, start + count * GOLDEN, GOLDEN)]
    words = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    mix_into(words, np.empty_like(words), word(state), words)
    found: list[int] = words.tolist()
    return found


def mix_into(out: Words, scratch: Words, state: Words, indices: Words) -> None:
    """Writes output number index - 1 of the generator for each index to `out`.

    Args:
        out: as long as `indices`, which it may be.
        scratch: as long, for what is in between.
        state: the state that the generator starts at, for all or for each.
        indices: from 1 on; from 0 on where `state` is one `GOLDEN` ahead.
    """
    np.multiply(indices, _W_GOLDEN, out)
    np.add(out, state, out)
    np.right_shift(out, _W_30, scratch)
    np.bitwise_xor(out, scratch, out)
    np.multiply(out, _W_FACTORS[0], out)
    np.right_shift(out, _W_27, scratch)
    np.bitwise_xor(out, scratch, out)
    np.multiply(out, _W_FACTORS[1], out)
    np.right_shift(out, _W_31, scratch)
    np.bitwise_xor(out, scratch, out)
