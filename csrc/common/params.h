// What the binding hands to the kernels: plain sizes and pointers, no framework types.
//
// L steps, N sequences, D directions, H hidden units, Hout = P with a projection and H without, G gates (4 LSTM, 3 GRU).
// Unless strides are given, tensors are contiguous in the order named. All pointers are borrowed: the caller allocates
// and frees. `const void*` and `void*` hold elements of `dtype`. Null means "not given" (zeros for a state).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"

namespace hsm {

enum class CellKind { lstm, gru };
enum class ScalarKind { float64, float32, bfloat16, float16 };

inline int64_t element_bytes(ScalarKind dtype) { return dtype == ScalarKind::float64 ? 8 : dtype == ScalarKind::float32 ? 4 : 2; }

constexpr int max_directions = 2;

// Where sequences are cut. Entry [t, n] of a mask is the edge between step t - 1 and step t of sequence n.
struct Boundaries {
  const bool* reset_mask;  // (L, N) with strides, or null
  int64_t reset_step_stride, reset_batch_stride;
  const bool* detach_mask;  // (L, N) with strides, or null; read in backward only
  int64_t detach_step_stride, detach_batch_stride;
  int64_t detach_every;    // k: the mask detaches every sequence at steps k, 2k, ...; 0: not known. CUDA
  const int64_t* lengths;  // (N,), each between 0 and L, or null
  const void* reset_h;     // (D, N, Hout) or null
  const void* reset_c;     // (D, N, H) or null; LSTM
};

// A run of steps [begin, end) of one sequence that a pass computes without waiting for any other run. The forward pass cuts a
// sequence at its resets, the backward pass at its resets and detaches. Both directions of a layer have the same segments.
struct Segment {
  int32_t sequence, begin, end;
  int32_t index;  // among all segments of a pass, by sequence and then by time
};

// All segments of a pass, dealt to slots. A slot runs its segments back to back, one step a round, beside the other slots.
struct Schedule {
  const Segment* segments;         // slot after slot
  const int32_t* slot_starts;      // (slots + 1,): where each slot's segments begin; slots with more steps come first
  const int32_t* sequence_starts;  // (N + 1,): the first Segment::index of each sequence
  int64_t slots;
  int64_t rounds;  // steps of the first slot
};

struct Sizes {
  CellKind cell;
  ScalarKind dtype;
  int64_t steps, batch;
  int directions, hidden, hidden_out;
  bool projection;
};

// G * H: the rows of W_ih and W_hh, the columns of their products.
HSM_HOST_DEVICE int64_t gate_columns(const Sizes& z) { return (z.cell == CellKind::lstm ? 4 : 3) * int64_t{z.hidden}; }

// One direction's parameters.
struct Weights {
  const void* weight_ih;  // (G * H, I); read in forward
  const void* weight_hh;  // (G * H, Hout)
  const void* weight_hr;  // (P, H) or null
  const void* bias_ih;    // (G * H,) or null
  const void* bias_hh;    // (G * H,) or null
};

struct ForwardParams {
  Sizes sizes;
  bool bfloat16_weights;  // weight_ih, weight_hh and weight_hr hold bfloat16 though `dtype` is float32; not with `training`
  Boundaries boundaries;
  Schedule schedule;
  Weights weights[max_directions];
  const void* h_0;  // (D, N, Hout) or null
  const void* c_0;  // (D, N, H) or null; LSTM
  const void* input;  // (L, N, I) with strides; elements of one step of one sequence are contiguous
  int64_t input_size, input_step_stride, input_batch_stride;
  bool training;   // a backward pass follows: then the bits of a step depend neither on the other steps of the call nor on other sequences
  void* gates;     // (L, N, D, 4 * H) or null: the activated gates, i, f, g, o or r, z, n, hidden half of n
  void* output;    // (L, N, D * Hout)
  void* c_states;  // (L, N, D, H) or null; LSTM
  void* h_n;       // (D, N, Hout)
  void* c_n;       // (D, N, H); LSTM
};

// How a product takes its weights: as they lie, packed block by block as they are used, or all packed before the first step.
enum class Packing { none, as_used, before };

// How a forward pass would run, and the workspace that it needs.
struct ForwardPlan {
  const char* instruction_set;
  size_t workspace_bytes;
  // Threads by sequences times threads by hidden units; the latter meet after every step.
  int64_t batch_groups, unit_groups;
  Packing input_packing, state_packing;  // of W_ih and of W_hh
  int64_t chunk_sequences, chunk_steps;  // what the input's product is computed for at once
};

struct BackwardParams {
  Sizes sizes;
  Boundaries boundaries;
  Schedule schedule;
  Weights weights[max_directions];  // biases are read with `recompute` only
  const void* h_0;                  // (D, N, Hout) or null; GRU
  const void* c_0;                  // (D, N, H) or null; LSTM
  const void* output;               // (L, N, D * Hout); GRU
  const void* c_states;             // (L, N, D, H); LSTM
  const void* gates;                // (L, N, D, 4 * H) as the forward pass left them
  // Instead, `grad_gates` holds the pre-activations, without bias: i, f, g, o or r, z and the halves of n.
  bool recompute;
  const void* grad_output;          // (L, N, D * Hout) or null
  const void* grad_h_n;             // (D, N, Hout) or null
  const void* grad_c_n;             // (D, N, H) or null; LSTM
  const void* grad_c_states;        // (L, N, D, H) or null; LSTM
  // Results. Gradients of the pre-activations, for each direction (steps, N, 4 * H): i, f, g, o or r, z, input half of n, hidden
  // half of n. The steps are those that the rounds at hand go through, from `first_step` on.
  void* grad_gates[max_directions];
  int64_t first_step[max_directions];
  void* grad_h;        // (L, N, D, Hout): of every step's h; with a projection only, else null
  void* grad_h_0;      // (D, N, Hout)
  void* grad_c_0;      // (D, N, H); LSTM
  void* grad_reset_h;  // (D, N, Hout), or null where nothing needs it
  void* grad_reset_c;  // (D, N, H), or null where nothing needs it; LSTM
};

// C (rows, columns) = A (rows, depth) @ B (depth, columns), or is increased by it; float32 or float64. Strides count elements. Of A's two strides one
// is 1, and of B's; the columns of C are contiguous.
struct ProductParams {
  ScalarKind dtype;
  int64_t rows, columns, depth;
  const void* a;
  int64_t a_row_stride, a_depth_stride;
  const void* b;
  int64_t b_depth_stride, b_column_stride;
  void* c;
  int64_t c_row_stride;
  bool add;  // to what C holds
};

// The sum of all rows of a matrix whose columns are contiguous, `sums` (columns), or added to it. Elements of `dtype`.
struct RowSumParams {
  ScalarKind dtype;
  int64_t rows, columns, row_stride;
  const void* matrix;
  void* sums;
  bool add;
};

}  // namespace hsm
