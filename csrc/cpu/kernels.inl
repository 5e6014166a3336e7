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

#include "sweeps.inl"

#include "measures.inl"  // uses what the sweeps have

#include "lowrank.inl"

}  // namespace

extern const Kernels FASTMERGE_KERNELS;
const Kernels FASTMERGE_KERNELS = {L::name, merge, deltas, gram, norms, census, tally, kth, lowrank};

}  // namespace fastmerge
