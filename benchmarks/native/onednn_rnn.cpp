// One layer of oneDNN's vanilla RNN (tanh), LSTM or GRU (linear before reset), fp32, behind a few C
// functions, for benchmarks/peers.py.
//
// Weights are brought into the layout oneDNN prefers once, at creation (forward_inference packs
// them): it is timed at its best, as if weights did not change between calls.
#include <omp.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "oneapi/dnnl/dnnl.hpp"

namespace {

using dnnl::memory;
using Arguments = std::unordered_map<int, memory>;
using Tag = memory::format_tag;
constexpr auto kF32 = memory::data_type::f32;
constexpr auto kTanh = dnnl::algorithm::eltwise_tanh;
constexpr auto kDirection = dnnl::rnn_direction::unidirectional_left2right;

std::string last_error;

// Results and gradients are of the same sizes and layouts as what they belong to, so that the
// backward descriptors name each twice.
struct Descs {
  memory::desc x, h, c, W_ih, W_hh, bias, y, none;
};

// A cell: its primitives, how many gates it has, how many of its biases, whether it has a c, and
// the activation where there is a choice.
template <typename ForwardType, typename BackwardType, int64_t gates, int64_t biases, bool has_c,
          dnnl::algorithm... activation>
struct Cell {
  static constexpr int64_t kGates = gates, kBiases = biases;
  static constexpr bool kHasC = has_c;
  using Forward = ForwardType;
  using Backward = BackwardType;

  static typename Forward::primitive_desc forward(const dnnl::engine& engine, dnnl::prop_kind kind,
                                                  const Descs& d) {
    if constexpr (has_c) {
      return {engine, kind,   activation..., kDirection, d.x,    d.h,   d.c,
              d.W_ih, d.W_hh, d.bias,        d.y,        d.none, d.none};
    } else {
      return {engine, kind,   activation..., kDirection, d.x,   d.h,
              d.W_ih, d.W_hh, d.bias,        d.y,        d.none};
    }
  }
  static typename Backward::primitive_desc backward(
      const dnnl::engine& engine, const Descs& d, const typename Forward::primitive_desc& forward) {
    constexpr auto kKind = dnnl::prop_kind::backward;
    if constexpr (has_c) {
      return {engine, kKind,  activation..., kDirection, d.x,    d.h,    d.c,    d.W_ih,
              d.W_hh, d.bias, d.y,           d.none,     d.none, d.x,    d.h,    d.c,
              d.W_ih, d.W_hh, d.bias,        d.y,        d.none, d.none, forward};
    } else {
      return {engine, kKind, activation..., kDirection, d.x,    d.h,    d.W_ih, d.W_hh, d.bias, d.y,
              d.none, d.x,   d.h,           d.W_ih,     d.W_hh, d.bias, d.y,    d.none, forward};
    }
  }
};
using VanillaRnn = Cell<dnnl::vanilla_rnn_forward, dnnl::vanilla_rnn_backward, 1, 1, false, kTanh>;
using Lstm = Cell<dnnl::lstm_forward, dnnl::lstm_backward, 4, 4, true>;
using LbrGru = Cell<dnnl::lbr_gru_forward, dnnl::lbr_gru_backward, 3, 4, false>;

// What the arrays of a call hold; null: there is no such thing.
struct Values {
  const float *x, *h0, *c0, *W_ih, *W_hh, *bias, *dy;
};
struct Results {
  float *y, *dx, *dh0, *dc0, *dW_ih, *dW_hh, *db;
};

struct Layer {
  virtual ~Layer() = default;
  virtual void run() = 0;
  virtual void read(const Results& to) = 0;
};

template <typename CellType>
class LayerOf : public Layer {
 public:
  LayerOf(int64_t T, int64_t B, int64_t I, int64_t H, bool training, const Values& from)
      : training_(training),
        W_ih_({1, 1, I, CellType::kGates, H}, kF32, Tag::ldgoi),  // torch's [G*H, I]
        W_hh_({1, 1, H, CellType::kGates, H}, kF32, Tag::ldgoi) {
    Descs d;
    d.x = {{T, B, I}, kF32, Tag::tnc};
    d.y = {{T, B, H}, kF32, Tag::tnc};
    d.h = d.c = {{1, 1, B, H}, kF32, Tag::ldnc};
    d.bias = {{1, 1, CellType::kBiases, H}, kF32, Tag::ldgo};
    d.W_ih = {{1, 1, I, CellType::kGates, H}, kF32, Tag::any};
    d.W_hh = {{1, 1, H, CellType::kGates, H}, kF32, Tag::any};

    const auto kind =
        training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference;
    const auto forward = CellType::forward(engine_, kind, d);
    forward_ = typename CellType::Forward(forward);
    const memory x = filled(d.x, from.x), bias = filled(d.bias, from.bias);
    const memory W_ih = filled(W_ih_, from.W_ih), W_hh = filled(W_hh_, from.W_hh);
    y_ = memory(d.y, engine_);
    forward_args_ = {{DNNL_ARG_SRC_LAYER, x},
                     {DNNL_ARG_SRC_ITER, filled(d.h, from.h0)},
                     {DNNL_ARG_WEIGHTS_LAYER, reordered(W_ih, forward.weights_layer_desc())},
                     {DNNL_ARG_WEIGHTS_ITER, reordered(W_hh, forward.weights_iter_desc())},
                     {DNNL_ARG_BIAS, bias},
                     {DNNL_ARG_DST_LAYER, y_}};
    if (CellType::kHasC) forward_args_.insert({DNNL_ARG_SRC_ITER_C, filled(d.c, from.c0)});
    if (!training) return;

    forward_args_.insert({DNNL_ARG_WORKSPACE, memory(forward.workspace_desc(), engine_)});
    const auto backward = CellType::backward(engine_, d, forward);
    backward_ = typename CellType::Backward(backward);
    dx_ = memory(d.x, engine_);
    dh0_ = memory(d.h, engine_);
    dW_ih_ = memory(backward.diff_weights_layer_desc(), engine_);
    dW_hh_ = memory(backward.diff_weights_iter_desc(), engine_);
    db_ = memory(d.bias, engine_);
    // What forward was given, and its results; but the weights may be wanted in another layout.
    backward_args_ = forward_args_;
    backward_args_[DNNL_ARG_WEIGHTS_LAYER] = reordered(W_ih, backward.weights_layer_desc());
    backward_args_[DNNL_ARG_WEIGHTS_ITER] = reordered(W_hh, backward.weights_iter_desc());
    backward_args_.insert({{DNNL_ARG_DIFF_DST_LAYER, filled(d.y, from.dy)},
                           {DNNL_ARG_DIFF_SRC_LAYER, dx_},
                           {DNNL_ARG_DIFF_SRC_ITER, dh0_},
                           {DNNL_ARG_DIFF_WEIGHTS_LAYER, dW_ih_},
                           {DNNL_ARG_DIFF_WEIGHTS_ITER, dW_hh_},
                           {DNNL_ARG_DIFF_BIAS, db_}});
    if (CellType::kHasC) {
      dc0_ = memory(d.c, engine_);
      backward_args_.insert({DNNL_ARG_DIFF_SRC_ITER_C, dc0_});
    }
  }

  void run() override {
    forward_.execute(stream_, forward_args_);
    if (training_) {
      // Weight gradients are accumulated into their buffers.
      for (memory* m : {&dW_ih_, &dW_hh_, &db_}) {
        std::memset(m->get_data_handle(), 0, m->get_desc().get_size());
      }
      backward_.execute(stream_, backward_args_);
    }
    stream_.wait();
  }

  void read(const Results& to) override {
    const auto copy = [](const memory& m, float* out) {
      std::memcpy(out, m.get_data_handle(), m.get_desc().get_size());
    };
    copy(y_, to.y);
    if (!training_) return;
    copy(dx_, to.dx);
    copy(dh0_, to.dh0);
    if (CellType::kHasC) copy(dc0_, to.dc0);
    copy(reordered(dW_ih_, W_ih_), to.dW_ih);
    copy(reordered(dW_hh_, W_hh_), to.dW_hh);
    copy(db_, to.db);
  }

 private:
  memory filled(const memory::desc& desc, const float* data) {
    memory m(desc, engine_);
    std::memcpy(m.get_data_handle(), data, desc.get_size());
    return m;
  }

  memory reordered(memory from, const memory::desc& desc) {
    memory to(desc, engine_);
    dnnl::reorder(from, to).execute(stream_, from, to);
    stream_.wait();
    return to;
  }

  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  bool training_;
  memory::desc W_ih_, W_hh_;
  memory y_, dx_, dh0_, dc0_, dW_ih_, dW_hh_, db_;
  dnnl::primitive forward_, backward_;
  Arguments forward_args_, backward_args_;
};

}  // namespace

extern "C" {

// `cell` is "RNN", "LSTM" or "GRU". The rows of the weights stand gate by gate: i f g o; z r n. The
// bias is the sum of torch's two; a GRU's has a fourth row: n of x's product and n of h's are
// apart. Null on failure; the reason is in rnn_error().
void* rnn_create(const char* cell, int64_t T, int64_t B, int64_t I, int64_t H, int training,
                 const float* x, const float* h0, const float* c0, const float* W_ih,
                 const float* W_hh, const float* bias, const float* dy) {
  try {
    omp_set_num_threads(1);
    const Values from{x, h0, c0, W_ih, W_hh, bias, dy};
    const std::string name = cell;
    if (name == "RNN") return new LayerOf<VanillaRnn>(T, B, I, H, training != 0, from);
    if (name == "LSTM") return new LayerOf<Lstm>(T, B, I, H, training != 0, from);
    if (name == "GRU") return new LayerOf<LbrGru>(T, B, I, H, training != 0, from);
    throw std::invalid_argument("no cell " + name);
  } catch (const std::exception& e) {
    last_error = e.what();
    return nullptr;
  }
}

void rnn_run(void* rnn) { static_cast<Layer*>(rnn)->run(); }

// Without training only y is written.
void rnn_read(void* rnn, float* y, float* dx, float* dh0, float* dc0, float* dW_ih, float* dW_hh,
              float* db) {
  static_cast<Layer*>(rnn)->read({y, dx, dh0, dc0, dW_ih, dW_hh, db});
}

void rnn_destroy(void* rnn) { delete static_cast<Layer*>(rnn); }

const char* rnn_error() { return last_error.c_str(); }

const char* rnn_version() {
  static const std::string text = [] {
    const dnnl_version_t* v = dnnl_version();
    return std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
           std::to_string(v->patch);
  }();
  return text.c_str();
}

}  // extern "C"
