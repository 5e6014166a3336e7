// The op `threshold`: one cooperative launch, large selections by the whole grid, the others by one block each.
#include <algorithm>

#include "desk.h"
#include "queue.h"

namespace fastmerge {
namespace {

// A selection by places in the tables.
struct Place {
  int64_t elements;
  int64_t view, size, rank;  // its first; cuts go where the ranks are
  int32_t tensors, models, inputs;
};

struct Batch {
  Queue queue;
  const Place* places;
  const View* views;
  const int64_t* sizes;
  const int64_t* ranks;
  Cut* cuts;
};

__global__ void __launch_bounds__(SELECT_THREADS, 2) threshold_kernel(const __grid_constant__ Batch batch) {
  Task& task = *reinterpret_cast<Task*>(shared_memory() + SELECT_SHARED);
  const auto selection_of = [&](int number, const Team&) -> Selection {
    const Place& place = batch.places[number];
    return {batch.views + place.view, batch.sizes + place.size, place.tensors,          place.models, place.inputs,
            place.elements,           batch.ranks + place.rank, batch.cuts + place.rank};
  };
  if (threadIdx.x == 0) task.number = -1;
  while (take(batch.queue, task, selection_of)) select(task);
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

constexpr size_t QUEUE_SHARED = SELECT_SHARED + sizeof(Task);
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
  int64_t work = 0;
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
    work += std::max<int64_t>(tiles_in(place.elements), like.models);
  }
  const int blocks = blocks_for(threshold_kernel, QUEUE_SHARED, work);
  const auto load_of = [&](const Place& place) {
    Load load = {place.elements, 0, place.models};
    for (int tensor = 0; tensor < place.tensors; ++tensor) load.tiles += tiles_in(sizes[place.size + tensor]);
    return load;
  };
  Queue queue = queue_of(places, load_of, blocks);

  Desk desk(stream);
  const size_t at_places = desk.put(places), at_views = desk.put(views), at_sizes = desk.put(sizes);
  const size_t at_ranks = desk.put(wanted), at_cuts = desk.put(std::vector<Cut>(wanted.size()));
  const size_t at_turn = desk.put(std::vector<Turn>(1));
  desk.send(queue.bytes(blocks));
  queue.turn = desk.on_device<Turn>(at_turn);
  queue.workspace = desk.scratch();
  const Batch batch = {queue,
                       desk.on_device<Place>(at_places),
                       desk.on_device<View>(at_views),
                       desk.on_device<int64_t>(at_sizes),
                       desk.on_device<int64_t>(at_ranks),
                       desk.on_device<Cut>(at_cuts)};
  launch(threshold_kernel, blocks, SELECT_THREADS, QUEUE_SHARED, stream, batch, queue.large > 0);
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

size_t selecting_bytes(const Most& most) {
  if (most.ranks == 0) return 0;
  return queue_bytes(most, resident_blocks(threshold_kernel, SELECT_THREADS, QUEUE_SHARED));
}

size_t workspace_bytes(int64_t elements, int models) {
  const int64_t tiles = tiles_in(elements);
  const int blocks = blocks_for(single_kernel, SELECT_SHARED, std::max<int64_t>(tiles, models));
  return BARRIER_BYTES + room_for(models, elements, tiles, blocks).bytes();
}

}  // namespace fastmerge
