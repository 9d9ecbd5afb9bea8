// The passes of a layer on a GPU. The recurrence goes in rounds, each one step of every sequence: a product with the recurrent weights and one
// kernel for everything else in the step variant, which runs whatever the operators take. plan.h says which other variant may take the place of
// its rounds; all else is the same for all.
//
// All work is enqueued on the caller's stream. Nothing is allocated, read back or waited for, so a call can be captured in a CUDA
// graph. Masks and lengths are read on the device only. A persistent variant deals the segments into which they cut the sequences to slots there
// (schedule.cuh), and runs no more rounds than these need. The host, which launches the step variant's rounds, does not know them: there, sequences run
// as if they were not cut. Only where the caller says that all are detached at every k-th step (Boundaries::detach_every) do segments run
// beside each other in the backward pass.
//
// Every sum has a fixed order, so that equal calls give equal bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/params.h"
#include "cuda/plan.h"

struct CUstream_st;

namespace hsm {
namespace cuda {

// A cudaError_t; 0 is success. Callers need no header of the CUDA toolkit.
using Status = int;
const char* status_text(Status status);

// Versions as CUDA counts them (13000 is 13.0): of the runtime in this library, and the newest that the driver can serve.
Status versions(int& runtime, int& driver);

// Of the current device.
Status find_device_facts(DeviceFacts& facts);

Status fill(void* data, int byte, size_t bytes, CUstream_st* stream);

// For each of `batch`: C (rows, columns) = A (rows, depth) @ B (depth, columns), or C is increased by it. Strides count elements. Of A's
// row and depth strides one is 1, and of B's depth and column strides; the columns of C are contiguous.
struct BatchedProduct {
  ScalarKind dtype;       // of A and B
  ScalarKind dtype_of_c;  // `dtype`, or float32 where that is a 16-bit type
  int64_t batch, rows, columns, depth;
  const void* a;
  int64_t a_batch_stride, a_row_stride, a_depth_stride;
  const void* b;
  int64_t b_batch_stride, b_depth_stride, b_column_stride;
  void* c;
  int64_t c_batch_stride, c_row_stride;
  bool add;
};

// Enqueues a product on the stream of the call; throws if it cannot.
struct Products {
  void (*multiply)(void* context, const BatchedProduct& product);
  void* context;
};

// The gradients that remain to be made from those of the pre-activations. Null: not wanted. Those of weights are of each of S samples, equal parts of the
// batch.
struct LayerGradients {
  int64_t samples;
  void* input;                      // (L, N, I)
  void* weight_ih[max_directions];  // (S, G * H, I)
  void* weight_hh[max_directions];  // (S, G * H, Hout)
  void* bias[max_directions];       // (S, 4 * H): of the parts of grad_gates, summed
};

struct BackwardLayer {
  // `grad_gates` and `first_step` are set by the pass itself, `output` is given for both cells, `h_0` too, and with `recompute` the
  // pre-activations are computed by the pass itself.
  BackwardParams params;
  const void* input;     // (L, N, I)
  int64_t input_size;
  const void* entering;  // (D, L, N, Hout): the h that entered each step; given with resets or lengths
  LayerGradients gradients;
};

// How much memory a pass takes at once; smaller ones make it go in more pieces.
struct Limits {
  // The input's product of so many steps is still in the GPU's cache when the rounds read it.
  int64_t input_product_bytes = int64_t{32} << 20;
  // A persistent variant loads the weights anew for each such piece.
  int64_t persistent_input_product_bytes = int64_t{128} << 20;
  // What deals segments to slots.
  int64_t schedule_bytes = int64_t{32} << 20;
  // The gradients of the pre-activations of one direction: rows enough for fast products over them.
  int64_t gate_gradient_bytes = int64_t{128} << 20;
};

// Each pass first says how many bytes of device memory it needs, aligned to 256 bytes; their contents do not matter. The schedule
// of the parameters is not looked at, their input is contiguous, and all their pointers are to memory of the current device.
size_t forward_workspace(const ForwardParams& params, const Setting& setting, const Limits& limits = {});
Status forward(const ForwardParams& params, void* workspace, const Setting& setting, const Products& products, CUstream_st* stream,
               const Limits& limits = {});

size_t backward_workspace(const BackwardLayer& layer, const Setting& setting, const Limits& limits = {});
Status backward(const BackwardLayer& layer, void* workspace, const Setting& setting, const Products& products, CUstream_st* stream,
                const Limits& limits = {});

}  // namespace cuda
}  // namespace hsm
