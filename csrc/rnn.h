// The contract between the bindings and the CPU kernels: argument structs and the kernel table.
//
// No torch header is included here or in any kernel. Kernels neither allocate nor start threads:
// the caller owns every buffer, and runs one call per team member (see Team). All sizes and strides
// count elements, and all indices are 64 bits wide.
//
// Letters: T steps, B sequences, N rows (one row is one step of one sequence), I inputs, H hidden
// units.
#pragma once

#include <cstddef>
#include <cstdint>

namespace charrnn_fast {

enum class Activation : int32_t { kTanh = 0, kRelu = 1, kSigmoid = 2 };

// As far as a core's prefetching reaches: what a core writes begins a page of its own.
constexpr size_t kPage = 4096;

// Only its bits: the kernels of an ISA know what to do with them.
struct bfloat16 {
  uint16_t bits;
};

// Where the rows of each step lie. "Slot" is the place of a sequence in order of falling length; at
// step t the sequences still running are the slots 0 .. n_t-1, and slot i has row
// step_row[t] + slot_row[i]. Plain padded batches leave all three pointers null: row t*B + i.
struct Sequences {
  int64_t T;                // steps of the longest sequence, >= 1
  int64_t B;                // sequences, >= 1
  int64_t N;                // rows of x, y, dy and dx
  const int64_t* step_row;  // [T] row of the first sequence at each step; null: t*B
  const int64_t* lengths;   // [B] steps of the sequence in slot i, falling, 1..T; null: all T
  const int64_t* slot_row;  // [B] row of slot i within a step, and in h0, h_n, dh_n, dh0; null: i
};

// The threads that work on one call. Every member calls the same kernel with the same arguments and
// its own rank; barrier(state) returns once all `size` members have called it (never called when
// size is 1).
struct Team {
  int rank;
  int size;
  void (*barrier)(void* state);
  void* state;
};

// How a call is divided among a team. Results have the same bits for each of them.
enum class Split : int32_t {
  kBatch = 0,   // each member runs all steps of its own sequences
  kHidden = 1,  // each member owns a range of hidden units; one barrier a step
};

// One direction of one layer, forward:  y_t = act(x_t W_ih' + b_ih + b_hh + y_{t-1} W_hh').
// Rows of y outside every sequence are left alone.
template <typename scalar>
struct ForwardArgs {
  Sequences seq;
  int64_t I, H;
  Activation activation;
  bool reverse;  // run each sequence from its last step to its first
  Split split;
  const scalar* x;  // [N, I], rows ldx apart; null when ids is given
  int64_t ldx;
  const int64_t* ids;  // [N] values in [0, I), standing for one-hot rows of x; or null
  const scalar* W_ih;  // [H, I]
  const scalar* W_hh;  // [H, H]
  const scalar* b_ih;  // [H] or null
  const scalar* b_hh;  // [H] or null
  const scalar* h0;    // [B, H] or null: zeros
  scalar* y;           // [N, H], rows ldy apart; aliases nothing
  int64_t ldy;
  scalar* h_n;      // [B, H]; aliases nothing
  void* workspace;  // forward_workspace(args, team size) bytes, 64-byte aligned
};

// The weights' gradients are sums over all rows. Where those are many, the sequences are divided in
// parts, each summed on its own, and the sums are added: as many threads then need not read each
// other's rows. Large sums would leave the cache for that. The shape alone decides, so that the
// bits do not depend on the threads.
inline int gradient_parts(int64_t B, int64_t N, int64_t H) {
  return B >= 4 && N >= 256 && H <= 256 ? 2 : 1;
}

// The same, backward. With delta_t the gradient of the sum inside act at step t:
//   delta_t = (dy_t + delta_{t+1} W_hh) * act'(y_t)      dx = delta W_ih      dh0 = delta_first
//   W_hh dW_ih = delta' x      dW_hh = delta' y_prev      db = sum of delta over rows
// Every output may be null, and is then not computed.
template <typename scalar>
struct BackwardArgs {
  Sequences seq;
  int64_t I, H;
  Activation activation;
  bool reverse;
  Split split;
  const scalar* x;  // as in ForwardArgs
  int64_t ldx;
  const int64_t* ids;
  const scalar* W_ih;  // [H, I]
  const scalar* W_hh;  // [H, H]
  const scalar* h0;    // [B, H] or null: zeros
  const scalar* y;     // [N, H], rows ldy apart: the result of forward
  int64_t ldy;
  const scalar* dy;  // [N, H], rows lddy apart; or null: zeros
  int64_t lddy;
  const scalar* dh_n;  // [B, H] or null: zeros
  scalar* delta;       // [N, H] scratch, aliases nothing; its rows are in an order of its own
  scalar* dx;          // [N, I]; rows outside every sequence are left alone
  scalar* dh0;         // [B, H]
  scalar* dW_ih;       // [H, I]
  scalar* dW_hh;       // [H, H]
  scalar* db;          // [H]: the gradient of b_ih and of b_hh
  void* workspace;     // backward_workspace(args, team size) bytes, 64-byte aligned
};

// A linear layer over rows:  y = x W' + b.
template <typename scalar>
struct LinearArgs {
  int64_t N, I, H;
  const scalar* x;  // [N, I]
  const scalar* W;  // [H, I]
  const scalar* b;  // [H]
  scalar* y;        // [N, H]; aliases nothing
  void* workspace;  // linear_workspace(args) bytes, 64-byte aligned
};

// Characters drawn one after the other, by S streams side by side: a step of every layer from the
// character before, the scores of the head, a draw. Of arrays with streams side by side, a call may
// be given some columns: `ld` streams lie in a row.
template <typename scalar>
struct GenerateArgs {
  int64_t N, S, V, H;  // characters to draw, streams, size of the vocabulary, hidden units
  int64_t layers;
  int64_t ld;
  Activation activation;
  const scalar* const* W_ih;  // [layers] of [H, V] for the first one, [H, H] for the others
  const scalar* const* W_hh;  // [layers] of [H, H]
  const scalar* const* b_ih;  // [layers] of [H], or null
  const scalar* const* b_hh;  // [layers] of [H], or null
  const scalar* W_out;        // [V, H]
  const scalar* b_out;        // [V] or null
  double temperature;         // divides the scores; 0: always the best
  int64_t top_k;              // only the k best, and ties with the last of them; 0: all
  double top_p;               // only the fewest whose probabilities reach p; 1: all
  const scalar* uniforms;     // [N, S] in [0, 1)
  const int64_t* tokens;      // [S] the characters to go on from, in [0, V)
  scalar* state;              // [layers, S, H]; read, and left as it was before the last character
  int64_t* drawn;             // [N, S]; aliases nothing
  bool (*stop)(
      void* state);  // asked every kStopProducts multiply-adds: true ends the call; or null
  void* stop_state;
  void* workspace;  // generate_workspace(args) bytes, 64-byte aligned
};
constexpr int64_t kStopProducts = int64_t{1} << 28;  // some hundredths of a second

// The kernels of one ISA for one dtype.
template <typename scalar>
struct Kernels {
  bool (*all_finite)(const scalar*, int64_t n);
  size_t (*forward_workspace)(const ForwardArgs<scalar>&, int team_size);
  void (*forward)(const ForwardArgs<scalar>&, const Team&);
  size_t (*backward_workspace)(const BackwardArgs<scalar>&, int team_size);
  void (*backward)(const BackwardArgs<scalar>&, const Team&);
  // Null for bfloat16, from here on.
  size_t (*linear_workspace)(const LinearArgs<scalar>&);
  void (*linear)(const LinearArgs<scalar>&, const Team&);
  size_t (*generate_workspace)(const GenerateArgs<scalar>&);
  void (*generate)(const GenerateArgs<scalar>&);
};

// One ISA. The table of them, best first, is in dispatch.cpp.
struct Isa {
  const char* name;     // "avx512bf16", "avx512", "avx2", "neon", "baseline"
  bool (*supported)();  // does this CPU, and its operating system, run it?
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const Kernels<bfloat16>* bf16;  // null where there are no products of bfloat16
};

// The ISA in use: the best one this CPU supports, unless CHARRNN_FAST_ISA or select_isa named
// another.
const Isa& isa();
// Every ISA compiled into this binary, best first; null-terminated.
const Isa* const* isas();
// Selects by name. False when the name is unknown or the CPU cannot run it; nothing changes then.
bool select_isa(const char* name);

}  // namespace charrnn_fast
