// What every kernel stands on: barriers and sums of a block and a grid, eight elements at a time.
//
// Kernels use CUDA only through what stands here and through its atomics and warp collectives with full masks, so that
// tests/cuda_emulator can run the same files without a card.
#pragma once
#include "../sweep.h"
#include "launch.h"

namespace fastmerge {

constexpr int WARP = 32;
constexpr unsigned EVERY_LANE = 0xffffffff;
constexpr int EIGHT = 8;  // the elements that a thread takes at once: 16 bytes of a 16-bit dtype, one Philox counter

namespace {

__device__ inline int64_t lesser(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// --- a block ---

// The block's dynamic shared memory, aligned to 16 bytes. What several functions of a kernel keep there, its launcher
// lays out.
__device__ __forceinline__ char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<char*>(dynamic_shared);
#else
  return emulated_shared_memory();
#endif
}

__device__ __forceinline__ void sync_block() {
  __syncthreads();
}

__device__ __forceinline__ bool any_in_block(bool mine) {
  return __syncthreads_or(mine) != 0;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(EVERY_LANE, value, lanes);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(EVERY_LANE, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

// --- a grid ---

// In device memory, zero before the launch; the launch is cooperative, so that every block is there to arrive.
struct Barrier {
  unsigned arrived;  // counts on and on: the n-th barrier is over at n times the blocks
};

// What any thread of the grid wrote before is seen by every thread after, save through the read-only cache.
__device__ inline void sync_grid(Barrier* barrier) {
  sync_block();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned end = (atomicAdd(&barrier->arrived, 1u) / gridDim.x + 1) * gridDim.x;
    const volatile unsigned* arrived = &barrier->arrived;
    while (*arrived < end) __nanosleep(32);
    __threadfence();
  }
  sync_block();
}

// --- copies that a thread does not wait for ---

// Sixteen bytes from device into shared memory, both aligned to as many, past the first cache. Copies belong to the
// next `close_copies`; after `await_copies<n>` all are there but those of the last n closed. A thread's own are its own
// alone: nobody else sees them without a barrier.
__device__ __forceinline__ void copy16(uint4* to, const uint4* from) {
#ifdef __CUDACC__
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
  emulated_copy(to, from);
#endif
}

__device__ __forceinline__ void close_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulated_close_copies();
#endif
}

template <int n>
__device__ __forceinline__ void await_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#else
  emulated_await_copies(n);
#endif
}

// --- eight elements ---

// Eight elements as they lie in memory: 16 bytes of a 16-bit dtype, or 32 bytes of float32.
struct Raw8 {
  uint4 word[2];
};

// Sixteen bytes past the first cache; `again`: another pass may find them in the second.
template <bool again>
__device__ __forceinline__ uint4 load16(const uint4* from) {
  return again ? __ldcg(from) : __ldcs(from);
}

// Elements at ... at + 7 of a view, zeros from `end` on; `at` is a multiple of 8. The view's dtype is not U8.
template <bool again = false>
__device__ __forceinline__ Raw8 raw8(const View& view, int64_t at, int64_t end) {
  Raw8 raw = {};
  const bool wide = dtype_of(view) == DType::F32;
  const char* from = bytes_of(view, at);
  if (at + EIGHT <= end && view.address % 16 == 0) {
    raw.word[0] = load16<again>(reinterpret_cast<const uint4*>(from));
    if (wide) raw.word[1] = load16<again>(reinterpret_cast<const uint4*>(from) + 1);
    return raw;
  }
  // Rolled up, as it is rare: a shift register keeps the words out of memory.
  uint4 &low = raw.word[0], &high = raw.word[1];
#pragma unroll 1
  for (int i = EIGHT - 1; i >= 0; --i) {
    const bool there = at + i < end;
    if (wide) {
      high = make_uint4(low.w, high.x, high.y, high.z);
      low = make_uint4(there ? reinterpret_cast<const uint32_t*>(from)[i] : 0, low.x, low.y, low.z);
    } else {
      const uint32_t element = there ? reinterpret_cast<const uint16_t*>(from)[i] : 0;
      low = make_uint4(low.x << 16 | element, low.y << 16 | low.x >> 16, low.z << 16 | low.y >> 16,
                       low.w << 16 | low.z >> 16);
    }
  }
  return raw;
}

// Writes elements at ... at + 7 of a view, none from `end` on.
__device__ __forceinline__ void store8(Raw8 raw, const View& view, int64_t at, int64_t end) {
  const bool wide = dtype_of(view) == DType::F32;
  char* to = const_cast<char*>(bytes_of(view, at));
  uint4 &low = raw.word[0], &high = raw.word[1];
  if (at + EIGHT <= end && view.address % 16 == 0) {
    __stcs(reinterpret_cast<uint4*>(to), low);
    if (wide) __stcs(reinterpret_cast<uint4*>(to) + 1, high);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < EIGHT && at + i < end; ++i) {
    if (wide) {
      reinterpret_cast<uint32_t*>(to)[i] = low.x;
      low = make_uint4(low.y, low.z, low.w, high.x);
      high = make_uint4(high.y, high.z, high.w, 0);
    } else {
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(low.x);
      low = make_uint4(low.x >> 16 | low.y << 16, low.y >> 16 | low.z << 16, low.z >> 16 | low.w << 16, low.w >> 16);
    }
  }
}

__device__ __forceinline__ float widened_f16(uint16_t half) {
#ifdef __CUDACC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return from_f16(half);
#endif
}

__device__ __forceinline__ void widen8(const Raw8& raw, DType dtype, float (&to)[EIGHT]) {
  const uint32_t words[8] = {raw.word[0].x, raw.word[0].y, raw.word[0].z, raw.word[0].w,
                             raw.word[1].x, raw.word[1].y, raw.word[1].z, raw.word[1].w};
  if (dtype == DType::F32) {
    for (int i = 0; i < EIGHT; ++i) to[i] = from_bits(words[i]);
  } else if (dtype == DType::BF16) {
    for (int i = 0; i < EIGHT; ++i) to[i] = from_bits(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
  } else {
    for (int i = 0; i < EIGHT; ++i) to[i] = widened_f16(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
  }
}

__device__ __forceinline__ void load8(const View& view, int64_t at, int64_t end, float (&to)[EIGHT]) {
  widen8(raw8(view, at, end), dtype_of(view), to);
}

}  // namespace
}  // namespace fastmerge
