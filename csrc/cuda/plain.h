// The sweep of what is most common, without a question asked of an element: bfloat16 throughout, aligned, at most three
// models, one setting, one of the methods that everybody uses. It gives the bits of `sweeping.h`, for about half the
// instructions: a card's memory brings elements faster than those could be counted, kept, voted on and divided.
//
// A tile in which anything is odd (a NaN, an Inf, what overflows, a sum too small to be divided here) is left to
// `sweeping.h`, which looks at it closely.
#pragma once
#include "drawn.h"
#include "lanes.h"

namespace fastmerge {
namespace {

constexpr int PLAIN_MODELS = 3;
constexpr int AHEAD = 2;  // tiles that are asked for before they are swept

// Of shared memory, for a block of so many threads: what was asked for and not yet used.
constexpr size_t plain_shared(int threads) {
  return sizeof(uint4) * AHEAD * (PLAIN_MODELS + 1) * static_cast<size_t>(threads);
}

// Where the shortened arithmetic below is that of IEEE: of weights that agree, of what divides, of lambda.
constexpr float TAME_LEAST = 0x1p-20f, TAME_MOST = 0x1p20f;
constexpr float LEAST_DIVIDEND = 0x1p-60f;

FASTMERGE_INLINE bool is_tame(float value) {
  return value >= TAME_LEAST && value <= TAME_MOST;
}

// The stages it is built for.
template <Keep keep, Elect elect, Mass by>
constexpr bool has_plain =
    elect == Elect::WEIGHTED
        ? keep == Keep::ABOVE || keep == Keep::BERNOULLI
        : elect == Elect::NONE &&
              (keep == Keep::ABOVE || (by == Mass::DIVISOR && (keep == Keep::ALL || keep == Keep::BERNOULLI)));

// What a thread knows of a tensor for a run of its tiles. Where there are fewer models, the others are zeros of weight
// -0: what they add changes no bit.
struct Plain {
  const uint4* models[PLAIN_MODELS];
  const uint4* base;
  uint4* target;
  const Part* parts;
  float limits[PLAIN_MODELS];      // ABOVE: what is smaller goes,
  float magnitudes[PLAIN_MODELS];  // by this cut
  float weights[PLAIN_MODELS];
  float masses[PLAIN_MODELS];
  int count;
  float divisor;
  float lambda;
};

// What a thread has counted of each model: above its cut's magnitude, and at least that. In float32, of which a card
// adds more at a time; a NaN is neither.
struct Sides {
  float above[PLAIN_MODELS], least[PLAIN_MODELS];
};

// Stays zero in each half until an Inf or a NaN has been seen in it.
__device__ __forceinline__ uint32_t watched(uint32_t seen, const uint4& words) {
#ifdef __CUDACC__
  const uint32_t zero = 0;
  asm("fma.rn.bf16x2 %0, %1, %5, %0; fma.rn.bf16x2 %0, %2, %5, %0;"
      "fma.rn.bf16x2 %0, %3, %5, %0; fma.rn.bf16x2 %0, %4, %5, %0;"
      : "+r"(seen)
      : "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(zero));
#else
  for (const uint32_t word : {words.x, words.y, words.z, words.w}) {
    seen |= ((word & 0x7fff7fff) + 0x00800080) & 0x80008000;
  }
#endif
  return seen;
}

__device__ __forceinline__ bool has_seen(uint32_t seen) {
#ifdef __CUDACC__
  return (seen & 0x7fff7fff) != 0;
#else
  return seen != 0;
#endif
}

// The whole tiles `tile` ... `until` - 1, each of `THREADS` times eight elements, or those up to the first that is odd:
// returns where it stopped. Every thread of a warp comes along. `sides`, where given, counts all of these tiles, and
// the one that is odd.
template <Keep keep, Elect elect, Mass by, bool has_base, int THREADS, bool counts = false>
__device__ __forceinline__ int64_t plain_tiles(const Plain& in, int64_t begin, int64_t tile, int64_t until,
                                               Sides* sides = nullptr) {
  const float inverse = reciprocal(in.divisor);
  const float masses[PLAIN_MODELS] = {in.masses[0], in.masses[1], in.masses[2]};
  constexpr int INPUTS = PLAIN_MODELS + 1, SLOTS = INPUTS * THREADS;
  int64_t eight = tile * THREADS + threadIdx.x;
  uint4* slot = reinterpret_cast<uint4*>(shared_memory()) + threadIdx.x;  // a thread sees no other's
  const auto ask = [&](int64_t of, int64_t at, uint4* to) {
    if (of < until) {
#pragma unroll
      for (int m = 0; m < PLAIN_MODELS; ++m) {
        if (m < in.count) copy16(to + m * THREADS, in.models[m] + at);
      }
      if (has_base) copy16(to + PLAIN_MODELS * THREADS, in.base + at);
    }
    close_copies();
  };
  for (int ahead = 0; ahead < AHEAD; ++ahead) {
    for (int m = in.count; m < PLAIN_MODELS; ++m) slot[ahead * SLOTS + m * THREADS] = {};
    ask(tile + ahead, eight + ahead * THREADS, slot + ahead * SLOTS);
  }
#pragma unroll 1
  for (int turn = 0; tile < until; ++tile, eight += THREADS, turn = turn + 1 < AHEAD ? turn + 1 : 0) {
    uint32_t kept = 0;  // of each model
    if constexpr (keep == Keep::BERNOULLI) {
#pragma unroll 1
      for (int m = 0; m < in.count; ++m) {
        kept |= drawn(in.parts[m].key, in.parts[m].cut, begin + eight * EIGHT) >> (KEPT_BITS * m);
      }
    }
    await_copies<AHEAD - 1>();
    uint4* here = slot + turn * SLOTS;
    uint32_t seen = 0;
    const auto take = [&](int input, float (&to)[EIGHT]) {
      const uint4 raw = here[input * THREADS];
      seen = watched(seen, raw);
      widen8({{raw, {}}}, DType::BF16, to);
    };
    float base[EIGHT] = {}, terms[PLAIN_MODELS][EIGHT];
    if (has_base) take(PLAIN_MODELS, base);
#pragma unroll
    for (int m = 0; m < PLAIN_MODELS; ++m) {
      take(m, terms[m]);
      for (int i = 0; i < EIGHT; ++i) {
        float delta = has_base ? terms[m][i] - base[i] : terms[m][i];
        if constexpr (counts) {
          if (fabsf(delta) > in.magnitudes[m]) sides->above[m] += 1.0f;
          if (fabsf(delta) >= in.magnitudes[m]) sides->least[m] += 1.0f;
        }
        if (keep == Keep::ABOVE) delta = fabsf(delta) < in.limits[m] ? 0.0f : delta;
        if (keep == Keep::BERNOULLI) delta = kept >> (kept_bit(i) - KEPT_BITS * m) & 1 ? delta : 0.0f;
        terms[m][i] = delta * in.weights[m];
      }
    }
    ask(tile + AHEAD, eight + AHEAD * THREADS, here);  // what was there is used up

    float sum[EIGHT], sign[EIGHT], mass[EIGHT], out[EIGHT];
    for (int i = 0; i < EIGHT; ++i) {
      sum[i] = terms[0][i] + terms[1][i] + terms[2][i];
      mass[i] = NOBODY;
      if constexpr (elect != Elect::NONE) {
        // The terms of the sign that is elected are summed as magnitudes, from a zero that is negative and stays so
        // where there are none: all that follows then leaves the base as it is.
        sign[i] = sum[i] >= 0.0f ? 1.0f : -1.0f;
        sum[i] = -0.0f;
      }
#pragma unroll
      for (int m = 0; m < PLAIN_MODELS; ++m) {
        const float term = elect == Elect::NONE ? terms[m][i] : terms[m][i] * sign[i];
        if (elect != Elect::NONE && term > 0.0f) sum[i] = sum[i] + term;
        if (by == Mass::AGREEING && term > 0.0f) mass[i] = mass[i] + masses[m];
        if (by == Mass::CONTRIBUTORS && term != 0.0f) mass[i] = mass[i] + masses[m];
      }
    }
    uint32_t least = INFINITE;  // of the magnitudes that are divided, as bits; the elected sums' zeros are larger
    if (by != Mass::DIVISOR || in.divisor != 1.0f) {
      for (int i = 0; i < EIGHT; ++i) {
        const uint32_t bits = elect == Elect::NONE ? (to_bits(sum[i]) & 0x7fffffff) - 1 : to_bits(sum[i]);
        least = bits < least ? bits : least;
        const float divisor = by == Mass::DIVISOR ? in.divisor : mass[i];
        sum[i] = quotient(sum[i], divisor, by == Mass::DIVISOR ? inverse : reciprocal(divisor));
      }
    }
    for (int i = 0; i < EIGHT; ++i) {
      const float merged = sum[i] * in.lambda;
      out[i] = elect == Elect::NONE ? combine<Lanes, has_base>(base[i], merged) : fused(sign[i], merged, base[i]);
    }
    const uint4 narrow = narrow8(out, DType::BF16).word[0];
    if (__any_sync(EVERY_LANE, has_seen(watched(seen, narrow)) || least < to_bits(LEAST_DIVIDEND))) break;
    __stcs(in.target + eight, narrow);
  }
  await_copies<0>();  // before the next run asks for its own
  return tile;
}

}  // namespace
}  // namespace fastmerge
