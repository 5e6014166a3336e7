"""Random bits as a pure function of key and flat index: Philox4x32, seven rounds (Salmon et al., SC 2011)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pieces(key, start, stream: tl.constexpr, block: tl.constexpr):
    """16 random bits for each of block flat indices from `start`, a multiple of 8, as int32.

    Counter e // 8 gives four words, eight pieces, low half first; element e takes piece e % 8.
    """
    counter = (start >> 3) + tl.arange(0, block // 8)  # int64
    w0, w1, w2, w3 = philox(key, counter, stream)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [block / 8, 2, 2], in order w0 w1 w2 w3
    halves = tl.join(words & 0xFFFF, words >> 16)  # [block / 8, 2, 2, 2]
    return tl.reshape(halves, (block,)).to(tl.int32)


@triton.jit
def philox(key, counter, stream: tl.constexpr):
    """Four words of 32 bits per counter. The products are 64 bits wide: one instruction gives both of their halves."""
    x0, x1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    x2, x3 = tl.full(counter.shape, stream, tl.uint32), tl.zeros(counter.shape, tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        left, right = x0.to(tl.uint64) * 0xD2511F53, x2.to(tl.uint64) * 0xCD9E8D57
        x0, x1 = (right >> 32).to(tl.uint32) ^ x1 ^ k0, right.to(tl.uint32)
        x2, x3 = (left >> 32).to(tl.uint32) ^ x3 ^ k1, left.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return x0, x1, x2, x3
