// The deltas of some models over a grain of a tensor, eight elements at a time, while what comes next is on its way.
//
// Reads 2 or 4 bytes per element and input. Where the inputs are alike and aligned, all loads of a step are issued at
// once, and those of 16 bits a step ahead: with 16 warps on a processor and three models and a base that is 32 KB in
// flight. Nothing is asked of a single element there: what is not finite shows in the sums, which are then taken once
// more with a look at each.
#pragma once
#include "layout.h"

namespace fastmerge {
namespace {

constexpr int MEASURE_THREADS = 256;
constexpr int STEP = MEASURE_THREADS * EIGHT;  // elements that a block takes at once
constexpr int TOGETHER = 4;                    // models that are read at once, at most

// A part of a tensor that is added up on its own; `base` may be null.
struct Grain {
  const View* views;
  const View* base;
  int64_t elements;  // of the tensor
  int64_t from;
  int size;
};

// Which models a block reads at once.
struct Few {
  int model[TOGETHER];

  // Without an index that is not known beforehand, which would put the models into memory.
  __device__ __forceinline__ int at(int i) const {
    const int low = i & 1 ? model[1] : model[0], high = i & 1 ? model[3] : model[2];
    return i & 2 ? high : low;
  }
};

__device__ __forceinline__ float finite_or_zero(float delta) {
  return fabsf(delta) < from_bits(INFINITE) ? delta : 0.0f;
}

// Where the models' elements of a grain and at last the base's begin, 0 if there is none: in shared memory, and read
// anew for each row, as registers are scarcer than that.
struct Starts {
  volatile uint64_t of[TOGETHER + 1];
};

template <int count>
__device__ __forceinline__ void note(Starts& starts, const Grain& grain, const Few& few, int bytes) {
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i <= count; ++i) {
      const View* view = i < count ? grain.views + few.model[i] : grain.base;
      starts.of[i] = view ? view->address + static_cast<uint64_t>(grain.from * bytes) : 0;
    }
  }
  sync_block();
}

// Eight elements of each.
template <Layout layout, int count>
struct Row {
  Raw8 raw[count + 1];

  __device__ __forceinline__ void read(const Starts& starts, int offset) {
    const auto bytes = static_cast<uint32_t>(offset) * static_cast<uint32_t>(size_of(static_cast<DType>(layout)));
#pragma unroll
    for (int i = 0; i <= count; ++i) {
      const uint64_t start = starts.of[i];
      if (i < count || start) raw[i] = plain8<layout>(reinterpret_cast<const uint4*>(start + bytes));
    }
  }

  __device__ __forceinline__ void widen(float (&deltas)[count][EIGHT]) const {
    float base[EIGHT];
    widen8(raw[count], static_cast<DType>(layout), base);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      widen8(raw[i], static_cast<DType>(layout), deltas[i]);
#pragma unroll
      for (int e = 0; e < EIGHT; ++e) deltas[i][e] = deltas[i][e] - base[e];
    }
  }
};

// Gives `sums` every eight elements of this thread; with a look at each of them, or what comes next on its way.
template <bool looking, Layout layout, int count, class Sums>
__device__ __forceinline__ void take_rows(const Starts& starts, int size, Sums& sums) {
  constexpr int ahead = looking || layout == Layout::F32 ? 0 : count > 2 ? 1 : 2;
  constexpr int rows = ahead ? ahead : 1;
  const int first = static_cast<int>(threadIdx.x) * EIGHT;
  Row<layout, count> row[rows] = {};
#pragma unroll
  for (int i = 0; i < ahead; ++i) {
    if (first + i * STEP < size) row[i].read(starts, first + i * STEP);
  }
#pragma unroll 1
  for (int offset = first; offset < size; offset += rows * STEP) {
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const int here = offset + i * STEP, next = here + ahead * STEP;
      if (here >= size) break;
      sums.prepare(here);
      if (!ahead) row[i].read(starts, here);
      float deltas[count][EIGHT];
      row[i].widen(deltas);
      if (ahead && next < size) row[i].read(starts, next);
      if constexpr (looking) {
        for (auto& each : deltas) {
          for (float& delta : each) delta = finite_or_zero(delta);
        }
      }
      sums.take(deltas, here);
    }
  }
}

// The same for inputs of any kind; what lies past the end counts as 0, too.
template <int count, class Sums>
__device__ __forceinline__ void take_any(const Grain& grain, const Few& few, Sums& sums) {
#pragma unroll 1
  for (int offset = static_cast<int>(threadIdx.x) * EIGHT; offset < grain.size; offset += STEP) {
    sums.prepare(offset);
    float base[EIGHT] = {}, deltas[count][EIGHT];
    if (grain.base) load8(*grain.base, grain.from + offset, grain.elements, base);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      load8(grain.views[few.model[i]], grain.from + offset, grain.elements, deltas[i]);
#pragma unroll
      for (int e = 0; e < EIGHT; ++e) deltas[i][e] = finite_or_zero(deltas[i][e] - base[e]);
    }
    sums.take(deltas, offset);
  }
}

// Gives `sums` the deltas of a grain, those that are not finite as 0: for every eight of them prepare(offset), then
// take(deltas, offset), `offset` being that of the first in the grain. is_finite() says whether all that were taken
// are; clear() starts anew.
template <Layout layout, int count, class Sums>
__device__ __forceinline__ void take_deltas(const Grain& grain, const Few& few, Starts& starts, Sums& sums) {
  sums.clear();
  if constexpr (layout == Layout::ANY) {
    take_any<count>(grain, few, sums);
  } else {
    note<count>(starts, grain, few, static_cast<int>(size_of(static_cast<DType>(layout))));
    take_rows<false, layout, count>(starts, grain.size, sums);
    if (sums.is_finite()) return;
    sums.clear();
    take_rows<true, layout, count>(starts, grain.size, sums);
  }
}

}  // namespace
}  // namespace fastmerge
