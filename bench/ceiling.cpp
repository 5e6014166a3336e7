// The ceiling of a sweep: the barest loop that reads the same inputs, in the same order, and writes the same outputs.
//
//     out = input_0 ^ input_1 ^ ...        one vector of 64 bytes at a time, so that no read can be left out
//
// Bytes per vector: 64 read per input, 64 written per output, of which there may be none. Compiled by ceiling.py.
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

struct Output {
  int64_t place;  // an address, or an offset in the file
  int64_t file;
};

struct Tensor {
  const char* const* inputs;  // one address per input
  int64_t count;              // of inputs
  int64_t bytes;              // of each input, and of each output
  const Output* outputs;      // at least one
  int64_t outputs_count;
};

namespace {

enum Store : int { NONE = 0, PLAIN = 1, STREAMED = 2, TO_FILE = 3 };

constexpr int64_t VECTOR = 64;
constexpr int64_t TILE = 512 << 10;  // bytes of one input, as the merge has it
constexpr int64_t CHUNK = 4 << 10;   // of them, that several outputs take in turn from the first cache
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

void sweep(const Tensor& tensor, int store, char* out, int64_t begin, int64_t end) {
  const int count = static_cast<int>(tensor.count);
  if (store == NONE) sweep<NONE>(tensor.inputs, count, out, begin, end);
  if (store == PLAIN) sweep<PLAIN>(tensor.inputs, count, out, begin, end);
  if (store == STREAMED) sweep<STREAMED>(tensor.inputs, count, out, begin, end);
}

void sweep_to_memory(const Tensor& tensor, int store, int64_t begin, int64_t end) {
  const int64_t step = tensor.outputs_count > 1 ? CHUNK : TILE;
  for (int64_t at = begin; at < end; at += step) {
    for (const Output* output = tensor.outputs; output < tensor.outputs + tensor.outputs_count; ++output) {
      sweep(tensor, store, reinterpret_cast<char*>(output->place) + at, at, std::min(at + step, end));
    }
  }
#ifdef __SSE2__
  if (store == STREAMED) _mm_sfence();
#endif
}

// False where it could not be written.
bool sweep_to_files(const Tensor& tensor, char* hot, int64_t begin, int64_t end) {
  sweep(tensor, PLAIN, hot, begin, end);
  return std::all_of(tensor.outputs, tensor.outputs + tensor.outputs_count, [&](const Output& output) {
    return pwrite(static_cast<int>(output.file), hot, end - begin, output.place + begin) == end - begin;
  });
}

}  // namespace

extern "C" {

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
      if (store != TO_FILE) {
        sweep_to_memory(*tensor, store, begin, end);
      } else if (!sweep_to_files(*tensor, hot, begin, end)) {
        failed = 1;
      }
    }
    std::free(hot);
  };
  std::vector<std::thread> crew;
  for (int i = 0; i < threads; ++i) crew.emplace_back(work);
  for (std::thread& worker : crew) worker.join();
  return failed;
}

}  // extern "C"
