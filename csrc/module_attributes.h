// What the short way reads of a module without running Python: the class's description and the
// instance's __dict__.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <string_view>
#include <vector>

namespace charrnn_fast {

// Interned once, so that a look-up in a module's __dict__ compares pointers.
struct Names {
  // clang-format off: it never comes to rest here
#define CHARRNN_FAST_NAMES(_)                                                            \
  _(_parameters) _(_flat_weights) _(_flat_weights_names) _(mode) _(bias) _(num_layers)   \
  _(dropout) _(training) _(bidirectional) _(batch_first) _(input_size) _(hidden_size)    \
  _(proj_size) _(nonlinearity) _(weight_ih) _(weight_hh) _(bias_ih) _(bias_hh) _(_kind)  \
  _(__call__) _(forward) _(_call_impl) _(_wrapped_call_impl) _(_compiled_call_impl)      \
  _(_hooked) _(_backward_hooks) _(_backward_pre_hooks) _(_forward_hooks)                 \
  _(_forward_pre_hooks) _(_global_backward_hooks) _(_global_backward_pre_hooks)          \
  _(_global_forward_hooks) _(_global_forward_pre_hooks)
// clang-format on
#define CHARRNN_FAST_DECLARE(name) PyObject* name = PyUnicode_InternFromString(#name);
  CHARRNN_FAST_NAMES(CHARRNN_FAST_DECLARE)
#undef CHARRNN_FAST_DECLARE
#undef CHARRNN_FAST_NAMES
};

inline const Names& names() {
  static const Names instance;
  return instance;
}

// One of our classes, as `describe` was told at the import. A subclass has its base's.
struct Kind {
  PyTypeObject* stock;  // torch.nn's class
  PyObject* forward;    // our class's own
  bool is_cell;
  bool pair;         // the state is (h, c)
  bool cuda;         // plain calls on CUDA are the op's, not torch.nn's
  int64_t gates;     // rows of a weight are so many times hidden_size
  std::string mode;  // of a cell; empty: its nonlinearity tells
};

// Never destroyed: modules may be called while the interpreter ends.
inline std::vector<Kind>& kinds() {
  static auto* const instance = new std::vector<Kind>;
  return *instance;
}

// Methods that torch.nn's forward asks of itself: where an instance has its own, the long way asks.
inline std::vector<PyObject*>& hooks() {
  static auto* const instance = new std::vector<PyObject*>;
  return *instance;
}

inline const Kind* kind_of(PyTypeObject* type) {
  PyObject* number = _PyType_Lookup(type, names()._kind);
  if (number == nullptr || !PyLong_CheckExact(number)) return nullptr;
  const auto i = static_cast<size_t>(PyLong_AsLongLong(number));
  return i < kinds().size() ? &kinds()[i] : nullptr;
}

// One module's __dict__. Anything unexpected in it sets `failed`, and the caller takes the long
// way.
class Attributes {
 public:
  explicit Attributes(PyObject* dict) : dict_(dict), failed(!PyDict_CheckExact(dict)) {
    if (!failed) parameters_ = get(names()._parameters);
    if (!failed && !PyDict_CheckExact(parameters_)) failed = true;
  }

  PyObject* get(PyObject* name) {
    PyObject* value = failed ? nullptr : PyDict_GetItemWithError(dict_, name);
    if (value == nullptr) failed = true;
    return value;
  }
  int64_t integer(PyObject* name) {
    PyObject* value = get(name);
    if (failed || !PyLong_CheckExact(value)) return fail<int64_t>();
    return PyLong_AsLongLong(value);
  }
  double number(PyObject* name) {
    PyObject* value = get(name);
    if (failed || !PyFloat_CheckExact(value)) return fail<double>();
    return PyFloat_AS_DOUBLE(value);
  }
  bool flag(PyObject* name) {
    PyObject* value = get(name);
    if (failed || !PyBool_Check(value)) return fail<bool>();
    return value == Py_True;
  }
  std::string_view text(PyObject* name) {
    PyObject* value = get(name);
    if (failed || !PyUnicode_CheckExact(value)) return fail<std::string_view>();
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(value, &size);
    return data == nullptr ? fail<std::string_view>() : std::string_view(data, size);
  }
  // Whether the instance has an attribute of its own by this name, in place of its class's method.
  bool overrides(PyObject* name) const { return PyDict_Contains(dict_, name) != 0; }
  // A parameter that is registered, and not hidden by an attribute of its name. Parametrized,
  // pruned and otherwise replaced weights are not found here, nor any other than `expected`.
  const at::Tensor* parameter(PyObject* name, PyObject* expected = nullptr) {
    PyObject* value = failed ? nullptr : PyDict_GetItemWithError(parameters_, name);
    if (value == nullptr || (expected != nullptr && value != expected) ||
        !THPVariable_CheckExact(value) || PyDict_Contains(dict_, name) != 0) {
      return fail<const at::Tensor*>();
    }
    return &THPVariable_Unpack(value);
  }

 private:
  template <typename T>
  T fail() {
    failed = true;
    return T();
  }

  PyObject* dict_;
  PyObject* parameters_ = nullptr;

 public:
  bool failed;
};

}  // namespace charrnn_fast
