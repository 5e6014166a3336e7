// Large tensors of 16-bit inputs for the op `merge_ranked`: selection and sweep in one read, by a guess; see guessed.h.
//
// All tensors go through each step together, a launch each: guess, sweep with the guess, prove it; sweep and prove once
// more those whose magnitude was another one; find the ends of the equals, or select where no guess was right; sweep
// what was swept with other cuts. A barrier of the grid for each step and tensor would cost as much as a launch.
//
// Bytes per element: those of the sweep; the inputs' in one unit of 8 to 32 beforehand; and of the sweep again between
// the guessed and the true ends, some 3 % for each model of 2^24 elements. A magnitude that was not the one (likewise)
// costs a sweep more; a tensor whose magnitudes are no guess is read as `select` and then the sweep read it. Counting
// reads what the sweep then finds in the second cache. Not yet measured on a card.
#include <algorithm>

#include "batch.h"
#include "desk.h"
#include "guessed.h"

namespace fastmerge {
namespace {

constexpr int ATTEMPTS = 2;
constexpr size_t PLAIN_SHARED = plain_shared(SELECT_THREADS);

// What becomes of a tensor; in device memory.
struct Plan {
  int64_t first;  // of its ranks, cuts and guesses
  int64_t room;   // its place
  int32_t sweeps, overflowed;
};

struct Guessing {
  const char* table;
  const Item* items;
  const int64_t* ranks;
  Cut* cuts;
  Plan* plans;
  Guess* guesses;
  char* rooms;
  Barrier* barrier;
  Room room;        // of a selection after all
  char* workspace;  // its
  int tensors;
  int sections;  // of each tensor; as many blocks sweep them
  int attempt;
};

struct Desktop {
  Task task;
  Item item;
  Guess* guesses;
};
constexpr size_t SLATE_SHARED = SELECT_SHARED + sizeof(Desktop);

// As its sections count one magnitude alone, all their counts fit where a section's bins would be.
FASTMERGE_INLINE Room guessed_room(int models, int64_t elements, int sections) {
  return {models, (sections + BINS - 1) / BINS, (tiles_in(elements) + sections - 1) / sections};
}

__device__ inline Room with_sections(Room room, int sections) {
  room.sections = sections;
  return room;
}

// Every thread of the block is done with the last tensor, and finds the next one on return.
__device__ inline void take_up(const Guessing& all, int tensor, Desktop& desktop) {
  sync_block();
  if (threadIdx.x == 0) {
    const Item item = desktop.item = all.items[tensor];
    const Plan plan = all.plans[tensor];
    desktop.guesses = all.guesses + plan.first;
    const Selection in = {at_place<const View>(all.table, item.views),
                          &all.items[tensor].elements,
                          1,
                          item.models,
                          item.inputs,
                          item.elements,
                          all.ranks + plan.first,
                          all.cuts + plan.first};
    const Team team = {all.barrier, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x)};
    desktop.task = {tensor, team, in, guessed_room(item.models, item.elements, all.sections), all.rooms + plan.room};
  }
  sync_block();
}

// Calls work(model) for each model of each tensor, each by one block.
template <class Work>
__device__ __forceinline__ void share_models(const Guessing& all, Desktop& desktop, const Work& work) {
  unsigned next = 0;
  for (int tensor = 0; tensor < all.tensors; ++tensor) {
    take_up(all, tensor, desktop);
    for (int model = 0; model < desktop.task.in.models; ++model) {
      if (next++ % gridDim.x != blockIdx.x) continue;
      work(model);
      sync_block();
    }
  }
}

__device__ __forceinline__ Slate& the_slate() {
  return *reinterpret_cast<Slate*>(shared_memory());
}

__device__ __forceinline__ Desktop& the_desktop() {
  return *reinterpret_cast<Desktop*>(shared_memory() + SELECT_SHARED);
}

// --- the guess ---

// The early units of all tensors, spread over the grid.
__device__ inline void census_early(const Guessing& all, Desktop& desktop, Slate& slate) {
  int64_t units = 0, start = 0;
  for (int tensor = 0; tensor < all.tensors; ++tensor) units += early_units(all.items[tensor].elements);
  const int64_t first = units * blockIdx.x / gridDim.x, last = units * (blockIdx.x + int64_t{1}) / gridDim.x;
  for (int tensor = 0; tensor < all.tensors; ++tensor) {
    const int64_t here = early_units(all.items[tensor].elements);
    const int64_t from = first > start ? first - start : 0, to = lesser(last - start, here);
    start += here;
    if (from >= to) continue;
    take_up(all, tensor, desktop);
    const Task& task = desktop.task;
    for (int next = 0; next < task.in.models;) {
      const Few few = few_from(next, task.in, task.room, task.workspace);
      if (few.count == 0) continue;
      count_section(task.room, task.workspace, few, -1, slate,
                    [&](Seen(&seen)[AT_ONCE]) { count_early(task.in, few, from, to, seen, slate); });
    }
  }
}

__global__ void __launch_bounds__(SELECT_THREADS, 2) guess_kernel(const __grid_constant__ Guessing all) {
  Slate& slate = the_slate();
  Desktop& desktop = the_desktop();
  const Task& task = desktop.task;
  share_models(all, desktop, [&](int model) { open(task.in, model, Ledger(task.room, task.workspace, model), slate); });
  sync_grid(all.barrier);
  census_early(all, desktop, slate);
  sync_grid(all.barrier);
  share_models(all, desktop, [&](int model) {
    guess_first(task.in, model, Ledger(task.room, task.workspace, model), desktop.guesses[model], slate);
  });
}

// --- the sweep with it ---

struct Sweeper {
  Desktop desktop;
  int64_t from, to;
  struct {  // of a warp
    int64_t next, end;
    Plain plain;
  } run[SELECT_THREADS / WARP];
  Tally tallies[GUESSED_MODELS];
};

constexpr size_t SWEEPER_SHARED = PLAIN_SHARED + sizeof(Sweeper);
constexpr size_t MEND_SHARED = PLAIN_SHARED + sizeof(Desktop);

template <Mass by>
__device__ __forceinline__ void sweep(const Guessing& all, const Desktop& desktop, int64_t from, int64_t to) {
  sweep_tiles<Keep::ABOVE, Elect::WEIGHTED, by, SELECT_THREADS>(all.table, desktop.item, desktop.task.in.cuts, from,
                                                                to);
}

// A call that nothing is kept in registers for: where a warp goes on, it finds in shared memory.
template <Mass by>
[[gnu::noinline]] __device__ void sweep_apart(const Guessing& all, const Sweeper& sweeper, int64_t from, int64_t to) {
  sweep<by>(all, sweeper.desktop, from, to);
}

__device__ __forceinline__ int64_t next_unit(const Sweeper& sweeper) {
  return sweeper.run[threadIdx.x / WARP].next;
}

__device__ __forceinline__ void go_on_from(Sweeper& sweeper, int64_t unit) {
  __syncwarp();
  if (threadIdx.x % WARP == 0) sweeper.run[threadIdx.x / WARP].next = unit;
  __syncwarp();
}

// A section of a tensor, counted and swept: a few units at a time, so that the sweep finds them in the second cache ...
template <Mass by>
__device__ __forceinline__ void sweep_counted(const Guessing& all, Sweeper& sweeper) {
#pragma unroll 1
  for (int64_t from; (from = next_unit(sweeper)) < sweeper.to;) {
    const int64_t to = lesser(from + TALLIED_UNITS, sweeper.to);
#pragma unroll 1
    for (int64_t unit = from; unit < to; ++unit) tally_unit(sweeper.desktop.task.in, unit, sweeper.tallies);
    go_on_from(sweeper, to);
    sweep_apart<by>(all, sweeper, from, to);
  }
}

// ... or counted by the plain sweep itself.
template <Mass by>
__device__ __forceinline__ void sweep_counting(const Guessing& all, Sweeper& sweeper) {
  const Item& item = sweeper.desktop.item;
#pragma unroll 1
  for (int64_t from; (from = next_unit(sweeper)) < sweeper.to;) {
    auto& run = sweeper.run[threadIdx.x / WARP];  // in shared memory, as the counts take the registers
    if (threadIdx.x % WARP == 0) {
      run.end = run_of<Keep::ABOVE, Elect::WEIGHTED, SELECT_THREADS>(all.table, item, sweeper.desktop.task.in.cuts,
                                                                     from, sweeper.to, run.plain);
    }
    __syncwarp();
    Sides sides = {};
    const int64_t unit = plain_tiles<Keep::ABOVE, Elect::WEIGHTED, by, true, SELECT_THREADS, true>(
        run.plain, item.begin, from, run.end, &sides);
    add_to(sweeper.tallies, item.models, sides);
    if (unit == sweeper.to) return;
    if (unit == run.end) tally_unit(sweeper.desktop.task.in, unit, sweeper.tallies);
    go_on_from(sweeper, unit + 1);
    sweep_apart<by>(all, sweeper, unit, unit + 1);
  }
}

// Blocks of a processor. The grid is that of the guess, whose shared memory leaves room for one where there are 100 KB:
// there the counts need not be squeezed into fewer registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int SWEEPERS = 1;
#else
constexpr int SWEEPERS = 2;
#endif

// Each block its section of each tensor.
template <Mass by>
__global__ void __launch_bounds__(SELECT_THREADS, SWEEPERS) guessed_kernel(const __grid_constant__ Guessing all) {
  Sweeper& sweeper = *reinterpret_cast<Sweeper*>(shared_memory() + PLAIN_SHARED);
  Desktop& desktop = sweeper.desktop;
  const Task& task = desktop.task;
#pragma unroll 1
  for (int tensor = 0; tensor < all.tensors; ++tensor) {
    take_up(all, tensor, desktop);
    if (!guessed(task, desktop.guesses)) continue;
    if (threadIdx.x == 0) {
      const int64_t tiles = tiles_in(task.in.elements);
      sweeper.from = tiles * task.team.rank / task.team.size * (TILE / UNIT);
      sweeper.to = tiles * (task.team.rank + 1) / task.team.size * (TILE / UNIT);
      if (all.attempt > 0) desktop.item.nonfinite = 0;
      if (blockIdx.x == 0) all.plans[tensor].sweeps = all.attempt + 1;
    }
    for (int model = threadIdx.x; model < task.in.models; model += SELECT_THREADS) sweeper.tallies[model] = {0, 0};
    sync_block();
    go_on_from(sweeper, sweeper.from);
    if (desktop.item.plain) {
      sweep_counting<by>(all, sweeper);
    } else {
      sweep_counted<by>(all, sweeper);
    }
    sync_block();
    const int64_t elements = lesser(sweeper.to * UNIT, task.in.elements) - sweeper.from * UNIT;
    report(task, elements, sweeper.tallies, desktop.guesses);
  }
}

// --- what the counts say ---

__global__ void __launch_bounds__(SELECT_THREADS, 2) prove_kernel(const __grid_constant__ Guessing all) {
  Desktop& desktop = the_desktop();
  const Task& task = desktop.task;
  share_models(all, desktop, [&](int model) {
    Plan& plan = all.plans[task.number];
    if (plan.sweeps != all.attempt + 1) return;
    if (model == 0 && threadIdx.x == 0) plan.overflowed = take_back_overflow(all.table, desktop.item);
    const Ledger ledger(task.room, task.workspace, model);
    if (!ledger.search->found)
      prove(task.in, model, with_sections(task.room, all.sections), ledger, desktop.guesses[model], the_slate());
  });
}

// A call, so that neither loop lives with the other's registers.
[[gnu::noinline]] __device__ void select_apart(const Guessing& all) {
  const Task& task = the_desktop().task;
  select(task.team, task.in, all.room, all.workspace, shared_memory());
}

// Where equals end, by the sections that are known; or a selection of all models.
__global__ void __launch_bounds__(SELECT_THREADS, 2) settle_kernel(const __grid_constant__ Guessing all) {
  Slate& slate = the_slate();
  Desktop& desktop = the_desktop();
  const Task& task = desktop.task;
  const auto ends_in_section = [&](int model) {
    return !searching(task.in, task.room, task.workspace) &&
           Ledger(task.room, task.workspace, model).search->section >= 0;
  };
  for (int tensor = 0; tensor < all.tensors; ++tensor) {
    take_up(all, tensor, desktop);
    for (int model = 0; model < task.in.models; ++model) {
      const Ledger ledger(task.room, task.workspace, model);
      if (ends_in_section(model))
        count_equals(task.team, task.in, model, with_sections(task.room, all.sections), ledger, slate);
    }
  }
  sync_grid(all.barrier);
  share_models(all, desktop, [&](int model) {
    if (!ends_in_section(model)) return;
    find_end(task.in, model, with_sections(task.room, all.sections), Ledger(task.room, task.workspace, model), slate);
  });
  for (int tensor = 0; tensor < all.tensors; ++tensor) {
    take_up(all, tensor, desktop);
    if (searching(task.in, task.room, task.workspace)) select_apart(all);
  }
}

// --- what was swept with other cuts, or not at all ---

template <Mass by>
__global__ void __launch_bounds__(SELECT_THREADS, 2) mend_kernel(const __grid_constant__ Guessing all) {
  Desktop& desktop = *reinterpret_cast<Desktop*>(shared_memory() + PLAIN_SHARED);
  const Task& task = desktop.task;
#pragma unroll 1
  for (int tensor = 0; tensor < all.tensors; ++tensor) {
    take_up(all, tensor, desktop);
    const Plan& plan = all.plans[tensor];
    const bool anew = plan.sweeps == 0 || plan.overflowed || searching(task.in, task.room, task.workspace);
    if (threadIdx.x == 0 && plan.sweeps > 0) desktop.item.nonfinite = 0;  // each element was looked at
    sync_block();
    const auto wrong = [&](int model) {
      if (anew) return all_of(desktop.item);
      return between(desktop.item, desktop.guesses[model].ties_end, task.in.cuts[model].ties_end);
    };
    for_each_run(task.team, anew ? 1 : task.in.models, wrong,
                 [&](int from, int to) { sweep<by>(all, desktop, from, to); });
  }
}

// --- launches ---

using Kernel = void (*)(Guessing);

template <template <Mass> class Of>
Kernel kernel_of(Mass by) {
  return by == Mass::DIVISOR    ? Of<Mass::DIVISOR>::kernel
         : by == Mass::AGREEING ? Of<Mass::AGREEING>::kernel
                                : Of<Mass::CONTRIBUTORS>::kernel;
}

template <Mass by>
struct Guessed {
  static constexpr Kernel kernel = guessed_kernel<by>;
};

template <Mass by>
struct Mended {
  static constexpr Kernel kernel = mend_kernel<by>;
};

// The grid of each launch.
int blocks_of_guesses() {
  return std::min(resident_blocks(guess_kernel, SELECT_THREADS, SLATE_SHARED),
                  resident_blocks(settle_kernel, SELECT_THREADS, SLATE_SHARED));
}

}  // namespace

bool worth_a_guess(const Tensor& tensor) {
  const auto is_wide = [](const View& view) { return dtype_of(view) == DType::F32; };
  return tensor.models <= GUESSED_MODELS && !std::any_of(tensor.views, tensor.views + tensor.inputs, is_wide) &&
         tensor.elements >= GUESSED_TILES * TILE * blocks_of_guesses();
}

void merge_guessed(const std::vector<Merge>& merges, const std::vector<const int64_t*>& ranks,
                   const std::vector<Cut*>& cuts, cudaStream_t stream) {
  if (merges.empty()) return;
  const int blocks = blocks_of_guesses();
  Gathered gathered;
  Counts counts;
  std::vector<Plan> plans;
  std::vector<int64_t> wanted;
  size_t rooms = 0;
  Room room = {};
  for (size_t t = 0; t < merges.size(); ++t) {
    const Tensor& tensor = merges[t].tensor;
    std::vector<int> settings(static_cast<size_t>(merges[t].settings));
    for (size_t i = 0; i < settings.size(); ++i) settings[i] = static_cast<int>(i);
    gathered.add(merges[t], settings, UNIT);
    counts.add(merges[t]);
    counts.tell(gathered.items.back(), settings);
    plans.push_back({static_cast<int64_t>(wanted.size()), static_cast<int64_t>(rooms), 0, 0});
    wanted.insert(wanted.end(), ranks[t], ranks[t] + tensor.models);
    rooms += guessed_room(tensor.models, tensor.elements, blocks).bytes();
    const Room again = room_for(tensor.models, tensor.elements, tiles_in(tensor.elements), blocks);
    room = {std::max(room.models, again.models), again.sections, std::max(room.tiles, again.tiles)};
  }
  const size_t guesses = (wanted.size() * sizeof(Guess) + 255) / 256 * 256;
  Desk desk(stream);
  desk.put(counts.values);
  const auto at_items = static_cast<size_t>(gathered.put([&desk](const auto& table) { return desk.put(table); }));
  const size_t at_plans = desk.put(plans), at_ranks = desk.put(wanted);
  const size_t at_cuts = desk.put(std::vector<Cut>(wanted.size()));
  const size_t at_barrier = desk.put(std::vector<Barrier>(1));
  desk.send(room.bytes() + rooms + guesses);
  Guessing all = {desk.on_device<char>(0),
                  desk.on_device<Item>(at_items),
                  desk.on_device<int64_t>(at_ranks),
                  desk.on_device<Cut>(at_cuts),
                  desk.on_device<Plan>(at_plans),
                  reinterpret_cast<Guess*>(desk.scratch() + room.bytes() + rooms),
                  desk.scratch() + room.bytes(),
                  desk.on_device<Barrier>(at_barrier),
                  room,
                  desk.scratch(),
                  static_cast<int>(merges.size()),
                  blocks,
                  0};
  const Mass by = mass_of(stages_of(merges[0].sweeps[0]));
  launch(guess_kernel, blocks, SELECT_THREADS, SLATE_SHARED, stream, all, true);
  for (; all.attempt < ATTEMPTS; ++all.attempt) {
    launch(kernel_of<Guessed>(by), blocks, SELECT_THREADS, SWEEPER_SHARED, stream, all);
    launch(prove_kernel, blocks, SELECT_THREADS, SLATE_SHARED, stream, all);
  }
  launch(settle_kernel, blocks, SELECT_THREADS, SLATE_SHARED, stream, all, true);
  launch(kernel_of<Mended>(by), blocks, SELECT_THREADS, MEND_SHARED, stream, all);
  counts.collect(desk.fetch<Count>(0, counts.values.size()));
  const Cut* found = desk.fetch<Cut>(at_cuts, wanted.size());
  for (size_t t = 0; t < merges.size(); ++t) {
    std::copy_n(found, merges[t].tensor.models, cuts[t]);
    found += merges[t].tensor.models;
  }
}

size_t guessed_bytes(const Most& most) {
  if (most.ranks == 0) return 0;
  const int blocks = blocks_of_guesses();
  const int64_t elements = most.elements * most.settings, least = GUESSED_TILES * TILE * blocks;
  const int64_t tensors = std::min<int64_t>(most.tensors * most.settings, elements / least);
  if (tensors == 0) return 0;
  const size_t guesses = static_cast<size_t>(most.ranks) * sizeof(Guess) + 255;
  const size_t each = guessed_room(most.ranks, elements, blocks).bytes() + guesses;
  return room_for(most.ranks, elements, tiles_in(elements), blocks).bytes() + static_cast<size_t>(tensors) * each;
}

}  // namespace fastmerge
