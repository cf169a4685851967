// The short way from a module's call into the ops; see short_way.h.
//
// What it gains: nn.Module.__call__, torch.nn's checks and the binding of the op in Python take
// several microseconds a call, as long as a cell's step or a short sequence takes itself. Here all
// classes are one table (Kind of module_attributes.h); the checks only tell plain calls from
// others, and complain of nothing.
#include "short_way.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <initializer_list>

#include "layer.h"
#include "module_attributes.h"

namespace charrnn_fast {
namespace {

namespace py = pybind11;

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

// The initial states: one tensor, or two, or none.
struct State {
  Optional h, c;

  // False where the object is anything else than `pair` says.
  bool read(PyObject* object, bool pair) {
    if (!pair || object == Py_None) return tensor_or_none(object, &h);
    return PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2 &&
           tensor_or_none(PyTuple_GET_ITEM(object, 0), &h) && h.has_value() &&
           tensor_or_none(PyTuple_GET_ITEM(object, 1), &c) && c.has_value();
  }
  template <typename Call>
  bool all(const Call& call) const {
    return (!h.has_value() || call(*h)) && (!c.has_value() || call(*c));
  }
  template <typename Call>
  void change(const Call& call) {
    if (h.has_value()) h = call(*h);
    if (c.has_value()) c = call(*c);
  }
};

PyObject* none() { Py_RETURN_NONE; }

// Whether the kernels may see it as it is; the long way knows what torch.nn makes of others.
bool is_dense(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested();
}

// The results of torch.nn's classes are no views: they may be detached in place, and changed in
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

at::Tensor squeeze_step(const at::Tensor& output) {
  return reshaped(output, [&] { return output.squeeze(0); }, [&] { return output.squeeze_(0); });
}

// Whether the op serves tensors of this device; torch.nn does where not, or the long way refuses.
bool is_served(const Kind& kind, const at::Tensor& input, const State& state,
               const at::Tensor& weight) {
  const auto device = input.device();
  if (!device.is_cpu() && !(device.is_cuda() && kind.cuda)) return false;
  // The long way knows the dtypes of results under autocast.
  if (kind.gates > 1 && at::autocast::is_autocast_enabled(device.type())) return false;
  return weight.device() == device && state.all([&](const at::Tensor& tensor) {
    return tensor.device() == device && is_dense(tensor);
  });
}

bool is_bool(const Optional& resets, const at::Tensor& input) {
  return resets->scalar_type() == at::kBool && resets->device() == input.device() &&
         is_dense(*resets);
}

PyObject* wrapped(at::Tensor& tensor) { return THPVariable_Wrap(std::move(tensor)); }

PyObject* tuple_of(PyObject* first, PyObject* second) {
  PyObject* pair = PyTuple_New(2);
  PyTuple_SET_ITEM(pair, 0, first);
  PyTuple_SET_ITEM(pair, 1, second);
  return pair;
}

struct Results {
  at::Tensor output, h_n, c_n, cells;
};

Results run(const at::Tensor& input, const State& state, const std::vector<at::Tensor>& weights,
            const Optional& lengths, const Optional& resets, std::string_view mode, bool bias,
            int64_t num_layers, double dropout, bool training, bool bidirectional, bool cells) {
  Results results;
  std::tie(results.output, results.h_n, results.c_n, results.cells) =
      rnn({input, state.h, state.c, weights, kNone, lengths, resets, mode, bias, cells}, num_layers,
          dropout, training, bidirectional);
  return results;
}

// What a module was called with; a cell has no lengths.
struct Arguments {
  PyObject* input = Py_None;
  PyObject* hx = Py_None;
  PyObject* lengths = Py_None;
  PyObject* resets = Py_None;
  PyObject* cells = Py_False;
};

// (output, state) of the module with this __dict__, or None when the call is anything but plain:
// then the caller takes the long way, whose checks are torch.nn's own. At T=B=H=1 it is most of the
// time.
PyObject* forward_or_none(const Kind& kind, PyObject* dict, const Arguments& given) {
  Optional input, lengths, resets;
  State state;
  if (observed() || given.input == Py_None || !tensor_or_none(given.input, &input) ||
      !state.read(given.hx, kind.pair) || !tensor_or_none(given.lengths, &lengths) ||
      !tensor_or_none(given.resets, &resets) || !PyBool_Check(given.cells)) {
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
  const int64_t proj_size = module.integer(name.proj_size);
  if (module.failed || proj_size != 0 || !PyList_CheckExact(weight_names) ||
      !PyList_CheckExact(flat_weights) ||
      PyList_GET_SIZE(weight_names) != PyList_GET_SIZE(flat_weights)) {
    return none();
  }
  for (PyObject* hook : hooks()) {
    if (module.overrides(hook)) return none();
  }
  std::vector<at::Tensor> weights;
  const Py_ssize_t n = PyList_GET_SIZE(weight_names);
  weights.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    // What torch.nn would use is the flat list; where they differ, the long way sorts it out.
    const at::Tensor* weight =
        module.parameter(PyList_GET_ITEM(weight_names, i), PyList_GET_ITEM(flat_weights, i));
    if (weight == nullptr) return none();
    weights.push_back(*weight);
  }
  if (weights.empty()) return none();

  for (size_t i = 0; bias && i < weights.size(); ++i) {
    const bool is_bias = i % 4 >= 2;  // which torch.nn broadcasts
    if (is_bias && (weights[i].dim() != 1 || weights[i].sym_size(0) != kind.gates * hidden_size)) {
      return none();
    }
  }

  const auto dtype = weights[0].scalar_type();
  const bool tokens = input->scalar_type() == at::kLong;
  if (!is_dense(*input) || input->dim() != (tokens ? 2 : 3)) return none();
  if (!tokens && (input->scalar_type() != dtype || input->sym_size(2) != input_size)) {
    return none();
  }
  const int64_t rows = num_layers * (bidirectional ? 2 : 1);
  if (!is_served(kind, *input, state, weights[0]) || !state.all([&](const at::Tensor& tensor) {
        return tensor.dim() == 3 && tensor.scalar_type() == dtype && tensor.sym_size(0) == rows &&
               tensor.sym_size(1) == input->sym_size(is_batch_first ? 0 : 1) &&
               tensor.sym_size(2) == hidden_size;
      })) {
    return none();
  }
  if (lengths.has_value() && lengths->scalar_type() != at::kLong) return none();
  if (resets.has_value() &&
      (!is_bool(resets, *input) || resets->dim() != 2 ||
       resets->sym_size(0) != input->sym_size(0) || resets->sym_size(1) != input->sym_size(1))) {
    return none();
  }

  const bool cells = given.cells == Py_True;
  Results results;
  {
    pybind11::gil_scoped_release no_gil;
    if (is_batch_first) {
      input = input->transpose(0, 1);
      if (resets.has_value()) resets = resets->transpose(0, 1);
    }
    // The kernels copy it in any case. A copy made here is what backward has; torch.nn's has one,
    // too.
    input = input->contiguous();
    results = run(*input, state, weights, lengths, resets, mode, bias, num_layers, dropout,
                  training, bidirectional, cells);
    if (is_batch_first) {
      results.output = batch_first(results.output);
      if (cells) results.cells = batch_first(results.cells);
    }
  }
  PyObject* h_n = wrapped(results.h_n);
  PyObject* after = kind.pair ? tuple_of(h_n, wrapped(results.c_n)) : h_n;
  PyObject* output = wrapped(results.output);
  if (!cells) return tuple_of(output, after);
  PyObject* triple = PyTuple_New(3);
  PyTuple_SET_ITEM(triple, 0, output);
  PyTuple_SET_ITEM(triple, 1, after);
  PyTuple_SET_ITEM(triple, 2, wrapped(results.cells));
  return triple;
}

// The same for a step of a cell: its state after it, or None.
PyObject* cell_or_none(const Kind& kind, PyObject* dict, const Arguments& given) {
  Optional input, reset;
  State state;
  if (observed() || given.input == Py_None || !tensor_or_none(given.input, &input) ||
      !state.read(given.hx, kind.pair) || !tensor_or_none(given.resets, &reset)) {
    return none();
  }
  const Names& name = names();
  Attributes module(dict);
  const bool bias = module.flag(name.bias);
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
  std::string_view mode = kind.mode;
  if (mode.empty()) {
    const std::string_view nonlinearity = module.text(name.nonlinearity);
    if (nonlinearity == "tanh") {
      mode = "RNN_TANH";
    } else if (nonlinearity == "relu") {
      mode = "RNN_RELU";
    } else if (nonlinearity == "sigmoid") {
      mode = "RNN_SIGMOID";
    } else {
      return none();
    }
  }
  const int64_t dim = input->dim();
  const auto dtype = weights[0].scalar_type();
  const bool tokens = input->scalar_type() == at::kLong;
  if (!is_dense(*input)) return none();
  const int64_t unbatched = tokens ? 0 : 1;
  if (dim != unbatched && dim != unbatched + 1) return none();
  if (weights[0].dim() != 2 || weights[1].dim() != 2) return none();
  const c10::SymInt hidden_size = weights[1].sym_size(1);
  const c10::SymInt gate_rows = hidden_size * kind.gates;
  if (weights[0].sym_size(0) != gate_rows || weights[1].sym_size(0) != gate_rows) return none();
  for (size_t i = 2; i < weights.size(); ++i) {
    if (weights[i].dim() != 1 || weights[i].sym_size(0) != gate_rows) return none();
  }
  if (!tokens && (input->scalar_type() != dtype || input->sym_size(-1) != weights[0].sym_size(1))) {
    return none();
  }
  const bool batched = dim != unbatched;
  if (!is_served(kind, *input, state, weights[0]) || !state.all([&](const at::Tensor& tensor) {
        return tensor.scalar_type() == dtype && tensor.dim() == (batched ? 2 : 1) &&
               tensor.sym_size(-1) == hidden_size &&
               (!batched || tensor.sym_size(0) == input->sym_size(0));
      })) {
    return none();
  }
  if (reset.has_value() && (!is_bool(reset, *input) || reset->dim() != (batched ? 1 : 0) ||
                            (batched && reset->sym_size(0) != input->sym_size(0)))) {
    return none();
  }

  Results results;
  {
    pybind11::gil_scoped_release no_gil;
    const auto one_step = [&](const at::Tensor& tensor) {
      return batched ? tensor.unsqueeze(0) : tensor.unsqueeze(0).unsqueeze(0);
    };
    input = one_step(*input);
    state.change(one_step);
    if (reset.has_value()) reset = one_step(*reset);
    results =
        run(*input, state, weights, std::nullopt, reset, mode, bias, 1, 0, false, false, false);
    for (at::Tensor* result : {&results.output, &results.c_n}) {
      if (result == &results.c_n && !kind.pair) continue;
      *result = squeeze_step(*result);
      if (!batched) *result = result->squeeze(0);
    }
  }
  PyObject* h = wrapped(results.output);
  return kind.pair ? tuple_of(h, wrapped(results.c_n)) : h;
}

// The __dict__ of a module.
py::object dict_of(PyObject* module) {
  return py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
}

// forward(module, input, hx, lengths, resets, cells) -> what it returns, or None.
PyObject* forward(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Kind* kind = count == 6 ? kind_of(Py_TYPE(args[0])) : nullptr;
  if (kind == nullptr) return none();
  const py::object dict = dict_of(args[0]);
  if (!dict) return nullptr;
  return forward_or_none(*kind, dict.ptr(), {args[1], args[2], args[3], args[4], args[5]});
  END_HANDLE_TH_ERRORS
}

// cell(module, input, hx, reset) -> the state after the step, or None.
PyObject* cell(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Kind* kind = count == 4 ? kind_of(Py_TYPE(args[0])) : nullptr;
  if (kind == nullptr) return none();
  const py::object dict = dict_of(args[0]);
  if (!dict) return nullptr;
  Arguments given{args[1], args[2]};
  given.resets = args[3];
  return cell_or_none(*kind, dict.ptr(), given);
  END_HANDLE_TH_ERRORS
}

// The way from nn.Module.__call__ to a module's forward, as it was at the import. Where someone has
// laid another way since, a call takes that one.
struct CallPath {
  PyObject *call = nullptr, *call_impl, *wrapped_call_impl;
  PyObject* globals;  // of torch.nn.modules.module

  // Whether a call of this module would do no more than call our class's forward.
  bool is_plain(const Kind& kind, PyTypeObject* type, PyObject* dict) const {
    const Names& name = names();
    const PyThreadState* thread = PyThreadState_Get();
    // A profiler finds modules by the frames of nn.Module.__call__.
    return thread->c_profilefunc == nullptr && thread->c_tracefunc == nullptr &&
           _PyType_Lookup(type, name._hooked) == Py_False &&
           _PyType_Lookup(kind.stock, name.__call__) == call &&
           _PyType_Lookup(type, name._call_impl) == call_impl &&
           _PyType_Lookup(type, name._wrapped_call_impl) == wrapped_call_impl &&
           _PyType_Lookup(type, name._compiled_call_impl) == Py_None &&
           _PyType_Lookup(type, name.forward) == kind.forward &&
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

PyObject* kept(const py::handle& owner, PyObject* key) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(owner.ptr(), key)).release().ptr();
}

// Takes a class into the table, and returns its number there; see Kind.
int64_t describe(const py::type& ours, const py::type& stock, bool is_cell, bool pair, bool cuda,
                 int64_t gates, const std::string& mode, const std::vector<std::string>& asked) {
  const Names& name = names();
  if (call_path.call == nullptr) {
    const py::module_ module = py::module_::import("torch.nn.modules.module");
    call_path.call_impl = kept(module.attr("Module"), name._call_impl);
    call_path.wrapped_call_impl = kept(module.attr("Module"), name._wrapped_call_impl);
    call_path.globals = py::object(module.attr("__dict__")).release().ptr();
    call_path.call = kept(module.attr("Module"), name.__call__);
    for (const std::string& hook : asked) {
      hooks().push_back(PyUnicode_InternFromString(hook.c_str()));
    }
  }
  kinds().push_back({reinterpret_cast<PyTypeObject*>(stock.inc_ref().ptr()),
                     kept(ours, name.forward), is_cell, pair, cuda, gates, mode});
  return static_cast<int64_t>(kinds().size()) - 1;
}

// call(module, args, kwargs) -> what forward returns, or None when nn.Module.__call__ would do
// anything but call it, or that would take the long way.
PyObject* call(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || PyDict_GET_SIZE(args[2]) != 0) return none();
  const Kind* kind = kind_of(Py_TYPE(args[0]));
  if (kind == nullptr) return none();
  // The last of five is an LSTM's return_cell_states.
  const Py_ssize_t given = PyTuple_GET_SIZE(args[1]);
  if (given < 1 || given > (kind->is_cell ? 3 : kind->pair ? 5 : 4)) return none();
  const py::object dict = dict_of(args[0]);
  if (!dict) return nullptr;
  if (!call_path.is_plain(*kind, Py_TYPE(args[0]), dict.ptr())) return none();
  Arguments arguments;
  PyObject** const all[] = {&arguments.input, &arguments.hx, &arguments.lengths, &arguments.resets,
                            &arguments.cells};
  for (Py_ssize_t i = 0; i < given; ++i) *all[i] = PyTuple_GET_ITEM(args[1], i);
  if (!kind->is_cell) return forward_or_none(*kind, dict.ptr(), arguments);
  arguments.resets = arguments.lengths;  // a cell's third
  return cell_or_none(*kind, dict.ptr(), arguments);
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
  m.def("describe", describe);
  m.def("batch_first", batch_first);
  m.def("squeeze_step", squeeze_step);
}

}  // namespace charrnn_fast
