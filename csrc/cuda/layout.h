// How the inputs of a tensor lie in memory, decided once, so that the loop over them asks nothing at each access.
#pragma once
#include "device.h"

namespace fastmerge {
namespace {

// All inputs of one dtype, aligned, and their elements a multiple of eight; or a closer look at each access.
enum class Layout { F32 = 0, F16 = 1, BF16 = 2, ANY = 3 };

FASTMERGE_INLINE Layout layout_of(const View* views, int inputs, int64_t elements) {
  bool plain = elements % EIGHT == 0;
  for (int input = 0; input < inputs; ++input) {
    plain &= views[input].dtype == views[0].dtype && views[input].address % 16 == 0;
  }
  return plain ? static_cast<Layout>(views[0].dtype) : Layout::ANY;
}

// Eight elements at a place that holds as many in the layout, which is not ANY.
template <Layout layout, bool again = false>
__device__ __forceinline__ Raw8 plain8(const uint4* from) {
  Raw8 raw = {};
  raw.word[0] = load16<again>(from);
  if constexpr (layout == Layout::F32) raw.word[1] = load16<again>(from + 1);
  return raw;
}

template <Layout layout>
__device__ __forceinline__ Raw8 read8(const View& view, int64_t at, int64_t end) {
  if constexpr (layout == Layout::ANY) {
    return raw8<true>(view, at, end);
  } else {
    return plain8<layout, true>(reinterpret_cast<const uint4*>(view.address) +
                                (layout == Layout::F32 ? at / 4 : at / 8));
  }
}

}  // namespace
}  // namespace fastmerge
