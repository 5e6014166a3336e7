// Records from the tuples and dataclasses of fastmerge/sweep.py, in the layouts of sweep.h.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "sweep.h"

namespace fastmerge {
namespace {

namespace py = pybind11;

// --- Python's objects, some hundred thousand of them: straight by its C API ---

py::object checked(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

template <class Do>
void for_each(PyObject* sequence, const Do& work) {
  const py::object items = checked(PySequence_Fast(sequence, "records are made of sequences"));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) work(PySequence_Fast_GET_ITEM(items.ptr(), i));
}

PyObject* field(PyObject* tuple, Py_ssize_t place) {
  if (!PyTuple_Check(tuple) || place >= PyTuple_GET_SIZE(tuple)) throw py::type_error("not a tuple of fastmerge.sweep");
  return PyTuple_GET_ITEM(tuple, place);
}

template <class T, class Read>
T read(PyObject* object, Read (*as)(PyObject*)) {
  const Read value = as(object);
  if (value == static_cast<Read>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<T>(value);
}

int64_t whole(PyObject* object) {
  return read<int64_t>(object, PyLong_AsLongLong);
}

uint64_t natural(PyObject* object) {
  return read<uint64_t>(object, PyLong_AsUnsignedLongLong);
}

uint32_t code_of(const py::dict& codes, PyObject* name) {
  PyObject* code = PyDict_GetItem(codes.ptr(), name);
  if (!code) throw py::key_error(py::repr(name));
  return static_cast<uint32_t>(natural(code));
}

// A name of a dataclass's attribute, made once.
struct Name {
  explicit Name(const char* name) : interned(checked(PyUnicode_InternFromString(name)).release().ptr()) {}
  py::object of(PyObject* object) const { return checked(PyObject_GetAttr(object, interned)); }
  float number_of(PyObject* object) const { return read<float>(of(object).ptr(), PyFloat_AsDouble); }
  uint8_t choice_of(PyObject* object) const { return static_cast<uint8_t>(whole(of(object).ptr())); }
  PyObject* interned;
};

template <class T>
py::array_t<T> array_of(const std::vector<T>& records) {
  return py::array_t<T>(static_cast<py::ssize_t>(records.size()), records.data());
}

// --- the records, flat, in the order in which they come ---

enum InputsField { ELEMENTS, MODELS, BASE, BEGIN };
enum ViewField { ADDRESS, VIEW_DTYPE };
enum TargetField { TARGET_DTYPE, OFFSET, FILE_NUMBER };

// Of one setting each, in one group.
py::array_t<Row> rows(const py::object& tensors) {
  std::vector<Row> records;
  for_each(tensors.ptr(), [&](PyObject* inputs) {
    const Py_ssize_t models = PyObject_Size(field(inputs, MODELS));
    if (models < 0) throw py::error_already_set();
    const bool has_base = field(inputs, BASE) != Py_None;
    records.push_back({whole(field(inputs, ELEMENTS)), whole(field(inputs, BEGIN)), static_cast<int32_t>(models),
                       static_cast<int32_t>(models + has_base), 1, 0});
  });
  return array_of(records);
}

py::array_t<View> views(const py::object& tensors, const py::dict& codes) {
  std::vector<View> records;
  const auto add = [&](PyObject* view) {
    records.push_back({natural(field(view, ADDRESS)), code_of(codes, field(view, VIEW_DTYPE))});
  };
  for_each(tensors.ptr(), [&](PyObject* inputs) {
    for_each(field(inputs, MODELS), add);
    if (field(inputs, BASE) != Py_None) add(field(inputs, BASE));
  });
  return array_of(records);
}

py::array_t<Sweep> sweeps(const py::object& settings) {
  static const Name keep("keep"), elect("elect"), tie_vote("tie_vote"), mean("mean"), divisor("divisor"),
      lambda("lambda_");
  std::vector<Sweep> records;
  for_each(settings.ptr(), [&](PyObject* each) {
    for_each(each, [&](PyObject* sweep) {
      records.push_back({keep.choice_of(sweep), elect.choice_of(sweep), tie_vote.choice_of(sweep),
                         mean.choice_of(sweep), divisor.number_of(sweep), lambda.number_of(sweep), 0.0f});
    });
  });
  return array_of(records);
}

py::array_t<Part> parts(const py::object& settings) {
  static const Name parts("parts"), mean("mean"), weight("weight"), rescale("rescale"), magnitude("magnitude"),
      ties_end("ties_end"), cut("cut"), key("key"), top_ties_end("top_ties_end"), top_magnitude("top_magnitude");
  std::vector<Part> records;
  for_each(settings.ptr(), [&](PyObject* each) {
    for_each(each, [&](PyObject* sweep) {
      const bool by_weights = mean.choice_of(sweep) == static_cast<uint8_t>(Mean::WEIGHTS);
      for_each(parts.of(sweep).ptr(), [&](PyObject* part) {
        const float own = weight.number_of(part);
        records.push_back({own, rescale.number_of(part), magnitude.number_of(part), by_weights ? own : 1.0f,
                           whole(ties_end.of(part).ptr()), natural(cut.of(part).ptr()), natural(key.of(part).ptr()),
                           whole(top_ties_end.of(part).ptr()), top_magnitude.number_of(part), 0.0f});
      });
    });
  });
  return array_of(records);
}

py::array_t<Target> targets(const py::object& tensors, const py::dict& codes) {
  std::vector<Target> records;
  for_each(tensors.ptr(), [&](PyObject* each) {
    for_each(each, [&](PyObject* target) {
      records.push_back({whole(field(target, OFFSET)), static_cast<int32_t>(whole(field(target, FILE_NUMBER))),
                         code_of(codes, field(target, TARGET_DTYPE))});
    });
  });
  return array_of(records);
}

}  // namespace
}  // namespace fastmerge
