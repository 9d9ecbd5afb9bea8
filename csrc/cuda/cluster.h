// How the blocks of a cluster share the recurrence of some sequences: what both the host, which plans, and the kernels want to know.
//
// Each block has some of the units, all their gates, and keeps their rows of the recurrent weights: in registers, and what these do not hold in
// shared memory. Tiles and words are those of tiles.cuh.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/plan.h"

namespace hsm {
namespace cuda {

constexpr int tile_units = 8;       // whose four gates are two tiles of 16 rows
constexpr int tile_sequences = 8;   // the columns of a tile
constexpr int block_words = 16;     // the depth of two instructions
constexpr int fragment_bytes = 16 * 32;  // of one instruction
constexpr int most_cluster_warps = 8;
constexpr int most_column_tiles = 2;
// Of a warp's weights in the forward pass: more sequences leave fewer registers for them.
HSM_HOST_DEVICE constexpr int register_blocks(int column_tiles) { return column_tiles == 1 ? 8 : 5; }

HSM_HOST_DEVICE int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Words from one vector to the next. Lanes that read at once meet no bank twice: in a tensor core's product each 16 bytes of two vectors, in one in
// float32 a word of every other one of eight.
HSM_HOST_DEVICE int vector_stride(int words, bool tensor_cores) { return round_up(words, 32) + (tensor_cores ? 16 : 4); }

// The forward pass. A warp has a group of 8 units, and of the depth of their product a share.
struct ClusterForwardShape {
  int blocks, units;  // of the cluster; of a block
  int groups, splits;
  int depth;          // blocks of 16 words that a warp multiplies
  int row_words;      // from one sequence's h to the next
  int column_tiles;
  int element_bytes;  // of h in shared memory
  int registers;      // blocks of weights in registers

  HSM_HOST_DEVICE int warps() const { return groups * splits; }
  HSM_HOST_DEVICE int sequences() const { return tile_sequences * column_tiles; }
  HSM_HOST_DEVICE int blocks_in_shared() const { return depth > registers ? depth - registers : 0; }
  // Bytes that a block receives in a round: h of all units.
  HSM_HOST_DEVICE int bytes_of_round() const { return blocks * units * sequences() * element_bytes; }

  // Places in shared memory, in bytes.
  HSM_HOST_DEVICE int64_t h() const { return int64_t{warps()} * blocks_in_shared() * 4 * fragment_bytes; }
  HSM_HOST_DEVICE int h_bytes() const { return sequences() * row_words * 4; }  // twice: what enters even rounds, and odd ones
  HSM_HOST_DEVICE int64_t sums() const { return h() + 2 * h_bytes(); }
  HSM_HOST_DEVICE int sums_bytes() const { return splits > 1 ? warps() * column_tiles * 8 * 32 * 4 : 0; }
  HSM_HOST_DEVICE int64_t outbox() const { return sums() + sums_bytes(); }
  HSM_HOST_DEVICE int outbox_bytes() const { return warps() * sequences() * tile_units * element_bytes; }  // twice
  HSM_HOST_DEVICE int64_t barriers() const { return outbox() + 2 * outbox_bytes(); }
  HSM_HOST_DEVICE int64_t shared_bytes() const { return barriers() + 2 * 8; }
};

inline bool has_tensor_cores(Arithmetic arithmetic) { return arithmetic != Arithmetic::float32; }
inline int element_bytes_of(Arithmetic arithmetic) { return arithmetic == Arithmetic::bfloat16 || arithmetic == Arithmetic::float16 ? 2 : 4; }

// Every block has whole groups of units, the last one maybe fewer; units behind the last are computed, and are zero.
inline int units_of_block(int hidden, int blocks) { return round_up((hidden + blocks - 1) / blocks, tile_units); }

inline ClusterForwardShape cluster_forward_shape(Arithmetic arithmetic, int hidden, int blocks, int column_tiles) {
  ClusterForwardShape shape{};
  shape.blocks = blocks;
  shape.units = units_of_block(hidden, blocks);
  shape.element_bytes = element_bytes_of(arithmetic);
  const int all_blocks = round_up(blocks * shape.units * shape.element_bytes, 4 * block_words) / (4 * block_words);
  shape.groups = shape.units / tile_units;
  const int splits = most_cluster_warps / shape.groups;
  shape.splits = splits < 1 ? 1 : splits < all_blocks ? splits : all_blocks;
  shape.depth = (all_blocks + shape.splits - 1) / shape.splits;
  shape.row_words = vector_stride(shape.splits * shape.depth * block_words, has_tensor_cores(arithmetic));
  shape.column_tiles = column_tiles;
  shape.registers = has_tensor_cores(arithmetic) ? register_blocks(column_tiles) : 0;
  return shape;
}

}  // namespace cuda
}  // namespace hsm
