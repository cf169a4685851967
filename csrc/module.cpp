// charrnn_fast._C: what is no tensor op.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "layer.h"
#include "short_way.h"
#include "teams.h"

namespace charrnn_fast {
namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch"] = TORCH_VERSION;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  py::list compiled;
  for (const Isa* const* entry = isas(); *entry != nullptr; ++entry) {
    compiled.append((*entry)->name);
  }
  info["isas"] = compiled;
  return info;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> result;
  for (const Isa* const* entry = isas(); *entry != nullptr; ++entry) {
    if ((*entry)->supported()) result.emplace_back((*entry)->name);
  }
  return result;
}

void use_isa(const std::string& name) {
  if (select_isa(name.c_str())) return;
  std::string known;
  for (const std::string& isa : supported_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error("ISA '" + name + "' is unknown or not supported by this CPU; choose from " +
                        known);
}

// (threads, "batch" or "hidden", whether both directions run at once) of one layer of these sizes.
py::tuple plan(int64_t T, int64_t B, int64_t rows, int64_t I, int64_t H, int64_t D,
               const std::string& mode, bool backward) {
  Layer layer{};
  layer.T = T, layer.B = B, layer.N = rows, layer.I = I, layer.H = H, layer.D = D;
  layer.cell = parse_mode(mode);
  const Plan plan = backward ? plan_backward(layer) : plan_forward(layer);
  return py::make_tuple(plan.members * (plan.at_once ? 2 : 1),
                        plan.split == Split::kBatch ? "batch" : "hidden", plan.at_once);
}

// The plan, as above, of any cell on any machine, and the cycles that it is modelled to take.
py::tuple modelled_plan(int threads, int node_cores, double l2, int cell, int64_t T, int64_t B,
                        int64_t rows, int64_t I, int64_t H, int64_t D, bool backward) {
  Layer layer{};
  layer.T = T, layer.B = B, layer.N = rows, layer.I = I, layer.H = H, layer.D = D;
  layer.cell = static_cast<Cell>(cell);
  const Machine machine = {threads, node_cores, l2};
  const Pass pass = backward ? Pass::kBackward : Pass::kForward;
  const Plan plan = cheapest_plan(layer, machine, pass);
  return py::make_tuple(plan.members, plan.split == Split::kBatch ? "batch" : "hidden",
                        plan.at_once, plan_cycles(layer, machine, plan, pass));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  define_short_way(m);
  m.def("build_info", build_info);
  m.def("isas", supported_isas);
  m.def("isa", [] { return std::string(isa().name); });
  m.def("select_isa", use_isa);
  m.def("counters", [] {
    py::dict result;
    const Counters& c = counters();
    result["forward_fused"] = c.forward_fused.load();
    result["backward_fused"] = c.backward_fused.load();
    result["forward_composite"] = c.forward_composite.load();
    result["backward_composite"] = c.backward_composite.load();
    return result;
  });
  m.def("plan", plan);
  m.def("modelled_plan", modelled_plan);
  // (threads that a call may use, cores of the largest NUMA node, bytes of a core's own cache)
  m.def("machine", [] {
    const Machine machine = this_machine();
    return py::make_tuple(machine.threads, machine.node_cores, machine.l2);
  });
  m.def("cgroup_cpus", cgroup_cpus);
  m.def("computed_in", computed_in);
  m.def("saved_numbers", saved_numbers);
  m.def("why_composite",
        [](const at::Tensor& input, const Optional& hx, const Optional& cx,
           const std::vector<at::Tensor>& weights, const Optional& resets,
           const std::string& mode) -> std::optional<std::string> {
          const char* why = why_composite(
              {input, hx, cx, weights, kNone, kNone, resets, mode, weights.size() % 4 == 0});
          return why == nullptr ? std::nullopt : std::optional<std::string>(why);
        });
}

}  // namespace charrnn_fast
