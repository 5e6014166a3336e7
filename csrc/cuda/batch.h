// Merges as the tables of a launch, and the counts that come back: the host's half of `merge` and `merge_ranked`.
#pragma once
#include <map>
#include <vector>

#include "sweeping.h"

namespace fastmerge {
namespace {

constexpr size_t KEEPS = 5;
constexpr size_t VOTES = 4 * 3;  // no election, or one of three kinds; with one of three masses

// The number of a combination of stages: keep x VOTES + vote.
inline size_t stages_of(const Sweep& sweep) {
  const auto mean = static_cast<Mean>(sweep.mean);
  const auto by = mean == Mean::SUM ? Mass::DIVISOR : mean == Mean::CONTRIBUTORS ? Mass::CONTRIBUTORS : Mass::AGREEING;
  return sweep.keep * VOTES + sweep.elect * size_t{3} +
         static_cast<size_t>(mass_of(static_cast<Elect>(sweep.elect), by));
}

constexpr Keep keep_of(size_t stages) {
  return static_cast<Keep>(stages / VOTES);
}

constexpr Elect elect_of(size_t stages) {
  return static_cast<Elect>(stages % VOTES / 3);
}

constexpr Mass mass_of(size_t stages) {
  return mass_of(elect_of(stages), static_cast<Mass>(stages % 3));
}

inline std::map<size_t, std::vector<int>> settings_by_stages(const Merge& merge) {
  std::map<size_t, std::vector<int>> settings;
  for (int setting = 0; setting < merge.settings; ++setting) {
    settings[stages_of(merge.sweeps[setting])].push_back(setting);
  }
  return settings;
}

// Whether plain.h sweeps a tensor with this setting, whose stages it knows.
inline bool is_plain(const Merge& merge, int setting) {
  const Tensor& tensor = merge.tensor;
  const Sweep& sweep = merge.sweeps[setting];
  const Part* parts = merge.parts + static_cast<int64_t>(setting) * tensor.models;
  const Target& target = merge.targets[setting];
  const auto fits = [](uint64_t address, DType dtype) { return address % 16 == 0 && dtype == DType::BF16; };
  bool plain =
      tensor.models <= PLAIN_MODELS && fits(static_cast<uint64_t>(target.offset), static_cast<DType>(target.dtype));
  for (int i = 0; i < tensor.inputs; ++i) plain &= fits(tensor.views[i].address, dtype_of(tensor.views[i]));
  for (int m = 0; m < tensor.models; ++m) plain &= parts[m].rescale == 1.0f;
  const bool has_base = tensor.inputs > tensor.models;
  if (static_cast<Elect>(sweep.elect) != Elect::NONE) {
    plain &= has_base && is_tame(sweep.lambda) && static_cast<TieVote>(sweep.tie_vote) == TieVote::POSITIVE;
    for (int m = 0; m < tensor.models; ++m) plain &= is_tame(parts[m].mass);
  }
  return plain && (has_base || static_cast<Keep>(sweep.keep) == Keep::ALL) && is_tame(sweep.divisor);
}

// What the items of one launch point at, gathered: their places are within each table, until `put` moves them.
struct Gathered {
  std::vector<Item> items;
  std::vector<View> views;
  std::vector<Sweep> sweeps;
  std::vector<Part> parts;
  std::vector<Target> targets;
  int64_t tiles = 0;

  // A tensor and some of its settings, in tiles of so many elements.
  void add(const Merge& merge, const std::vector<int>& settings, int64_t tile) {
    const Tensor& tensor = merge.tensor;
    Item item = {};
    item.elements = tensor.elements;
    item.begin = merge.begin;
    item.first_tile = tiles;
    item.views = bytes_in(views);
    item.sweeps = bytes_in(sweeps);
    item.parts = bytes_in(parts);
    item.targets = bytes_in(targets);
    item.models = tensor.models;
    item.inputs = tensor.inputs;
    item.settings = static_cast<int>(settings.size());
    item.plain = settings.size() == 1 && is_plain(merge, settings[0]);
    views.insert(views.end(), tensor.views, tensor.views + tensor.inputs);
    for (const int setting : settings) {
      const Part* first = merge.parts + static_cast<int64_t>(setting) * tensor.models;
      sweeps.push_back(merge.sweeps[setting]);
      parts.insert(parts.end(), first, first + tensor.models);
      targets.push_back(merge.targets[setting]);
    }
    tiles += (tensor.elements + tile - 1) / tile;
    items.push_back(item);
  }

  // Once: `append` copies a table to where the kernel finds it, and returns its place there; so does this, the items'.
  template <class Append>
  int64_t put(const Append& append) {
    const auto views_at = append(views), sweeps_at = append(sweeps), parts_at = append(parts);
    const auto targets_at = append(targets);
    for (Item& item : items) {
      item.views += static_cast<int64_t>(views_at);
      item.sweeps += static_cast<int64_t>(sweeps_at);
      item.parts += static_cast<int64_t>(parts_at);
      item.targets += static_cast<int64_t>(targets_at);
    }
    return static_cast<int64_t>(append(items));
  }

 private:
  template <class T>
  static int64_t bytes_in(const std::vector<T>& table) {
    return static_cast<int64_t>(table.size() * sizeof(T));
  }
};

// What the kernels count. The counts are the first table of a launch, so that places among them are places in it.
class Counts {
 public:
  // Room for a tensor's counts. Its items are told of them one after another, with the settings that they have.
  void add(const Merge& merge) {
    const auto inputs = static_cast<size_t>(merge.tensor.inputs);
    tensors_.push_back({&merge, values.size(), {}});
    values.resize(values.size() + inputs, 0);
    values.resize(values.size() + inputs, ~Count{0});
    values.resize(values.size() + static_cast<size_t>(merge.settings), 0);
  }

  void tell(Item& item, const std::vector<int>& settings) {
    Counted& counted = tensors_.back();
    const auto place = [&](size_t index) { return static_cast<int64_t>((counted.at + index) * sizeof(Count)); };
    const auto inputs = static_cast<size_t>(item.inputs);
    if (counted.order.empty()) {  // the first item alone counts what is not finite
      item.nonfinite = place(0);
      item.first = place(inputs);
    }
    item.overflow = place(2 * inputs + counted.order.size());
    counted.order.insert(counted.order.end(), settings.begin(), settings.end());
  }

  void collect(const Count* found) const {
    for (const Counted& counted : tensors_) {
      const Merge& merge = *counted.merge;
      const Count* next = found + counted.at;
      for (int i = 0; i < merge.tensor.inputs; ++i) merge.nonfinite[i] = static_cast<int64_t>(*next++);
      for (int i = 0; i < merge.tensor.inputs; ++i) merge.first[i] = static_cast<int64_t>(*next++);  // all ones: -1
      for (const int setting : counted.order) merge.overflow[setting] = static_cast<int64_t>(*next++);
    }
  }

  std::vector<Count> values{0};  // place 0 stands for none

 private:
  struct Counted {
    const Merge* merge;
    size_t at;
    std::vector<int> order;  // of its settings
  };
  std::vector<Counted> tensors_;
};

}  // namespace
}  // namespace fastmerge
