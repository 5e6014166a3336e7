// The Python face of the CUDA kernels: flat record arrays of device addresses in, flat arrays of numbers out, the GIL
// released between. Nothing touches a GPU before the first call, so that a process may fork until then.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "launch.h"
#include "ops.h"

namespace py = pybind11;
using namespace fastmerge;

namespace {

template <class T>
using Records = py::array_t<T, py::array::c_style>;

// pybind11 knows record types by their name, in all modules of a process at once: these are this module's own.
struct RowRecord : Row {};
struct ViewRecord : View {};
struct SweepRecord : Sweep {};
struct PartRecord : Part {};
struct TargetRecord : Target {};

using Rows = Records<RowRecord>;
using Views = Records<ViewRecord>;
using Sweeps = Records<SweepRecord>;
using Parts = Records<PartRecord>;
using Targets = Records<TargetRecord>;
using Ranks = Records<int64_t>;

template <class T>
const T* at(const Records<T>& records, size_t index) {
  return records.data() + index;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_at(uintptr_t handle) {
  return reinterpret_cast<cudaStream_t>(handle);
}

// The GPU of one call; the caller's own is put back after it.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "say which one it is");
    check(cudaSetDevice(device), "be chosen");
  }
  ~OnDevice() { static_cast<void>(cudaSetDevice(before_)); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

std::vector<Tensor> tensors_of(const Rows& rows, const Views& views) {
  std::vector<Tensor> tensors;
  size_t view = 0;
  for (py::ssize_t i = 0; i < rows.size(); ++i) {
    const Row& row = *at(rows, static_cast<size_t>(i));
    tensors.push_back({at(views, view), row.elements, row.models, row.inputs, row.begin});
    view += static_cast<size_t>(row.inputs);
  }
  if (view != static_cast<size_t>(views.size())) throw std::invalid_argument("views do not match the tensors");
  return tensors;
}

// Merges over the records of a call, and what is found: nothing, of a tensor without elements.
struct Merges {
  std::vector<Merge> merges;
  py::array_t<int64_t> nonfinite, first, overflow;

  Merges(const Rows& rows, const Views& views, const Sweeps& sweeps, const Parts& parts, const Targets& targets)
      : nonfinite(views.size()), first(views.size()), overflow(targets.size()) {
    std::fill_n(nonfinite.mutable_data(), views.size(), 0);
    std::fill_n(first.mutable_data(), views.size(), -1);
    std::fill_n(overflow.mutable_data(), targets.size(), 0);
    const std::vector<Tensor> tensors = tensors_of(rows, views);
    size_t view = 0, setting = 0, part = 0;
    for (size_t t = 0; t < tensors.size(); ++t) {
      const Row& row = *at(rows, t);
      const auto settings = static_cast<size_t>(row.settings);
      merges.push_back({tensors[t], row.begin, row.settings, at(sweeps, setting), at(parts, part), at(targets, setting),
                        nonfinite.mutable_data() + view, first.mutable_data() + view,
                        overflow.mutable_data() + setting});
      view += static_cast<size_t>(row.inputs);
      setting += settings;
      part += settings * static_cast<size_t>(row.models);
    }
    if (setting != static_cast<size_t>(targets.size()) || setting != static_cast<size_t>(sweeps.size()) ||
        part != static_cast<size_t>(parts.size())) {
      throw std::invalid_argument("sweeps, parts and targets do not match the tensors");
    }
  }

  py::tuple found() const { return py::make_tuple(nonfinite, first, overflow); }
};

py::tuple py_merge(const Rows& rows, const Views& views, const Sweeps& sweeps, const Parts& parts,
                   const Targets& targets, int device, uintptr_t stream) {
  const Merges all(rows, views, sweeps, parts, targets);
  {
    const py::gil_scoped_release release;
    const OnDevice here(device);
    merge(all.merges, stream_at(stream));
  }
  return all.found();
}

void py_merge_async(const Rows& rows, const Views& views, const Sweeps& sweeps, const Parts& parts,
                    const Targets& targets, uintptr_t cuts, int device, uintptr_t stream) {
  const Merges all(rows, views, sweeps, parts, targets);
  if (all.merges.size() != 1) throw std::invalid_argument("one tensor at a time");
  const py::gil_scoped_release release;
  const OnDevice here(device);
  merge_async(all.merges[0], pointer<const Cut>(cuts), stream_at(stream));
}

py::array_t<double> py_gram(const Rows& rows, const Views& views, int device, uintptr_t stream) {
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
  const py::gil_scoped_release release;
  const OnDevice here(device);
  gram(tensors, starts, stream_at(stream));
  return products;
}

py::array_t<double> py_norms(const Rows& rows, const Views& views, const Sweeps& sweeps, const Parts& parts, int device,
                             uintptr_t stream) {
  const std::vector<Tensor> tensors = tensors_of(rows, views);
  py::array_t<double> sums(parts.size() * 6);
  std::fill_n(sums.mutable_data(), sums.size(), 0.0);
  std::vector<const Sweep*> settings;
  std::vector<const Part*> firsts;
  std::vector<int64_t> begins;
  std::vector<double*> starts;
  size_t part = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    settings.push_back(at(sweeps, t));
    firsts.push_back(at(parts, part));
    begins.push_back(at(rows, t)->begin);
    starts.push_back(sums.mutable_data() + part * 6);
    part += static_cast<size_t>(tensors[t].models);
  }
  const py::gil_scoped_release release;
  const OnDevice here(device);
  norms(tensors, settings, firsts, begins, starts, stream_at(stream));
  return sums;
}

// Ranks as they follow one another, one per model of each group, and the cuts they lead to.
struct Ranked {
  std::vector<Cut> cuts;
  std::vector<const int64_t*> wanted;
  std::vector<Cut*> starts;

  explicit Ranked(const Ranks& ranks) : cuts(static_cast<size_t>(ranks.size())) {}

  void next(const Ranks& ranks, int models) {
    wanted.push_back(at(ranks, used_));
    starts.push_back(cuts.data() + used_);
    used_ += static_cast<size_t>(models);
  }
  void check_all() const {
    if (used_ != cuts.size()) throw std::invalid_argument("ranks do not match the groups");
  }
  py::tuple found() const {
    py::array_t<float> magnitudes(static_cast<py::ssize_t>(cuts.size()));
    py::array_t<int64_t> ends(static_cast<py::ssize_t>(cuts.size()));
    for (size_t i = 0; i < cuts.size(); ++i) {
      magnitudes.mutable_data()[i] = cuts[i].magnitude;
      ends.mutable_data()[i] = cuts[i].ties_end;
    }
    return py::make_tuple(magnitudes, ends);
  }

 private:
  size_t used_ = 0;
};

// Rows of one group follow one another; ranks are groups x models, flat.
py::tuple py_threshold(const Rows& rows, const Views& views, const Ranks& ranks, int device, uintptr_t stream) {
  const std::vector<Tensor> tensors = tensors_of(rows, views);
  std::vector<Group> groups;
  Ranked ranked(ranks);
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (t == 0 || at(rows, t)->group != at(rows, t - 1)->group) {
      groups.emplace_back();
      ranked.next(ranks, tensors[t].models);
    }
    groups.back().push_back(tensors[t]);
  }
  ranked.check_all();
  {
    const py::gil_scoped_release release;
    const OnDevice here(device);
    threshold(groups, ranked.wanted, ranked.starts, stream_at(stream));
  }
  return ranked.found();
}

py::tuple py_merge_ranked(const Rows& rows, const Views& views, const Sweeps& sweeps, const Parts& parts,
                          const Ranks& ranks, const Targets& targets, int device, uintptr_t stream) {
  const Merges all(rows, views, sweeps, parts, targets);
  Ranked ranked(ranks);
  for (const Merge& each : all.merges) ranked.next(ranks, each.tensor.models);
  ranked.check_all();
  {
    const py::gil_scoped_release release;
    const OnDevice here(device);
    merge_ranked(all.merges, ranked.wanted, ranked.starts, stream_at(stream));
  }
  return py::tuple(all.found() + ranked.found());
}

void py_threshold_async(const Rows& rows, const Views& views, const Ranks& ranks, uintptr_t cuts, uintptr_t workspace,
                        int device, uintptr_t stream) {
  const std::vector<Tensor> tensors = tensors_of(rows, views);
  if (tensors.size() != 1 || ranks.size() != tensors[0].models) throw std::invalid_argument("one tensor at a time");
  const py::gil_scoped_release release;
  const OnDevice here(device);
  threshold_async(tensors[0], ranks.data(), pointer<Cut>(cuts), pointer<void>(workspace), stream_at(stream));
}

size_t py_workspace_bytes(const Rows& rows, int device) {
  if (rows.size() != 1) throw std::invalid_argument("one tensor at a time");
  const OnDevice here(device);
  return workspace_bytes(rows.data()->elements, rows.data()->models);
}

// The most that any op takes, of the device and pinned together, when it is given no more than this.
size_t scratch_bytes(int64_t tensors, int64_t elements, int models, int settings, int ranks, int device) {
  const OnDevice here(device);
  const Most most = {tensors, elements, models, settings, ranks};
  return 3 * tables_bytes(most) + 256 + std::max({measuring_bytes(most), selecting_bytes(most), ranked_bytes(most)});
}

void release_scratch(int device) {
  const OnDevice here(device);
  release_kept();
}

// --- a GPU's memory and streams ---

int devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "be counted");
  return count;
}

// Without a card, or without a driver, or with one too old: the runtime says which.
std::string why_not() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count > 0 ? "" : "no GPU is seen";
  static_cast<void>(cudaGetLastError());
  return std::string("CUDA sees no GPU: ") + cudaGetErrorString(error);
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "say its name");
  return properties.name;
}

size_t free_bytes(int device) {
  const OnDevice here(device);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "say how much memory is free");
  return free;
}

uintptr_t allocate(int device, size_t bytes) {
  const OnDevice here(device);
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "allocate memory");
  return reinterpret_cast<uintptr_t>(memory);
}

void release(int device, uintptr_t address) {
  const OnDevice here(device);
  check(cudaFree(pointer<void>(address)), "release memory");
}

uintptr_t pin(int device, size_t bytes) {
  const OnDevice here(device);
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "pin memory");
  return reinterpret_cast<uintptr_t>(memory);
}

void unpin(int device, uintptr_t address) {
  const OnDevice here(device);
  check(cudaFreeHost(pointer<void>(address)), "unpin memory");
}

uintptr_t open_stream(int device) {
  const OnDevice here(device);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "open a stream");
  return reinterpret_cast<uintptr_t>(stream);
}

void close_stream(int device, uintptr_t stream) {
  const OnDevice here(device);
  check(cudaStreamDestroy(stream_at(stream)), "close a stream");
}

void copy(int device, uintptr_t to, uintptr_t from, size_t bytes, bool up, uintptr_t stream) {
  const OnDevice here(device);
  check(cudaMemcpyAsync(pointer<void>(to), pointer<void>(from), bytes,
                        up ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, stream_at(stream)),
        up ? "take a copy" : "give a copy");
}

void synchronize(int device, uintptr_t stream) {
  const OnDevice here(device);
  check(cudaStreamSynchronize(stream_at(stream)), "finish its work");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() =
      "The compiled CUDA kernels: device addresses, dtypes and counts in, numbers out. Called by fastmerge.cuda "
      "alone.";
  PYBIND11_NUMPY_DTYPE(RowRecord, elements, begin, models, inputs, settings, group);
  PYBIND11_NUMPY_DTYPE(ViewRecord, address, dtype);
  PYBIND11_NUMPY_DTYPE(SweepRecord, keep, elect, tie_vote, mean, divisor, lambda, padding);
  PYBIND11_NUMPY_DTYPE(PartRecord, weight, rescale, magnitude, mass, ties_end, cut, key, top_ties_end, top_magnitude,
                       padding);
  PYBIND11_NUMPY_DTYPE(TargetRecord, offset, file, dtype);

  module.attr("__version__") = FASTMERGE_VERSION;
  module.attr("ROW") = py::dtype::of<RowRecord>();
  module.attr("VIEW") = py::dtype::of<ViewRecord>();
  module.attr("SWEEP") = py::dtype::of<SweepRecord>();
  module.attr("PART") = py::dtype::of<PartRecord>();
  module.attr("TARGET") = py::dtype::of<TargetRecord>();

  py::register_local_exception<DeviceError>(module, "DeviceError", PyExc_RuntimeError);
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const OutOfMemory& error) {
      py::set_error(PyExc_MemoryError, error.what());
    }
  });

  module.def("merge", &py_merge);
  module.def("merge_async", &py_merge_async);
  module.def("merge_ranked", &py_merge_ranked);
  module.def("gram", &py_gram);
  module.def("norms", &py_norms);
  module.def("threshold", &py_threshold);
  module.def("threshold_async", &py_threshold_async);
  module.def("workspace_bytes", &py_workspace_bytes);

  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  module.def("scratch_bytes", &scratch_bytes, no_gil);
  module.def("release_scratch", &release_scratch, no_gil);
  module.def("why_not", &why_not, no_gil);
  module.def("devices", &devices, no_gil);
  module.def("device_name", &device_name, no_gil);
  module.def("free_bytes", &free_bytes, no_gil);
  module.def("allocate", &allocate, no_gil);
  module.def("release", &release, no_gil);
  module.def("pin", &pin, no_gil);
  module.def("unpin", &unpin, no_gil);
  module.def("open_stream", &open_stream, no_gil);
  module.def("close_stream", &close_stream, no_gil);
  module.def("copy", &copy, no_gil);
  module.def("synchronize", &synchronize, no_gil);
}
