// The op `merge_ranked`: selects each tensor's cuts and sweeps with them, all tensors in one launch.
//
// Large tensors of 16-bit inputs are guessed.cu's, and mostly read once. The others are read twice: bytes read per
// element are those of `select`, then those of the sweep, which may find some of it in the cache. Only for the vote by
// weighted deltas, which is the paper's: each kernel holds the whole selection, and those of all ten votes took longer
// to compile than everything else. The other votes are two launches.
#include <algorithm>

#include "batch.h"
#include "desk.h"
#include "queue.h"

namespace fastmerge {
namespace {

static_assert(plain_shared(SELECT_THREADS) <= SELECT_SHARED, "a sweep has the memory of the selection before it");

struct RankedParams {
  Queue queue;
  const char* table;
  const Item* items;
  const int64_t* firsts;  // of each item's ranks
  const int64_t* ranks;
  Cut* cuts;
};

// What a block does, and which tiles of the tensor it sweeps.
struct Share {
  Task task;
  int64_t from, to;
};

// Calls, so that neither loop lives with the other's registers: inlined, both would spill.
[[gnu::noinline]] __device__ void select_apart(const Task& task) {
  select(task);
}

template <Mass by>
[[gnu::noinline]] __device__ void sweep_share(const RankedParams& params, const Share& share) {
  const Item& item = params.items[share.task.number];
  sweep_tiles<Keep::ABOVE, Elect::WEIGHTED, by, SELECT_THREADS>(params.table, item, share.task.in.cuts, share.from,
                                                                share.to);
}

template <Mass by>
__global__ void __launch_bounds__(SELECT_THREADS, 2) ranked_kernel(const __grid_constant__ RankedParams params) {
  Share& share = *reinterpret_cast<Share*>(shared_memory() + SELECT_SHARED);
  const auto share_of = [&](int number, const Team& team) -> Selection {
    const Item& item = params.items[number];
    const int64_t tiles = (item.elements + UNIT - 1) / UNIT;
    share.from = tiles * team.rank / team.size;
    share.to = tiles * (team.rank + 1) / team.size;
    const int64_t first = params.firsts[number];
    return {at_place<const View>(params.table, item.views),
            &item.elements,
            1,
            item.models,
            item.inputs,
            item.elements,
            params.ranks + first,
            params.cuts + first};
  };
  if (threadIdx.x == 0) share.task.number = -1;
  while (take(params.queue, share.task, share_of)) {
    select_apart(share.task);
    sweep_share<by>(params, share);
  }
}

constexpr size_t SHARED = SELECT_SHARED + sizeof(Share);

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

// What one call of the op is given, or a part of that.
struct Given {
  std::vector<Merge> merges;
  std::vector<const int64_t*> ranks;
  std::vector<Cut*> cuts;

  void add(const Merge& merge, const int64_t* rank, Cut* cut) {
    merges.push_back(merge);
    ranks.push_back(rank);
    cuts.push_back(cut);
  }
};

// All of the same stages.
void merge_at_once(const std::vector<Merge>& merges, const std::vector<const int64_t*>& ranks,
                   const std::vector<Cut*>& cuts, size_t stages, cudaStream_t stream) {
  if (merges.empty()) return;
  int64_t work = 0;
  for (const Merge& merge : merges) work += std::max<int64_t>(tiles_in(merge.tensor.elements), merge.tensor.models);
  const RankedKernel kernel = kernel_of(mass_of(stages));
  const auto blocks = static_cast<int>(std::min<int64_t>(resident_blocks(kernel, SELECT_THREADS, SHARED), work));

  std::vector<size_t> order(merges.size());
  for (size_t t = 0; t < order.size(); ++t) order[t] = t;
  const auto load_of = [&](size_t t) -> Load {
    const Tensor& tensor = merges[t].tensor;
    return {tensor.elements, tiles_in(tensor.elements), tensor.models};
  };
  Queue queue = queue_of(order, load_of, blocks);

  Gathered gathered;
  Counts counts;
  std::vector<int64_t> firsts, wanted;
  for (const size_t t : order) {
    const std::vector<int> settings = settings_by_stages(merges[t]).at(stages);
    gathered.add(merges[t], settings, UNIT);
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
  const size_t at_turn = desk.put(std::vector<Turn>(1));
  desk.send(queue.bytes(blocks));
  queue.turn = desk.on_device<Turn>(at_turn);
  queue.workspace = desk.scratch();
  const RankedParams params = {queue,
                               desk.on_device<char>(0),
                               desk.on_device<Item>(at_items),
                               desk.on_device<int64_t>(at_firsts),
                               desk.on_device<int64_t>(at_ranks),
                               desk.on_device<Cut>(at_cuts)};
  launch(kernel, blocks, SELECT_THREADS, SHARED, stream, params, queue.large > 0);
  counts.collect(desk.fetch<Count>(0, counts.values.size()));
  const Cut* found = desk.fetch<Cut>(at_cuts, wanted.size());
  for (const size_t t : order) {
    std::copy_n(found, merges[t].tensor.models, cuts[t]);
    found += merges[t].tensor.models;
  }
}

}  // namespace

void merge_ranked(const std::vector<Merge>& merges, const std::vector<const int64_t*>& ranks,
                  const std::vector<Cut*>& cuts, cudaStream_t stream) {
  if (merges.empty()) return;
  const size_t stages = stages_of(merges[0].sweeps[0]);
  if (keep_of(stages) != Keep::ABOVE || elect_of(stages) != Elect::WEIGHTED) {
    return merge_apart(merges, ranks, cuts, stream);
  }
  Given large, others;
  for (size_t t = 0; t < merges.size(); ++t) {
    if (settings_by_stages(merges[t]).size() != 1 || stages_of(merges[t].sweeps[0]) != stages) {
      return merge_apart(merges, ranks, cuts, stream);
    }
    (worth_a_guess(merges[t].tensor) ? large : others).add(merges[t], ranks[t], cuts[t]);
  }
  merge_guessed(large.merges, large.ranks, large.cuts, stream);
  merge_at_once(others.merges, others.ranks, others.cuts, stages, stream);
}

size_t ranked_bytes(const Most& most) {
  size_t bytes = 0;
  for (const Mass by : {Mass::DIVISOR, Mass::AGREEING, Mass::CONTRIBUTORS}) {
    if (most.ranks == 0) break;
    bytes = std::max(bytes, queue_bytes(most, resident_blocks(kernel_of(by), SELECT_THREADS, SHARED)));
  }
  return std::max(bytes, guessed_bytes(most));
}

}  // namespace fastmerge
