// The ceiling of a sweep: the barest loop that reads the same inputs, in the same order, and writes the same output.
//
//     out = input_0 ^ input_1 ^ ...        one vector of 64 bytes at a time, so that no read can be left out
//
// Bytes per vector: 64 read per input, 64 written unless there is nowhere to write. Compiled by ceiling.py.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

enum Store : int { NONE = 0, PLAIN = 1, STREAMED = 2, TO_FILE = 3 };

constexpr int64_t VECTOR = 64;
constexpr int64_t TILE = 512 << 10;  // bytes of one input, as the merge has it
using Vector = uint64_t __attribute__((vector_size(VECTOR), may_alias));
using Loose = Vector __attribute__((aligned(1)));

std::atomic<uint64_t> seen{0};  // what was read goes here where nothing is written

void put(char* to, const Vector& value, [[maybe_unused]] bool streamed) {
#if defined(__AVX512F__)
  if (streamed) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(value));
#elif defined(__SSE2__)
  for (int i = 0; streamed && i < 4; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, reinterpret_cast<const __m128i*>(&value)[i]);
  }
  if (streamed) return;
#endif
  *reinterpret_cast<Loose*>(to) = value;
}

// `count` inputs are known to the compiler, so that its loop over them is unrolled; 0 where they are more.
template <int count, Store store>
void sweep(const char* const* inputs, int inputs_count, char* out, int64_t begin, int64_t end) {
  const int all = count ? count : inputs_count;
  Vector total = {};
  int64_t at = begin;
  for (; at + VECTOR <= end; at += VECTOR) {
    Vector value = *reinterpret_cast<const Loose*>(inputs[0] + at);
    for (int input = 1; input < all; ++input) value ^= *reinterpret_cast<const Loose*>(inputs[input] + at);
    if (store == NONE) {
      total ^= value;
    } else {
      put(out + (at - begin), value, store == STREAMED);
    }
  }
  for (; at < end; ++at) {
    char value = 0;
    for (int input = 0; input < all; ++input) value ^= inputs[input][at];
    if (store == NONE) total[0] ^= static_cast<uint64_t>(value);
    if (store != NONE) out[at - begin] = value;
  }
  if (store == NONE) seen ^= total[0] ^ total[1] ^ total[2] ^ total[3] ^ total[4] ^ total[5] ^ total[6] ^ total[7];
#ifdef __SSE2__
  if (store == STREAMED) _mm_sfence();
#endif
}

template <Store store>
void sweep(const char* const* inputs, int count, char* out, int64_t begin, int64_t end) {
  switch (count) {
    case 1: return sweep<1, store>(inputs, count, out, begin, end);
    case 2: return sweep<2, store>(inputs, count, out, begin, end);
    case 3: return sweep<3, store>(inputs, count, out, begin, end);
    case 4: return sweep<4, store>(inputs, count, out, begin, end);
    default: return sweep<0, store>(inputs, count, out, begin, end);
  }
}

}  // namespace

extern "C" {

struct Tensor {
  const char* const* inputs;  // one address per input
  int64_t count;              // of inputs
  int64_t bytes;              // of each input, and of the output
  int64_t place;              // of the output: an address, or an offset in the file
  int64_t file;
};

// Whether a vector can be written past the caches here.
int can_stream() {
#ifdef __SSE2__
  return 1;
#else
  return 0;
#endif
}

// Sweeps all tensors, tile by tile, on `threads` threads. Outputs that are STREAMED are aligned to 64 bytes. Returns 0,
// or 1 where a file could not be written.
int ceiling(const Tensor* tensors, int64_t count, int store, int threads) {
  struct Tile {
    const Tensor* tensor;
    int64_t begin, end;
  };
  std::vector<Tile> tiles;
  for (const Tensor* tensor = tensors; tensor < tensors + count; ++tensor) {
    for (int64_t begin = 0; begin < tensor->bytes; begin += TILE) {
      tiles.push_back({tensor, begin, std::min(begin + TILE, tensor->bytes)});
    }
  }
  std::atomic<size_t> next{0};
  std::atomic<int> failed{0};
  const auto work = [&] {
    char* hot = store == TO_FILE ? static_cast<char*>(std::aligned_alloc(VECTOR, TILE)) : nullptr;
    for (size_t number; (number = next++) < tiles.size();) {
      const auto& [tensor, begin, end] = tiles[number];
      const int inputs = static_cast<int>(tensor->count);
      char* out = reinterpret_cast<char*>(tensor->place) + begin;
      if (store == NONE) sweep<NONE>(tensor->inputs, inputs, out, begin, end);
      if (store == PLAIN) sweep<PLAIN>(tensor->inputs, inputs, out, begin, end);
      if (store == STREAMED) sweep<STREAMED>(tensor->inputs, inputs, out, begin, end);
      if (store != TO_FILE) continue;
      sweep<PLAIN>(tensor->inputs, inputs, hot, begin, end);
      const ssize_t written = pwrite(static_cast<int>(tensor->file), hot, end - begin, tensor->place + begin);
      if (written != end - begin) failed = 1;
    }
    std::free(hot);
  };
  std::vector<std::thread> crew;
  for (int i = 0; i < threads; ++i) crew.emplace_back(work);
  for (std::thread& worker : crew) worker.join();
  return failed;
}

}  // extern "C"
