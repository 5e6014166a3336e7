// The ops `gram` and `norms`: a launch for all tensors of one layout, by one rule, which measures their grains and adds
// up those of each tensor.
#include <algorithm>
#include <cmath>
#include <map>

#include "desk.h"
#include "measure.h"
#include "ops.h"

namespace fastmerge {
namespace {

// The last tensor that begins at a grain or before.
__device__ int tensor_of(const Measures& all, int grain) {
  int first = 0, last = all.count - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (all.tensors[middle].first <= grain) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// A sum over all grains of a tensor by each warp; past the first cache, as other blocks wrote them.
template <class What>
__device__ __forceinline__ void add_grains(const Measures& all, const Measured& tensor) {
  const int width = static_cast<int>(What::width(tensor.models)), lane = threadIdx.x % WARP;
  for (int sum = threadIdx.x / WARP; sum < width; sum += MEASURE_THREADS / WARP) {
    if (!What::is_wanted(tensor.models, sum)) continue;
    const double* each = all.sums + tensor.sum + int64_t{sum} * tensor.grains;
    const bool largest = What::is_largest(sum);
    double total = 0.0;
#pragma unroll 8
    for (int grain = lane; grain < tensor.grains; grain += WARP) {
      const double here = __ldcg(each + grain);
      total = largest ? larger_of(here, total) : total + here;
    }
    total = largest ? warp_max(total) : warp_sum(total);
    if (lane == 0) all.out[tensor.out + sum] = total;
  }
}

// A block has done so many grains of a tensor: the one that did its last ones adds up all of them.
template <class What>
__device__ __forceinline__ void finish(const Measures& all, int number, int grains) {
  const Measured& tensor = all.tensors[number];
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(all.done + number, grains) + grains == tensor.grains;
    __threadfence();
  }
  if (any_in_block(is_last)) add_grains<What>(all, tensor);
}

// The first grain of a block, which takes those up to the next one's first.
__device__ __forceinline__ int first_of(const Measures& all, unsigned block) {
  return static_cast<int>(int64_t{block} * all.grains / gridDim.x);
}

template <class What>
__global__ void __launch_bounds__(MEASURE_THREADS, What::blocks) measure_kernel(const __grid_constant__ Measures all) {
  Share& share = slate().share;
  if (threadIdx.x == 0) {
    share.first = first_of(all, blockIdx.x);
    share.end = first_of(all, blockIdx.x + 1);
    share.tensor = tensor_of(all, share.first);
  }
  sync_block();
  for (int next = share.first; next < share.end;) {
    const Measured& tensor = all.tensors[share.tensor];
    for (; next < tensor.first + tensor.grains && next < share.end; ++next) {
      const int place = next - tensor.first;
      const int64_t from = place * tensor.grain, left = tensor.elements - from;
      const View* views = all.views + tensor.view;
      const Grain grain = {views, tensor.inputs > tensor.models ? views + tensor.models : nullptr, tensor.elements,
                           from, static_cast<int>(left < tensor.grain ? left : tensor.grain)};
      What::measure(tensor, grain, all.parts + tensor.part, {all.sums + tensor.sum + place, tensor.grains});
    }
    const int before = tensor.first > share.first ? tensor.first : share.first;
    if (next > before) finish<What>(all, share.tensor, next - before);
    sync_block();
    if (threadIdx.x == 0) share.tensor = share.tensor + 1;
    sync_block();
  }
}

using Kernel = void (*)(Measures);
constexpr size_t LAYOUTS = 4;

// One tensor, and what measures it.
struct Job {
  const Tensor* tensor;
  const Kernel* kernels;  // by layout
  int64_t width;
  int64_t begin;
  const Part* parts;  // one per model, or none

  Kernel kernel() const {
    return kernels[static_cast<size_t>(layout_of(tensor->views, tensor->inputs, tensor->elements))];
  }
};

// Tensors that stand together in the table, for one launch.
struct Launch {
  Kernel kernel;
  size_t first;
  int count;
  int grains;
};

// The tables of all launches.
struct Tables {
  std::vector<Measured> tensors;
  std::vector<View> views;
  std::vector<Part> parts;
  std::vector<Launch> launches;
  int64_t sums = 0, out = 0;

  // A tensor for the last launch.
  void add(const Job& job) {
    const Tensor& tensor = *job.tensor;
    Measured here = {};
    here.elements = tensor.elements;
    here.begin = job.begin;
    here.grain = grain_of(tensor.elements);
    here.first = launches.back().grains;
    here.grains = static_cast<int>((tensor.elements + here.grain - 1) / here.grain);
    here.view = static_cast<int64_t>(views.size());
    here.part = static_cast<int64_t>(parts.size());
    here.sum = sums;
    here.out = out;
    here.models = tensor.models;
    here.inputs = tensor.inputs;
    tensors.push_back(here);
    views.insert(views.end(), tensor.views, tensor.views + tensor.inputs);
    if (job.parts) parts.insert(parts.end(), job.parts, job.parts + tensor.models);
    sums += here.grains * job.width;
    out += job.width;
    launches.back().grains += here.grains;
    ++launches.back().count;
  }
};

// Measures all tensors; hands each one's sums to `collect(t, sums)`.
template <class Collect>
void run(const std::vector<Job>& jobs, cudaStream_t stream, const Collect& collect) {
  std::vector<std::vector<size_t>> alike;  // those of one kernel
  std::map<Kernel, size_t> known;
  for (size_t t = 0; t < jobs.size(); ++t) {
    const size_t place = known.emplace(jobs[t].kernel(), alike.size()).first->second;
    if (place == alike.size()) alike.emplace_back();
    alike[place].push_back(t);
  }
  if (jobs.empty()) return;
  Tables tables;
  for (const std::vector<size_t>& each : alike) {
    tables.launches.push_back({jobs[each.front()].kernel(), tables.tensors.size(), 0, 0});
    for (const size_t t : each) tables.add(jobs[t]);
  }
  Desk desk(stream);
  const size_t at_tensors = desk.put(tables.tensors), at_views = desk.put(tables.views);
  const size_t at_parts = desk.put(tables.parts), at_done = desk.put(std::vector<int>(jobs.size()));
  const auto out = static_cast<size_t>(tables.out);
  const size_t at_out = desk.put(std::vector<double>(out));  // those of no elements stay zero
  desk.send(static_cast<size_t>(tables.sums) * sizeof(double));
  for (const Launch& each : tables.launches) {
    if (each.grains == 0) continue;
    const Measures all = {desk.on_device<Measured>(at_tensors) + each.first,
                          each.count,
                          each.grains,
                          desk.on_device<View>(at_views),
                          desk.on_device<Part>(at_parts),
                          reinterpret_cast<double*>(desk.scratch()),
                          desk.on_device<int>(at_done) + each.first,
                          desk.on_device<double>(at_out)};
    const int64_t most = resident_blocks(each.kernel, MEASURE_THREADS, MEASURE_SHARED);
    const int blocks = static_cast<int>(std::min<int64_t>(each.grains, most));
    launch(each.kernel, blocks, MEASURE_THREADS, MEASURE_SHARED, stream, all);
  }
  const double* found = desk.fetch<double>(at_out, out);
  size_t place = 0;
  for (const std::vector<size_t>& each : alike) {
    for (const size_t t : each) collect(t, found + tables.tensors[place++].out);
  }
}

constexpr Kernel GRAM[LAYOUTS] = {measure_kernel<Gram<Layout::F32>>, measure_kernel<Gram<Layout::F16>>,
                                  measure_kernel<Gram<Layout::BF16>>, measure_kernel<Gram<Layout::ANY>>};

// Of norms only what is common is compiled for its layout: each kernel takes a second for each card.
constexpr bool is_common(Keep keep) {
  return keep == Keep::ALL || keep == Keep::ABOVE || keep == Keep::BERNOULLI;
}

template <Keep keep>
constexpr Kernel NORMS_OF[LAYOUTS] = {measure_kernel<Norms<keep, Layout::ANY>>,
                                      measure_kernel<Norms<keep, Layout::ANY>>,
                                      measure_kernel<Norms<keep, is_common(keep) ? Layout::BF16 : Layout::ANY>>,
                                      measure_kernel<Norms<keep, Layout::ANY>>};

const Kernel* norms_of(Keep keep) {
  switch (keep) {
    case Keep::ALL: return NORMS_OF<Keep::ALL>;
    case Keep::ABOVE: return NORMS_OF<Keep::ABOVE>;
    case Keep::BERNOULLI: return NORMS_OF<Keep::BERNOULLI>;
    case Keep::BAND: return NORMS_OF<Keep::BAND>;
    default: return NORMS_OF<Keep::CLIP>;
  }
}

}  // namespace

void gram(const std::vector<Tensor>& tensors, const std::vector<double*>& products, cudaStream_t stream) {
  std::vector<Job> jobs;
  for (const Tensor& tensor : tensors) jobs.push_back({&tensor, GRAM, gram_width(tensor.models), 0, nullptr});
  run(jobs, stream, [&](size_t t, const double* sums) {
    const int models = tensors[t].models;
    for (int row = 0; row < models; ++row) {
      for (int column = row; column < models; ++column) {
        products[t][row * models + column] = products[t][column * models + row] = sums[row * models + column];
      }
    }
  });
}

void norms(const std::vector<Tensor>& tensors, const std::vector<const Sweep*>& sweeps,
           const std::vector<const Part*>& parts, const std::vector<int64_t>& begins, const std::vector<double*>& sums,
           cudaStream_t stream) {
  std::vector<Job> jobs;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Kernel* kernels = norms_of(static_cast<Keep>(sweeps[t]->keep));
    jobs.push_back({&tensors[t], kernels, norms_width(tensors[t].models), begins[t], parts[t]});
  }
  run(jobs, stream, [&](size_t t, const double* found) {
    for (int64_t i = 0; i < norms_width(tensors[t].models); ++i) {
      sums[t][i] = i % 3 == 1 ? std::sqrt(found[i]) : found[i];
    }
  });
}

size_t measuring_bytes(const Most& most) {
  const int64_t width = std::max(gram_width(most.models), norms_width(most.models));
  const int64_t sums = (most.elements / LEAST_GRAIN + most.tensors) * most.settings * width;
  return static_cast<size_t>(sums) * sizeof(double);
}

}  // namespace fastmerge
