// The short way from a module's call into the ops; see short_way.h.
#include "short_way.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <initializer_list>

#include "layer.h"

namespace charrnn_fast {
namespace {

namespace py = pybind11;

// Interned once, so that a look-up in a module's __dict__ compares pointers.
struct Names {
  // clang-format off: it never comes to rest here
#define CHARRNN_FAST_NAMES(_)                                                            \
  _(_parameters) _(_flat_weights) _(_flat_weights_names) _(mode) _(bias) _(num_layers)   \
  _(dropout) _(training) _(bidirectional) _(batch_first) _(input_size) _(hidden_size)    \
  _(nonlinearity) _(weight_ih) _(weight_hh) _(bias_ih) _(bias_hh)                        \
  _(_update_flat_weights) _(check_forward_args) _(check_hidden_size) _(check_input)      \
  _(get_expected_hidden_size) _(permute_hidden)                                          \
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

const Names& names() {
  static const Names instance;
  return instance;
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

// Whether someone watches calls from Python, or traces them: they must see torch.ops.
bool observed() {
  return at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing();
}

bool tensor_or_none(PyObject* object, Optional* result) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  *result = THPVariable_Unpack(object);
  return true;
}

PyObject* none() { Py_RETURN_NONE; }

// Whether the kernels may see it as it is; the long way knows what nn.RNN makes of others.
bool is_dense(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested();
}

// The results of nn.RNN and nn.RNNCell are no views: they may be detached in place, and changed in
// place outside of the no_grad in which they were made. So ours get their shape in place. That
// changes no data, and must not change the version by which backward notices changes.
template <typename Reshape, typename InPlace>
at::Tensor reshaped(const at::Tensor& result, const Reshape& reshape, const InPlace& in_place) {
  if (at::isTensorSubclassLike(result) || torch::jit::tracer::isTracing()) return reshape();
  c10::impl::ExcludeDispatchKeyGuard same_version(c10::DispatchKey::ADInplaceOrView);
  return in_place();
}

at::Tensor batch_first(const at::Tensor& output) {
  return reshaped(
      output, [&] { return output.transpose(0, 1); }, [&] { return output.transpose_(0, 1); });
}

at::Tensor first_step(const at::Tensor& output) {
  return reshaped(output, [&] { return output.squeeze(0); }, [&] { return output.squeeze_(0); });
}

// (output, h_n) of the module with this __dict__, or None when the call is anything but plain: then
// the caller takes the long way, whose checks are nn.RNN's own. At T=B=H=1 it is most of the time.
PyObject* forward_or_none(PyObject* dict, PyObject* input_, PyObject* hx_, PyObject* lengths_) {
  Optional input, hx, lengths;
  if (observed() || input_ == Py_None || !tensor_or_none(input_, &input) ||
      !tensor_or_none(hx_, &hx) || !tensor_or_none(lengths_, &lengths)) {
    return none();
  }
  const Names& name = names();
  Attributes module(dict);
  PyObject* weight_names = module.get(name._flat_weights_names);
  PyObject* flat_weights = module.get(name._flat_weights);
  const std::string_view mode = module.text(name.mode);
  const bool bias = module.flag(name.bias);
  const int64_t num_layers = module.integer(name.num_layers);
  const double dropout = module.number(name.dropout);
  const bool training = module.flag(name.training);
  const bool bidirectional = module.flag(name.bidirectional);
  const bool is_batch_first = module.flag(name.batch_first);
  const int64_t input_size = module.integer(name.input_size);
  const int64_t hidden_size = module.integer(name.hidden_size);
  if (module.failed || !PyList_CheckExact(weight_names) || !PyList_CheckExact(flat_weights) ||
      PyList_GET_SIZE(weight_names) != PyList_GET_SIZE(flat_weights)) {
    return none();
  }
  for (PyObject* hook : {name._update_flat_weights, name.check_forward_args, name.check_hidden_size,
                         name.check_input, name.get_expected_hidden_size, name.permute_hidden}) {
    if (module.overrides(hook)) return none();
  }
  std::vector<at::Tensor> weights;
  const Py_ssize_t n = PyList_GET_SIZE(weight_names);
  weights.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    // What nn.RNN would use is the flat list; where they differ, the long way sorts it out.
    const at::Tensor* weight =
        module.parameter(PyList_GET_ITEM(weight_names, i), PyList_GET_ITEM(flat_weights, i));
    if (weight == nullptr) return none();
    weights.push_back(*weight);
  }
  if (weights.empty()) return none();

  for (size_t i = 0; bias && i < weights.size(); ++i) {
    const bool is_bias = i % 4 >= 2;  // which nn.RNN broadcasts
    if (is_bias && (weights[i].dim() != 1 || weights[i].sym_size(0) != hidden_size)) return none();
  }

  const bool tokens = input->scalar_type() == at::kLong;
  if (!is_dense(*input) || input->dim() != (tokens ? 2 : 3)) return none();
  if (!tokens &&
      (input->scalar_type() != weights[0].scalar_type() || input->sym_size(2) != input_size)) {
    return none();
  }
  if (hx.has_value() && (hx->dim() != 3 || hx->scalar_type() != weights[0].scalar_type() ||
                         hx->sym_size(0) != num_layers * (bidirectional ? 2 : 1) ||
                         hx->sym_size(1) != input->sym_size(is_batch_first ? 0 : 1) ||
                         hx->sym_size(2) != hidden_size)) {
    return none();
  }

  StackResult result;
  {
    pybind11::gil_scoped_release no_gil;
    if (is_batch_first) input = input->transpose(0, 1);
    // The kernels copy it in any case. A copy made here is what backward has; nn.RNN's has one,
    // too.
    input = input->contiguous();
    result = rnn({*input, hx, kNone, weights, kNone, lengths, kNone, mode, bias}, num_layers,
                 dropout, training, bidirectional);
    if (is_batch_first) std::get<0>(result) = batch_first(std::get<0>(result));
  }
  PyObject* output = THPVariable_Wrap(std::move(std::get<0>(result)));
  PyObject* h_n = THPVariable_Wrap(std::move(std::get<1>(result)));
  PyObject* pair = PyTuple_New(2);
  PyTuple_SET_ITEM(pair, 0, output);
  PyTuple_SET_ITEM(pair, 1, h_n);
  return pair;
}

// forward(module.__dict__, input, hx, lengths) -> (output, h_n), or None.
PyObject* forward(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return count == 4 ? forward_or_none(args[0], args[1], args[2], args[3]) : none();
  END_HANDLE_TH_ERRORS
}

// The way from nn.Module.__call__ to RNN.forward, as it was at the import. Where someone has laid
// another way since, a call takes that one.
struct CallPath {
  PyTypeObject* stock = nullptr;  // nn.RNN
  PyObject *call, *call_impl, *wrapped_call_impl, *forward;
  PyObject* globals;  // of torch.nn.modules.module

  // Whether a call of this module would do no more than call RNN.forward.
  bool is_plain(PyTypeObject* type, PyObject* dict) const {
    const Names& name = names();
    const PyThreadState* thread = PyThreadState_Get();
    // A profiler finds modules by the frames of nn.Module.__call__.
    return stock != nullptr && thread->c_profilefunc == nullptr && thread->c_tracefunc == nullptr &&
           _PyType_Lookup(type, name._hooked) == Py_False &&
           _PyType_Lookup(stock, name.__call__) == call &&
           _PyType_Lookup(type, name._call_impl) == call_impl &&
           _PyType_Lookup(type, name._wrapped_call_impl) == wrapped_call_impl &&
           _PyType_Lookup(type, name._compiled_call_impl) == Py_None &&
           _PyType_Lookup(type, name.forward) == forward &&
           lacks(dict, {name._call_impl, name._wrapped_call_impl, name._compiled_call_impl,
                        name.forward}) &&
           are_empty(dict, {name._backward_hooks, name._backward_pre_hooks, name._forward_hooks,
                            name._forward_pre_hooks}) &&
           are_empty(globals, {name._global_backward_hooks, name._global_backward_pre_hooks,
                               name._global_forward_hooks, name._global_forward_pre_hooks});
  }

 private:
  static bool lacks(PyObject* dict, std::initializer_list<PyObject*> keys) {
    return std::all_of(keys.begin(), keys.end(),
                       [dict](PyObject* key) { return PyDict_Contains(dict, key) == 0; });
  }
  static bool are_empty(PyObject* dict, std::initializer_list<PyObject*> keys) {
    return std::all_of(keys.begin(), keys.end(), [dict](PyObject* key) {
      PyObject* hooks = PyDict_GetItemWithError(dict, key);
      return hooks != nullptr && PyDict_Check(hooks) && PyDict_GET_SIZE(hooks) == 0;
    });
  }
};
CallPath call_path;

// Remembers CallPath, for `call`: of the class RNN itself.
void watch_calls(const py::type& rnn) {
  const py::module_ module = py::module_::import("torch.nn.modules.module");
  const Names& name = names();
  const auto kept = [](const py::handle& owner, PyObject* key) {
    return py::reinterpret_steal<py::object>(PyObject_GetAttr(owner.ptr(), key)).release().ptr();
  };
  call_path.stock = reinterpret_cast<PyTypeObject*>(rnn.ptr())->tp_base;
  call_path.call = kept(module.attr("Module"), name.__call__);
  call_path.call_impl = kept(module.attr("Module"), name._call_impl);
  call_path.wrapped_call_impl = kept(module.attr("Module"), name._wrapped_call_impl);
  call_path.forward = kept(rnn, name.forward);
  call_path.globals = py::object(module.attr("__dict__")).release().ptr();
}

// call(module, args, kwargs) -> (output, h_n), or None when nn.Module.__call__ would do anything
// but call RNN.forward, or that would take the long way.
PyObject* call(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || PyDict_GET_SIZE(args[2]) != 0) return none();
  const Py_ssize_t given = PyTuple_GET_SIZE(args[1]);
  if (given < 1 || given > 3) return none();
  const py::object dict =
      py::reinterpret_steal<py::object>(PyObject_GenericGetDict(args[0], nullptr));
  if (!dict || !call_path.is_plain(Py_TYPE(args[0]), dict.ptr())) return none();
  const auto argument = [&](Py_ssize_t i) {
    return i < given ? PyTuple_GET_ITEM(args[1], i) : Py_None;
  };
  return forward_or_none(dict.ptr(), argument(0), argument(1), argument(2));
  END_HANDLE_TH_ERRORS
}

// cell(module.__dict__, input, hx) -> h', or None, as forward.
PyObject* cell(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Optional input, hx;
  if (count != 3 || observed() || args[1] == Py_None || !tensor_or_none(args[1], &input) ||
      !tensor_or_none(args[2], &hx)) {
    return none();
  }
  const Names& name = names();
  Attributes module(args[0]);
  const bool bias = module.flag(name.bias);
  const std::string_view nonlinearity = module.text(name.nonlinearity);
  const at::Tensor* weight_ih = module.parameter(name.weight_ih);
  const at::Tensor* weight_hh = module.parameter(name.weight_hh);
  if (module.failed) return none();
  std::vector<at::Tensor> weights{*weight_ih, *weight_hh};
  if (bias) {
    const at::Tensor* bias_ih = module.parameter(name.bias_ih);
    const at::Tensor* bias_hh = module.parameter(name.bias_hh);
    if (module.failed) return none();
    weights.insert(weights.end(), {*bias_ih, *bias_hh});
  }
  std::string_view mode;
  if (nonlinearity == "tanh") {
    mode = "RNN_TANH";
  } else if (nonlinearity == "relu") {
    mode = "RNN_RELU";
  } else if (nonlinearity == "sigmoid") {
    mode = "RNN_SIGMOID";
  } else {
    return none();
  }
  const int64_t dim = input->dim();
  const auto dtype = weights[0].scalar_type();
  const bool tokens = input->scalar_type() == at::kLong;
  if (!is_dense(*input)) return none();
  const int64_t unbatched = tokens ? 0 : 1;
  if (dim != unbatched && dim != unbatched + 1) return none();
  if (weights[0].dim() != 2 || weights[1].dim() != 2) return none();
  const c10::SymInt hidden_size = weights[0].sym_size(0);
  if (weights[1].sym_size(0) != hidden_size || weights[1].sym_size(1) != hidden_size) return none();
  for (size_t i = 2; i < weights.size(); ++i) {
    if (weights[i].dim() != 1 || weights[i].sym_size(0) != hidden_size) return none();
  }
  if (!tokens && (input->scalar_type() != dtype || input->sym_size(-1) != weights[0].sym_size(1))) {
    return none();
  }
  const bool batched = dim != unbatched;
  if (hx.has_value() &&
      (hx->scalar_type() != dtype || hx->dim() != (batched ? 2 : 1) ||
       hx->sym_size(-1) != hidden_size || (batched && hx->sym_size(0) != input->sym_size(0)))) {
    return none();
  }

  at::Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    input = input->unsqueeze(0);
    if (!batched) input = input->unsqueeze(0);
    if (hx.has_value()) {
      hx = hx->unsqueeze(0);
      if (!batched) hx = hx->unsqueeze(0);
    }
    y = std::get<0>(call_layer({*input, hx, kNone, weights, kNone, kNone, kNone, mode, bias}));
    y = first_step(y);
    if (!batched) y = y.squeeze(0);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}
PyMethodDef kMethods[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL,
     nullptr},
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
     nullptr},
    {"cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cell)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void define_short_way(pybind11::module_& m) {
  PyModule_AddFunctions(m.ptr(), kMethods);
  m.def("watch_calls", watch_calls);
  m.def("batch_first", batch_first);
  m.def("first_step", first_step);
}

}  // namespace charrnn_fast
