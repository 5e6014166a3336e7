// Runs the kernels of AVX2 over fixed inputs, case after case, for count.py to have their instructions counted:
// those between entry to and return from `counted`. Prints the names of the cases, and how many elements each is over.
#include <cstdio>
#include <functional>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace fastmerge {
extern const Kernels kernels_avx2;
}

using namespace fastmerge;

namespace {

constexpr int64_t CHUNKS = 16, ELEMENTS = CHUNKS * CHUNK;
constexpr int MODELS = 4, INPUTS = MODELS + 1;

// A bfloat16 of a number of steps of 2^-14, fewer than 256.
uint16_t bf16(int steps) {
  return to_bf16(static_cast<float>(steps) * 0x1p-14f);
}

// A base of some hundred values, and models a few steps from it, as fine-tuning leaves them.
std::vector<std::vector<uint16_t>> fixed_inputs() {
  std::vector<std::vector<uint16_t>> inputs(INPUTS, std::vector<uint16_t>(ELEMENTS));
  uint32_t state = 1;
  const auto below = [&state](int limit) {
    state = state * 1664525 + 1013904223;
    return static_cast<int>((state >> 16) % static_cast<uint32_t>(limit));
  };
  for (size_t at = 0; at < ELEMENTS; ++at) {
    const int base = below(200) - 100;
    for (int model = 0; model < MODELS; ++model) {
      inputs[static_cast<size_t>(model)][at] = bf16(base + below(12) + below(12) - 11);
    }
    inputs[MODELS][at] = bf16(base);
  }
  return inputs;
}

Sweep sweep_of(Keep keep, Elect elect = Elect::NONE, float divisor = 1.0f) {
  const Mean mean = elect == Elect::NONE ? Mean::SUM : Mean::WEIGHTS;
  return {static_cast<uint8_t>(keep), static_cast<uint8_t>(elect), 0, static_cast<uint8_t>(mean), divisor, 1.0f, 0.0f};
}

}  // namespace

extern "C" __attribute__((noinline)) void counted(const std::function<void(int64_t)>& chunk) {
  for (int64_t begin = 0; begin < ELEMENTS; begin += CHUNK) chunk(begin);
}

int main() {
  const Kernels& kernels = kernels_avx2;
  const auto inputs = fixed_inputs();
  std::vector<uint16_t> out(ELEMENTS);
  std::vector<char> block(Scratch::bytes(INPUTS) + 64);
  Scratch scratch(block.data() + 64 - reinterpret_cast<uintptr_t>(block.data()) % 64, INPUTS);
  double sums[64] = {};
  Census census = {1, INFINITE, 20, 0, {}};
  Tally tally = {CANDIDATES, {}, {}, {}};
  for (int i = 0; i < CANDIDATES; ++i) tally.value[i] = to_bits(static_cast<float>(9 - i) * 0x1p-14f);

  const auto view = [&](int input) { return View{reinterpret_cast<uint64_t>(inputs[input].data()), 2}; };
  const View models_and_base[] = {view(0), view(1), view(2), view(MODELS)};
  const View all[] = {view(0), view(1), view(2), view(3), view(MODELS)};
  const auto tensor_of = [](const View* views, int models, bool has_base) {
    return Tensor{views, ELEMENTS, models, models + has_base};
  };
  const Tensor deltas = tensor_of(models_and_base, 3, true), one = tensor_of(all, 1, false),
               two = tensor_of(all, 2, false);
  const auto parts_of = [](float rescale) {
    std::vector<Part> parts;
    for (uint64_t model = 0; model < MODELS; ++model) {
      parts.push_back({0.3f, rescale, 7 * 0x1p-14f, 0.3f, ELEMENTS / 2, uint64_t{1} << 30, model, ELEMENTS / 3,
                       20 * 0x1p-14f, 0.0f});
    }
    return parts;
  };
  const std::vector<Part> parts = parts_of(1.0f), rescaled = parts_of(4.0f), whole = {{1, 1, 0, 1, 0, 0, 0, 0, 0, 0}};

  const auto count = [](const char* name, const std::function<void(int64_t)>& chunk) {
    std::printf("%s %lld\n", name, static_cast<long long>(ELEMENTS));
    counted(chunk);
  };
  const auto merge = [&](const char* name, const Tensor& tensor, const Sweep& sweep, const std::vector<Part>& given,
                         bool again = false) {
    count(name, [&](int64_t begin) {
      const Output output = {sweep.lambda, reinterpret_cast<char*>(&out[begin]), false};
      kernels.merge(tensor, sweep, given.data(), begin, CHUNK, DType::BF16, &output, 1, again, nullptr, scratch);
    });
  };
  merge("linear", tensor_of(all, 3, false), sweep_of(Keep::ALL, Elect::NONE, 0.9f), parts);
  merge("linear, again", tensor_of(all, 3, false), sweep_of(Keep::ALL, Elect::NONE, 0.9f), parts, true);
  merge("slerp", two, sweep_of(Keep::ALL), parts);
  merge("passthrough", one, sweep_of(Keep::ALL), whole);
  merge("task_arithmetic", deltas, sweep_of(Keep::ALL), parts);
  merge("ties", deltas, sweep_of(Keep::ABOVE, Elect::WEIGHTED), parts);
  merge("breadcrumbs", deltas, sweep_of(Keep::BAND), parts);
  merge("nearswap", tensor_of(all + 3, 1, true), sweep_of(Keep::CLIP), parts);
  Sweep ram = sweep_of(Keep::ABOVE);
  ram.mean = static_cast<uint8_t>(Mean::CONTRIBUTORS);
  merge("ram", deltas, ram, parts);
  merge("dare_linear", deltas, sweep_of(Keep::BERNOULLI), rescaled);
  merge("dare_ties", deltas, sweep_of(Keep::BERNOULLI, Elect::WEIGHTED), rescaled);

  std::vector<uint16_t> counts(static_cast<size_t>(deltas.models) * 2);
  const Sweep ties = sweep_of(Keep::ABOVE, Elect::WEIGHTED);
  count("ties, counted", [&](int64_t begin) {
    const Output output = {ties.lambda, reinterpret_cast<char*>(&out[begin]), false};
    kernels.merge(deltas, ties, parts.data(), begin, CHUNK, DType::BF16, &output, 1, false, counts.data(), scratch);
  });
  const Tensor four = tensor_of(all, 4, true);
  count("gram of 2", [&](int64_t begin) { kernels.gram(two, begin, CHUNK, scratch, sums); });
  count("gram of 4", [&](int64_t begin) { kernels.gram(four, begin, CHUNK, scratch, sums); });
  const auto measure = [&](const char* name, const std::function<void(int64_t)>& chunk) {
    kernels.deltas(deltas, 0, CHUNK, true, scratch);
    count(name, chunk);
  };
  count("deltas", [&](int64_t begin) { kernels.deltas(deltas, begin, CHUNK, true, scratch); });
  measure("census", [&](int64_t) { kernels.census(scratch.wide, CHUNK, census); });
  measure("tally", [&](int64_t) { kernels.tally(scratch.wide, CHUNK, tally); });
  for (const Keep keep : {Keep::ALL, Keep::ABOVE, Keep::BERNOULLI, Keep::BAND}) {
    const char* names[] = {"norms", "norms above", "norms at random", "norms in a band"};
    measure(names[static_cast<int>(keep)], [&, keep](int64_t begin) {
      kernels.norms(deltas, sweep_of(keep), parts.data(), begin, CHUNK, scratch, sums);
    });
  }
}
