// The op `merge_ranked`: selects each tensor's cuts and sweeps with them, all tensors in one cooperative launch.
//
// Large tensors are the work of the whole grid, one after another; of the others each block takes one at a time, and
// finds much of it in the cache when it sweeps. Bytes read per element: those of `select`, then those of the sweep.
// Only for the vote by weighted deltas, which is the paper's: each kernel holds the whole selection, and those of all
// ten votes took longer to compile than everything else. The other votes are two launches.
#include <algorithm>

#include "batch.h"
#include "desk.h"
#include "select.h"

namespace fastmerge {
namespace {

constexpr size_t SHARED = SELECT_SHARED + 16;  // and the number of the tensor that a block has taken
constexpr int64_t SWEPT = SELECT_THREADS * EIGHT;

struct RankedParams {
  const char* table;
  const Item* items;      // the large ones first
  const int64_t* firsts;  // of each item's ranks
  const int64_t* ranks;
  Cut* cuts;
  int large, count;
  Barrier* barrier;
  int* taken;
  Room together, alone;
  char* workspace;  // the grid's, then each block's
};

// Nothing is kept in registers from before the selection, or the loop would spill.
template <Mass by>
__device__ __forceinline__ void sweep_share(const RankedParams& params, int number, const Team& team) {
  asm volatile("" : "+r"(number) : : "memory");
  const Item& item = params.items[number];
  const int64_t tiles = (item.elements + SWEPT - 1) / SWEPT;
  sweep_tiles<Keep::ABOVE, Elect::WEIGHTED, by>(params.table, item, params.cuts + params.firsts[number],
                                                tiles * team.rank / team.size, tiles * (team.rank + 1) / team.size);
}

template <Mass by>
__global__ void __launch_bounds__(SELECT_THREADS, 2) ranked_kernel(const __grid_constant__ RankedParams params) {
  char* shared = shared_memory();
  auto* next = reinterpret_cast<int*>(shared + SELECT_SHARED);
  const Team grid = {params.barrier, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x)};
  char* own = params.workspace + params.together.bytes() + blockIdx.x * params.alone.bytes();
  for (int number = 0;; ++number) {
    const bool large = number < params.large;
    if (!large) {
      if (threadIdx.x == 0) *next = params.large + atomicAdd(params.taken, 1);
      sync_block();
      number = *next;
      if (number >= params.count) return;
    }
    const Team team = large ? grid : Team{nullptr, 1, 0};
    const Item& item = params.items[number];
    const int64_t first = params.firsts[number];
    const Selection in = {at_place<const View>(params.table, item.views),
                          &item.elements,
                          1,
                          item.models,
                          item.inputs,
                          item.elements,
                          params.ranks + first,
                          params.cuts + first};
    select(team, in, large ? params.together : params.alone, large ? params.workspace : own, shared);
    sweep_share<by>(params, number, team);
  }
}

using RankedKernel = void (*)(RankedParams);

RankedKernel kernel_of(Mass by) {
  return by == Mass::DIVISOR    ? ranked_kernel<Mass::DIVISOR>
         : by == Mass::AGREEING ? ranked_kernel<Mass::AGREEING>
                                : ranked_kernel<Mass::CONTRIBUTORS>;
}

// Each op on its own.
void merge_apart(std::vector<Merge> merges, const std::vector<const int64_t*>& ranks, const std::vector<Cut*>& cuts,
                 cudaStream_t stream) {
  std::vector<Group> groups;
  for (const Merge& merge : merges) groups.push_back({merge.tensor});
  threshold(groups, ranks, cuts, stream);
  std::vector<std::vector<Part>> parts;
  for (size_t t = 0; t < merges.size(); ++t) {
    const auto models = static_cast<size_t>(merges[t].tensor.models);
    parts.emplace_back(merges[t].parts, merges[t].parts + models * static_cast<size_t>(merges[t].settings));
    for (size_t i = 0; i < parts[t].size(); ++i) {
      parts[t][i].magnitude = cuts[t][i % models].magnitude;
      parts[t][i].ties_end = cuts[t][i % models].ties_end;
    }
    merges[t].parts = parts[t].data();
  }
  merge(merges, stream);
}

}  // namespace

void merge_ranked(const std::vector<Merge>& merges, const std::vector<const int64_t*>& ranks,
                  const std::vector<Cut*>& cuts, cudaStream_t stream) {
  if (merges.empty()) return;
  const size_t stages = stages_of(merges[0].sweeps[0]);
  if (keep_of(stages) != Keep::ABOVE || elect_of(stages) != Elect::WEIGHTED) {
    return merge_apart(merges, ranks, cuts, stream);
  }
  int64_t total = 0, work = 0;
  for (const Merge& merge : merges) {
    if (settings_by_stages(merge).size() != 1 || stages_of(merge.sweeps[0]) != stages) {
      return merge_apart(merges, ranks, cuts, stream);
    }
    total += merge.tensor.elements;
    work += std::max<int64_t>(tiles_in(merge.tensor.elements), merge.tensor.models);
  }
  const RankedKernel kernel = kernel_of(mass_of(stages));
  const auto blocks = static_cast<int>(std::min<int64_t>(resident_blocks(kernel, SELECT_THREADS, SHARED), work));

  std::vector<size_t> order(merges.size());
  for (size_t t = 0; t < order.size(); ++t) order[t] = t;
  const auto large =
      std::stable_partition(
          order.begin(), order.end(),
          [&](size_t t) { return merges[t].tensor.elements > std::max<int64_t>(SAMPLES, total / blocks); }) -
      order.begin();
  const auto room_of = [&](auto begin, auto end, int team_blocks) {
    int models = 0;
    int64_t largest = 0;
    for (; begin != end; ++begin) {
      models = std::max(models, merges[*begin].tensor.models);
      largest = std::max(largest, merges[*begin].tensor.elements);
    }
    return room_for(models, largest, tiles_in(largest), team_blocks);
  };
  const Room together = room_of(order.begin(), order.begin() + large, blocks);
  const Room alone = room_of(order.begin() + large, order.end(), 1);

  Gathered gathered;
  Counts counts;
  std::vector<int64_t> firsts, wanted;
  for (const size_t t : order) {
    const std::vector<int> settings = settings_by_stages(merges[t]).at(stages);
    gathered.add(merges[t], settings, SWEPT);
    counts.add(merges[t]);
    counts.tell(gathered.items.back(), settings);
    firsts.push_back(static_cast<int64_t>(wanted.size()));
    wanted.insert(wanted.end(), ranks[t], ranks[t] + merges[t].tensor.models);
  }
  Desk desk(stream);
  desk.put(counts.values);
  const auto at_items = static_cast<size_t>(gathered.put([&desk](const auto& table) { return desk.put(table); }));
  const size_t at_firsts = desk.put(firsts), at_ranks = desk.put(wanted);
  const size_t at_cuts = desk.put(std::vector<Cut>(wanted.size()));
  const size_t at_barrier = desk.put(std::vector<Barrier>(1)), at_taken = desk.put(std::vector<int>(1));
  desk.send(together.bytes() + static_cast<size_t>(blocks) * alone.bytes());
  const RankedParams params = {desk.on_device<char>(0),
                               desk.on_device<Item>(at_items),
                               desk.on_device<int64_t>(at_firsts),
                               desk.on_device<int64_t>(at_ranks),
                               desk.on_device<Cut>(at_cuts),
                               static_cast<int>(large),
                               static_cast<int>(order.size()),
                               desk.on_device<Barrier>(at_barrier),
                               desk.on_device<int>(at_taken),
                               together,
                               alone,
                               desk.scratch()};
  launch(kernel, blocks, SELECT_THREADS, SHARED, stream, params, true);
  counts.collect(desk.fetch<Count>(0, counts.values.size()));
  const Cut* found = desk.fetch<Cut>(at_cuts, wanted.size());
  for (const size_t t : order) {
    std::copy_n(found, merges[t].tensor.models, cuts[t]);
    found += merges[t].tensor.models;
  }
}

}  // namespace fastmerge
