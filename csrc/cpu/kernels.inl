// The loops over a chunk, written once in Lanes and compiled for each instruction set by its isa_*.cpp.
#include <cstring>
#include <utility>

#include "kernels.h"
#include "simd.h"

namespace fastmerge {
namespace {

using L = Lanes;
using F = L::F;
using U = L::U;
using D = L::D;
using M = L::M;
using P = L::P;

// Lines are asked for so many bytes before they are read, a page: that is where the processor's own guesses end.
constexpr int AHEAD = 4096;

int padded(int count) {
  return (count + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
}

// --- widening: elements to float32, the last vector padded with zeros ---

template <DType dtype, class Put>
void each_vector(const char* from, int count, const Put& put) {
  constexpr int size = dtype == DType::F32 ? 4 : 2;
  int at = 0;
  for (; at + L::width <= count; at += L::width) put(at, L::read<dtype>(from + at * size));
  char rest[SUM_LANES * 4] = {};
  memcpy(rest, from + at * size, static_cast<size_t>(count - at) * size);
  for (int end = padded(count), start = at; at < end; at += L::width)
    put(at, L::read<dtype>(rest + (at - start) * size));
}

template <class Put>
void each_vector(const View& view, int64_t begin, int count, const Put& put) {
  const char* from = bytes_of(view, begin);
  switch (dtype_of(view)) {
    case DType::F32: return each_vector<DType::F32>(from, count, put);
    case DType::F16: return each_vector<DType::F16>(from, count, put);
    case DType::BF16: return each_vector<DType::BF16>(from, count, put);
    case DType::U8: return;
  }
}

void widen(const View& view, int64_t begin, int count, float* to) {
  each_vector(view, begin, count, [to](int at, F value) { L::store(to + at, value); });
}

void deltas(const Tensor& tensor, int64_t begin, int count, bool infinite_too, Scratch& scratch) {
  const View* base = base_of(tensor);
  float* origin = scratch.wide + tensor.models * CHUNK;
  if (base) widen(*base, begin, count, origin);
  const U largest = L::word(infinite_too ? INFINITE : INFINITE - 1);
  for (int model = 0; model < tensor.models; ++model) {
    float* to = scratch.wide + model * CHUNK;
    each_vector(tensor.views[model], begin, count, [=](int at, F value) {
      const F delta = base ? value - L::load(origin + at) : value;
      L::store(to + at, L::where(L::at_least(largest, L::magnitude(delta)), delta));
    });
  }
}

// --- what stays of a delta ---

uint32_t count_of(M mask) {
  return static_cast<uint32_t>(__builtin_popcount(L::bits(mask)));
}

uint32_t largest_of(U magnitudes) {
  uint32_t lanes[L::width], largest = 0;
  L::store(lanes, magnitudes);
  for (const uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// What is at least its threshold and below its top, or a NaN; 0 elsewhere.
F in_band(F delta, const uint32_t* thresholds, const float* tops) {
  const F below = L::where(L::not_ge(L::absolute(delta), L::load(tops)), delta);
  return L::where(L::at_least(L::magnitude(delta), L::load(thresholds)), below);
}

F clipped(F delta, const Part& part) {
  return L::clip(delta, L::set(-part.magnitude), L::set(part.magnitude));
}

// Points at the chunk where it lies, if it may; or at widened copies, as where dtypes differ or a line would end past
// the tensor. Returns whether it lies in place.
bool point(const Tensor& tensor, int64_t begin, int count, bool may_lie, Scratch& scratch) {
  bool in_place = may_lie && count % LINE == 0;
  for (int input = 1; input < tensor.inputs; ++input) in_place &= tensor.views[input].dtype == tensor.views[0].dtype;
  for (int input = 0; input < tensor.inputs; ++input) {
    float* copy = scratch.wide + input * CHUNK;
    if (!in_place) widen(tensor.views[input], begin, count, copy);
    scratch.inputs[input] = in_place ? bytes_of(tensor.views[input], begin) : reinterpret_cast<const char*>(copy);
  }
  return in_place;
}

// A few counters abreast, or each would wait for its own products.
constexpr int ABREAST = 4;

void draw(const Part& part, int64_t begin, int count, uint8_t* kept) {
  if (part.cut >> 32) {
    memset(kept, 0xff, CHUNK / 8);
    return;
  }
  const uint32_t upper = static_cast<uint32_t>(part.cut >> 16);
  constexpr int step = ABREAST * L::draws_at_once;
  const P m0 = L::wide(PHILOX_M0), m1 = L::wide(PHILOX_M1);
  P keys[PHILOX_ROUNDS][2];
  for (uint32_t round = 0; round < PHILOX_ROUNDS; ++round) {
    keys[round][0] = L::wide(static_cast<uint32_t>(part.key) + round * PHILOX_W0);
    keys[round][1] = L::wide(static_cast<uint32_t>(part.key >> 32) + round * PHILOX_W1);
  }
  for (int at = 0; at < count; at += step) {
    const uint64_t counter = static_cast<uint64_t>(begin + at) / 8;
    P words[ABREAST][4];
    for (int i = 0; i < ABREAST; ++i) {
      words[i][0] = L::counters(static_cast<uint32_t>(counter) + static_cast<uint32_t>(i) * L::draws_at_once / 8);
      words[i][1] = L::wide(static_cast<uint32_t>(counter >> 32));
      words[i][2] = words[i][3] = L::wide(0);
    }
    for (const auto& key : keys) {  // only the lower halves of the lanes count; what is above them is never looked at
      for (P(&x)[4] : words) {
        const P p0 = L::product(x[0], m0), p1 = L::product(x[2], m1);
        x[0] = L::exclusive_or(L::upper(p1), x[1], key[0]);
        x[1] = p1;
        x[2] = L::exclusive_or(L::upper(p0), x[3], key[1]);
        x[3] = p0;
      }
    }
    bool equal = false;
    for (int i = 0; i < ABREAST; ++i) equal |= L::draws(words[i], upper, kept + (at + i * L::draws_at_once) / 8);
    for (int element = at; equal && element < at + step; ++element) {
      if (!equals_upper(begin + element, part.key, upper)) continue;
      const int bit = kept_on_equal(begin + element, part.key, part.cut);
      kept[element / 8] = static_cast<uint8_t>(kept[element / 8] | bit << (element % 8));
    }
  }
}

// Calls `run(from, to)` over the chunk in pieces within which each model's threshold is the same in every line: equals
// are kept below ties_end, so T before it, T + 1 after it, and a mixture in the line where it falls. So it is with the
// tops of a band.
template <DType dtype, class Each>
void each_threshold(const Part* parts, int models, bool band, int64_t begin, int count, const Scratch& scratch,
                    const Each& run) {
  constexpr int vectors = L::vectors<dtype>, line = vectors * L::width;
  const int end = padded(count);
  for (int at = 0, until; at < end; at = until) {
    until = end;
    const auto set = [&](float magnitude, int64_t ties_end, auto* thresholds) {
      const int64_t ties = ties_end - begin - at;  // equals among elements below this are above
      for (int v = 0; v < vectors; ++v) {
        for (int lane = 0; lane < L::width; ++lane) {
          const uint32_t least = to_bits(magnitude) + (L::element<dtype>(v, lane) >= ties);
          memcpy(thresholds + v * L::width + lane, &least, sizeof least);
        }
      }
      if (ties > 0 && ties < end - at) {
        const int next = at + (ties < line ? line : static_cast<int>(ties) / line * line);
        until = next < until ? next : until;
      }
    };
    for (int model = 0; model < models; ++model) {
      const Part& part = parts[model];
      set(part.magnitude, part.ties_end, scratch.thresholds + model * LINE);
      if (band) set(part.top_magnitude, part.top_ties_end, scratch.tops + model * LINE);
    }
    run(at, until);
  }
}

template <class Each>
void each_threshold(DType dtype, const Part* parts, int models, bool band, int64_t begin, int count,
                    const Scratch& scratch, const Each& run) {
  switch (dtype) {
    case DType::F32: return each_threshold<DType::F32>(parts, models, band, begin, count, scratch, run);
    case DType::F16: return each_threshold<DType::F16>(parts, models, band, begin, count, scratch, run);
    case DType::BF16: return each_threshold<DType::BF16>(parts, models, band, begin, count, scratch, run);
    case DType::U8: return;
  }
}

#include "lowrank.inl"
#include "measures.inl"
#include "sweeps.inl"

}  // namespace

extern const Kernels FASTMERGE_KERNELS;
const Kernels FASTMERGE_KERNELS = {L::name, merge, deltas, gram, norms, census, tally, kth, lowrank};

}  // namespace fastmerge
