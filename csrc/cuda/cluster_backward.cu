// The backward recurrence by clusters of blocks. In a round each block multiplies what the round before left, the gradients of its gates, with the
// rows of W_hh that the forward pass gave it, too: parts of the gradients of h of all units. A part goes to the block that has the unit,
// which sums them in the order of the senders, so that equal calls give equal bits, and takes its units through the cell.
//
// Parts lie in two buffers in turn, each with a barrier that counts the bytes as they come, and so do the gradients of the gates, which a barrier of the
// block hands from its cells to its products. Before that barrier every thread has read the parts of its round, and no other block sends parts into
// the same buffer before it has some of the next round, which are sent behind it.
#include "cuda/cluster_passes.cuh"
#include "cuda/tiles.cuh"

namespace hsm {
namespace cuda {
namespace {

using BackwardClusters = ClusterRun<BackwardRound, ClusterBackwardShape>;

template <Arithmetic arithmetic, CellKind kind, int n_tiles>
class BackwardWarp {
 public:
  HSM_DEVICE explicit BackwardWarp(const BackwardClusters& s) : s_(s), z_(s.round.params.sizes), shape_(s.shape), storage_(shared_storage<char>()) {
    warp_ = static_cast<int>(thread() / 32), lane_ = static_cast<int>(lane());
    rank_ = static_cast<int>(cluster_rank());
    direction_ = static_cast<int>(block_y());
    first_slot_ = static_cast<int64_t>(block_x()) / shape_.blocks * shape_.slots();
    barriers_ = reinterpret_cast<Mbarrier*>(storage_ + shape_.barriers());
    warp_fragments_ = reinterpret_cast<Words4*>(storage_) + warp_ * shape_.blocks_in_shared() * 2 * 32;
  }

  HSM_DEVICE void run() {
    // The first round has nothing to multiply; one more round than there are steps delivers what the last one left.
    const int exchanges = rounds_of(visits(), direction_, first_slot_, shape_.slots());
    set_up(exchanges);
    for_each([&](int e, const UnitPlace& mine) { upcoming_[e] = visit_at(visits(), direction_, first_slot_ + mine.column, 0); });
    look_at(0);
    step(0);
    for (int exchange = 0; exchange < exchanges; ++exchange) {
      look_at(exchange + 1);
      sync_threads();
      multiply_and_send(exchange);
      receive(exchange, exchanges);
      step(exchange + 1);
    }
    // Nobody may leave while others may still write to its memory.
    cluster_arrive();
    cluster_wait();
  }

 private:
  using T = Element<arithmetic>;
  static constexpr bool tensor_cores = arithmetic != Arithmetic::float32;
  static constexpr int gate_count = kind == CellKind::lstm ? 4 : 3;
  static constexpr int most_kept_tiles = kept_backward_tiles(arithmetic, n_tiles), most_kept_depth = kept_backward_depth(arithmetic, n_tiles);
  static constexpr int tiles_at_once = tensor_cores ? most_kept_tiles : 2;
  // Units of sequences that a thread may have: pieces of 8 units of 4 sequences are dealt to the warps.
  static constexpr int most_elements = most_block_units / 8 * 2 * n_tiles / most_cluster_warps;

  struct UnitPlace {
    int unit, column;  // of the block
    bool exists;
  };
  HSM_DEVICE UnitPlace element(int e) const {
    const int piece = e * shape_.warps + warp_, of_columns = 2 * n_tiles;
    const int unit = piece / of_columns * 8 + lane_ % 8, column = piece % of_columns * 4 + lane_ / 8;
    return {unit, column, unit < shape_.units && rank_ * shape_.units + unit < z_.hidden && first_slot_ + column < visits().slots};
  }
  // Calls function(e, element) for what the thread has.
  template <class Function>
  HSM_DEVICE void for_each(Function function) const {
#pragma unroll
    for (int e = 0; e < most_elements; ++e) {
      const UnitPlace mine = element(e);
      if (mine.exists) function(e, mine);
    }
  }

  HSM_DEVICE int unit_of(const UnitPlace& mine) const { return rank_ * shape_.units + mine.unit; }
  HSM_DEVICE const Visits& visits() const { return s_.round.visits; }
  HSM_DEVICE T* gates_of(int round) const { return reinterpret_cast<T*>(storage_ + shape_.gates() + (round & 1) * shape_.gates_bytes()); }
  HSM_DEVICE int gates_stride() const { return shape_.row_words * elements_per_word<arithmetic>; }
  HSM_DEVICE char* inbox_of(int exchange) const { return storage_ + shape_.inboxes() + exchange % 2 * shape_.inboxes_bytes(); }
  HSM_DEVICE unsigned bytes_of_round() const { return static_cast<unsigned>(shape_.bytes_of_round()); }

  HSM_DEVICE void set_up(int exchanges) {
    if (thread() == 0)
      for (int b = 0; b < 2; ++b) {
        mbarrier_init(barriers_ + b, 1);
        if (exchanges > b) mbarrier_arrive_expect(barriers_ + b, bytes_of_round());
      }
    load_weights();
    clear_gates();
    mbarrier_fence_init();
    cluster_arrive();
    cluster_wait();
  }

  // The gates' gradients as they are multiplied with element k of a row of 16 units' weights.
  HSM_DEVICE Words4 words_of_unit(int unit, int block) const {
    const int hidden = z_.hidden, units = shape_.units, first = rank_ * units;
    return words_of_lane<arithmetic>(block, [&](int k) {
      const int gate = k / units, own = first + k % units;
      if (unit >= hidden || own >= hidden || gate >= gate_count) return 0.0f;
      return load<T>(s_.round.params.weights[direction_].weight_hh, (int64_t{gate} * hidden + own) * hidden + unit);
    });
  }

  HSM_DEVICE int first_unit(int tile) const { return 16 * (tile * shape_.warps + warp_); }
  HSM_DEVICE BlockFragments fragments_of_units(int tile, int block) const {
    const int unit = first_unit(tile) + lane_ / 4;
    return fragments_of(words_of_unit(unit, block), words_of_unit(unit + 8, block));
  }
  HSM_DEVICE bool in_registers(int tile, int block) const { return tile < shape_.kept_tiles && block < shape_.kept_depth; }
  HSM_DEVICE Words4* fragments_at(int tile, int block) const {
    const int before = tile * shape_.depth + block, kept_tiles = tile < shape_.kept_tiles ? tile + 1 : shape_.kept_tiles;
    return warp_fragments_ + (before - kept_tiles * shape_.kept_depth) * 2 * 32;
  }

  HSM_DEVICE void load_weights() {
#pragma unroll
    for (int tile = 0; tile < most_kept_tiles; ++tile)
#pragma unroll
      for (int block = 0; block < most_kept_depth; ++block)
        if (in_registers(tile, block)) kept_[tile][block] = fragments_of_units(tile, block);
    for (int tile = 0; tile < shape_.tiles; ++tile)
      for (int block = 0; block < shape_.depth; ++block)
        if (!in_registers(tile, block)) put_fragments(fragments_at(tile, block), fragments_of_units(tile, block));
  }

  // Zeros where no round puts anything.
  HSM_DEVICE void clear_gates() const {
    const int all = 2 * shape_.slots() * shape_.row_words;
    uint32_t* words = reinterpret_cast<uint32_t*>(storage_ + shape_.gates());
    for (int i = static_cast<int>(thread()); i < all; i += 32 * shape_.warps) words[i] = 0;
    sync_threads();
  }
  HSM_DEVICE void put_gate(int round, const UnitPlace& mine, int gate, float value) const {
    gates_of(round)[mine.column * gates_stride() + gate * shape_.units + mine.unit] = operand<arithmetic>(value);
  }

  HSM_DEVICE BackwardVisit visit_of(int e) const { return cuda::visit_of(direction_, visits_[e], before_[e]); }

  // Reads what a round needs of memory. By way of a visit that has come before.
  HSM_DEVICE void look_at(int i) {
    for_each([&](int e, const UnitPlace& mine) {
      before_[e] = i > 0 ? visits_[e] : Visit{0, 0};
      visits_[e] = upcoming_[e];
      upcoming_[e] = visit_at(visits(), direction_, first_slot_ + mine.column, i + 1);
      inputs_[e] = inputs_of<T, kind>(s_.round, visit_of(e), unit_of(mine));
    });
  }

  HSM_DEVICE void multiply_and_send(int exchange) const {
    const uint32_t* gates = reinterpret_cast<const uint32_t*>(gates_of(exchange));
    for (int first = 0; first < shape_.tiles; first += tiles_at_once) {
      TileSums sums[tiles_at_once][n_tiles] = {};
      if constexpr (tensor_cores) {
        if (first == 0) {
#pragma unroll
          for (int block = 0; block < most_kept_depth; ++block) {
            if (block >= shape_.kept_depth) break;
            const BlockVectors<n_tiles> vectors = get_vectors<n_tiles>(gates + block * block_words, shape_.row_words);
#pragma unroll
            for (int tile = 0; tile < most_kept_tiles; ++tile)
              if (tile < shape_.kept_tiles) add_block<arithmetic>(sums[tile], kept_[tile][block], vectors);
          }
        }
      }
      for (int block = first == 0 ? shape_.kept_depth : 0; block < shape_.depth; ++block) {
        const uint32_t* of_block = gates + block * block_words;
        if constexpr (tensor_cores) {
          const BlockVectors<n_tiles> vectors = get_vectors<n_tiles>(of_block, shape_.row_words);
#pragma unroll
          for (int tile = 0; tile < tiles_at_once; ++tile)
            if (first + tile < shape_.tiles) add_block<arithmetic>(sums[tile], get_fragments(fragments_at(first + tile, block)), vectors);
        } else {
#pragma unroll
          for (int tile = 0; tile < tiles_at_once; ++tile)
            if (first + tile < shape_.tiles) add_block_in_float32(sums[tile], fragments_at(first + tile, block), of_block, shape_.row_words);
        }
      }
#pragma unroll
      for (int tile = 0; tile < tiles_at_once; ++tile)
        if (first + tile < shape_.tiles) send(exchange, first_unit(first + tile), sums[tile]);
    }
  }

  // A tile's parts to the blocks that have its units. Two neighbouring lanes have two columns of two units each; they swap, so that each has four columns
  // of one.
  HSM_DEVICE void send(int exchange, int first_unit, const TileSums (&sums)[n_tiles]) const {
    const int odd = lane_ % 2, unit = first_unit + 8 * odd + lane_ / 4;
    const int block = unit / shape_.units, column = lane_ % 4 / 2 * 4;
    char* inbox = inbox_of(exchange) + rank_ * shape_.inbox_bytes();
    Mbarrier* barrier = barriers_ + exchange % 2;
#pragma unroll
    for (int n = 0; n < n_tiles; ++n) {
      const float upper[2] = {sums[n].total(0), sums[n].total(1)}, lower[2] = {sums[n].total(2), sums[n].total(3)};
      const float first = shuffle_xor(odd ? upper[0] : lower[0], 1), second = shuffle_xor(odd ? upper[1] : lower[1], 1);
      const float parts[4] = {odd ? first : upper[0], odd ? second : upper[1], odd ? lower[0] : first, odd ? lower[1] : second};
      Words4 words;
      std::memcpy(&words, parts, sizeof words);
      if (block >= shape_.blocks) continue;
      char* to = inbox + ((unit - block * shape_.units) * shape_.unit_stride() + 8 * n + column) * 4;
      store_async(map_to_rank(to, static_cast<unsigned>(block)), words, map_to_rank(barrier, static_cast<unsigned>(block)));
    }
  }

  // Waits for all parts, and makes their barrier expect those of the exchange after the next.
  HSM_DEVICE void receive(int exchange, int exchanges) const {
    Mbarrier* barrier = barriers_ + exchange % 2;
    mbarrier_wait(barrier, static_cast<unsigned>(exchange) / 2 % 2);
    if (thread() == 0 && exchange + 2 < exchanges) mbarrier_arrive_expect(barrier, bytes_of_round());
  }

  HSM_DEVICE float sum_of_parts(int exchange, const UnitPlace& mine) const {
    const char* inboxes = inbox_of(exchange);
    const int at = mine.unit * shape_.unit_stride() + mine.column;
    float sum = 0;
    for (int sender = 0; sender < shape_.blocks; ++sender) sum += reinterpret_cast<const float*>(inboxes + sender * shape_.inbox_bytes())[at];
    return sum;
  }

  HSM_DEVICE void step(int i) {
    for_each([&](int e, const UnitPlace& mine) {
      const float incoming = i > 0 ? sum_of_parts(i - 1, mine) : 0;
      const GateGradients<float> grad = backward_unit<T, kind>(s_.round, visit_of(e), unit_of(mine), inputs_[e], incoming, carried_[e]);
#pragma unroll
      for (int g = 0; g < gate_count; ++g) put_gate(i, mine, g, grad.template of_hidden<kind>(g));
    });
  }

  const BackwardClusters& s_;
  const Sizes& z_;
  const ClusterBackwardShape& shape_;
  char* storage_;
  int warp_, lane_, rank_, direction_;
  int64_t first_slot_;
  Mbarrier* barriers_;
  Words4* warp_fragments_;
  BlockFragments kept_[most_kept_tiles ? most_kept_tiles : 1][most_kept_depth ? most_kept_depth : 1];
  Visit before_[most_elements], visits_[most_elements], upcoming_[most_elements];
  StepInputs<float> inputs_[most_elements];
  float carried_[most_elements] = {};
};

template <Arithmetic arithmetic, CellKind kind, int n_tiles>
HSM_KERNEL(32 * most_cluster_warps) cluster_backward_kernel(HSM_ARGUMENT BackwardClusters s) {
#ifdef HSM_HAS_CLUSTERS
  BackwardWarp<arithmetic, kind, n_tiles>(s).run();
#else
  trap();
#endif
}

}  // namespace

cudaError_t cluster_backward(const BackwardRound& round, const Plan& plan, cudaStream_t stream) {
  const Sizes& z = round.params.sizes;
  const BackwardClusters s{round, cluster_backward_shape(plan.arithmetic, z.cell, z.hidden, plan.blocks, plan.slots / tile_columns)};
  return with_arithmetic_and_cell(plan.arithmetic, z.cell, [&](auto arithmetic, auto cell) {
    constexpr Arithmetic a = decltype(arithmetic)::value;
    constexpr CellKind kind = decltype(cell)::value;
    const auto kernel = s.shape.column_tiles == 1 ? cluster_backward_kernel<a, kind, 1> : cluster_backward_kernel<a, kind, 2>;
    return launch_clusters(kernel, s, stream);
  });
}

}  // namespace cuda
}  // namespace hsm
