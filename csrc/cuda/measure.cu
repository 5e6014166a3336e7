// The ops `gram` and `norms`: one launch that measures the grains of all tensors, one that adds them up.
#include <algorithm>
#include <cmath>

#include "desk.h"
#include "measure.h"
#include "ops.h"

namespace fastmerge {
namespace {

__device__ const Measured& tensor_of(const Measures& all, int64_t grain) {
  int first = 0, last = all.count - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (all.tensors[middle].grain <= grain) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return all.tensors[first];
}

template <class What>
__global__ void __launch_bounds__(MEASURE_THREADS, 2) grains_kernel(const __grid_constant__ Measures all) {
  for (int64_t grain = blockIdx.x; grain < all.grains; grain += gridDim.x) {
    const Measured& tensor = tensor_of(all, grain);
    const int64_t number = grain - tensor.grain, from = number * GRAIN, end = from + GRAIN;
    measure(What(), tensor, all.views + tensor.view, all.parts + tensor.part, from,
            end < tensor.elements ? end : tensor.elements, all.sums + tensor.sum + number * What::width(tensor));
  }
}

template <class What>
__global__ void __launch_bounds__(MEASURE_THREADS) totals_kernel(const __grid_constant__ Measures all) {
  for (int number = blockIdx.x; number < all.count; number += gridDim.x) {
    const Measured& tensor = all.tensors[number];
    const int64_t grains = (tensor.elements + GRAIN - 1) / GRAIN;
    const int width = What::width(tensor);
    for (int sum = 0; sum < width; ++sum) {
      const auto is_largest = [sum](int) { return What::is_largest(sum); };
      double total[1] = {0.0};
      for (int64_t grain = threadIdx.x; grain < grains; grain += MEASURE_THREADS) {
        const double here = all.sums[tensor.sum + grain * width + sum];
        total[0] = is_largest(0) ? (here > total[0] ? here : total[0]) : total[0] + here;
      }
      add_up(total, is_largest, [&](int, double value) { all.out[tensor.out + sum] = value; });
    }
  }
}

// Measures all tensors; hands each one's sums to `collect(t, sums)`.
template <class What, class Width, class Collect>
void run(const std::vector<Tensor>& tensors, std::vector<Measured> measured, const std::vector<Part>& parts,
         cudaStream_t stream, const Width& width, const Collect& collect) {
  if (tensors.empty()) return;
  std::vector<View> views;
  int64_t grains = 0, sums = 0, out = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t here = (tensors[t].elements + GRAIN - 1) / GRAIN;
    measured[t].elements = tensors[t].elements;
    measured[t].models = tensors[t].models;
    measured[t].inputs = tensors[t].inputs;
    measured[t].grain = grains;
    measured[t].view = static_cast<int64_t>(views.size());
    measured[t].sum = sums;
    measured[t].out = out;
    views.insert(views.end(), tensors[t].views, tensors[t].views + tensors[t].inputs);
    grains += here;
    sums += here * width(t);
    out += width(t);
  }
  Desk desk(stream);
  const size_t at_tensors = desk.put(measured), at_views = desk.put(views), at_parts = desk.put(parts);
  const size_t at_out = desk.put(std::vector<double>(static_cast<size_t>(out)));
  desk.send(static_cast<size_t>(sums) * sizeof(double));
  const Measures all = {
      desk.on_device<Measured>(at_tensors), static_cast<int>(tensors.size()), grains,
      desk.on_device<View>(at_views),       desk.on_device<Part>(at_parts),   reinterpret_cast<double*>(desk.scratch()),
      desk.on_device<double>(at_out)};
  const auto launch_on = [&](void (*kernel)(Measures), int64_t work) {
    const int64_t most = resident_blocks(kernel, MEASURE_THREADS, MEASURE_SHARED);
    launch(kernel, static_cast<int>(std::min(work, most)), MEASURE_THREADS, MEASURE_SHARED, stream, all);
  };
  if (grains > 0) launch_on(grains_kernel<What>, grains);
  launch_on(totals_kernel<What>, all.count);
  const double* found = desk.fetch<double>(at_out, static_cast<size_t>(out));
  for (size_t t = 0; t < tensors.size(); ++t) collect(t, found + measured[t].out);
}

}  // namespace

void gram(const std::vector<Tensor>& tensors, const std::vector<double*>& products, cudaStream_t stream) {
  const auto width = [&](size_t t) { return static_cast<int64_t>(tensors[t].models) * tensors[t].models; };
  run<Gram>(tensors, std::vector<Measured>(tensors.size()), {}, stream, width, [&](size_t t, const double* sums) {
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
  std::vector<Measured> measured(tensors.size());
  std::vector<Part> all;
  for (size_t t = 0; t < tensors.size(); ++t) {
    measured[t].begin = begins[t];
    measured[t].keep = static_cast<Keep>(sweeps[t]->keep);
    measured[t].part = static_cast<int64_t>(all.size());
    all.insert(all.end(), parts[t], parts[t] + tensors[t].models);
  }
  const auto width = [&](size_t t) { return static_cast<int64_t>(tensors[t].models) * NORMS; };
  run<Norms>(tensors, std::move(measured), all, stream, width, [&](size_t t, const double* found) {
    for (int64_t i = 0; i < width(t); ++i) sums[t][i] = i % 3 == 1 ? std::sqrt(found[i]) : found[i];
  });
}

size_t measuring_bytes(const Most& most) {
  const int64_t width = std::max<int64_t>(int64_t{most.models} * most.models, int64_t{most.models} * NORMS);
  const int64_t sums = (most.elements / GRAIN + most.tensors) * most.settings * width;
  return static_cast<size_t>(sums) * sizeof(double);
}

}  // namespace fastmerge
