// The ops on CPU tensors: allocation, the division of work among threads, and the calls into the
// kernels.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <omp.h>
#include <sched.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>

#include "layer.h"

namespace charrnn_fast {

static at::ScalarType computed_in(const Isa& isa, at::ScalarType dtype) {
  if (dtype == at::kDouble || (dtype == at::kBFloat16 && isa.bf16 != nullptr)) return dtype;
  return at::kFloat;
}

at::ScalarType computed_in(at::ScalarType dtype) { return computed_in(isa(), dtype); }

namespace {

// Members wait here for each other by spinning, since a step may last less than a microsecond; they
// offer the core to others when the wait is long, as it is when another program holds a core.
//
// Each has a line of cache of its own that only it writes, so that one transfer between two cores
// is all that a meeting takes.
class Barrier {
 public:
  explicit Barrier(int size) : members_(size) {
    for (Member& member : members_) member.all = &members_;
  }

  void* member(int rank) { return &members_[rank]; }
  static void wait(void* member) { static_cast<Member*>(member)->wait(); }

 private:
  struct alignas(128) Member {  // two lines: the one beside a line may be fetched with it
    std::atomic<int64_t> arrivals{0};
    const std::vector<Member>* all = nullptr;

    void wait() {
      const int64_t now = arrivals.load(std::memory_order_relaxed) + 1;
      arrivals.store(now, std::memory_order_release);
      for (const Member& other : *all) {
        for (int spins = 0; other.arrivals.load(std::memory_order_acquire) < now;) {
          if (++spins < kSpins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
          } else {
            sched_yield();
          }
        }
      }
    }
  };

  static constexpr int kSpins = 1000;
  std::vector<Member> members_;
};

// The cheapest way by a rough count of cycles. Constants were measured on Zen 4 and Zen 5 cores
// with AVX-512; they decide speed only, never results.
Plan cheapest_plan(const Layer& layer, int threads, double passes) {
  // Between distant cores, whose round trip is half a microsecond; a tenth of it between close
  // ones.
  constexpr double kBarrierCycles = 2500;
  constexpr double kNeighbourCycles = 1000;  // a step beside rows that another core writes
  constexpr double kStartCycles = 20000;     // waking the threads
  constexpr double kLanes = 16;
  // Below two rows, loading the weights takes longer than multiplying by them.
  const auto recurrence = [&](double rows) {
    return layer.H * layer.H / kLanes * std::max(rows, 2.0);
  };
  const double products = static_cast<double>(layer.N) * layer.H / kLanes *
                          (layer.I + (passes > 1 ? layer.I + layer.H : 0));
  const double steps = layer.T;
  Plan best{1, Split::kBatch, false};
  double best_cost = layer.D * (steps * recurrence(layer.B) + products);
  // `cost` of one direction, by as many threads.
  const auto consider = [&](int members, Split split, bool at_once, double cost) {
    if (members * (at_once ? 2 : 1) > 1) cost += kStartCycles;
    if (!at_once) cost *= layer.D;
    if (cost < best_cost) {
      best = {members, split, at_once};
      best_cost = cost;
    }
  };
  for (const bool at_once : {true, false}) {
    const int most = at_once ? threads / 2 : threads;
    if (at_once && (layer.D == 1 || most == 0)) continue;
    const int by_batch = static_cast<int>(std::clamp<int64_t>(layer.B, 1, most));
    const double rows = (layer.B + by_batch - 1) / by_batch;
    consider(
        by_batch, Split::kBatch, at_once,
        steps * (recurrence(rows) + (by_batch > 1 ? kNeighbourCycles : 0)) + products / by_batch);
    const int by_hidden = static_cast<int>(std::min<int64_t>(most, (layer.H + 63) / 64));
    if (by_hidden > 1) {
      consider(by_hidden, Split::kHidden, at_once,
               steps * (recurrence(layer.B) / by_hidden + kBarrierCycles) + products / by_hidden);
    }
  }
  return best;
}

// Runs call(direction, team) for each direction, in teams of plan.members, both at once where
// plan.at_once says so.
template <typename Call>
void run_teams(int64_t directions, const Plan& plan, const Call& call) {
  const int members = plan.members;
  const auto run = [&](int64_t first, int64_t last) {
    const int size = static_cast<int>(last - first) * members;
    if (size == 1) return call(first, Team{0, 1, nullptr, nullptr});
    std::array<Barrier, 2> barriers{Barrier(members), Barrier(members)};
    bool complete = true;
#pragma omp parallel num_threads(size)
    {
      // OpenMP may give fewer threads than asked for; then one does everything.
      const int rank = omp_get_thread_num();
      if (omp_get_num_threads() == size) {
        const int64_t direction = rank / members;
        call(first + direction, Team{rank % members, members, Barrier::wait,
                                     barriers[direction].member(rank % members)});
      } else if (rank == 0) {
        complete = false;
      }
    }
    if (complete) return;
    for (int64_t d = first; d < last; ++d) call(d, Team{0, 1, nullptr, nullptr});
  };
  if (plan.at_once) return run(0, directions);
  for (int64_t d = 0; d < directions; ++d) run(d, d + 1);
}

int threads_to_use(const Layer& layer, double passes) {
  if (at::in_parallel_region()) return 1;
  // Not worth waking a thread for less than some tens of microseconds.
  const double cycles = passes * layer.D * layer.N * layer.H * (layer.I + layer.H) / 16.0;
  return cycles < 100000 ? 1 : at::get_num_threads();
}

Plan make_plan(const Layer& layer, double passes) {
  return cheapest_plan(layer, threads_to_use(layer, passes), passes);
}

// The layout of the rows, with the arrays it points to.
class Rows {
 public:
  Rows(const Layer& layer, const Optional& batch_sizes, const Optional& lengths)
      : seq_{layer.T, layer.B, layer.N, nullptr, nullptr, nullptr} {
    if (batch_sizes.has_value()) {
      const int64_t* running = batch_sizes->const_data_ptr<int64_t>();
      step_row_.resize(layer.T);
      lengths_.resize(layer.B);
      int64_t row = 0;
      for (int64_t t = 0; t < layer.T; ++t) {
        step_row_[t] = row;
        row += running[t];
        const int64_t next = t + 1 < layer.T ? running[t + 1] : 0;
        std::fill(lengths_.begin() + next, lengths_.begin() + running[t], t + 1);
      }
      seq_.step_row = step_row_.data();
      seq_.lengths = lengths_.data();
    } else if (lengths.has_value()) {
      const int64_t* steps = lengths->const_data_ptr<int64_t>();
      slot_row_.resize(layer.B);
      std::iota(slot_row_.begin(), slot_row_.end(), 0);
      std::stable_sort(slot_row_.begin(), slot_row_.end(),
                       [&](int64_t a, int64_t b) { return steps[a] > steps[b]; });
      lengths_.resize(layer.B);
      for (int64_t i = 0; i < layer.B; ++i) lengths_[i] = steps[slot_row_[i]];
      seq_.slot_row = slot_row_.data();
      seq_.lengths = lengths_.data();
    }
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  const Sequences& sequences() const { return seq_; }

 private:
  std::vector<int64_t> step_row_, lengths_, slot_row_;
  Sequences seq_;
};

// Calls call(kernels) with the kernels of `dtype`, one that computed_in answers.
template <typename Call>
void with_kernels(const Isa& isa, at::ScalarType dtype, const Call& call) {
  if (dtype == at::kDouble) return call(*isa.f64);
  if (dtype == at::kBFloat16) return call(*isa.bf16);
  return call(*isa.f32);
}

// The kernels have a type of their own for bfloat16, of the same bits.
template <typename scalar>
using InTorch = std::conditional_t<std::is_same_v<scalar, bfloat16>, at::BFloat16, scalar>;

template <typename scalar>
const scalar* data(const at::Tensor& tensor) {
  return reinterpret_cast<const scalar*>(tensor.const_data_ptr<InTorch<scalar>>());
}

template <typename scalar>
scalar* mutable_data(const at::Tensor& tensor) {
  return reinterpret_cast<scalar*>(tensor.mutable_data_ptr<InTorch<scalar>>());
}

// Memory for the length of one call. A thread keeps the largest block of moderate size that its
// calls needed: fresh memory comes from the system page by page, which took up to two fifths of the
// time of a training step.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes <= kept.bytes) {
      std::swap(block_, kept);
    } else {
      block_.data.reset(c10::alloc_cpu(bytes));  // 64-byte aligned; throws what at::empty throws
      block_.bytes = bytes;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (kept.bytes < block_.bytes && block_.bytes <= kKeptBytes) std::swap(block_, kept);
  }

  std::byte* data() const { return static_cast<std::byte*>(block_.data.get()); }

 private:
  static constexpr size_t kKeptBytes = size_t{32} << 20;

  // Plain memory: it is freed when its thread ends, when a tensor's allocator may be gone.
  struct Free {
    void operator()(void* data) const { c10::free_cpu(data); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    size_t bytes = 0;
  };

  Block block_;
  static thread_local Block kept;
};
thread_local Scratch::Block Scratch::kept;

// So that what follows in the same block is aligned.
size_t rounded_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory of results. Small blocks are malloc's, which keeps those that a thread frees for the next
// call; for aligned ones, as torch's allocator wants all of them, it searches anew each time.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes > 0 && bytes <= kSmall ? std::malloc(bytes) : nullptr;
    if (data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, release, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr size_t kSmall = 4096;

  static void release(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    std::free(data);
  }
};

// at::empty without the dispatcher.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  static ResultAllocator allocator;
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_generic(sizes, &allocator, keys, dtype, std::nullopt));
}

Optional contiguous(const Optional& tensor) {
  return tensor.has_value() && tensor->defined() ? Optional(tensor->contiguous()) : std::nullopt;
}

// The tensors themselves where all are contiguous, as weights are; else copies, kept in `copies`.
at::TensorList contiguous(at::TensorList tensors, std::vector<at::Tensor>* copies) {
  if (std::all_of(tensors.begin(), tensors.end(),
                  [](const at::Tensor& tensor) { return tensor.is_contiguous(); })) {
    return tensors;
  }
  for (const at::Tensor& tensor : tensors) copies->push_back(tensor.contiguous());
  return *copies;
}

Optional converted(const Optional& tensor, at::ScalarType dtype) {
  return tensor.has_value() && tensor->defined() ? Optional(tensor->to(dtype)) : std::nullopt;
}

std::vector<at::Tensor> converted(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) result.push_back(tensor.to(dtype));
  return result;
}

// Token ids stay what they are.
at::Tensor converted_input(const at::Tensor& input, at::ScalarType dtype) {
  return input.scalar_type() == at::kLong ? input : input.to(dtype);
}

template <typename scalar>
const scalar* data_or_null(const Optional& tensor) {
  return tensor.has_value() ? data<scalar>(*tensor) : nullptr;
}

template <typename scalar>
void forward_layer(const Kernels<scalar>& table, const Layer& layer, const at::Tensor& input,
                   const Optional& hx, at::TensorList weights, bool has_biases,
                   const Sequences& seq, at::Tensor& y, at::Tensor& h_n) {
  const int64_t per_direction = has_biases ? 4 : 2;
  const Plan plan = plan_forward(layer);
  const scalar* h0 = data_or_null<scalar>(hx);
  std::array<ForwardArgs<scalar>, 2> args;
  for (int64_t d = 0; d < layer.D; ++d) {
    const at::Tensor* w = &weights[d * per_direction];
    args[d] = {
        .seq = seq,
        .I = layer.I,
        .H = layer.H,
        .activation = layer.activation,
        .reverse = d == 1,
        .split = plan.split,
        .x = layer.tokens ? nullptr : data<scalar>(input),
        .ldx = layer.I,
        .ids = layer.tokens ? input.const_data_ptr<int64_t>() : nullptr,
        .W_ih = data<scalar>(w[0]),
        .W_hh = data<scalar>(w[1]),
        .b_ih = has_biases ? data<scalar>(w[2]) : nullptr,
        .b_hh = has_biases ? data<scalar>(w[3]) : nullptr,
        .h0 = h0 != nullptr ? h0 + d * layer.B * layer.H : nullptr,
        .y = mutable_data<scalar>(y) + d * layer.H,
        .ldy = layer.D * layer.H,
        .h_n = mutable_data<scalar>(h_n) + d * layer.B * layer.H,
        .workspace = nullptr,
    };
  }
  const size_t bytes = rounded_up(table.forward_workspace(args[0], plan.members));
  const Scratch scratch(layer.D * bytes);
  for (int64_t d = 0; d < layer.D; ++d) args[d].workspace = scratch.data() + d * bytes;
  const auto forward = table.forward;
  run_teams(layer.D, plan, [&](int64_t d, const Team& team) { forward(args[d], team); });
}

Pair rnn_layer_cpu(const at::Tensor& input_, const Optional& hx_, at::TensorList weights_,
                   const Optional& batch_sizes_, const Optional& lengths_, std::string_view mode,
                   bool has_biases) {
  const Layer layer = check_layer(input_, hx_, weights_, batch_sizes_, lengths_, mode, has_biases);
  if (why_composite(input_, hx_, weights_) != nullptr) {
    return composite::forward(input_, hx_, weights_, batch_sizes_, lengths_, mode, has_biases);
  }
  // Looked up once: another thread may select another ISA meanwhile.
  const Isa& current = isa();
  const auto dtype = weights_[0].scalar_type(), computed = computed_in(current, dtype);
  if (computed != dtype) {
    const auto [y, h_n] =
        rnn_layer_cpu(converted_input(input_, computed), converted(hx_, computed),
                      converted(weights_, computed), batch_sizes_, lengths_, mode, has_biases);
    return {y.to(dtype), h_n.to(dtype)};
  }
  const at::Tensor input = input_.contiguous();
  const Optional hx = contiguous(hx_);
  std::vector<at::Tensor> copies;
  const at::TensorList weights = contiguous(weights_, &copies);
  const Optional batch_sizes = contiguous(batch_sizes_), lengths = contiguous(lengths_);
  if (layer.tokens) check_token_ids(input, layer.I);

  const int64_t columns = layer.D * layer.H;
  at::Tensor y = layer.packed          ? empty({layer.N, columns}, dtype)
                 : lengths.has_value() ? at::zeros({layer.T, layer.B, columns}, dtype)
                                       : empty({layer.T, layer.B, columns}, dtype);
  at::Tensor h_n = empty({layer.D, layer.B, layer.H}, dtype);
  if (layer.N == 0 || layer.H == 0) return {y, h_n};

  count(counters().forward_fused);
  const Rows rows(layer, batch_sizes, lengths);
  with_kernels(current, dtype, [&](const auto& kernels) {
    forward_layer(kernels, layer, input, hx, weights, has_biases, rows.sequences(), y, h_n);
  });
  return {y, h_n};
}

template <typename scalar>
void backward_layer(const Kernels<scalar>& table, const Layer& layer, const Optional& dy,
                    const Optional& dh_n, const at::Tensor& input, const Optional& hx,
                    at::TensorList weights, const at::Tensor& y, bool has_biases,
                    const Sequences& seq, std::vector<at::Tensor>& grads) {
  const int64_t per_direction = has_biases ? 4 : 2;
  const Plan plan = plan_backward(layer);
  const int64_t state = layer.B * layer.H;
  const scalar* h0 = data_or_null<scalar>(hx);
  const scalar* dy_data = data_or_null<scalar>(dy);
  const scalar* dh_n_data = data_or_null<scalar>(dh_n);
  const auto out = [](at::Tensor& grad) {
    return grad.numel() > 0 ? mutable_data<scalar>(grad) : nullptr;
  };
  std::array<BackwardArgs<scalar>, 2> args;
  size_t bytes = 0;  // of the workspace of either direction
  std::array<at::Tensor, 2> dx;
  for (int64_t d = 0; d < layer.D; ++d) {
    const at::Tensor* w = &weights[d * per_direction];
    at::Tensor* dw = &grads[2 + d * per_direction];
    dx[d] = d == 0 || grads[0].numel() == 0 ? grads[0] : at::zeros_like(grads[0]);
    scalar* dh0 = out(grads[1]);
    scalar* db = has_biases ? out(dw[2].numel() > 0 ? dw[2] : dw[3]) : nullptr;
    args[d] = {
        .seq = seq,
        .I = layer.I,
        .H = layer.H,
        .activation = layer.activation,
        .reverse = d == 1,
        .split = plan.split,
        .x = layer.tokens ? nullptr : data<scalar>(input),
        .ldx = layer.I,
        .ids = layer.tokens ? input.const_data_ptr<int64_t>() : nullptr,
        .W_ih = data<scalar>(w[0]),
        .W_hh = data<scalar>(w[1]),
        .h0 = h0 != nullptr ? h0 + d * state : nullptr,
        .y = data<scalar>(y) + d * layer.H,
        .ldy = layer.D * layer.H,
        .dy = dy_data != nullptr ? dy_data + d * layer.H : nullptr,
        .lddy = layer.D * layer.H,
        .dh_n = dh_n_data != nullptr ? dh_n_data + d * state : nullptr,
        .delta = nullptr,
        .dx = out(dx[d]),
        .dh0 = dh0 != nullptr ? dh0 + d * state : nullptr,
        .dW_ih = out(dw[0]),
        .dW_hh = out(dw[1]),
        .db = db,
        .workspace = nullptr,
    };
    bytes = std::max(bytes, rounded_up(table.backward_workspace(args[d], plan.members)));
  }
  const size_t delta_bytes = rounded_up(layer.N * layer.H * sizeof(scalar));
  const Scratch scratch(layer.D * (delta_bytes + bytes));
  for (int64_t d = 0; d < layer.D; ++d) {
    std::byte* own = scratch.data() + d * (delta_bytes + bytes);
    args[d].delta = reinterpret_cast<scalar*>(own);
    args[d].workspace = own + delta_bytes;
  }
  const auto backward = table.backward;
  run_teams(layer.D, plan, [&](int64_t d, const Team& team) { backward(args[d], team); });
  if (layer.D == 2 && grads[0].numel() > 0) grads[0].add_(dx[1]);
  for (int64_t d = 0; has_biases && d < layer.D; ++d) {
    at::Tensor* dw = &grads[2 + d * per_direction];
    if (dw[2].numel() > 0 && dw[3].numel() > 0) {
      std::memcpy(out(dw[3]), out(dw[2]), layer.H * sizeof(scalar));
    }
  }
}

std::vector<at::Tensor> rnn_layer_backward_cpu(const Optional& dy_, const Optional& dh_n_,
                                               const at::Tensor& input_, const Optional& hx_,
                                               at::TensorList weights_, const at::Tensor& y_,
                                               const Optional& batch_sizes_,
                                               const Optional& lengths_, std::string_view mode,
                                               bool has_biases, c10::List<bool> needs) {
  const Layer layer = check_layer_backward(dy_, dh_n_, input_, hx_, weights_, y_, batch_sizes_,
                                           lengths_, mode, has_biases, needs);
  if (why_composite(input_, hx_, weights_) != nullptr) {
    return composite::backward(dy_, dh_n_, input_, hx_, weights_, y_, batch_sizes_, lengths_, mode,
                               has_biases, needs);
  }
  // Looked up once: another thread may select another ISA meanwhile.
  const Isa& current = isa();
  const auto dtype = weights_[0].scalar_type(), computed = computed_in(current, dtype);
  if (computed != dtype) {
    return converted(
        rnn_layer_backward_cpu(converted(dy_, computed), converted(dh_n_, computed),
                               converted_input(input_, computed), converted(hx_, computed),
                               converted(weights_, computed), y_.to(computed), batch_sizes_,
                               lengths_, mode, has_biases, needs),
        dtype);
  }
  const at::Tensor input = input_.contiguous(), y = y_.contiguous();
  const Optional hx = contiguous(hx_), dy = contiguous(dy_), dh_n = contiguous(dh_n_);
  const Optional batch_sizes = contiguous(batch_sizes_), lengths = contiguous(lengths_);
  std::vector<at::Tensor> copies;
  const at::TensorList weights = contiguous(weights_, &copies);
  if (layer.tokens) check_token_ids(input, layer.I);

  const bool nothing = layer.N == 0 || layer.H == 0;
  const bool gaps = lengths.has_value();
  const auto grad = [&](bool wanted, at::IntArrayRef sizes, bool zeros) {
    if (!wanted) return empty({0}, dtype);
    return zeros ? at::zeros(sizes, dtype) : empty(sizes, dtype);
  };
  std::vector<at::Tensor> grads;
  grads.reserve(needs.size());
  grads.push_back(grad(needs[0] && !layer.tokens, input.sizes(), gaps));
  grads.push_back(grad(needs[1], {layer.D, layer.B, layer.H}, nothing));
  for (size_t i = 0; i < weights.size(); ++i) {
    grads.push_back(grad(needs[2 + i], weights[i].sizes(), nothing));
  }
  if (nothing) return grads;

  count(counters().backward_fused);
  const Rows rows(layer, batch_sizes, lengths);
  with_kernels(current, dtype, [&](const auto& kernels) {
    backward_layer(kernels, layer, dy, dh_n, input, hx, weights, y, has_biases, rows.sequences(),
                   grads);
  });
  return grads;
}

}  // namespace

Plan plan_forward(const Layer& layer) { return make_plan(layer, 1); }
Plan plan_backward(const Layer& layer) { return make_plan(layer, 3); }

TORCH_LIBRARY_IMPL(charrnn_fast, CPU, m) {
  m.impl("rnn_layer", TORCH_FN(rnn_layer_cpu));
  m.impl("rnn_layer_backward", TORCH_FN(rnn_layer_backward_cpu));
}

}  // namespace charrnn_fast
