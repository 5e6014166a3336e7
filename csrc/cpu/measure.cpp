// The ops `gram` and `norms`: sums over grains of a fixed size, added up in the order of the grains whatever the
// threads.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace fastmerge {
namespace {

constexpr int64_t GRAIN = 64 * CHUNK;

// For each chunk of each grain of each tensor: lets `measure(t, begin, count, scratch, sums)` add to the grain's
// `size(t)` sums; then hands the sums over in order to `collect(t, sums)`.
template <class Size, class Measure, class Collect>
void by_grains(const std::vector<Tensor>& tensors, const Crew& crew, const Size& size, const Measure& measure,
               const Collect& collect) {
  struct Grain {
    size_t tensor;
    int64_t begin;
    size_t sums;
  };
  std::vector<Grain> grains;
  size_t total = 0, scratch_bytes = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    scratch_bytes = std::max(scratch_bytes, Scratch::bytes(tensors[t].inputs));
    for (int64_t begin = 0; begin < tensors[t].elements; begin += GRAIN, total += size(t)) {
      grains.push_back({t, begin, total});
    }
  }
  std::vector<double> sums(total);
  parallel(static_cast<int64_t>(grains.size()), crew.threads, scratch_bytes, crew.tick, [&](int64_t item, char* block) {
    const Grain& grain = grains[static_cast<size_t>(item)];
    const Tensor& tensor = tensors[grain.tensor];
    Scratch scratch(block, tensor.inputs);
    const int64_t end = std::min(grain.begin + GRAIN, tensor.elements);
    for (int64_t at = grain.begin; at < end; at += CHUNK) {
      const int count = static_cast<int>(std::min<int64_t>(CHUNK, end - at));
      measure(grain.tensor, at, count, scratch, sums.data() + grain.sums);
    }
    return bytes_read(tensor, end - grain.begin);
  });
  for (const Grain& grain : grains) collect(grain.tensor, sums.data() + grain.sums);
}

}  // namespace

void gram(const std::vector<Tensor>& tensors, const std::vector<double*>& products, const Crew& crew) {
  const auto models = [&](size_t t) { return static_cast<size_t>(tensors[t].models); };
  by_grains(
      tensors, crew, [&](size_t t) { return models(t) * models(t); },
      [&](size_t t, int64_t begin, int count, Scratch& scratch, double* sums) {
        crew.kernels->gram(tensors[t], begin, count, scratch, sums);
      },
      [&](size_t t, const double* sums) {
        for (size_t row = 0; row < models(t); ++row) {
          for (size_t column = row; column < models(t); ++column) {
            products[t][row * models(t) + column] += sums[row * models(t) + column];
            products[t][column * models(t) + row] = products[t][row * models(t) + column];
          }
        }
      });
}

void norms(const std::vector<Tensor>& tensors, const std::vector<const Sweep*>& sweeps,
           const std::vector<const Part*>& parts, const std::vector<double*>& sums, const Crew& crew) {
  const auto size = [&](size_t t) { return static_cast<size_t>(tensors[t].models) * 6; };
  by_grains(
      tensors, crew, size,
      [&](size_t t, int64_t begin, int count, Scratch& scratch, double* here) {
        crew.kernels->deltas(tensors[t], begin, count, false, scratch);
        crew.kernels->norms(tensors[t], *sweeps[t], parts[t], begin, count, scratch, here);
      },
      [&](size_t t, const double* here) {
        for (size_t i = 0; i < size(t); ++i)
          sums[t][i] = i % 3 == 2 ? std::max(sums[t][i], here[i]) : sums[t][i] + here[i];
      });
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (size_t i = 1; i < size(t); i += 3) sums[t][i] = std::sqrt(sums[t][i]);
  }
}

}  // namespace fastmerge
