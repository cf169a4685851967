// The contract between the bindings and the CPU kernels: argument structs and the kernel table.
//
// No torch header is included here or in any kernel. Kernels neither allocate nor start threads:
// the caller owns every buffer, and runs one call per team member (see Team). All sizes and strides
// count elements, and all indices are 64 bits wide.
//
// Letters: T steps, B sequences, N rows (one row is one step of one sequence), I inputs, H hidden
// units, G gates.
#pragma once

#include <cstddef>
#include <cstdint>

namespace charrnn_fast {

// What a hidden unit computes in a step. The first three are Elman's, by their activation.
enum class Cell : int32_t { kTanh = 0, kRelu = 1, kSigmoid = 2, kLstm = 3, kGru = 4 };

// A hidden unit has `sums` sums a step. x W_ih' + b_ih is added to the first `gates` of them, and
// h W_hh' + b_hh to the last `gates`. W_hh has its rows in the order of those sums, gate by gate;
// so has W_ih, but for a GRU, whose sums are n_x r z n_h: the rows of W_ih are r z n, as torch has
// them, and belong to the sums 1, 2 and 0.
struct CellSizes {
  int gates;
  int sums;
  int saved;       // numbers a unit keeps for backward, beside y
  bool has_state;  // carries c from step to step, beside h
  bool reads_h0;   // in backward, also where no gradient of W_hh is wanted
};
constexpr CellSizes sizes_of(Cell cell) {
  if (cell == Cell::kLstm) return {4, 4, 5, true, false};
  if (cell == Cell::kGru) return {3, 4, 4, false, true};
  return {1, 1, 0, false, false};
}

// As far as a core's prefetching reaches: what a core writes begins a page of its own.
constexpr size_t kPage = 4096;

// Only its bits: the kernels of an ISA know what to do with them.
struct bfloat16 {
  uint16_t bits;
};

// Where the rows of each step lie. "Slot" is the place of a sequence in order of falling length; at
// step t the sequences still running are the slots 0 .. n_t-1, and slot i has row
// step_row[t] + slot_row[i]. Plain padded batches leave all pointers null: row t*step_rows + i.
struct Sequences {
  int64_t T;                // steps of the longest sequence, >= 1
  int64_t B;                // sequences, >= 1
  int64_t N;                // rows of x, y, dy and dx
  int64_t step_rows;        // rows from one step to the next, where step_row is null
  const int64_t* step_row;  // [T] row of the first sequence at each step; null: t*step_rows
  const int64_t* lengths;   // [B] steps of the sequence in slot i, falling, 1..T; null: all T
  const int64_t* slot_row;  // [B] row of slot i within a step; null: i
  // Row of slot i in h0, c0, dh0 and dc0; negative: it starts from zeros. Null: as slot_row.
  const int64_t* start_row;
  // Row of slot i in h_n, c_n, dh_n and dc_n; negative: nobody wants its state. Null: as slot_row.
  const int64_t* end_row;
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

// One direction of one layer, forward. Elman:  y_t = act(x_t W_ih' + b_ih + b_hh + y_{t-1} W_hh').
// The formulas of all cells are in cells-inl.h. Rows of y, cells and saved outside every sequence
// are left alone.
template <typename scalar>
struct ForwardArgs {
  Sequences seq;
  int64_t I, H;
  Cell cell;
  bool reverse;  // run each sequence from its last step to its first
  Split split;
  const scalar* x;  // [N, I], rows ldx apart; null when ids is given
  int64_t ldx;
  const int64_t* ids;  // [N] values in [0, I), standing for one-hot rows of x; or null
  const scalar* W_ih;  // [G*H, I]
  const scalar* W_hh;  // [G*H, H]
  const scalar* b_ih;  // [G*H] or null
  const scalar* b_hh;  // [G*H] or null
  const scalar* h0;    // [., H] or null: zeros
  const scalar* c0;    // [., H] or null: zeros; of cells that have one
  scalar* y;           // [N, H], rows ldy apart; aliases nothing
  int64_t ldy;
  scalar* h_n;    // [., H]; aliases nothing
  scalar* c_n;    // [., H], of cells that have one, else null; aliases nothing
  scalar* cells;  // [N, H], rows ldcells apart: c of every step; or null; aliases nothing
  int64_t ldcells;
  scalar* saved;    // [N, saved*H], for backward, in a layout of its own; or null; aliases nothing
  void* workspace;  // forward_workspace(args, team size) bytes, 64-byte aligned
};

// The weights' gradients are sums over all rows. Where those are many, the sequences are divided in
// parts, each summed on its own, and the sums are added: as many threads then need not read each
// other's rows. Large sums would leave the cache for that. The shape alone decides, so that the
// bits do not depend on the threads.
inline int gradient_parts(Cell cell, int64_t B, int64_t N, int64_t H) {
  return B >= 4 && N >= 256 && sizes_of(cell).gates * H * H <= 256 * 256 ? 2 : 1;
}

// The same, backward. With delta_t the gradients of a unit's sums at step t, of which delta_x are
// the first G and delta_h the last G:
//   dx = delta_x W_ih      dh_{t-1} = delta_h W_hh (+ dh_t z of a GRU)      db_ih = sum of delta_x
//   dW_ih = delta_x' x     dW_hh = delta_h' y_prev                          db_hh = sum of delta_h
// Elman: delta_t = (dy_t + dh_t) * act'(y_t). Every output may be null, and is then not computed.
template <typename scalar>
struct BackwardArgs {
  Sequences seq;
  int64_t I, H;
  Cell cell;
  bool reverse;
  Split split;
  const scalar* x;  // as in ForwardArgs
  int64_t ldx;
  const int64_t* ids;
  const scalar* W_ih;  // [G*H, I]
  const scalar* W_hh;  // [G*H, H]
  const scalar* h0;    // [., H] or null: zeros
  const scalar* c0;    // [., H] or null: zeros
  const scalar* y;     // [N, H], rows ldy apart: the result of forward
  int64_t ldy;
  const scalar* saved;  // [N, saved*H]: of forward on the same ISA; null where saved is 0
  const scalar* dy;     // [N, H], rows lddy apart; or null: zeros
  int64_t lddy;
  const scalar* dcells;  // [N, H], rows lddcells apart; or null: zeros
  int64_t lddcells;
  const scalar* dh_n;  // [., H] or null: zeros
  const scalar* dc_n;  // [., H] or null: zeros
  scalar* dx;          // [N, I]; rows outside every sequence are left alone
  scalar* dh0;         // [., H]; rows of no slot are left alone
  scalar* dc0;         // [., H]; rows of no slot are left alone
  scalar* dW_ih;       // [G*H, I]
  scalar* dW_hh;       // [G*H, H]
  scalar* db_ih;       // [G*H]
  scalar* db_hh;       // [G*H]
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
  Cell cell;
  const scalar* const* W_ih;  // [layers] of [G*H, V] for the first one, [G*H, H] for the others
  const scalar* const* W_hh;  // [layers] of [G*H, H]
  const scalar* const* b_ih;  // [layers] of [G*H], or null
  const scalar* const* b_hh;  // [layers] of [G*H], or null
  const scalar* W_out;        // [V, H]
  const scalar* b_out;        // [V] or null
  double temperature;         // divides the scores; 0: always the best
  int64_t top_k;              // only the k best, and ties with the last of them; 0: all
  double top_p;               // only the fewest whose probabilities reach p; 1: all
  const scalar* uniforms;     // [N, S] in [0, 1)
  const int64_t* tokens;      // [S] the characters to go on from, in [0, V)
  scalar* state;              // [layers, S, H]; read, and left as it was before the last character
  scalar* cell_state;         // the same for c, of cells that have one; else null
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
  bool (*pays)();       // is it faster here than those after it? Null: always
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const Kernels<bfloat16>* bf16;  // null where there are no products of bfloat16
};

// What the kernels' shared library exports; setup.py lists the names for the linker.
#define CHARRNN_FAST_EXPORT __attribute__((visibility("default")))

// The ISA in use: the best one that this CPU supports and that pays on it, unless CHARRNN_FAST_ISA
// or select_isa named another.
CHARRNN_FAST_EXPORT const Isa& isa();
// Every ISA compiled into this binary, best first; null-terminated.
CHARRNN_FAST_EXPORT const Isa* const* isas();
// Selects by name. False when the name is unknown or the CPU cannot run it; nothing changes then.
CHARRNN_FAST_EXPORT bool select_isa(const char* name);

}  // namespace charrnn_fast
