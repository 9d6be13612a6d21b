"""Asymmetric numeral systems (Duda 2009) for many symbols side by side: a stack of bits on which to push and pop.

A symbol's share of the 2^24 slots is a run of whole numbers, from c(symbol) to c(symbol + 1). To push it is to write it
in -log2 of its share bits; to pop from random bits is to draw it with that probability, and undoes the push exactly
(Townsend, Bird & Barber 2019). Each of the first n heads, a 64-bit number, takes one of n symbols; what a head cannot
hold goes, 32 bits at a time, to one stack that all heads share.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

PRECISION = 24  # bits of a probability
MIN_HEAD = 2**32  # a head is never below it, nor above 2^64: what a push moves to the stack, its pop moves back
SLOTS = 2**PRECISION

Floats = NDArray[np.float64]
# Symbols (m, n), whole numbers between 0 and the size of the alphabet -> their c, (m, n).
Cumulative = Callable[[Floats], Floats]


def quantize_cdf(below: Floats, symbols: Floats, size: int) -> Floats:
    """c(symbol) from the distribution function: two slots for each of `size` symbols, the others by probability.

    With one slot kept, a distribution function that falls by its last bit, as one with rounding errors may, could leave
    a symbol without any; with two, c increases all the same.
    """
    return np.floor(below * (SLOTS - 2 * size)) + 2 * symbols


def interval(cumulative: Cumulative, symbols: Floats, bits: int) -> tuple[Floats, Floats]:
    """The first slot of each symbol `(n,)`, and that after its last."""
    start, end = cumulative(np.stack((symbols, symbols + 1)))
    return np.where(symbols == 0, 0, start), np.where(symbols == 2**bits - 1, SLOTS, end)


class Stack:
    """`words` (uint32) below `heads` (uint64), as `content` gives them; from nothing, to compress.

    A stack to compress on that runs out of words takes pseudorandom ones: `borrowed` of them. They are the initial bits
    of bits-back coding, and lie at the bottom when everything is popped again.
    """

    def __init__(self, heads: NDArray[np.uint64] | None = None, words: NDArray[np.uint32] | None = None):
        self.writing = heads is None or words is None
        self.heads = np.zeros(0, np.uint64) if heads is None else heads.astype(np.uint64)
        self.words = np.zeros(1024, np.uint32) if words is None else words.astype(np.uint32)
        self.top = 0 if words is None else len(words)
        self.borrowed = 0
        self.random = np.random.PCG64(0)

    def content(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        return self.heads, self.words[: self.top]

    def push_words(self, words: NDArray[np.uint64]) -> None:
        if self.top + len(words) > len(self.words):
            self.words = np.concatenate((self.words, np.zeros(len(self.words) + len(words), np.uint32)))
        self.words[self.top : self.top + len(words)] = words
        self.top += len(words)

    def pop_words(self, count: int) -> NDArray[np.uint64]:
        missing = max(0, count - self.top)
        if missing and not self.writing:
            raise EOFError("more is popped than was pushed")
        first, self.top = self.top, self.top - (count - missing)
        words = self.words[self.top : first].astype(np.uint64)
        if not missing:
            return words
        self.borrowed += missing
        return np.concatenate((self.random.random_raw(missing) % MIN_HEAD, words))

    def grow(self, count: int) -> None:
        """To at least so many heads. A new one begins with one word of the stack, so that it costs nothing."""
        if (new := count - len(self.heads)) > 0:
            self.heads = np.concatenate((self.heads, self.pop_words(new) + np.uint64(MIN_HEAD)))

    def shrink(self, count: int) -> None:
        """Back to so many heads, from where `grow` started."""
        self.push_words(self.heads[count:] % MIN_HEAD)
        self.heads = self.heads[:count]

    def flip(self, mask: NDArray[np.uint64]) -> None:
        """Those of each head's 32 last bits that are set in its mask `(n,)`; done again, it is undone."""
        self.heads[: len(mask)] ^= mask

    def push(self, cumulative: Cumulative, symbols: Floats, bits: int) -> None:
        """Symbols `(n,)` of an alphabet of 2^`bits`."""
        start, end = interval(cumulative, symbols, bits)
        self._push(start.astype(np.uint64), (end - start).astype(np.uint64))

    def pop(self, cumulative: Cumulative, n: int, bits: int) -> Floats:
        """Symbols `(n,)` of an alphabet of 2^`bits`, found two bits at a time."""
        slot = (self.heads[:n] % SLOTS).astype(np.float64)
        symbols = np.zeros(n)
        step = 2**bits
        while step > 1:
            ways = 4 if step > 2 else 2
            step //= ways
            candidates = symbols + step * np.arange(1, ways)[:, None]
            symbols += step * np.count_nonzero(cumulative(candidates) <= slot, axis=0)
        start, end = interval(cumulative, symbols, bits)
        self._pop(start.astype(np.uint64), (end - start).astype(np.uint64))
        return symbols

    def push_uniform(self, symbols: Floats, bits: int) -> None:
        shift = PRECISION - bits
        self._push(symbols.astype(np.uint64) << np.uint64(shift), np.full(len(symbols), 1 << shift, np.uint64))

    def pop_uniform(self, n: int, bits: int) -> Floats:
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
