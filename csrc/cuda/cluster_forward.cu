// The forward recurrence by clusters of blocks. A cluster goes through all rounds of some slots of one direction; clusters know nothing of each
// other. In a round each warp multiplies its units' weights, which it keeps, with the h of all units, takes its units through the cell, and sends
// their h to all blocks of the cluster.
//
// h lies in two buffers in turn, for even and for odd rounds, each with a barrier that counts the bytes as they come; nothing else is waited
// for. A buffer is written again only once every warp of every block has read it: h of the next round has then come from all of them.
#include "cuda/cluster_passes.cuh"
#include "cuda/forward.cuh"
#include "cuda/tiles.cuh"

namespace hsm {
namespace cuda {
namespace {

using ForwardClusters = ClusterRun<ForwardRound, ClusterForwardShape>;

template <Arithmetic arithmetic, CellKind kind, int n_tiles>
class ForwardWarp {
 public:
  HSM_DEVICE explicit ForwardWarp(const ForwardClusters& s) : s_(s), z_(s.round.params.sizes), shape_(s.shape), storage_(shared_storage<char>()) {
    const int warp = static_cast<int>(thread() / 32);
    rank_ = static_cast<int>(cluster_rank());
    group_ = warp / shape_.splits, split_ = warp % shape_.splits;
    direction_ = static_cast<int>(block_y());
    first_slot_ = static_cast<int64_t>(block_x()) / shape_.blocks * shape_.slots();
    unit_ = rank_ * shape_.units + group_ * tile_units + static_cast<int>(lane()) / 4;
    warp_fragments_ = reinterpret_cast<Words4*>(storage_) + warp * shape_.blocks_in_shared() * 4 * 32;
    sums_ = reinterpret_cast<float*>(storage_ + shape_.sums());
    outbox_ = storage_ + shape_.outbox() + warp * n_tiles * tile_columns * tile_units * sizeof(T);
    barriers_ = reinterpret_cast<Mbarrier*>(storage_ + shape_.barriers());
  }

  HSM_DEVICE void run() {
    const int rounds = rounds_of(visits(), direction_, first_slot_, shape_.slots());
    set_up(rounds);
    for_each([&](int n, int column) { upcoming_[n][column] = visit_at(visits(), direction_, slot(n, column), 0); });
    Round next = look_at(0);
    for_each([&](int n, int column) { h_[n][column] = next.h[n][column], c_[n][column] = next.c[n][column]; });
    for (int i = 0; i < rounds; ++i) {
      TileSums sums[2][n_tiles] = {};
      add_input(next, sums);
      if (i + 1 < rounds) next = look_at(i + 1);
      if (i > 0) receive(i, rounds);
      multiply(i, sums);
      if (shape_.splits > 1) share_sums(sums);
      step(i, rounds, next, sums);
    }
    // Nobody leaves while others may still write to its memory.
    cluster_arrive();
    cluster_wait();
  }

 private:
  using T = Element<arithmetic>;
  static constexpr bool tensor_cores = arithmetic != Arithmetic::float32;
  static constexpr int kept_blocks = tensor_cores ? register_blocks(kind, n_tiles) : 0;

  // What a round reads of memory for the lane's unit in its two columns of each tile. h and c: where a segment begins.
  struct Round {
    bool begins[n_tiles][2];
    float input[n_tiles][2][4];
    float h[n_tiles][2], c[n_tiles][2];
  };

  HSM_DEVICE bool owns(int n) const { return n % shape_.splits == split_; }
  HSM_DEVICE const Visits& visits() const { return s_.round.visits; }
  HSM_DEVICE int64_t slot(int n, int column) const { return first_slot_ + tile_columns * n + 2 * (static_cast<int>(lane()) % 4) + column; }
  HSM_DEVICE bool exists(int n, int column) const { return unit_ < z_.hidden && slot(n, column) < visits().slots; }
  HSM_DEVICE uint32_t* h_of(int round) const { return reinterpret_cast<uint32_t*>(storage_ + shape_.h() + round % 2 * shape_.h_bytes()); }

  // Calls function(n, column) for what the lane computes and what exists.
  template <class Function>
  HSM_DEVICE void for_each(Function function) const {
#pragma unroll
    for (int n = 0; n < n_tiles; ++n)
#pragma unroll
      for (int column = 0; column < 2; ++column)
        if (owns(n) && exists(n, column)) function(n, column);
  }

  HSM_DEVICE void set_up(int rounds) {
    if (thread() == 0)
      for (int b = 0; b < 2; ++b) {
        mbarrier_init(barriers_ + b, 1);
        if (rounds > 2 - b) mbarrier_arrive_expect(barriers_ + b, bytes_of_round());
      }
    load_weights();
    load_h();
    load_bias();
    mbarrier_fence_init();
    cluster_arrive();
    cluster_wait();
  }

  HSM_DEVICE unsigned bytes_of_round() const { return static_cast<unsigned>(shape_.bytes_of_round()); }

  // The words that the lane multiplies of a gate's row of the recurrent weights, in one block.
  HSM_DEVICE Words4 words_of_gate(int gate, int block) const {
    if (unit_ >= z_.hidden || gate >= (kind == CellKind::lstm ? 4 : 3)) return {0, 0, 0, 0};
    const int64_t row = (int64_t{gate} * z_.hidden + unit_) * z_.hidden;
    return words_of_lane<arithmetic>(block, [&](int k) {
      return k < z_.hidden ? load<T>(s_.round.params.weights[direction_].weight_hh, row + k) : 0.0f;
    });
  }

  // Two gates of the group's units.
  HSM_DEVICE BlockFragments fragments_of_gates(int tile, int block) const {
    return fragments_of(words_of_gate(2 * tile, split_ * shape_.depth + block), words_of_gate(2 * tile + 1, split_ * shape_.depth + block));
  }

  HSM_DEVICE void load_weights() {
#pragma unroll
    for (int block = 0; block < kept_blocks; ++block)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        if (block < shape_.depth) kept_[block][tile] = fragments_of_gates(tile, block);
    for (int block = kept_blocks; block < shape_.depth; ++block)
      for (int tile = 0; tile < 2; ++tile) put_fragments(fragments_at(tile, block), fragments_of_gates(tile, block));
  }
  HSM_DEVICE Words4* fragments_at(int tile, int block) const { return warp_fragments_ + ((block - kept_blocks) * 2 + tile) * 2 * 32; }

  // What enters the first round, of all units, and zeros behind them, which nobody overwrites.
  HSM_DEVICE void load_h() {
    const int words = shape_.row_words, all = shape_.slots() * words;
    for (int i = static_cast<int>(thread()); i < all; i += 32 * shape_.warps) {
      const int64_t slot = first_slot_ + i / words;
      const Visit visit = slot < visits().slots ? visit_at(visits(), direction_, slot, 0) : Visit{0, 0};
      h_of(0)[i] = word_of<arithmetic>(i % words, [&](int k) {
        return visit.has(Visit::is_step) && k < z_.hidden ? entering_h<T>(s_.round, direction_, visit, k) : 0.0f;
      });
      h_of(1)[i] = 0;
    }
  }

  HSM_DEVICE void load_bias() {
    if (unit_ >= z_.hidden) return;
    const Weights& w = s_.round.params.weights[direction_];
    const int h = z_.hidden, n = 2 * h + unit_, last = kind == CellKind::lstm ? 3 * h + unit_ : n;
    bias_[0] = load<T>(w.bias_ih, unit_) + load<T>(w.bias_hh, unit_);
    bias_[1] = load<T>(w.bias_ih, h + unit_) + load<T>(w.bias_hh, h + unit_);
    bias_[2] = load<T>(w.bias_ih, n) + (kind == CellKind::lstm ? load<T>(w.bias_hh, n) : 0);
    bias_[3] = (kind == CellKind::lstm ? load<T>(w.bias_ih, last) : 0) + load<T>(w.bias_hh, last);
  }

  // What is read by way of a visit has come before its round begins, and the visit before that.
  HSM_DEVICE Round look_at(int i) {
    Round round{};
    for_each([&](int n, int column) {
      const Visit visit = upcoming_[n][column];
      upcoming_[n][column] = visit_at(visits(), direction_, slot(n, column), i + 1);
      round.begins[n][column] = visit.has(Visit::first);
      if (!visit.has(Visit::is_step)) return;
      const float* input = input_of<T>(s_.round, cuda::visit_of(direction_, visit)) + unit_;
#pragma unroll
      for (int g = 0; g < (kind == CellKind::lstm ? 4 : 3); ++g) round.input[n][column][g] = input[g * z_.hidden];
      if (!visit.has(Visit::first)) return;
      round.h[n][column] = entering_h<T>(s_.round, direction_, visit, unit_);
      if constexpr (kind == CellKind::lstm) round.c[n][column] = entering_c<T>(s_.round, direction_, visit, unit_);
    });
    return round;
  }

  // The sums of a lane in a group's two tiles are i, f, g and o in LSTM; in GRU r, z and the two halves of n, of which W_hh has the second.
  static HSM_HOST_DEVICE int slot_of(int gate) { return kind == CellKind::lstm || gate < 2 ? gate : 5 - gate; }

  // What is not multiplied with h.
  HSM_DEVICE void add_input(const Round& round, TileSums (&sums)[2][n_tiles]) const {
    for_each([&](int n, int column) {
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const int slot = slot_of(g);
        sums[slot / 2][n].of[0][2 * (slot % 2) + column] = round.input[n][column][g] + bias_[g];
      }
    });
  }

  // Waits for h of the round, and makes its barrier expect the next one but one.
  HSM_DEVICE void receive(int i, int rounds) const {
    Mbarrier* barrier = barriers_ + i % 2;
    mbarrier_wait(barrier, static_cast<unsigned>(i - 1) / 2 % 2);
    if (thread() == 0 && i + 2 < rounds) mbarrier_arrive_expect(barrier, bytes_of_round());
    sync_warp();  // mma.sync wants all lanes side by side
  }

  HSM_DEVICE void multiply(int i, TileSums (&sums)[2][n_tiles]) const {
    const uint32_t* vectors = h_of(i) + split_ * shape_.depth * block_words;
    if constexpr (tensor_cores) {
#pragma unroll
      for (int block = 0; block < kept_blocks; ++block) {
        if (block >= shape_.depth) break;
        const BlockVectors<n_tiles> h = get_vectors<n_tiles>(vectors + block * block_words, shape_.row_words);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) add_block<arithmetic>(sums[tile], kept_[block][tile], h);
      }
    }
    for (int block = kept_blocks; block < shape_.depth; ++block) {
      const uint32_t* h = vectors + block * block_words;
      if constexpr (tensor_cores) {
        const BlockVectors<n_tiles> loaded = get_vectors<n_tiles>(h, shape_.row_words);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) add_block<arithmetic>(sums[tile], get_fragments(fragments_at(tile, block)), loaded);
      } else {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) add_block_in_float32(sums[tile], fragments_at(tile, block), h, shape_.row_words);
      }
    }
  }

  // Where a warp of the group leaves its sums for the one that owns a tile: eight floats for each lane.
  HSM_DEVICE float* sums_at(int split, int n) const {
    return sums_ + ((group_ * shape_.splits + split) * n_tiles + n) * 8 * 32 + static_cast<int>(lane());
  }

  HSM_DEVICE void share_sums(TileSums (&sums)[2][n_tiles]) const {
#pragma unroll
    for (int n = 0; n < n_tiles; ++n) {
      if (owns(n)) continue;
      float* shared = sums_at(split_, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) shared[32 * i] = sums[i / 4][n].total(i % 4);
    }
    sync_threads();
#pragma unroll
    for (int n = 0; n < n_tiles; ++n) {
      if (!owns(n)) continue;
      float totals[8] = {};
      for (int split = 0; split < shape_.splits; ++split) {
        const float* shared = sums_at(split, n);
#pragma unroll
        for (int i = 0; i < 8; ++i) totals[i] += split == split_ ? sums[i / 4][n].total(i % 4) : shared[32 * i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i / 4][n].of[0][i % 4] = totals[i], sums[i / 4][n].of[1][i % 4] = 0;
    }
  }

  // Through the cell. What others wait for goes first; a slot without a step computes nothing that anybody reads.
  HSM_DEVICE void step(int i, int rounds, const Round& next, const TileSums (&sums)[2][n_tiles]) {
    UnitStep<float> steps[n_tiles][2];
    for_each([&](int n, int column) {
      float pre[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) pre[g] = sums[slot_of(g) / 2][n].total(2 * (slot_of(g) % 2) + column);
      float& h = h_[n][column];
      float& c = c_[n][column];
      UnitStep<float>& out = steps[n][column];
      out = forward_unit<kind>(true, pre, h, c);
      out.h = widen(narrow<T>(out.h));
      const bool begins = next.begins[n][column];
      h = begins ? next.h[n][column] : out.h;
      c = begins ? next.c[n][column] : out.c;
    });
    if (i + 1 < rounds) send(i);
    // Its visit is read again, which takes less than to hold it in registers.
    for_each([&](int n, int column) {
      write_step<T, kind>(s_.round, direction_, visit_at(visits(), direction_, slot(n, column), i), unit_, steps[n][column]);
    });
  }

  // The group's h to all blocks. In the outbox, which others of the warp may still read as it was two rounds ago, a sequence's eight units lie
  // side by side.
  HSM_DEVICE void send(int i) const {
    constexpr int chunk_bytes = static_cast<int>(sizeof(Words4)), chunks = tile_units * static_cast<int>(sizeof(T)) / chunk_bytes;
    constexpr int chunks_of_tile = tile_columns * chunks;
    T* outbox = reinterpret_cast<T*>(outbox_ + i % 2 * shape_.outbox_bytes());
    const int l = static_cast<int>(lane());
    const bool is_unit = unit_ < z_.hidden;
#pragma unroll
    for (int n = 0; n < n_tiles; ++n)
#pragma unroll
      for (int column = 0; column < 2; ++column)
        if (owns(n)) outbox[(8 * n + 2 * (l % 4) + column) * tile_units + l / 4] = operand<arithmetic>(is_unit ? h_[n][column] : 0.0f);
    sync_warp();
    char* next = reinterpret_cast<char*>(h_of(i + 1));
    Mbarrier* barrier = barriers_ + (i + 1) % 2;
    const int place = (rank_ * shape_.units + group_ * tile_units) * static_cast<int>(sizeof(T));
#pragma unroll
    for (int n = 0; n < n_tiles; ++n) {
      if (!owns(n)) continue;
      const int chunk = l % chunks_of_tile, row = 8 * n + chunk / chunks;
      const Words4 value = reinterpret_cast<const Words4*>(outbox)[n * chunks_of_tile + chunk];
      char* to = next + row * shape_.row_words * 4 + place + chunk % chunks * chunk_bytes;
      for (int block = l / chunks_of_tile; block < shape_.blocks; block += 32 / chunks_of_tile)
        store_async(map_to_rank(to, static_cast<unsigned>(block)), value, map_to_rank(barrier, static_cast<unsigned>(block)));
    }
  }

  const ForwardClusters& s_;
  const Sizes& z_;
  const ClusterForwardShape& shape_;
  char* storage_;
  int rank_, group_, split_, direction_, unit_;
  int64_t first_slot_;
  Words4* warp_fragments_;
  float* sums_;
  char* outbox_;
  Mbarrier* barriers_;
  BlockFragments kept_[kept_blocks ? kept_blocks : 1][2];
  float bias_[4] = {};
  float h_[n_tiles][2] = {}, c_[n_tiles][2] = {};
  Visit upcoming_[n_tiles][2];
};

template <Arithmetic arithmetic, CellKind kind, int n_tiles>
HSM_KERNEL(32 * most_cluster_warps) cluster_forward_kernel(HSM_ARGUMENT ForwardClusters s) {
#ifdef HSM_HAS_CLUSTERS
  ForwardWarp<arithmetic, kind, n_tiles>(s).run();
#else
  trap();
#endif
}

}  // namespace

cudaError_t cluster_forward(const ForwardRound& round, const Plan& plan, cudaStream_t stream) {
  const Sizes& z = round.params.sizes;
  const ForwardClusters s{round, cluster_forward_shape(plan.arithmetic, z.cell, z.hidden, plan.blocks, plan.slots / tile_columns)};
  return with_arithmetic_and_cell(plan.arithmetic, z.cell, [&](auto arithmetic, auto cell) {
    constexpr Arithmetic a = decltype(arithmetic)::value;
    constexpr CellKind kind = decltype(cell)::value;
    const auto kernel = s.shape.column_tiles == 1 ? cluster_forward_kernel<a, kind, 1> : cluster_forward_kernel<a, kind, 2>;
    return launch_clusters(kernel, s, stream);
  });
}

}  // namespace cuda
}  // namespace hsm
