// The ops of csrc/cpu by the kernels of NEON, for tests/neon_emulator.py to run under an emulator: requests come on
// standard input, answers go to standard output, both as arrays with their size in bytes before them.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cpu/ops.h"

namespace fastmerge {
extern const Kernels kernels_neon;
}

using namespace fastmerge;

namespace {

// --- arrays ---

void take(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(0);  // nobody asks any more
}

template <class T>
std::vector<T> received() {
  int64_t bytes;
  take(&bytes, sizeof bytes);
  std::vector<T> values(static_cast<size_t>(bytes) / sizeof(T));
  take(values.data(), static_cast<size_t>(bytes));
  return values;
}

void send(const void* from, int64_t bytes) {
  fwrite(&bytes, sizeof bytes, 1, stdout);
  fwrite(from, 1, static_cast<size_t>(bytes), stdout);
}

template <class T>
void send(const std::vector<T>& values) {
  send(values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
}

// So many bytes between guards, as misaligned as they are at an address of the other side.
struct Memory {
  static constexpr char GUARD = '\xa5';
  static constexpr int64_t LINE_BYTES = 64;

  Memory(uint64_t address, int64_t count)
      : bytes(count), whole(static_cast<size_t>(count + 3 * LINE_BYTES), GUARD), start(whole.data() + LINE_BYTES) {
    start += (address - reinterpret_cast<uint64_t>(start)) % LINE_BYTES;
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(start); }
  void check() const {
    for (const char& byte : whole) {
      if ((&byte < start || &byte >= start + bytes) && byte != GUARD) {
        fprintf(stderr, "written outside of the output\n");
        abort();
      }
    }
  }

  int64_t bytes;
  std::vector<char> whole;
  char* start;
};

// --- what every op but `lowrank` is given ---

struct Request {
  std::vector<Row> rows = received<Row>();
  std::vector<View> views = received<View>();
  std::vector<Sweep> sweeps = received<Sweep>();
  std::vector<Part> parts = received<Part>();
  std::vector<Target> targets = received<Target>();
  std::vector<int64_t> ranks = received<int64_t>();
  std::vector<std::unique_ptr<Memory>> inputs, outputs;
  std::vector<Tensor> tensors;

  Request() {
    View* view = views.data();
    Target* target = targets.data();
    for (const Row& row : rows) {
      tensors.push_back({view, row.elements, row.models, row.inputs, row.begin});
      for (int32_t i = 0; i < row.inputs; ++i, ++view) {
        inputs.push_back(std::make_unique<Memory>(view->address, row.elements * size_of(dtype_of(*view))));
        take(inputs.back()->start, static_cast<size_t>(inputs.back()->bytes));
        view->address = inputs.back()->address();
      }
      for (int32_t i = 0; target != targets.data() + targets.size() && i < row.settings; ++i, ++target) {
        const int64_t bytes = row.elements * size_of(static_cast<DType>(target->dtype));
        outputs.push_back(std::make_unique<Memory>(static_cast<uint64_t>(target->offset), bytes));
        target->offset = static_cast<int64_t>(outputs.back()->address());
      }
    }
  }

  size_t parts_of(size_t t) const {
    return static_cast<size_t>(rows[t].settings) * static_cast<size_t>(rows[t].models);
  }
};

struct Merges {
  explicit Merges(const Request& request)
      : nonfinite(request.views.size()), first(request.views.size(), -1), overflow(request.targets.size()) {
    size_t view = 0, setting = 0, part = 0;
    for (size_t t = 0; t < request.rows.size(); ++t) {
      const Row& row = request.rows[t];
      all.push_back({request.tensors[t], row.settings, request.sweeps.data() + setting, request.parts.data() + part,
                     request.targets.data() + setting, nonfinite.data() + view, first.data() + view,
                     overflow.data() + setting});
      view += static_cast<size_t>(row.inputs);
      setting += static_cast<size_t>(row.settings);
      part += request.parts_of(t);
    }
  }
  void answer(const Request& request) const {
    send(nonfinite);
    send(first);
    send(overflow);
    for (const auto& output : request.outputs) {
      output->check();
      send(output->start, output->bytes);
    }
  }

  std::vector<Merge> all;
  std::vector<int64_t> nonfinite, first, overflow;
};

void answer(const std::vector<Cut>& cuts) {
  std::vector<float> magnitudes;
  std::vector<int64_t> ends;
  for (const Cut& cut : cuts) {
    magnitudes.push_back(cut.magnitude);
    ends.push_back(cut.ties_end);
  }
  send(magnitudes);
  send(ends);
}

// --- the ops ---

void merge(const Crew& crew) {
  const Request request;
  Merges merges(request);
  fastmerge::merge(merges.all, crew);
  merges.answer(request);
}

void merge_ranked(const Crew& crew) {
  const Request request;
  Merges merges(request);
  std::vector<Cut> cuts(request.ranks.size());
  std::vector<const int64_t*> ranks;
  std::vector<Cut*> starts;
  size_t model = 0;
  for (const Row& row : request.rows) {
    ranks.push_back(request.ranks.data() + model);
    starts.push_back(cuts.data() + model);
    model += static_cast<size_t>(row.models);
  }
  fastmerge::merge_ranked(merges.all, ranks, starts, crew);
  merges.answer(request);
  answer(cuts);
}

void gram(const Crew& crew) {
  const Request request;
  size_t total = 0;
  for (const Row& row : request.rows) total += static_cast<size_t>(row.models * row.models);
  std::vector<double> products(total);
  std::vector<double*> starts;
  size_t start = 0;
  for (const Row& row : request.rows) {
    starts.push_back(products.data() + start);
    start += static_cast<size_t>(row.models * row.models);
  }
  fastmerge::gram(request.tensors, starts, crew);
  send(products);
}

void norms(const Crew& crew) {
  const Request request;
  std::vector<double> sums(request.parts.size() * 6);
  std::vector<const Sweep*> sweeps;
  std::vector<const Part*> parts;
  std::vector<double*> starts;
  size_t part = 0;
  for (size_t t = 0; t < request.rows.size(); part += request.parts_of(t), ++t) {
    sweeps.push_back(request.sweeps.data() + t);
    parts.push_back(request.parts.data() + part);
    starts.push_back(sums.data() + part * 6);
  }
  fastmerge::norms(request.tensors, sweeps, parts, starts, crew);
  send(sums);
}

void threshold(const Crew& crew) {
  const Request request;
  std::vector<Group> groups;
  std::vector<Cut> cuts(request.ranks.size());
  std::vector<const int64_t*> ranks;
  std::vector<Cut*> starts;
  size_t model = 0;
  for (size_t t = 0; t < request.rows.size(); ++t) {
    if (t == 0 || request.rows[t].group != request.rows[t - 1].group) {
      groups.emplace_back();
      ranks.push_back(request.ranks.data() + model);
      starts.push_back(cuts.data() + model);
      model += static_cast<size_t>(request.rows[t].models);
    }
    groups.back().push_back(request.tensors[t]);
  }
  fastmerge::threshold(groups, ranks, starts, crew);
  answer(cuts);
}

void lowrank(const Crew& crew) {
  const auto sizes = received<int64_t>();  // dtype, rank, rows, width, the address of the weights
  const auto weights = received<char>();
  const auto left = received<float>(), right = received<float>(), scaling = received<float>();
  Memory input(static_cast<uint64_t>(sizes[4]), static_cast<int64_t>(weights.size()));
  Memory output(0, sizes[2] * sizes[3] * 4);
  std::copy(weights.begin(), weights.end(), input.start);
  fastmerge::lowrank({input.start, static_cast<DType>(sizes[0]), static_cast<int>(sizes[1]), sizes[3], left.data(),
                      right.data(), scaling[0], reinterpret_cast<float*>(output.start)},
                     sizes[2], crew);
  output.check();
  send(output.start, output.bytes);
}

}  // namespace

int main() {
  const std::string name = kernels_neon.name;
  send(name.data(), static_cast<int64_t>(name.size()));
  void (*const ops[])(const Crew&) = {merge, merge_ranked, gram, norms, threshold, lowrank};
  for (;;) {
    fflush(stdout);
    const auto asked = received<int64_t>();  // op, threads, tile
    ops[asked[0]]({&kernels_neon, static_cast<int>(asked[1]), asked[2], [](int64_t) {}});
  }
}
