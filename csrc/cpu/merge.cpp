// The op `merge`: tiles of tensors through the sweep into a hot buffer, and from there to memory or to their place in a
// file.
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <system_error>

#include "tiles.h"

namespace fastmerge {
namespace {

// Elements per tile: half a megabyte of bf16 output, which stays in the second cache until it is written. Of each of
// several outputs half of that, as smaller writes cost more than the second cache saves, and of all at most HOT bytes.
constexpr int64_t TILE = 128 * CHUNK;
constexpr int64_t HOT = 4 << 20;
// A small tensor has so many tiles for each thread, of at least so many elements, so that none has long to wait.
constexpr int64_t TILES_EACH = 8, LEAST_TILE = 8 * CHUNK;
// Outputs in memory that are larger than this together go past the caches, which need not read what is overwritten.
constexpr int64_t PAST_CACHES = 1 << 20;

// Settings that are swept together at most.
constexpr int TOGETHER = 16;

void write_all(const Target& target, int64_t at_byte, const char* from, int64_t bytes) {
  for (int64_t written = 0; written < bytes;) {
    const ssize_t now =
        pwrite(target.file, from + written, static_cast<size_t>(bytes - written), target.offset + at_byte + written);
    if (now < 0 && errno == EINTR) continue;
    if (now < 0 && errno == EFAULT) throw InputCut();  // bytes copied straight from a mapped input
    if (now <= 0) throw std::system_error(now < 0 ? errno : ENOSPC, std::generic_category());
    written += now;
  }
}

float element(const View& view, int64_t at) {
  const char* from = bytes_of(view, at);
  if (dtype_of(view) == DType::F32) {
    float value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  uint16_t half;
  memcpy(&half, from, sizeof half);
  return dtype_of(view) == DType::F16 ? from_f16(half) : from_bf16(half);
}

bool finite(float value) {
  return (to_bits(value) & INFINITE) != INFINITE;
}

// The smallest magnitude that rounds to Inf.
uint32_t overflow_bits(DType dtype) {
  return dtype == DType::F16 ? to_bits(65520.0f) : dtype == DType::BF16 ? 0x7f7f8000 : INFINITE;
}

// What is rare is looked for again, slowly, in the one chunk where the sweep saw that something is there.
void look(const Merge& merge, int setting, bool inputs_too, int64_t begin, int count, const float* out) {
  static std::mutex mutex;  // never held while an input is read: a cut file would leave it locked
  for (int input = 0; inputs_too && input < merge.tensor.inputs; ++input) {
    int64_t nonfinite = 0, first = -1;
    for (int64_t at = begin; at < begin + count; ++at) {
      if (finite(element(merge.tensor.views[input], at))) continue;
      if (nonfinite++ == 0) first = merge.tensor.begin + at;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    merge.nonfinite[input] += nonfinite;
    if (nonfinite && (merge.first[input] < 0 || first < merge.first[input])) merge.first[input] = first;
  }
  const uint32_t limit = overflow_bits(static_cast<DType>(merge.targets[setting].dtype));
  int64_t overflow = 0;
  for (int at = 0; at < count; ++at) {
    const uint32_t magnitude = to_bits(out[at]) & 0x7fffffff;
    overflow += magnitude >= limit && magnitude < INFINITE;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  merge.overflow[setting] += overflow;
}

// Narrows like the kernels, and writes every NaN as the same one, which costs too much where there is none.
void store(const float* from, int count, DType dtype, char* to) {
  for (int i = 0; i < count; ++i, to += size_of(dtype)) {
    const float value = from[i] == from[i] ? from[i] : from_bits(0x7fc00000);
    const uint16_t half = dtype == DType::F16 ? to_f16(value) : to_bf16(value);
    memcpy(to, dtype == DType::F32 ? static_cast<const void*>(&value) : &half, static_cast<size_t>(size_of(dtype)));
  }
}

// Bytes of an element of the widest output.
int64_t widest(const Merge& merge) {
  int64_t size = 1;
  for (int setting = 0; setting < merge.settings; ++setting) {
    size = std::max<int64_t>(size, size_of(static_cast<DType>(merge.targets[setting].dtype)));
  }
  return size;
}

// How many settings, from one on, differ in lambda alone: their means are the same.
int alike(const Merge& merge, int setting) {
  const size_t parts = static_cast<size_t>(merge.tensor.models) * sizeof(Part);
  const auto same = [&](int other) {
    Sweep sweep = merge.sweeps[other];
    sweep.lambda = merge.sweeps[setting].lambda;
    return merge.targets[other].dtype == merge.targets[setting].dtype &&
           memcmp(&sweep, merge.sweeps + setting, sizeof sweep) == 0 &&
           memcmp(merge.parts + other * merge.tensor.models, merge.parts + setting * merge.tensor.models, parts) == 0;
  };
  int count = 1;
  while (count < TOGETHER && setting + count < merge.settings && same(setting + count)) ++count;
  return count;
}

// A part of a setting's output, which begins so many bytes from its start, goes where it belongs.
void put(const Merge& merge, int setting, int64_t at_byte, const char* from, int64_t bytes, Hash hash) {
  const Target& target = merge.targets[setting];
  if (target.file < 0) {
    memcpy(reinterpret_cast<char*>(target.offset + at_byte), from, static_cast<size_t>(bytes));
    return;
  }
  if (hash) merge.hashes[setting].note(hash, at_byte, from, bytes);
  write_all(target, at_byte, from, bytes);
}

int64_t sweep_tile(const Tile& tile, const Crew& crew, bool past_caches, char* block) {
  const Merge& merge = *tile.merge;
  const Tensor& tensor = merge.tensor;
  if (dtype_of(tensor.views[0]) == DType::U8) {
    for (int setting = 0; setting < merge.settings; ++setting) {
      put(merge, setting, tile.begin, bytes_of(tensor.views[0], tile.begin), tile.end - tile.begin, crew.hash);
    }
    return tile.end - tile.begin;
  }
  Scratch scratch(block, tensor.inputs);
  char* hot = block + Scratch::bytes(tensor.inputs);  // the tile of one output after another
  const int64_t stride = (tile.end - tile.begin) * widest(merge);
  for (int64_t at = tile.begin; at < tile.end; at += CHUNK) {
    const int count = static_cast<int>(std::min<int64_t>(CHUNK, tile.end - at));
    bool looked = false;
    uint16_t* counts = tile.counts ? tile.counts->each.data() + at / CHUNK * tensor.models * 2 : nullptr;
    for (int setting = 0, next; setting < merge.settings; setting = next) {
      Output outputs[TOGETHER];
      next = setting + alike(merge, setting);
      for (int each = setting; each < next; ++each) {
        const Target& target = merge.targets[each];
        const int64_t size = size_of(static_cast<DType>(target.dtype));
        char* in_memory = reinterpret_cast<char*>(target.offset) + at * size;
        char* out = target.file < 0 ? in_memory : hot + each * stride + (at - tile.begin) * size;
        const bool past = past_caches && target.file < 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
        outputs[each - setting] = {merge.sweeps[each].lambda, out, past};
      }
      const auto sweep = [&](DType to, const Output* places, int settings) {
        return crew.kernels->merge(tensor, merge.sweeps[setting], merge.parts + setting * tensor.models, at, count, to,
                                   places, settings, setting > 0, setting == 0 ? counts : nullptr, scratch);
      };
      const auto dtype = static_cast<DType>(merge.targets[setting].dtype);
      if (sweep(dtype, outputs, next - setting) < overflow_bits(dtype)) continue;
      if (tile.counts) {
        tile.counts->odd = true;
        continue;
      }
      for (int each = setting; each < next; ++each) {
        const Output wide = {outputs[each - setting].lambda, reinterpret_cast<char*>(scratch.out), false};
        sweep(DType::F32, &wide, 1);
        look(merge, each, !looked, at, count, scratch.out);
        store(scratch.out, count, dtype, outputs[each - setting].to);
        looked = true;
      }
    }
  }
  for (int setting = 0; setting < merge.settings; ++setting) {
    if (merge.targets[setting].file < 0) continue;
    const int64_t size = size_of(static_cast<DType>(merge.targets[setting].dtype));
    put(merge, setting, tile.begin * size, hot + setting * stride, (tile.end - tile.begin) * size, crew.hash);
  }
#ifdef __SSE2__
  if (past_caches) _mm_sfence();
#endif
  return bytes_read(tensor, tile.end - tile.begin);
}

}  // namespace

int64_t grain(const Merge& merge, const Crew& crew) {
  int64_t elements = CHUNK;
  for (int setting = 0; crew.hash && setting < merge.settings; ++setting) {
    elements = std::max(elements, PIECE / size_of(static_cast<DType>(merge.targets[setting].dtype)));
  }
  return elements;
}

void cover(const Merge& merge, int64_t begin, int64_t end, const Crew& crew, Counts* counts, std::vector<Tile>& tiles) {
  if (merge.settings == 0) return;
  const int64_t even = std::max(merge.tensor.elements / (TILES_EACH * std::max(crew.threads, 1)), LEAST_TILE);
  const int64_t hot = std::min(merge.settings > 1 ? TILE / 2 : TILE, HOT / (merge.settings * widest(merge)));
  const int64_t wanted = crew.tile > 0 ? crew.tile : std::min(even, hot), step = grain(merge, crew);
  const int64_t length = std::max<int64_t>((wanted + step - 1) / step, 1) * step;
  for (; begin < end; begin += length) tiles.push_back({&merge, begin, std::min(begin + length, end), counts});
}

void sweep(const std::vector<Tile>& tiles, const Crew& crew) {
  size_t scratch_bytes = 0;
  int64_t in_memory = 0;
  for (const Tile& tile : tiles) {
    const Merge& merge = *tile.merge;
    const int64_t elements = tile.end - tile.begin;
    bool files = false;
    for (int setting = 0; setting < merge.settings; ++setting) {
      const Target& target = merge.targets[setting];
      files |= target.file >= 0;
      if (target.file < 0) in_memory += elements * size_of(static_cast<DType>(target.dtype));
    }
    const size_t hot = files ? static_cast<size_t>(elements * widest(merge) * merge.settings) : 0;
    scratch_bytes = std::max(scratch_bytes, Scratch::bytes(merge.tensor.inputs) + hot + 64);
  }
  const bool past_caches = in_memory > PAST_CACHES;
  parallel(static_cast<int64_t>(tiles.size()), crew.threads, scratch_bytes, crew.tick, [&](int64_t item, char* block) {
    return sweep_tile(tiles[static_cast<size_t>(item)], crew, past_caches, block);
  });
}

void merge(const std::vector<Merge>& merges, const Crew& crew) {
  std::vector<Tile> tiles;
  for (const Merge& merge : merges) cover(merge, 0, merge.tensor.elements, crew, nullptr, tiles);
  sweep(tiles, crew);
}

}  // namespace fastmerge
