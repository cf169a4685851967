// oneDNN's vanilla RNN (one layer, tanh, fp32) behind four C functions, for benchmarks/peers.py.
//
// Weights are brought into the layout oneDNN prefers once, at creation: it is timed at its best, as
// if weights did not change between calls.
#include <omp.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <unordered_map>

#include "oneapi/dnnl/dnnl.hpp"

namespace {

using dnnl::memory;
using Arguments = std::unordered_map<int, memory>;
using Tag = memory::format_tag;
constexpr auto kF32 = memory::data_type::f32;

std::string last_error;

struct Rnn {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  int64_t T, B, I, H;
  memory x, h0, y, bias, dy, dx, dh0, dW_ih, dW_hh, db;
  dnnl::primitive forward, backward;
  Arguments forward_args, backward_args;
  bool training;

  memory filled(const memory::desc& desc, const float* data) {
    memory m(desc, engine);
    std::memcpy(m.get_data_handle(), data, desc.get_size());
    return m;
  }

  memory reordered(memory from, const memory::desc& desc) {
    memory to(desc, engine);
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
    return to;
  }

  memory::desc W_ih_desc(Tag tag) const { return {{1, 1, I, 1, H}, kF32, tag}; }
  memory::desc W_hh_desc(Tag tag) const { return {{1, 1, H, 1, H}, kF32, tag}; }

  Rnn(int64_t T, int64_t B, int64_t I, int64_t H, bool training, const float* x_data,
      const float* W_ih_data, const float* W_hh_data, const float* bias_data, const float* dy_data)
      : T(T), B(B), I(I), H(H), training(training) {
    const memory::desc x_desc({T, B, I}, kF32, Tag::tnc), y_desc({T, B, H}, kF32, Tag::tnc);
    const memory::desc bias_desc({1, 1, 1, H}, kF32, Tag::ldgo), none;
    // An initial state of zeros is given in full: without one, dW_hh of oneDNN 3.2 is wrong.
    const memory::desc h_desc({1, 1, B, H}, kF32, Tag::ldnc);
    x = filled(x_desc, x_data);
    bias = filled(bias_desc, bias_data);
    y = memory(y_desc, engine);
    h0 = memory(h_desc, engine);
    std::memset(h0.get_data_handle(), 0, h_desc.get_size());
    // nn.RNN's [H, I] is oneDNN's "ldgoi" with one layer, direction and gate.
    memory W_ih = filled(W_ih_desc(Tag::ldgoi), W_ih_data);
    memory W_hh = filled(W_hh_desc(Tag::ldgoi), W_hh_data);

    const auto kind = training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference;
    const dnnl::vanilla_rnn_forward::primitive_desc forward_desc(
        engine, kind, dnnl::algorithm::eltwise_tanh,
        dnnl::rnn_direction::unidirectional_left2right, x_desc, h_desc, W_ih_desc(Tag::any),
        W_hh_desc(Tag::any), bias_desc, y_desc, none);
    forward = dnnl::vanilla_rnn_forward(forward_desc);
    forward_args = {{DNNL_ARG_SRC_LAYER, x},
                    {DNNL_ARG_SRC_ITER, h0},
                    {DNNL_ARG_WEIGHTS_LAYER, reordered(W_ih, forward_desc.weights_layer_desc())},
                    {DNNL_ARG_WEIGHTS_ITER, reordered(W_hh, forward_desc.weights_iter_desc())},
                    {DNNL_ARG_BIAS, bias},
                    {DNNL_ARG_DST_LAYER, y}};
    if (!training) return;

    memory workspace(forward_desc.workspace_desc(), engine);
    forward_args.insert({DNNL_ARG_WORKSPACE, workspace});
    const dnnl::vanilla_rnn_backward::primitive_desc backward_desc(
        engine, dnnl::prop_kind::backward, dnnl::algorithm::eltwise_tanh,
        dnnl::rnn_direction::unidirectional_left2right, x_desc, h_desc, W_ih_desc(Tag::any),
        W_hh_desc(Tag::any), bias_desc, y_desc, none, x_desc, h_desc, W_ih_desc(Tag::any),
        W_hh_desc(Tag::any), bias_desc, y_desc, none, forward_desc);
    backward = dnnl::vanilla_rnn_backward(backward_desc);
    dy = filled(y_desc, dy_data);
    dx = memory(x_desc, engine);
    dh0 = memory(h_desc, engine);
    dW_ih = memory(backward_desc.diff_weights_layer_desc(), engine);
    dW_hh = memory(backward_desc.diff_weights_iter_desc(), engine);
    db = memory(bias_desc, engine);
    backward_args = {{DNNL_ARG_SRC_LAYER, x},
                     {DNNL_ARG_SRC_ITER, h0},
                     {DNNL_ARG_WEIGHTS_LAYER, reordered(W_ih, backward_desc.weights_layer_desc())},
                     {DNNL_ARG_WEIGHTS_ITER, reordered(W_hh, backward_desc.weights_iter_desc())},
                     {DNNL_ARG_BIAS, bias},
                     {DNNL_ARG_DST_LAYER, y},
                     {DNNL_ARG_WORKSPACE, workspace},
                     {DNNL_ARG_DIFF_DST_LAYER, dy},
                     {DNNL_ARG_DIFF_SRC_LAYER, dx},
                     {DNNL_ARG_DIFF_SRC_ITER, dh0},
                     {DNNL_ARG_DIFF_WEIGHTS_LAYER, dW_ih},
                     {DNNL_ARG_DIFF_WEIGHTS_ITER, dW_hh},
                     {DNNL_ARG_DIFF_BIAS, db}};
  }

  void run() {
    forward.execute(stream, forward_args);
    if (training) {
      // Weight gradients are accumulated into their buffers.
      for (memory* m : {&dW_ih, &dW_hh, &db}) {
        std::memset(m->get_data_handle(), 0, m->get_desc().get_size());
      }
      backward.execute(stream, backward_args);
    }
    stream.wait();
  }

  void read(float* y_out, float* dx_out, float* dW_ih_out, float* dW_hh_out, float* db_out) {
    const auto copy = [](const memory& m, float* out) {
      std::memcpy(out, m.get_data_handle(), m.get_desc().get_size());
    };
    copy(y, y_out);
    if (!training) return;
    copy(dx, dx_out);
    copy(db, db_out);
    copy(reordered(dW_ih, W_ih_desc(Tag::ldgoi)), dW_ih_out);
    copy(reordered(dW_hh, W_hh_desc(Tag::ldgoi)), dW_hh_out);
  }
};

}  // namespace

extern "C" {

// Null on failure; the reason is in rnn_error().
void* rnn_create(int threads, int64_t T, int64_t B, int64_t I, int64_t H, int training,
                 const float* x, const float* W_ih, const float* W_hh, const float* bias,
                 const float* dy) {
  try {
    omp_set_num_threads(threads);
    return new Rnn(T, B, I, H, training != 0, x, W_ih, W_hh, bias, dy);
  } catch (const std::exception& e) {
    last_error = e.what();
    return nullptr;
  }
}

void rnn_run(void* rnn) { static_cast<Rnn*>(rnn)->run(); }

void rnn_read(void* rnn, float* y, float* dx, float* dW_ih, float* dW_hh, float* db) {
  static_cast<Rnn*>(rnn)->read(y, dx, dW_ih, dW_hh, db);
}

void rnn_destroy(void* rnn) { delete static_cast<Rnn*>(rnn); }

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
