// The op `threshold`: one cooperative launch, large selections by the whole grid, the others by one block each.
#include <algorithm>

#include "desk.h"
#include "select.h"

namespace fastmerge {
namespace {

// A selection by places in the tables.
struct Place {
  int64_t elements;
  int64_t view, size, rank;  // its first; cuts go where the ranks are
  int32_t tensors, models, inputs;
};

struct Batch {
  const Place* places;  // the large ones first
  int large, count;
  const View* views;
  const int64_t* sizes;
  const int64_t* ranks;
  Cut* cuts;
  Barrier* barrier;
  int* taken;  // of the others, which blocks take one by one
  Room together, alone;
  char* workspace;  // the grid's, then each block's
};

// What a block does next; in shared memory, so that it takes no registers.
struct Next {
  Team team;
  Selection in;
  Room room;
  char* workspace;
  bool none;
};

// The number of the last one done, -1 before the first, is `number`; that of the next one is returned.
__device__ int take(const Batch& batch, int number, Next& next) {
  const bool large = ++number < batch.large;
  if (!large) number = batch.large + atomicAdd(batch.taken, 1);
  next.none = number >= batch.count;
  if (next.none) return number;
  const Place& place = batch.places[number];
  next.in = {batch.views + place.view, batch.sizes + place.size, place.tensors,          place.models, place.inputs,
             place.elements,           batch.ranks + place.rank, batch.cuts + place.rank};
  next.team = {batch.barrier, large ? static_cast<int>(gridDim.x) : 1, large ? static_cast<int>(blockIdx.x) : 0};
  next.room = large ? batch.together : batch.alone;
  next.workspace = batch.workspace + (large ? 0 : batch.together.bytes() + blockIdx.x * batch.alone.bytes());
  return number;
}

__global__ void __launch_bounds__(SELECT_THREADS, 2) threshold_kernel(const __grid_constant__ Batch batch) {
  char* shared = shared_memory();
  Next& next = *reinterpret_cast<Next*>(shared + SELECT_SHARED);
  for (int number = -1;;) {
    if (threadIdx.x == 0) number = take(batch, number, next);
    sync_block();
    if (next.none) return;
    select(next.team, next.in, next.room, next.workspace, shared);
  }
}

// One tensor, its tables in the parameters.
struct Single {
  static constexpr int MOST = 120;
  View views[MOST];
  int64_t ranks[MOST];
  int64_t elements;
  int models, inputs;
  Cut* cuts;
  Barrier* barrier;
  Room room;
  char* workspace;
};

__global__ void __launch_bounds__(SELECT_THREADS, 2) single_kernel(const __grid_constant__ Single single) {
  const Team grid = {single.barrier, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x)};
  const Selection in = {single.views,    &single.elements, 1,          single.models, single.inputs,
                        single.elements, single.ranks,     single.cuts};
  select(grid, in, single.room, single.workspace, shared_memory());
}

constexpr size_t BATCH_SHARED = SELECT_SHARED + sizeof(Next);
constexpr size_t BARRIER_BYTES = 256;

// No more blocks than there is work for: waiting for one another costs each of them.
template <class P>
int blocks_for(void (*kernel)(P), size_t shared_bytes, int64_t tiles) {
  const int most = resident_blocks(kernel, SELECT_THREADS, shared_bytes);
  return static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(tiles, 1)));
}

}  // namespace

void threshold(const std::vector<Group>& groups, const std::vector<const int64_t*>& ranks,
               const std::vector<Cut*>& cuts, cudaStream_t stream) {
  if (groups.empty()) return;
  std::vector<View> views;
  std::vector<int64_t> sizes, wanted;
  std::vector<Place> places;
  int64_t total = 0, work = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const Tensor& like = groups[g].front();
    Place place = {0,
                   static_cast<int64_t>(views.size()),
                   static_cast<int64_t>(sizes.size()),
                   static_cast<int64_t>(wanted.size()),
                   static_cast<int32_t>(groups[g].size()),
                   like.models,
                   like.inputs};
    for (const Tensor& tensor : groups[g]) {
      views.insert(views.end(), tensor.views, tensor.views + tensor.inputs);
      sizes.push_back(tensor.elements);
      place.elements += tensor.elements;
    }
    wanted.insert(wanted.end(), ranks[g], ranks[g] + like.models);
    places.push_back(place);
    total += place.elements;
    work += std::max<int64_t>(tiles_in(place.elements), like.models);
  }
  const int blocks = blocks_for(threshold_kernel, BATCH_SHARED, work);
  // More than its share of the elements would keep one block busy while the others have nothing left to do.
  const auto is_large = [&](const Place& place) { return place.elements > std::max<int64_t>(SAMPLES, total / blocks); };
  const auto tiles_of = [&](const Place& place) {
    int64_t tiles = 0;
    for (int tensor = 0; tensor < place.tensors; ++tensor) tiles += tiles_in(sizes[place.size + tensor]);
    return tiles;
  };
  const auto large = std::stable_partition(places.begin(), places.end(), is_large) - places.begin();
  const auto room_of = [&](auto begin, auto end, int team_blocks) {
    int models = 0;
    int64_t largest = 0, tiles = 0;
    for (; begin != end; ++begin) {
      models = std::max(models, begin->models);
      largest = std::max(largest, begin->elements);
      tiles = std::max(tiles, tiles_of(*begin));
    }
    return room_for(models, largest, tiles, team_blocks);
  };
  const Room together = room_of(places.begin(), places.begin() + large, blocks);
  const Room alone = room_of(places.begin() + large, places.end(), 1);

  Desk desk(stream);
  const size_t at_places = desk.put(places), at_views = desk.put(views), at_sizes = desk.put(sizes);
  const size_t at_ranks = desk.put(wanted), at_cuts = desk.put(std::vector<Cut>(wanted.size()));
  const size_t at_barrier = desk.put(std::vector<Barrier>(1)), at_taken = desk.put(std::vector<int>(1));
  desk.send(together.bytes() + static_cast<size_t>(blocks) * alone.bytes());
  const Batch batch = {desk.on_device<Place>(at_places),
                       static_cast<int>(large),
                       static_cast<int>(places.size()),
                       desk.on_device<View>(at_views),
                       desk.on_device<int64_t>(at_sizes),
                       desk.on_device<int64_t>(at_ranks),
                       desk.on_device<Cut>(at_cuts),
                       desk.on_device<Barrier>(at_barrier),
                       desk.on_device<int>(at_taken),
                       together,
                       alone,
                       desk.scratch()};
  launch(threshold_kernel, blocks, SELECT_THREADS, BATCH_SHARED, stream, batch, large > 0);
  const Cut* found = desk.fetch<Cut>(at_cuts, wanted.size());
  for (size_t g = 0; g < groups.size(); ++g) {
    std::copy_n(found, groups[g].front().models, cuts[g]);
    found += groups[g].front().models;
  }
}

void threshold_async(const Tensor& tensor, const int64_t* ranks, Cut* cuts, void* workspace, cudaStream_t stream) {
  if (tensor.inputs > Single::MOST) {
    throw std::invalid_argument("a selection without a wait takes at most " + std::to_string(Single::MOST) +
                                " inputs; take the op that waits");
  }
  Single single = {};
  std::copy_n(tensor.views, tensor.inputs, single.views);
  std::copy_n(ranks, tensor.models, single.ranks);
  const int64_t tiles = tiles_in(tensor.elements);
  const int blocks = blocks_for(single_kernel, SELECT_SHARED, std::max<int64_t>(tiles, tensor.models));
  single.elements = tensor.elements;
  single.models = tensor.models;
  single.inputs = tensor.inputs;
  single.cuts = cuts;
  single.barrier = static_cast<Barrier*>(workspace);
  single.room = room_for(tensor.models, tensor.elements, tiles, blocks);
  single.workspace = static_cast<char*>(workspace) + BARRIER_BYTES;
  check(cudaMemsetAsync(workspace, 0, sizeof(Barrier), stream), "clear a barrier");
  launch(single_kernel, blocks, SELECT_THREADS, SELECT_SHARED, stream, single, true);
}

size_t workspace_bytes(int64_t elements, int models) {
  const int64_t tiles = tiles_in(elements);
  const int blocks = blocks_for(single_kernel, SELECT_SHARED, std::max<int64_t>(tiles, models));
  return BARRIER_BYTES + room_for(models, elements, tiles, blocks).bytes();
}

}  // namespace fastmerge
