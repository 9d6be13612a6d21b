"""Asymmetric numeral systems (ANS, Duda 2009) for many symbols side by side.

The coder is a stack of bits to push to and pop from. The share of a symbol among the 2^24 slots is the interval from
c(symbol) to c(symbol + 1). Pushing a symbol takes -log2 of its share in bits. Popping from random bits draws a symbol
with that probability; popping after a push undoes it exactly (Townsend, Bird & Barber 2019). Each of n symbols goes to
one of the first n heads, which are 64-bit numbers. A full head moves 32 bits to a stack of words that all heads share.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

PRECISION = 24  # bits of a probability
MIN_HEAD = 2**32  # Heads stay in [2^32, 2^64), so that a pop moves back the words that its push moved.
SLOTS = 2**PRECISION

Floats = NDArray[np.float64]
# Symbols (m, n), integers from 0 to the size of the alphabet -> their c, (m, n).
Cumulative = Callable[[Floats], Floats]


def quantize_cdf(below: Floats, symbols: Floats, size: int) -> Floats:
    """Compute c(symbol) from the distribution function.

    Each of `size` symbols gets at least two slots. With one slot, rounding errors of the distribution function could
    leave a symbol without any. With two, c always increases.
    """
    return np.floor(below * (SLOTS - 2 * size)) + 2 * symbols


def find_interval(cumulative: Cumulative, symbols: Floats, bits: int) -> tuple[Floats, Floats]:
    """Find the first slot of each symbol `(n,)`, and the slot after its last."""
    start, end = cumulative(np.stack((symbols, symbols + 1)))
    return np.where(symbols == 0, 0, start), np.where(symbols == 2**bits - 1, SLOTS, end)


class Stack:
    """A stack of words (uint32) below heads (uint64).

    A stack for compression starts empty. When it has no words left to pop, it pops pseudorandom ones and counts them in
    `borrowed`. They are the initial bits of bits-back coding, and remain at the bottom when all else is popped again.
    """

    def __init__(self, heads: NDArray[np.uint64] | None = None, words: NDArray[np.uint32] | None = None):
        self.can_borrow = heads is None or words is None
        self.heads = np.zeros(0, np.uint64) if heads is None else heads.astype(np.uint64)
        self.words = np.zeros(1024, np.uint32) if words is None else words.astype(np.uint32)
        self.top = 0 if words is None else len(words)
        self.borrowed = 0
        self.random = np.random.PCG64(0)

    def get_content(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """Return the heads and the words."""
        return self.heads, self.words[: self.top]

    def push_words(self, words: NDArray[np.uint64]) -> None:
        """Push words below the heads."""
        if self.top + len(words) > len(self.words):
            self.words = np.concatenate((self.words, np.zeros(len(self.words) + len(words), np.uint32)))
        self.words[self.top : self.top + len(words)] = words
        self.top += len(words)

    def pop_words(self, count: int) -> NDArray[np.uint64]:
        """Pop words; raise EOFError if there are too few and none may be borrowed."""
        missing = max(0, count - self.top)
        if missing and not self.can_borrow:
            raise EOFError("more was popped than pushed")
        first, self.top = self.top, self.top - (count - missing)
        words = self.words[self.top : first].astype(np.uint64)
        if not missing:
            return words
        self.borrowed += missing
        return np.concatenate((self.random.random_raw(missing) % MIN_HEAD, words))

    def grow(self, count: int) -> None:
        """Grow to at least `count` heads. A new head starts with a word of the stack, so it costs no bits."""
        if (new := count - len(self.heads)) > 0:
            self.heads = np.concatenate((self.heads, self.pop_words(new) + np.uint64(MIN_HEAD)))

    def shrink(self, count: int) -> None:
        """Shrink to `count` heads, which undoes `grow`."""
        self.push_words(self.heads[count:] % MIN_HEAD)
        self.heads = self.heads[:count]

    def flip(self, mask: NDArray[np.uint64]) -> None:
        """Flip the bits of `mask` `(n,)` in the lowest 32 bits of each head; flipping again undoes it."""
        self.heads[: len(mask)] ^= mask

    def push(self, cumulative: Cumulative, symbols: Floats, bits: int) -> None:
        """Push symbols `(n,)` of an alphabet of size 2^`bits`."""
        start, end = find_interval(cumulative, symbols, bits)
        self._push(start.astype(np.uint64), (end - start).astype(np.uint64))

    def pop(self, cumulative: Cumulative, n: int, bits: int) -> Floats:
        """Pop symbols `(n,)` of an alphabet of size 2^`bits`, by a search of two bits per step."""
        slot = (self.heads[:n] % SLOTS).astype(np.float64)
        symbols = np.zeros(n)
        step = 2**bits
        while step > 1:
            ways = 4 if step > 2 else 2
            step //= ways
            candidates = symbols + step * np.arange(1, ways)[:, None]
            symbols += step * np.count_nonzero(cumulative(candidates) <= slot, axis=0)
        start, end = find_interval(cumulative, symbols, bits)
        self._pop(start.astype(np.uint64), (end - start).astype(np.uint64))
        return symbols

    def push_uniform(self, symbols: Floats, bits: int) -> None:
        """Push symbols `(n,)` of equal probability 2^-`bits`."""
        shift = PRECISION - bits
        self._push(symbols.astype(np.uint64) << np.uint64(shift), np.full(len(symbols), 1 << shift, np.uint64))

    def pop_uniform(self, n: int, bits: int) -> Floats:
        """Pop symbols `(n,)` of equal probability 2^-`bits`."""
        shift = PRECISION - bits
        symbols = self.heads[:n] % SLOTS >> shift
        self._pop(symbols << shift, np.full(n, 1 << shift, np.uint64))
        return symbols.astype(np.float64)

    def _push(self, start: NDArray[np.uint64], share: NDArray[np.uint64]) -> None:
        heads = self.heads[: len(start)]
        full = heads >> (64 - PRECISION) >= share
        if full.any():
            self.push_words(heads[full] % MIN_HEAD)
            heads[full] >>= 32
        quotient, rest = np.divmod(heads, share)
        heads[:] = quotient * SLOTS + rest + start

    def _pop(self, start: NDArray[np.uint64], share: NDArray[np.uint64]) -> None:
        heads = self.heads[: len(start)]
        heads[:] = (heads >> PRECISION) * share + heads % SLOTS - start
        empty = heads < MIN_HEAD
        if empty.any():
            heads[empty] = heads[empty] * MIN_HEAD + self.pop_words(int(empty.sum()))
