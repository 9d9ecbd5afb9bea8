// How the grid variant shares out a pass: the host's part, without CUDA.
//
// All blocks of one launch are on the GPU together. A group of them holds the recurrent weights of one direction, each block those of some units,
// and runs some of the slots. Blocks of a group meet in every round; groups never meet.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/params.h"
#include "cuda/plan.h"

namespace hsm {
namespace cuda {

constexpr int grid_warps = 8, grid_threads = 32 * grid_warps;
// A product takes the states of so many slots at once, and of each of them 64 bytes: a chunk.
constexpr int grid_columns = 8, grid_chunk_bytes = 64;
constexpr int64_t grid_chunk_words = grid_columns * grid_chunk_bytes / 4;
constexpr int grid_buffers = 8, grid_rounds_between_fences = 3;  // grid.cuh says how they go together
constexpr int grid_most_units = 16;  // of a block

struct GridShape {
  Arithmetic arithmetic;
  int groups;          // of each direction
  int blocks;          // of each group
  int units;           // of each block; an even number, so that two 16-bit numbers that travel together have one sender
  int64_t slots;       // of each group, or fewer
  int passes;          // grid_columns of them at a time
  int parts;           // vectors of H that are exchanged in a round: h, or the gradient of each gate
  int part_chunks;     // of each of them
  int chunks;          // of all
  int tiles;           // of 16 rows of a block's weights
  int directions;      // that run together
  int64_t shared_bytes;

  // Of the products of all warps.
  HSM_HOST_DEVICE int partial_floats() const { return grid_warps * tiles * 16 * grid_columns; }
  HSM_HOST_DEVICE int64_t buffer_words() const { return chunks * grid_chunk_words; }
  HSM_HOST_DEVICE int64_t exchange_words() const { return int64_t{directions} * groups * passes * grid_buffers * buffer_words(); }
};

// Of a block's weights: how many tiles there may be; how many of their chunks a warp holds in registers, and how many it waits for at once. For
// more, ptxas spills.
HSM_HOST_DEVICE constexpr int grid_most_tiles(PassKind pass, CellKind cell) { return pass == PassKind::backward ? 1 : cell == CellKind::lstm ? 4 : 3; }
HSM_HOST_DEVICE constexpr int grid_held_chunks(PassKind pass, Arithmetic arithmetic) {
  return arithmetic == Arithmetic::float32 ? 0 : pass == PassKind::backward ? 8 : 3;
}
HSM_HOST_DEVICE constexpr int grid_chunks_together(PassKind pass, Arithmetic arithmetic) {
  return arithmetic == Arithmetic::tf32 || (pass == PassKind::backward && arithmetic != Arithmetic::float32) ? 8 : 4;
}

// The grid variant's plan for a pass, or that of `step`, with the reason. `blocks`: of a group, or 0.
Plan plan_grid(const Sizes& sizes, PassKind pass, bool cuts, Arithmetic arithmetic, const DeviceFacts& device, int blocks);

// What such a plan means. All zero for other variants.
GridShape grid_shape(const Sizes& sizes, PassKind pass, const Plan& plan);

}  // namespace cuda
}  // namespace hsm
