// The op `merge`: one launch per combination of stages, whatever the number of tensors. See sweeping.h for the bytes.
//
// The grid is as large as the card holds at once. Each block takes a contiguous range of the tiles of all tensors: it
// looks its first tensor up once and walks on from there.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "batch.h"
#include "desk.h"

namespace fastmerge {
namespace {

constexpr int THREADS = 128;
constexpr int64_t TILE = THREADS * EIGHT;
constexpr size_t INLINE_BYTES = 3968;

// The table is in device memory, or in the parameters themselves, which needs no copy.
struct SweepParams {
  const char* table;
  int64_t items;  // their place
  int64_t count;
  int64_t tiles;
  const Cut* cuts;  // of the one tensor, or none
  alignas(16) char inlined[INLINE_BYTES];
};

// The last of the items whose first tile is not beyond this one.
__device__ inline int64_t item_of(const Item* items, int64_t count, int64_t tile) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (items[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

template <Keep keep, Elect elect, Mass by>
__global__ void __launch_bounds__(THREADS, (Sweeping<keep, elect, by>::blocks))
    sweep_kernel(const __grid_constant__ SweepParams params) {
  const char* table = params.table ? params.table : params.inlined;
  const Item* items = at_place<const Item>(table, params.items);
  int64_t tile = params.tiles * blockIdx.x / gridDim.x;
  const int64_t end = params.tiles * (blockIdx.x + int64_t{1}) / gridDim.x;
  for (int64_t i = item_of(items, params.count, tile); tile < end; ++i) {
    const int64_t next = i + 1 < params.count ? items[i + 1].first_tile : params.tiles;
    const int64_t until = next < end ? next : end;
    sweep_tiles<keep, elect, by, THREADS>(table, items[i], params.cuts, tile - items[i].first_tile,
                                          until - items[i].first_tile);
    tile = until;
  }
}

using SweepKernel = void (*)(SweepParams);

template <size_t... stages>
constexpr std::array<SweepKernel, sizeof...(stages)> kernels_of(std::index_sequence<stages...>) {
  return {sweep_kernel<keep_of(stages), elect_of(stages), mass_of(stages)>...};
}

void launch_sweep(size_t stages, const SweepParams& params, cudaStream_t stream) {
  static const auto kernels = kernels_of(std::make_index_sequence<KEEPS * VOTES>());
  constexpr size_t shared = plain_shared(THREADS);
  const int64_t resident = resident_blocks(kernels[stages], THREADS, shared);
  launch(kernels[stages], static_cast<int>(std::min(params.tiles, resident)), THREADS, shared, stream, params);
}

template <class Append>
SweepParams params_of(Gathered& gathered, const Append& append) {
  SweepParams params = {};
  params.items = gathered.put(append);
  params.count = static_cast<int64_t>(gathered.items.size());
  params.tiles = gathered.tiles;
  return params;
}

}  // namespace

void merge(const std::vector<Merge>& merges, cudaStream_t stream) {
  std::map<size_t, Gathered> launches;
  Counts counts;
  for (const Merge& merge : merges) {
    if (merge.tensor.elements == 0) continue;
    counts.add(merge);
    for (const auto& [stages, settings] : settings_by_stages(merge)) {
      Gathered& gathered = launches[stages];
      gathered.add(merge, settings, TILE);
      counts.tell(gathered.items.back(), settings);
    }
  }
  if (launches.empty()) return;

  Desk desk(stream);
  desk.put(counts.values);
  std::vector<std::pair<size_t, SweepParams>> ready;
  for (auto& [stages, gathered] : launches) {
    ready.emplace_back(stages, params_of(gathered, [&desk](const auto& table) { return desk.put(table); }));
  }
  desk.send();
  for (auto& [stages, params] : ready) {
    params.table = desk.on_device<char>(0);
    launch_sweep(stages, params, stream);
  }
  counts.collect(desk.fetch<Count>(0, counts.values.size()));
}

size_t tables_bytes(const Most& most) {
  const auto tensors = static_cast<size_t>(most.tensors), settings = static_cast<size_t>(most.settings);
  const auto models = static_cast<size_t>(most.models), ranks = static_cast<size_t>(most.ranks), inputs = models + 1;
  const size_t places = 256;  // what `measure.cu` and `select.cu` note of a tensor or a group
  const size_t setting = sizeof(Item) + sizeof(Sweep) + sizeof(Target) + sizeof(Count) + models * sizeof(Part) +
                         models * 6 * sizeof(double) + inputs * sizeof(View) + places +
                         (ranks + 1) * (sizeof(View) + sizeof(int64_t) + sizeof(Cut));
  const size_t tensor =
      inputs * (sizeof(View) + 2 * sizeof(Count)) + models * models * sizeof(double) + models * sizeof(Part) + places;
  return tensors * (tensor + settings * setting) + 1024;  // each table begins at a multiple of 16
}

void merge_async(const Merge& merge, const Cut* cuts, cudaStream_t stream) {
  if (merge.tensor.elements == 0) return;
  for (const auto& [stages, settings] : settings_by_stages(merge)) {
    Gathered gathered;
    gathered.add(merge, settings, TILE);
    std::array<char, INLINE_BYTES> table;
    size_t used = 0;
    SweepParams params = params_of(gathered, [&](const auto& from) {
      const size_t place = (used + 15) / 16 * 16, bytes = from.size() * sizeof(from[0]);
      if (place + bytes > table.size()) {
        throw std::invalid_argument("a merge without a wait takes fewer models and settings; take the op that waits");
      }
      memcpy(table.data() + place, from.data(), bytes);
      used = place + bytes;
      return place;
    });
    memcpy(params.inlined, table.data(), used);
    params.cuts = cuts;
    launch_sweep(stages, params, stream);
  }
}

}  // namespace fastmerge
