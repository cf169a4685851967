// The contract between the binding and the CUDA kernels: argument structs, the plan, the launchers.
//
// No torch header is included here or in any kernel, and kernels do not allocate: the caller owns
// every buffer. Letters as in csrc/rnn.h, and D directions, the second of which runs down in time.
// Pointers are to device memory unless a comment says otherwise; sizes and strides count elements.
//
// Only the recurrence is ours. The projection of the inputs, and the gradients of weights and
// inputs, are matrix products over all steps at once, which the caller leaves to a library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/rnn.h"

namespace charrnn_fast::cuda {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// How the recurrence is computed.
enum class Design : int32_t {
  kBlock = 0,  // each block runs all steps of a few sequences, with all of W_hh in registers and
               // shared memory
  kGrid = 1,   // each block holds some rows of W_hh and runs all steps; blocks meet at a barrier
               // each step
  kStep = 2,   // a library's matrix product and an elementwise kernel each step
};

// What a plan depends on. Filled from cudaDeviceGetAttribute, or from a data sheet.
struct DeviceLimits {
  int multiprocessors;
  int compute_capability;  // 10 * major + minor
  int shared_per_block;    // bytes a block may have after opting in
  int registers_per_sm;    // 32-bit
  bool cooperative;        // cooperative launch is supported
};

struct LaunchPlan {
  Design design;
  int tile;             // which instance of the kernel; see kBlockTiles and kGridTiles
  int rows;             // sequences of a block (kBlock), or of a group of blocks (kGrid)
  int blocks;           // blocks of one direction
  int blocks_in_group;  // kGrid: blocks that share sequences and meet at a barrier
  int shared_bytes;     // dynamic shared memory of a block
  bool together;        // both directions fit into one launch
  const char* reason;   // why this design, for people
};

constexpr int kThreads = 256;  // of every block of the persistent kernels
constexpr int kMaxRows = 16;   // sequences of a block of kBlock
constexpr int kCounterBytes =
    128;                        // of workspace for each group's counter: a cache line of its own
constexpr int kStagedRows = 8;  // sequences that a block of kGrid holds in shared memory at a time

// How the threads of a block divide H outputs times K inputs of W_hh. A thread holds `outputs` rows
// times 4 * `quads` columns; `slices` neighbouring lanes share the rows and add up their sums.
struct Tile {
  int slices;   // lanes along K
  int outputs;  // rows of a thread
  int quads;    // groups of four columns of a thread
  int held;  // of the outputs * quads groups, so many are in registers, the others in shared memory
  bool packed;  // weights stay 16 bits wide (float16 and bfloat16 only)

  constexpr int width() const { return slices * 4 * quads; }  // the K it covers
  constexpr int block_outputs() const { return kThreads / slices * outputs; }
  constexpr int group_bytes() const { return packed ? 8 : 16; }
  constexpr int weight_bytes() const { return (outputs * quads - held) * group_bytes() * kThreads; }
};

// kBlock: K = H = 32 * quads. `held` is as much as does not spill (tests/cuda/check_ptxas.py), in
// whole columns of groups.
constexpr Tile kBlockTiles[] = {
    {8, 1, 1, 1, false},   {8, 2, 2, 4, false},  {8, 3, 3, 9, false},   {8, 4, 4, 16, false},
    {8, 5, 5, 25, false},  {8, 6, 6, 36, false}, {8, 7, 7, 49, false},  {8, 8, 8, 40, false},
    {8, 9, 9, 36, false},  {8, 8, 8, 64, true},  {8, 10, 10, 80, true}, {8, 12, 12, 72, true},
    {8, 13, 13, 78, true},
};
constexpr int kBlockTileCount = sizeof(kBlockTiles) / sizeof(Tile);

// kGrid: K = H = 128 * quads; a block has 8 * outputs of the H outputs.
constexpr Tile kGridTiles[] = {
    {32, 13, 3, 39, false}, {32, 10, 4, 40, false}, {32, 7, 6, 42, false},
    {32, 5, 8, 40, false},  {32, 4, 12, 40, false}, {32, 3, 16, 39, false},
};
constexpr int kGridTileCount = sizeof(kGridTiles) / sizeof(Tile);

constexpr int64_t kMaxHidden = 2048;

// Chooses by a model of cycles per step. Pure: no device is asked. H and B >= 1.
LaunchPlan plan_recurrence(int64_t H, int64_t B, int64_t D, Dtype dtype,
                           const DeviceLimits& limits);
// The plan for one design, whatever it costs. Null reason when the device cannot run it.
LaunchPlan plan_design(Design design, int64_t H, int64_t B, int64_t D, Dtype dtype,
                       const DeviceLimits& limits);
// What a step costs by the model that plan_recurrence chooses by.
double plan_cycles(const LaunchPlan& plan, int64_t H, int64_t B, int64_t D, Dtype dtype,
                   const DeviceLimits& limits);
// Bytes of RecurrenceArgs::workspace, all of them zero at launch.
size_t recurrence_workspace(const LaunchPlan& plan, int64_t B, int64_t H, int64_t D);

// One layer of D directions; with state s, product p = W s and an elementwise function f:
//   forward:   s_t = f(in_t + W_hh s_{t-1})            out = y          in = x W_ih' + b_ih + b_hh
//   backward:  s_t = (in_t + W_hh' s_{t+1}) act'(y_t)  out = delta      in = dy
// Tensors of float16 and bfloat16 are rounded when stored; the state is float32 throughout.
struct RecurrenceArgs {
  int64_t T, B, H;
  int32_t D;
  int32_t first_direction;  // of this launch; set by the launcher
  Dtype dtype;              // of all void pointers
  Cell cell;
  const int64_t* step_row;  // [T] row of the first sequence at each step (packed); null: t*B
  const int64_t* lengths;   // [B] steps of each sequence, 1..T; null: all T
  const void* W_hh[2];      // [H, H] of each direction
  const void* in;           // [N, D*H] or, backward, null: zeros; may alias out
  const void* y;            // [N, D*H] backward only
  void* out;                // [N, D*H]; padded rows past a sequence's end become zero
  const void* initial;      // [D, B, H] h0, or dh_n; null: zeros
  void* final;              // [D, B, H] h_n, or dh0; may be null
  void* workspace;          // recurrence_workspace() bytes, zeroed, 16-byte aligned; kGrid only
  int32_t rows;             // from the plan, as the next; set by the launcher
  int32_t blocks_in_group;
};

// One step of kStep, forward: y = act(y), where y holds in_t + W_hh s; the state follows.
// Backward: delta from the product of the step run before, and final where a sequence has ended.
struct StepArgs {
  int64_t t, before;  // this step and the one run before it; outside [0, T): none
  int64_t T, B, H;
  Dtype dtype;
  Cell cell;
  const int64_t* lengths;  // [B] or null
  int64_t rows;            // sequences that have a row at step t; the first ones
  int64_t ld;              // of the rows of y, in and delta
  void* y;                 // [rows, H] at step t; backward reads only
  void* state;             // forward: [B, H] h, kept where a sequence does not run
  const void* in;          // backward: [rows, H] dy at step t, or null
  const void* product;     // backward: [B, H] delta_before W_hh
  const void* initial;     // backward: [B, H] dh_n or null
  void* delta;             // backward: [rows, H] at step t
  void*
      delta_rows;  // backward: [B, H] the same without gaps between the rows, for the next product
  void* final;     // backward: [B, H] dh0 or null
};

struct GatherArgs {
  int64_t N, I, H;
  Dtype dtype;
  const int64_t*
      ids;  // [N]; one outside [0, I) gives a row of NaN: the host cannot know in time to raise
  const void* table;  // [I, H] rows of W_ih' + bias
  void* out;          // [N, H], rows ld apart
  int64_t ld;
};

// sum[v] = sum of delta[n] over the n with ids[n] = v, in the order of n, so with the same bits
// every time.
struct SegmentSumArgs {
  int64_t I, H;
  Dtype dtype;
  const int64_t* order;   // [N] rows in order of their ids, equal ids in order of n
  const int64_t* starts;  // [I + 1] where each id starts in order
  const void* delta;      // [N, H], rows ld apart
  int64_t ld;
  void* sum;  // [I, H]
};

// S streams, N characters each, all float32. The first layer is fed by a table of rows, the others
// by the layer below.
struct DrawArgs {
  int64_t S, N, H, V;
  int32_t layers;
  Cell cell;
  const float* table;  // [V, H] rows of W_ih' + b_ih + b_hh of the first layer
  const float* W_ih;   // [layers - 1, H, H] of the layers above it
  const float* bias;   // [layers - 1, H] b_ih + b_hh of those; null: zeros
  const float* W_hh;   // [layers, H, H]
  const float* W_out;  // [V, H]
  const float* b_out;  // [V]; null: zeros
  float temperature;   // below the smallest normal number: the best character, the first of equals
  int64_t top_k;       // 0: all
  float top_p;         // 1: all
  const float* uniforms;  // [N, S] in [0, 1)
  const int64_t* tokens;  // [S] to start from; one outside [0, V) makes everything NaN
  float* state;           // [layers, S, H] read, and left at the last state
  int64_t* drawn;         // [N, S]
  float* workspace;       // [S, 2 * layers * H + 2 * V]
};

}  // namespace charrnn_fast::cuda

// Launchers. Each returns null, or what went wrong (a string that lives for ever). `stream` is a
// cudaStream_t.
extern "C" {
const char* charrnn_fast_cuda_limits(int device, charrnn_fast::cuda::DeviceLimits* limits);
const char* charrnn_fast_cuda_forward(const charrnn_fast::cuda::LaunchPlan* plan,
                                      const charrnn_fast::cuda::RecurrenceArgs* args, void* stream);
const char* charrnn_fast_cuda_backward(const charrnn_fast::cuda::LaunchPlan* plan,
                                       const charrnn_fast::cuda::RecurrenceArgs* args,
                                       void* stream);
const char* charrnn_fast_cuda_step_forward(const charrnn_fast::cuda::StepArgs* args, void* stream);
const char* charrnn_fast_cuda_step_backward(const charrnn_fast::cuda::StepArgs* args, void* stream);
const char* charrnn_fast_cuda_gather(const charrnn_fast::cuda::GatherArgs* args, void* stream);
const char* charrnn_fast_cuda_segment_sum(const charrnn_fast::cuda::SegmentSumArgs* args,
                                          void* stream);
const char* charrnn_fast_cuda_generate(const charrnn_fast::cuda::DrawArgs* args, void* stream);
}
