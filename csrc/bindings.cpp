// The Python face of the CPU core: flat record arrays of addresses in, flat arrays of numbers out, the GIL released
// between.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include "cpu/ops.h"
#include "records.h"

namespace py = pybind11;
using namespace fastmerge;

namespace {

template <class T>
using Records = py::array_t<T, py::array::c_style>;

template <class T>
const T* at(const Records<T>& records, size_t index) {
  return records.data() + index;
}

// Random bits are drawn for a chunk at a time, whose counters have their upper words in common.
constexpr int64_t LONGEST_IN_PARTS = int64_t{1} << 35;

std::vector<Tensor> tensors_of(const Records<Row>& rows, const Records<View>& views) {
  std::vector<Tensor> tensors;
  size_t view = 0;
  for (py::ssize_t i = 0; i < rows.size(); ++i) {
    const Row& row = *at(rows, static_cast<size_t>(i));
    if (row.begin % 8 != 0 || (row.begin > 0 && row.begin + row.elements > LONGEST_IN_PARTS)) {
      throw std::invalid_argument("a part of a tensor begins at a multiple of 8, below 2^35");
    }
    tensors.push_back({at(views, view), row.elements, row.models, row.inputs, row.begin});
    view += static_cast<size_t>(row.inputs);
  }
  if (view != static_cast<size_t>(views.size())) throw std::invalid_argument("views do not match the tensors");
  return tensors;
}

Crew crew_of(const std::string& isa, int threads, int64_t tile, const py::object& tick, uint64_t hash = 0) {
  const Kernels* chosen = nullptr;
  for (int i = 0; i < KERNELS_COUNT; ++i) {
    if (isa == KERNELS[i]->name && !why_not(*KERNELS[i])) chosen = KERNELS[i];
  }
  if (!chosen) throw std::invalid_argument("no kernels for " + isa + " here");
  // The caller's thread comes up for air: signals are answered, progress is told; either may raise.
  const auto watch = [&tick](int64_t bytes) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!tick.is_none()) tick(bytes);
  };
  return {chosen, threads, tile, watch, reinterpret_cast<Hash>(hash)};
}

py::dict instruction_sets() {
  py::dict sets;
  for (int i = 0; i < KERNELS_COUNT; ++i) {
    const char* reason = why_not(*KERNELS[i]);
    sets[KERNELS[i]->name] = reason ? py::object(py::str(reason)) : py::none();
  }
  return sets;
}

// The merges of an op, and the arrays that they fill in.
struct Merges {
  Merges(const Records<Row>& rows, const Records<View>& views, const Records<Sweep>& sweeps, const Records<Part>& parts,
         const Records<Target>& targets, const Crew& crew)
      : nonfinite(views.size()), first(views.size()), overflow(targets.size()) {
    std::fill_n(nonfinite.mutable_data(), views.size(), 0);
    std::fill_n(first.mutable_data(), views.size(), -1);
    std::fill_n(overflow.mutable_data(), targets.size(), 0);
    const std::vector<Tensor> tensors = tensors_of(rows, views);
    size_t view = 0, setting = 0, part = 0;
    hashes.reserve(static_cast<size_t>(targets.size()));
    for (size_t t = 0; t < tensors.size(); ++t) {
      const auto settings = static_cast<size_t>(at(rows, t)->settings);
      for (size_t k = setting; k < setting + settings && k < static_cast<size_t>(targets.size()); ++k) {
        if (crew.hash && at(targets, k)->file < 0)
          throw std::invalid_argument("an output that is hashed goes to a file");
        hashes.emplace_back(crew.hash ? tensors[t].elements * size_of(static_cast<DType>(at(targets, k)->dtype)) : 0);
      }
      all.push_back({tensors[t], static_cast<int>(settings), at(sweeps, setting), at(parts, part), at(targets, setting),
                     nonfinite.mutable_data() + view, first.mutable_data() + view, overflow.mutable_data() + setting,
                     hashes.data() + setting});
      view += static_cast<size_t>(tensors[t].inputs);
      setting += settings;
      part += settings * static_cast<size_t>(tensors[t].models);
    }
    if (setting != static_cast<size_t>(targets.size()) || part != static_cast<size_t>(parts.size())) {
      throw std::invalid_argument("sweeps, parts and targets do not match the tensors");
    }
  }

  // Of each output, or of none.
  py::list hashes_of_outputs(const Crew& crew) const {
    py::list wholes;
    for (size_t k = 0; crew.hash && k < hashes.size(); ++k) {
      char whole[PieceHashes::SIZE];
      hashes[k].whole(crew.hash, whole);
      wholes.append(py::bytes(whole, sizeof whole));
    }
    return wholes;
  }

  std::vector<Merge> all;
  std::vector<PieceHashes> hashes;
  py::array_t<int64_t> nonfinite, first, overflow;
};

// What is kept of each model of each tensor or group: ranks in, cuts out.
struct Cuts {
  template <class Models>
  Cuts(const Records<int64_t>& ranks, size_t count, const Models& models_of) : all(static_cast<size_t>(ranks.size())) {
    size_t model = 0;
    for (size_t i = 0; i < count; ++i) {
      wanted.push_back(at(ranks, model));
      starts.push_back(all.data() + model);
      model += static_cast<size_t>(models_of(i));
    }
    if (model != all.size()) throw std::invalid_argument("ranks do not match the tensors");
  }
  py::array_t<float> magnitudes() const {
    py::array_t<float> values(static_cast<py::ssize_t>(all.size()));
    for (size_t i = 0; i < all.size(); ++i) values.mutable_data()[i] = all[i].magnitude;
    return values;
  }
  py::array_t<int64_t> ends() const {
    py::array_t<int64_t> values(static_cast<py::ssize_t>(all.size()));
    for (size_t i = 0; i < all.size(); ++i) values.mutable_data()[i] = all[i].ties_end;
    return values;
  }

  std::vector<Cut> all;
  std::vector<const int64_t*> wanted;
  std::vector<Cut*> starts;
};

py::tuple py_merge(const Records<Row>& rows, const Records<View>& views, const Records<Sweep>& sweeps,
                   const Records<Part>& parts, const Records<Target>& targets, const std::string& isa, int threads,
                   int64_t tile, const py::object& tick, uint64_t hash) {
  const Crew crew = crew_of(isa, threads, tile, tick, hash);
  Merges merges(rows, views, sweeps, parts, targets, crew);
  {
    const py::gil_scoped_release release;
    merge(merges.all, crew);
  }
  return py::make_tuple(merges.nonfinite, merges.first, merges.overflow, merges.hashes_of_outputs(crew));
}

py::tuple py_merge_ranked(const Records<Row>& rows, const Records<View>& views, const Records<Sweep>& sweeps,
                          const Records<Part>& parts, const Records<int64_t>& ranks, const Records<Target>& targets,
                          const std::string& isa, int threads, int64_t tile, const py::object& tick, uint64_t hash) {
  const Crew crew = crew_of(isa, threads, tile, tick, hash);
  Merges merges(rows, views, sweeps, parts, targets, crew);
  for (const Merge& each : merges.all) {
    if (each.tensor.begin != 0) throw std::invalid_argument("what is selected from is a whole tensor");
  }
  Cuts cuts(ranks, merges.all.size(), [&](size_t t) { return merges.all[t].tensor.models; });
  {
    const py::gil_scoped_release release;
    merge_ranked(merges.all, cuts.wanted, cuts.starts, crew);
  }
  return py::make_tuple(merges.nonfinite, merges.first, merges.overflow, merges.hashes_of_outputs(crew),
                        cuts.magnitudes(), cuts.ends());
}

py::array_t<double> py_gram(const Records<Row>& rows, const Records<View>& views, const std::string& isa, int threads,
                            const py::object& tick) {
  const std::vector<Tensor> tensors = tensors_of(rows, views);
  py::ssize_t total = 0;
  for (const Tensor& tensor : tensors) total += static_cast<py::ssize_t>(tensor.models) * tensor.models;
  py::array_t<double> products(total);
  std::fill_n(products.mutable_data(), total, 0.0);
  std::vector<double*> starts;
  double* start = products.mutable_data();
  for (const Tensor& tensor : tensors) {
    starts.push_back(start);
    start += static_cast<py::ssize_t>(tensor.models) * tensor.models;
  }
  const Crew crew = crew_of(isa, threads, 0, tick);
  const py::gil_scoped_release release;
  gram(tensors, starts, crew);
  return products;
}

py::array_t<double> py_norms(const Records<Row>& rows, const Records<View>& views, const Records<Sweep>& sweeps,
                             const Records<Part>& parts, const std::string& isa, int threads, const py::object& tick) {
  const std::vector<Tensor> tensors = tensors_of(rows, views);
  py::array_t<double> sums(parts.size() * 6);
  std::fill_n(sums.mutable_data(), sums.size(), 0.0);
  std::vector<const Sweep*> settings;
  std::vector<const Part*> firsts;
  std::vector<double*> starts;
  size_t part = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    settings.push_back(at(sweeps, t));
    firsts.push_back(at(parts, part));
    starts.push_back(sums.mutable_data() + part * 6);
    part += static_cast<size_t>(tensors[t].models);
  }
  const Crew crew = crew_of(isa, threads, 0, tick);
  const py::gil_scoped_release release;
  norms(tensors, settings, firsts, starts, crew);
  return sums;
}

// Rows of one group follow one another; ranks are groups x models, flat.
py::tuple py_threshold(const Records<Row>& rows, const Records<View>& views, const Records<int64_t>& ranks,
                       const std::string& isa, int threads, const py::object& tick) {
  const std::vector<Tensor> tensors = tensors_of(rows, views);
  std::vector<Group> groups;
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (t == 0 || at(rows, t)->group != at(rows, t - 1)->group) groups.emplace_back();
    groups.back().push_back(tensors[t]);
  }
  Cuts cuts(ranks, groups.size(), [&](size_t g) { return groups[g].front().models; });
  const Crew crew = crew_of(isa, threads, 0, tick);
  {
    const py::gil_scoped_release release;
    threshold(groups, cuts.wanted, cuts.starts, crew);
  }
  return py::make_tuple(cuts.magnitudes(), cuts.ends());
}

// weights[rows, width] + scaling * left[rows, rank] right[rank, width], whose right comes in blocks (see lowrank.h).
void py_lowrank(uint64_t weights, int dtype, const Records<float>& left, const Records<float>& right, float scaling,
                Records<float>& out, const std::string& isa, int threads) {
  const py::ssize_t rows = out.shape(0), width = out.shape(1), rank = left.shape(1);
  const py::ssize_t blocks = (width + LOWRANK_BLOCK - 1) / LOWRANK_BLOCK;
  if (left.shape(0) != rows || right.size() != blocks * rank * LOWRANK_BLOCK) {
    throw std::invalid_argument("left, right and out do not match");
  }
  const LowRank product = {reinterpret_cast<const char*>(weights),
                           static_cast<DType>(dtype),
                           static_cast<int>(rank),
                           width,
                           left.data(),
                           right.data(),
                           scaling,
                           out.mutable_data()};
  Crew crew = crew_of(isa, threads, 0, py::none());
  crew.tick = nullptr;
  const py::gil_scoped_release release;
  lowrank(product, rows, crew);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The compiled CPU kernels: addresses, dtypes and counts in, numbers out. Called by fastmerge.native alone.";
  PYBIND11_NUMPY_DTYPE(Row, elements, begin, models, inputs, settings, group);
  PYBIND11_NUMPY_DTYPE(View, address, dtype);
  PYBIND11_NUMPY_DTYPE(Sweep, keep, elect, tie_vote, mean, divisor, lambda, padding);
  PYBIND11_NUMPY_DTYPE(Part, weight, rescale, magnitude, mass, ties_end, cut, key, top_ties_end, top_magnitude,
                       padding);
  PYBIND11_NUMPY_DTYPE(Target, offset, file, dtype);

  module.attr("__version__") = FASTMERGE_VERSION;
  module.attr("ROW") = py::dtype::of<Row>();
  module.attr("VIEW") = py::dtype::of<View>();
  module.attr("SWEEP") = py::dtype::of<Sweep>();
  module.attr("PART") = py::dtype::of<Part>();
  module.attr("TARGET") = py::dtype::of<Target>();

  module.def("rows", &rows);
  module.def("views", &views);
  module.def("sweeps", &sweeps);
  module.def("parts", &parts);
  module.def("targets", &targets);

  static py::exception<InputCut> input_cut(module, "InputCut");
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const InputCut& error) {
      py::set_error(input_cut, error.what());
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetFromErrno(PyExc_OSError);
    }
  });

  module.def("instruction_sets", &instruction_sets,
             "Instruction sets of this build, best first; None or why not here.");
  module.def("merge", &py_merge);
  module.def("merge_ranked", &py_merge_ranked);
  module.def("gram", &py_gram);
  module.def("norms", &py_norms);
  module.def("threshold", &py_threshold);
  module.attr("LOWRANK_BLOCK") = LOWRANK_BLOCK;
  module.def("lowrank", &py_lowrank, py::arg(), py::arg(), py::arg().noconvert(), py::arg().noconvert(), py::arg(),
             py::arg().noconvert(), py::arg(), py::arg());
}
