// What the kernels of the grid variant share: weights that stay in a multiprocessor, and the exchange of a vector between the blocks of a group.
//
// Data carry their own flag. A buffer is full of `nothing` before it is written, a word that no number has: a receiver looks again until none is
// left. It is the pattern of a NaN; numbers that are NaN travel as another one. Words of 32 bits are what is written and read as a whole, so
// each is a flag of its own, whatever the order in which the words of one access become visible.
//
// Round r reads buffer r % B and writes the next one. Who has received all of round r knows that everybody has read round r - 1, since what they
// sent was made of it, and fills its part of that buffer with `nothing` again. Its next words there are those of round r - 1 + B. Nobody may
// see what was there before when looking for them. With a fence at the end of every F-th round, the writer fences after round f < r + F at the
// latest, and its words of round f + 2, which it sends next, say so to the same lane of the receiver, who fences after round f + F + 1 at the latest.
// That is before its round r - 1 + B if B is at least 2 F + 2. There is no other barrier between blocks.
#pragma once

#include <cstring>

#include "cuda/grid_passes.cuh"
#include "cuda/tiles.cuh"

namespace hsm {
namespace cuda {

template <class To, class From>
HSM_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

static_assert(grid_buffers >= 2 * grid_rounds_between_fences + 2 && (grid_buffers & (grid_buffers - 1)) == 0, "");

// Behind a round of a launch.
HSM_DEVICE void end_round(int round) {
  if (round % grid_rounds_between_fences == 0) fence();
}

constexpr uint32_t nothing = 0xffffffff, nan_word = 0x7fff7fff;  // NaN, or two
HSM_DEVICE uint32_t something(uint32_t word) { return word == nothing ? nan_word : word; }
HSM_DEVICE bool has_nothing(const Words4& w) {
  return w.x == nothing || w.y == nothing || w.z == nothing || w.w == nothing;
}

// How 8 columns are multiplied with a tile: 16 rows, each of 4 parts of 16 bytes, one after the other. Lane 4 g + t brings part t of column g.
template <Arithmetic arithmetic>
struct ByTensorCores {
  static constexpr bool can_hold = true;  // what a lane needs of a tile
  static constexpr int sums = 4;

  static HSM_DEVICE void add(float (&sum)[sums], const BlockFragments& tile, const Words4& words) {
    multiply_add<arithmetic>(sum, tile.of[0], words.x, words.y);
    multiply_add<arithmetic>(sum, tile.of[1], words.z, words.w);
  }
  static HSM_DEVICE void add(float (&sum)[sums], const Words4* tile, const Words4& words) {
    add(sum, fragments_of(tile[lane()], tile[32 + lane()]), words);
  }
  // Into (16, 8).
  static HSM_DEVICE void leave(const float (&sum)[sums], float* to) {
    float* const at = to + lane() / 4 * grid_columns + lane() % 4 * 2;
    at[0] = sum[0], at[1] = sum[1];
    at[8 * grid_columns] = sum[2], at[8 * grid_columns + 1] = sum[3];
  }
};

// In float32: a lane sums what its part gives for each row.
struct ByMultiplyAdd {
  static constexpr bool can_hold = false;
  static constexpr int sums = 16;

  static HSM_DEVICE void add(float (&sum)[sums], const Words4* tile, const Words4& words) {
    const float x = bits_as<float>(words.x), y = bits_as<float>(words.y), z = bits_as<float>(words.z), w = bits_as<float>(words.w);
#pragma unroll
    for (int row = 0; row < sums; ++row) {
      const Words4 weights = tile[4 * row + lane() % 4];
      sum[row] += bits_as<float>(weights.x) * x;
      sum[row] += bits_as<float>(weights.y) * y;
      sum[row] += bits_as<float>(weights.z) * z;
      sum[row] += bits_as<float>(weights.w) * w;
    }
  }
  static HSM_DEVICE void leave(const float (&sum)[sums], float* to) {
#pragma unroll
    for (int row = 0; row < sums; ++row) {
      float all = sum[row] + shuffle_down(sum[row], 2);
      all += shuffle_down(all, 1);
      if (lane() % 4 == 0) to[row * grid_columns + lane() / 4] = all;
    }
  }
};

// In the part of a chunk that a lane brings.
template <Arithmetic arithmetic>
constexpr int part_elements = 4 * elements_per_word<arithmetic>;

// Which of the work is a block's.
struct GridPlace {
  int direction, group;  // the group counts all of the launch
  int first_unit;
  int64_t first_slot, slots;

  HSM_DEVICE GridPlace(const GridShape& shape, int first_direction, int64_t all_slots) {
    group = static_cast<int>(block_x()) / shape.blocks;
    direction = first_direction + group / shape.groups;
    first_unit = static_cast<int>(block_x()) % shape.blocks * shape.units;
    first_slot = group % shape.groups * shape.slots;
    slots = all_slots - first_slot < shape.slots ? all_slots - first_slot : shape.slots;
  }
};

// The buffer that round `round` of a launch reads, of one pass of a group.
HSM_DEVICE uint32_t* exchange_buffer(const GridShape& shape, uint32_t* exchange, int group, int pass, int round) {
  const int64_t buffer = (int64_t{group} * shape.passes + pass) * grid_buffers + (round & (grid_buffers - 1));
  return exchange + buffer * shape.buffer_words();
}

// Where in a buffer an element of a vector lies, of which sequence.
template <class T>
HSM_DEVICE int64_t exchange_word(const GridShape& shape, int part, int unit, int column) {
  constexpr int elements = grid_chunk_bytes / sizeof(T);
  const int64_t chunk = int64_t{part} * shape.part_chunks + unit / elements;
  return (chunk * grid_columns + column) * (grid_chunk_bytes / 4) + unit % elements * static_cast<int>(sizeof(T)) / 4;
}

// Ends a wait that lasts too long: without the blocks that it waits for, which can only be missing by a fault of the kernel or of the device,
// nothing that follows could be right.
class Watchdog {
 public:
  HSM_DEVICE void look() {
    if (++looks_ % looks_between_times) return;
    const uint64_t now = nanoseconds();
    if (begin_ == 0) begin_ = now;
    if (now - begin_ > patience) give_up();
  }

 private:
  static constexpr uint32_t looks_between_times = 1024;
  static constexpr uint64_t patience = 10'000'000'000;

  uint32_t looks_ = 0;
  uint64_t begin_ = 0;
};

// This lane's 16 bytes of up to `most` chunks, `stride` chunks apart; zeros for others, and for slots that there are not.
template <int most>
HSM_DEVICE void receive(const Words4* chunks, int stride, int count, bool exists, Words4 (&words)[most]) {
  const Words4* at = chunks + lane();
#pragma unroll
  for (int i = 0; i < most; ++i) words[i] = exists && i < count ? load_relaxed(at + i * stride * 32) : Words4{0, 0, 0, 0};
  Watchdog watchdog;
  for (;;) {
    bool missing = false;
#pragma unroll
    for (int i = 0; i < most; ++i) missing |= has_nothing(words[i]);
    if (!any_lane(missing)) return;
    watchdog.look();
#pragma unroll
    for (int i = 0; i < most; ++i)
      if (has_nothing(words[i])) words[i] = load_relaxed(at + i * stride * 32);
  }
}

// A part: element(i), as products take it.
template <Arithmetic arithmetic, class ElementAt>
HSM_DEVICE Words4 pack(ElementAt element) {
  return {word_of<arithmetic>(0, element), word_of<arithmetic>(1, element), word_of<arithmetic>(2, element), word_of<arithmetic>(3, element)};
}

// Of a row that has `count` elements left, and zeros behind them.
template <Arithmetic arithmetic>
HSM_DEVICE Words4 pack_row(const Element<arithmetic>* row, int count) {
  if (count >= part_elements<arithmetic> && reinterpret_cast<uintptr_t>(row) % sizeof(Words4) == 0) {
    Element<arithmetic> elements[part_elements<arithmetic>];
    std::memcpy(elements, __builtin_assume_aligned(row, sizeof(Words4)), sizeof elements);
    return pack<arithmetic>([&](int i) { return widen(elements[i]); });
  }
  return pack<arithmetic>([&](int i) { return i < count ? widen(row[i]) : 0.0f; });
}

// The weights of a block. Chunk c is warp c % 8's: the first ones are held in registers, the others lie in shared memory.
template <PassKind pass, Arithmetic arithmetic, CellKind kind>
class GridWeights {
 public:
  using Product = std::conditional_t<arithmetic == Arithmetic::float32, ByMultiplyAdd, ByTensorCores<arithmetic>>;
  static constexpr int most_tiles = grid_most_tiles(pass, kind), held_chunks = grid_held_chunks(pass, arithmetic);

  // words_of(row, chunk, quarter): 16 bytes of weights. `stage` has room for a tile for each of the block's tiles and warps. Before a barrier
  // of the block.
  template <class WordsOf>
  HSM_DEVICE GridWeights(const GridShape& shape, Words4* stage, Words4* shared, WordsOf words_of)
      : tiles_(shape.tiles), chunks_((shape.chunks - warp() + grid_warps - 1) / grid_warps), shared_(shared + warp() * tiles_ * tile_words) {
    // By a loop, into memory; a register has no index.
    const auto load = [&](int i, Words4* to) {
      const int row = static_cast<int>(lane()) / 4, quarter = static_cast<int>(lane()) % 4;
#pragma unroll 1
      for (int half = 0; half < 2 * tiles_; ++half)
        to[32 * half] = i < chunks_ ? words_of(8 * half + row, warp() + i * grid_warps, quarter) : Words4{0, 0, 0, 0};
    };
    if constexpr (held_chunks > 0) {
      Words4* const mine = stage + warp() * tiles_ * tile_words + lane();
#pragma unroll
      for (int i = 0; i < held_chunks; ++i) {
        load(i, mine);
#pragma unroll
        for (int tile = 0; tile < most_tiles; ++tile) {
          const Words4* const words = mine + (tile < tiles_ ? tile * tile_words : 0);
          held_[i][tile] = fragments_of(words[0], words[32]);
        }
      }
    }
#pragma unroll 1
    for (int i = held_chunks; i < chunks_; ++i) load(i, shared_tile(i, 0) + lane());
  }

  // The warp's part of the product with what arrives in `buffer` of up to 8 slots, into its part of `partial` (warps, tiles * 16, 8).
  HSM_DEVICE void multiply(const uint32_t* buffer, int64_t slots, float* partial) const {
    float* const mine = partial + warp() * tiles_ * 16 * grid_columns;
    const Words4* chunks = reinterpret_cast<const Words4*>(buffer) + warp() * 32;
    const bool exists = static_cast<int64_t>(lane() / 4) < slots;
    float sums[chains][most_tiles][Product::sums] = {};
    add<true>(chunks, 0, exists, sums);
    for (int first = together; first < chunks_; first += together) add<false>(chunks, first, exists, sums);
#pragma unroll
    for (int tile = 0; tile < most_tiles; ++tile) {
      if (tile >= tiles_) continue;
#pragma unroll
      for (int i = 0; i < Product::sums; ++i)
#pragma unroll
        for (int chain = 1; chain < chains; ++chain) sums[0][tile][i] += sums[chain][tile][i];
      Product::leave(sums[0][tile], mine + tile * 16 * grid_columns);
    }
  }

 private:
  static constexpr int tile_words = 64;
  static constexpr int together = grid_chunks_together(pass, arithmetic);
  // Sums that do not wait for each other: an addition takes some ten times as long as to begin one.
  static constexpr int chains = most_tiles == 1 && Product::can_hold ? 2 : 1;
  static_assert(held_chunks <= together, "held weights are those of the first chunks together");

  static HSM_DEVICE int warp() { return static_cast<int>(thread()) / 32; }
  HSM_DEVICE Words4* shared_tile(int i, int tile) const { return shared_ + ((i - held_chunks) * grid_warps * tiles_ + tile) * tile_words; }

  template <bool first_ones>
  HSM_DEVICE void add(const Words4* chunks, int first, bool exists, float (&sums)[chains][most_tiles][Product::sums]) const {
    Words4 words[together];
    receive(chunks + first * grid_warps * 32, grid_warps, chunks_ - first, exists, words);
#pragma unroll
    for (int i = 0; i < together; ++i) {
      if (first + i >= chunks_) continue;
#pragma unroll
      for (int tile = 0; tile < most_tiles; ++tile) {
        if (tile >= tiles_) continue;
        if constexpr (first_ones && Product::can_hold) {
          if (i < held_chunks) {
            Product::add(sums[i % chains][tile], held_[i < held_chunks ? i : 0][tile], words[i]);
            continue;
          }
        }
        Product::add(sums[i % chains][tile], shared_tile(first + i, tile), words[i]);
      }
    }
  }

  const int tiles_, chunks_;  // of the block, of the warp
  Words4* const shared_;
  BlockFragments held_[held_chunks > 0 ? held_chunks : 1][most_tiles];
};

// Of the product that the warps of a block have left in parts, row `row` and column `column`.
HSM_DEVICE float sum_of_parts(const GridShape& shape, const float* partial, int row, int column) {
  const int parts = shape.chunks < grid_warps ? shape.chunks : grid_warps;
  float sum = 0;
  for (int part = 0; part < parts; ++part) sum += partial[(part * shape.tiles * 16 + row) * grid_columns + column];
  return sum;
}

// An element as it travels, with its neighbour where two share a word. All lanes call it; the even ones have words of two.
template <class T>
HSM_DEVICE uint32_t travelling_word(T x) {
  if constexpr (sizeof(T) == 4) {
    return something(bits_as<uint32_t>(x));
  } else {
    const uint32_t bits = bits_as<uint16_t>(x);
    return something(bits | shuffle_down(bits, 1) << 16);
  }
}

// Whether a unit's words are its own: neighbours share them in a 16-bit type.
template <class T>
HSM_DEVICE bool has_word(int unit) {
  return unit * static_cast<int>(sizeof(T)) % 4 == 0;
}

// Sends a word for the next round, in whose turn its place in the buffer of the round before is free.
template <class T>
HSM_DEVICE void send(const GridShape& shape, uint32_t* exchange, int group, int pass, int round, int part, int unit, int column, uint32_t word) {
  const int64_t at = exchange_word<T>(shape, part, unit, column);
  store_relaxed(exchange_buffer(shape, exchange, group, pass, round + 1) + at, word);
  store_relaxed(exchange_buffer(shape, exchange, group, pass, round - 1 + grid_buffers) + at, nothing);
}

// What a kernel gets.
template <class Round>
struct GridRun {
  Round round;
  GridShape shape;
  int first_direction;
  uint32_t* exchange;
};

// What is multiplied in the first round: the h that enters it, or nothing.
template <class T>
HSM_DEVICE float first_vector(const ForwardRound& s, int direction, int64_t slot, int unit) {
  const Visit visit = visit_at(s.visits, direction, slot, 0);
  return visit.has(Visit::is_step) ? entering_h<T>(s, direction, visit, unit) : 0.0f;
}
template <class T>
HSM_DEVICE float first_vector(const BackwardRound&, int, int64_t, int) {
  return 0.0f;
}

// The buffers of a launch before its first round: that of the round has what it multiplies, the others nothing. What there is not,
// behind the units and the slots, is zero in all of them, and nobody writes it.
template <Arithmetic arithmetic, class Round>
HSM_KERNEL(block_threads) begin_exchange(HSM_ARGUMENT GridRun<Round> s) {
#ifdef HSM_HAS_MMA
  using T = Element<arithmetic>;
  constexpr int in_word = elements_per_word<arithmetic>, words_of_column = grid_chunk_bytes / 4;
  const GridShape& shape = s.shape;
  const int64_t at = int64_t{block_x()} * block_threads + thread();
  if (at >= shape.exchange_words()) return;
  const int64_t buffer = at / shape.buffer_words(), in_buffer = at % shape.buffer_words();
  const int64_t pass = buffer / grid_buffers % shape.passes, group = buffer / grid_buffers / shape.passes;
  const int chunk = static_cast<int>(in_buffer / grid_chunk_words);
  const int unit = (chunk % shape.part_chunks * words_of_column + static_cast<int>(in_buffer % words_of_column)) * in_word;
  const int64_t in_group = pass * grid_columns + in_buffer / words_of_column % grid_columns, slot = group % shape.groups * shape.slots + in_group;
  const int hidden = s.round.params.sizes.hidden, direction = s.first_direction + static_cast<int>(group / shape.groups);
  uint32_t word = 0;
  if (unit < hidden && in_group < shape.slots && slot < s.round.visits.slots) {
    word = nothing;
    if (buffer % grid_buffers == 0)
      word = something(word_of<arithmetic>(0, [&](int i) { return unit + i < hidden ? first_vector<T>(s.round, direction, slot, unit + i) : 0.0f; }));
  }
  s.exchange[at] = word;
#else
  trap();
#endif
}

// Launches kernel(run) for all directions, as many at once as there is room for.
template <Arithmetic arithmetic, class Round>
cudaError_t launch_grid(void (*kernel)(GridRun<Round>), GridRun<Round> run, cudaStream_t stream) {
  const GridShape& shape = run.shape;
  cudaError_t status = cudaSuccess;
  for (int d = 0; d < run.round.params.sizes.directions && status == cudaSuccess; d += shape.directions) {
    run.first_direction = d;
    LaunchShape words{static_cast<unsigned>((shape.exchange_words() + block_threads - 1) / block_threads)};
    words.threads = block_threads;
    status = launch(begin_exchange<arithmetic, Round>, words, stream, run);
    if (status != cudaSuccess) return status;
    LaunchShape blocks{static_cast<unsigned>(shape.directions * shape.groups * shape.blocks)};
    blocks.threads = grid_threads, blocks.shared_bytes = static_cast<size_t>(shape.shared_bytes);
    Together together;
    together.cooperative = true;
    status = launch_together(kernel, blocks, together, stream, run);
  }
  return status;
}

}  // namespace cuda
}  // namespace hsm
