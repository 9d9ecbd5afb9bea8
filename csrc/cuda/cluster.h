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
constexpr int tile_columns = 8;   // the columns of a tile
constexpr int block_words = 16;     // the depth of two instructions
constexpr int fragment_bytes = 16 * 32;  // of one instruction
constexpr int most_cluster_warps = 8;
constexpr int most_column_tiles = 2;
constexpr int most_block_units = tile_units * most_cluster_warps;
// Of a warp's weights in the forward pass: more sequences leave fewer registers for them. ptxas needs more beside them for a GRU.
HSM_HOST_DEVICE constexpr int register_blocks(CellKind cell, int column_tiles) {
  return (column_tiles == 1 ? 8 : 5) - (cell == CellKind::gru);
}

HSM_HOST_DEVICE int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Words from one vector to the next. Lanes that read at once meet no bank twice: in a tensor core's product each 16 bytes of two vectors, in one in
// float32 a word of every other one of eight.
HSM_HOST_DEVICE int vector_stride(int words, bool tensor_cores) { return round_up(words, 32) + (tensor_cores ? 16 : 4); }

// The forward pass. A warp has a group of 8 units, and of the depth of their product a share.
struct ClusterForwardShape {
  int blocks, units;  // of the cluster; of a block
  int groups, splits, warps;
  int depth;          // blocks of 16 words that a warp multiplies
  int row_words;      // from one sequence's h to the next
  int column_tiles;
  int element_bytes;  // of h in shared memory
  int registers;      // blocks of weights in registers

  HSM_HOST_DEVICE int slots() const { return tile_columns * column_tiles; }
  HSM_HOST_DEVICE int blocks_in_shared() const { return depth > registers ? depth - registers : 0; }
  // Bytes that a block receives in a round: h of all units.
  HSM_HOST_DEVICE int bytes_of_round() const { return blocks * units * slots() * element_bytes; }

  // Places in shared memory, in bytes.
  HSM_HOST_DEVICE int64_t shared_weight_bytes() const { return int64_t{warps} * blocks_in_shared() * 4 * fragment_bytes; }
  HSM_HOST_DEVICE int64_t h() const { return shared_weight_bytes(); }
  HSM_HOST_DEVICE int h_bytes() const { return slots() * row_words * 4; }  // twice: what enters even rounds, and odd ones
  HSM_HOST_DEVICE int64_t sums() const { return h() + 2 * h_bytes(); }
  HSM_HOST_DEVICE int sums_bytes() const { return splits > 1 ? warps * column_tiles * 8 * 32 * 4 : 0; }
  HSM_HOST_DEVICE int64_t outbox() const { return sums() + sums_bytes(); }
  HSM_HOST_DEVICE int outbox_bytes() const { return warps * slots() * tile_units * element_bytes; }  // twice
  HSM_HOST_DEVICE int64_t barriers() const { return outbox() + 2 * outbox_bytes(); }
  HSM_HOST_DEVICE int64_t shared_bytes() const { return barriers() + 2 * 8; }
};

// The backward pass. A block multiplies the gradients of its gates with their rows of the weights, which gives parts of the gradients of h of all
// units: tiles of 16 units are dealt to its warps. A part goes to the block that has the unit, into an inbox for each sender.
struct ClusterBackwardShape {
  int blocks, units;
  int warps;
  int tiles;      // of a warp
  int depth;      // blocks of 16 words: the gates of the block's units, gate by gate
  int row_words;  // from the gate gradients of one sequence to the next
  int column_tiles;
  int kept_tiles, kept_depth;  // whose weights are in registers

  HSM_HOST_DEVICE int slots() const { return tile_columns * column_tiles; }
  HSM_HOST_DEVICE int blocks_in_shared() const { return tiles * depth - kept_tiles * kept_depth; }
  // Floats from one unit of an inbox to the next: eight units of four sequences meet no bank twice.
  HSM_HOST_DEVICE int unit_stride() const { return slots() + 4; }
  HSM_HOST_DEVICE int inbox_bytes() const { return units * unit_stride() * 4; }
  HSM_HOST_DEVICE int bytes_of_round() const { return blocks * units * slots() * 4; }

  // Places in shared memory, in bytes.
  HSM_HOST_DEVICE int64_t shared_weight_bytes() const { return int64_t{warps} * blocks_in_shared() * 2 * fragment_bytes; }
  HSM_HOST_DEVICE int64_t gates() const { return shared_weight_bytes(); }
  HSM_HOST_DEVICE int gates_bytes() const { return slots() * row_words * 4; }  // twice
  HSM_HOST_DEVICE int64_t inboxes() const { return gates() + 2 * gates_bytes(); }
  HSM_HOST_DEVICE int inboxes_bytes() const { return blocks * inbox_bytes(); }  // twice
  HSM_HOST_DEVICE int64_t barriers() const { return inboxes() + 2 * inboxes_bytes(); }
  HSM_HOST_DEVICE int64_t shared_bytes() const { return barriers() + 2 * 8; }
};

// As many as the registers hold; words of 32 bits make more blocks of the same units.
HSM_HOST_DEVICE constexpr int kept_backward_tiles(Arithmetic arithmetic, int column_tiles) {
  return arithmetic == Arithmetic::float32 ? 0 : arithmetic == Arithmetic::tf32 || column_tiles > 1 ? 2 : 4;
}
HSM_HOST_DEVICE constexpr int kept_backward_depth(Arithmetic arithmetic, int column_tiles) {
  return arithmetic == Arithmetic::float32 ? 0 : column_tiles > 1 ? 4 : arithmetic == Arithmetic::tf32 ? 8 : 3;
}

inline bool has_tensor_cores(Arithmetic arithmetic) { return arithmetic != Arithmetic::float32; }
inline int element_bytes_of(Arithmetic arithmetic) { return arithmetic == Arithmetic::bfloat16 || arithmetic == Arithmetic::float16 ? 2 : 4; }

// Every block has whole groups of units, the last one maybe fewer; units behind the last are computed, and are zero.
inline int units_of_block(int hidden, int blocks) { return round_up((hidden + blocks - 1) / blocks, tile_units); }

inline ClusterForwardShape cluster_forward_shape(Arithmetic arithmetic, CellKind cell, int hidden, int blocks, int column_tiles) {
  ClusterForwardShape shape{};
  shape.blocks = blocks;
  shape.units = units_of_block(hidden, blocks);
  shape.element_bytes = element_bytes_of(arithmetic);
  const int all_blocks = round_up(blocks * shape.units * shape.element_bytes, 4 * block_words) / (4 * block_words);
  shape.groups = shape.units / tile_units;
  const int splits = most_cluster_warps / shape.groups;
  shape.splits = splits < 1 ? 1 : splits < all_blocks ? splits : all_blocks;
  shape.warps = shape.groups * shape.splits;
  shape.depth = (all_blocks + shape.splits - 1) / shape.splits;
  shape.row_words = vector_stride(shape.splits * shape.depth * block_words, has_tensor_cores(arithmetic));
  shape.column_tiles = column_tiles;
  shape.registers = has_tensor_cores(arithmetic) ? register_blocks(cell, column_tiles) : 0;
  return shape;
}

inline ClusterBackwardShape cluster_backward_shape(Arithmetic arithmetic, CellKind cell, int hidden, int blocks, int column_tiles) {
  ClusterBackwardShape shape{};
  shape.blocks = blocks;
  shape.units = units_of_block(hidden, blocks);
  shape.column_tiles = column_tiles;
  const int all_tiles = (blocks * shape.units + 15) / 16, pieces = shape.units / 8 * 2 * column_tiles;  // of 8 units of 4 sequences
  const int useful_warps = all_tiles > pieces ? all_tiles : pieces;
  shape.warps = useful_warps < most_cluster_warps ? useful_warps : most_cluster_warps;
  shape.tiles = (all_tiles + shape.warps - 1) / shape.warps;
  const int gates = cell == CellKind::lstm ? 4 : 3;
  shape.depth = round_up(gates * shape.units * element_bytes_of(arithmetic), 4 * block_words) / (4 * block_words);
  shape.row_words = vector_stride(shape.depth * block_words, has_tensor_cores(arithmetic));
  const int tiles = kept_backward_tiles(arithmetic, column_tiles), depth = kept_backward_depth(arithmetic, column_tiles);
  shape.kept_tiles = shape.tiles < tiles ? shape.tiles : tiles;
  shape.kept_depth = shape.depth < depth ? shape.depth : depth;
  return shape;
}

}  // namespace cuda
}  // namespace hsm
