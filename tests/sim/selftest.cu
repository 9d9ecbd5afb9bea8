// Small kernels, one for each thing that the simulator can do. `fault` plants a mistake; 0 is the right kernel.
#include <cstdint>

#include "cuda/primitives.cuh"
#include "sim/library.h"

namespace {

using namespace hsm::cuda;

// values (T, threads): each round turns the order of the threads round.
enum BarrierFault { read_too_early = 1, overwrite_too_early, barrier_in_a_branch, end_before_the_barrier, two_barriers, write_too_far };
HSM_KERNEL(256) reverse(HSM_ARGUMENT int fault, HSM_ARGUMENT unsigned threads, HSM_ARGUMENT int rounds, float* HSM_ARGUMENT values) {
  float* shared = shared_storage<float>();
  const unsigned i = thread();
  for (int t = 0; t < rounds; ++t) {
    if (fault == write_too_far && i == 0) shared[threads] = 0;
    if (fault == end_before_the_barrier && i == 3) return;
    shared[i] = values[i];
    if (fault == barrier_in_a_branch) {
      if (i != 3) sync_threads();
    } else if (fault == two_barriers) {
      if (i % 2)
        sync_threads();
      else
        sync_threads();
    } else if (fault != read_too_early) {
      sync_threads();
    }
    values[i] = shared[threads - 1 - i] + 1;
    if (fault != overwrite_too_early) sync_threads();
  }
}

// out[i]: the sum of the warp's values; bits[i]: which of them are odd.
enum WarpFault { wrong_lane = 1, not_all_lanes, no_sync_warp, missing_lane };
HSM_KERNEL(256) warp_sum(HSM_ARGUMENT int fault, const int* HSM_ARGUMENT values, int* HSM_ARGUMENT out, unsigned* HSM_ARGUMENT bits) {
  int* shared = shared_storage<int>();
  const unsigned i = thread();
  int sum = values[i];
  for (unsigned step = 16; step > 0; step /= 2) {
    const unsigned lanes = fault == wrong_lane && step == 4 ? 5 : step;
    if (fault == not_all_lanes && step == 1 && i % 32 == 0) continue;
    sum += shuffle_down(sum, lanes);
  }
  if (i % 32 == 0) shared[i / 32] = sum;
  if (fault != no_sync_warp) sim::sync_warp(sim::all_lanes, sim::Where::here());
  out[i] = shared[i / 32];
  if (fault == missing_lane) {
    if (i % 32 < 16) out[i] = sim::shuffle(0xffffu, out[i], 16 + i % 16, sim::Where::here());
  }
  bits[i] = sim::ballot(sim::all_lanes, values[i] % 2, sim::Where::here());
}

// Half the warps hand a value to the other half, which is a barrier of 64 threads for each pair of warps.
HSM_KERNEL(128) pairs(HSM_ARGUMENT int fault, int* HSM_ARGUMENT values) {
  int* shared = shared_storage<int>();
  const unsigned i = thread(), pair = i / 64;
  if (i % 64 < 32) shared[i / 2 + i % 32 - i % 64 / 2] = values[i];
  if (!fault) sim::named_barrier(1 + static_cast<int>(pair), 64, sim::Where::here());
  if (i % 64 >= 32) values[i] = shared[32 * pair + i % 32];
}

// values (blocks,): each round adds the left neighbour's value, by the grid barrier or by one made of atomics.
enum GridFault { no_grid_barrier = 1, one_block_stays_away, not_cooperative };
HSM_KERNEL(32) neighbours(HSM_ARGUMENT int fault, HSM_ARGUMENT bool own_barrier, HSM_ARGUMENT int rounds, int* HSM_ARGUMENT values,
                          int* HSM_ARGUMENT arrived) {
  const unsigned count = blocks();
  for (int t = 0; t < rounds; ++t) {
    const int* now = values + t * count;
    int* next = values + (t + 1) * count;
    if (thread() == 0) next[block_x()] = now[block_x()] + now[(block_x() + count - 1) % count];
    if (fault == no_grid_barrier) continue;
    if (!own_barrier) {
      sim::grid_barrier(sim::Where::here());
      continue;
    }
    sync_threads();
    if (thread() == 0 && !(fault == one_block_stays_away && block_x() == 1)) {
      sim::atomic_add(arrived, 1);
      while (sim::load_acquire(arrived, sim::Where::here()) < (t + 1) * static_cast<int>(count)) {
      }
    }
    sync_threads();
  }
}

// values (T + 1, ranks, 4): in each round every block sends four words to all, and makes its next four from what all have sent.
enum ClusterFault {
  no_wait = 1,
  swapped_buffer,
  wrong_phase,
  too_few_bytes,
  too_many_bytes,
  no_cluster_barrier_at_first,
  no_wait_at_last,
  overwritten_barrier,
  wrong_rank,
};
HSM_KERNEL(32) all_to_all(HSM_ARGUMENT int fault, HSM_ARGUMENT int rounds, uint32_t* HSM_ARGUMENT values) {
  const unsigned ranks = cluster_blocks(), me = cluster_rank();
  Words4* buffers = shared_storage<Words4>();  // (2, ranks)
  Mbarrier* barriers = reinterpret_cast<Mbarrier*>(buffers + 2 * ranks);
  const unsigned bytes = ranks * sizeof(Words4) + (fault == too_few_bytes ? -16 : fault == too_many_bytes ? 16 : 0);
  if (thread() == 0)
    for (int k = 0; k < 2; ++k) {
      mbarrier_init(barriers + k, 1);
      mbarrier_arrive_expect(barriers + k, bytes);
    }
  mbarrier_fence_init();
  if (fault != no_cluster_barrier_at_first) {
    cluster_arrive();
    cluster_wait();
  }
  if (fault == overwritten_barrier && thread() == 0) barriers[0] = 0;
  for (int t = 0; t < rounds; ++t) {
    const int buffer = t % 2, read = fault == swapped_buffer && t == 2 ? 1 - buffer : buffer;
    if (thread() < ranks) {
      const uint32_t* row = values + 4 * (t * ranks + me);
      const unsigned to = fault == wrong_rank && t == 1 ? 0 : thread();
      store_async(map_to_rank(buffers + buffer * ranks + me, to), {row[0], row[1], row[2], row[3]}, map_to_rank(barriers + buffer, to));
    }
    const bool skipped = (fault == no_wait && t == 1) || (fault == no_wait_at_last && t + 1 == rounds);
    if (!skipped) mbarrier_wait(barriers + buffer, (t / 2 + (fault == wrong_phase && t == 3)) % 2);
    if (thread() == 0) {
      const uint32_t* all = reinterpret_cast<const uint32_t*>(buffers + read * ranks);
      uint32_t* next = values + 4 * ((t + 1) * ranks + me);
      for (int k = 0; k < 4; ++k) {
        next[k] = me + 1;
        for (unsigned r = 0; r < ranks; ++r) next[k] = next[k] * 31 + all[4 * r + k];
      }
      if (t + 2 < rounds) mbarrier_arrive_expect(barriers + buffer, bytes);
    }
    // The others of the block send what the first thread has written.
    sync_threads();
  }
  if (fault == no_wait_at_last) return;
  cluster_arrive();
  cluster_wait();
}

// values (T + 1, ranks): in each round every block adds its right neighbour's value, which it reads from that one's shared memory.
enum DistributedFault { no_cluster_barrier = 1, waits_once_in_two_rounds, neighbour_beyond_the_cluster };
HSM_KERNEL(32) distributed(HSM_ARGUMENT int fault, HSM_ARGUMENT int rounds, int* HSM_ARGUMENT values) {
  const unsigned ranks = cluster_blocks(), me = cluster_rank();
  int* mine = shared_storage<int>();
  const int* theirs = static_cast<const int*>(map_to_rank(mine, fault == neighbour_beyond_the_cluster ? me + 1 : (me + 1) % ranks).value);
  for (int t = 0; t < rounds; ++t) {
    if (thread() == 0) mine[0] = values[t * ranks + me];
    if (fault != no_cluster_barrier) cluster_arrive();
    if (fault != no_cluster_barrier && !(fault == waits_once_in_two_rounds && t % 2)) cluster_wait();
    if (thread() == 0) values[(t + 1) * ranks + me] = mine[0] + theirs[0];
    cluster_arrive();
    cluster_wait();
  }
}

// d (16, 8) += a (16, K) @ b (K, 8), the operands in the bits of their type.
enum MmaFault { wrong_row = 1, wrong_column, halves_swapped };
enum MmaType { bf16, fp16, tf32 };
template <class Element, int depth, int per_register>
inline void load_fragments(int fault, const Element* a, const Element* b, uint32_t (&fragment_a)[4], uint32_t (&fragment_b)[2]) {
  const int group = static_cast<int>(lane()) / 4, t = static_cast<int>(lane()) % 4;
  const int row_offset = fault == wrong_row ? 4 : 8, column = fault == wrong_column ? group ^ 1 : group;
  const auto pack = [&](auto element, bool swapped) {
    uint32_t word = 0;
    for (int j = 0; j < per_register; ++j) word |= static_cast<uint32_t>(element(j)) << (16 * (swapped ? 1 - j : j));
    return word;
  };
  for (int half = 0; half < 2; ++half) {
    const int k = half * depth / 2 + per_register * t;
    for (int rows = 0; rows < 2; ++rows)
      fragment_a[rows + 2 * half] = pack([&](int j) { return a[(group + rows * row_offset) * depth + k + j]; }, fault == halves_swapped);
    fragment_b[half] = pack([&](int j) { return b[(k + j) * 8 + column]; }, false);
  }
}

HSM_KERNEL(32) multiply(HSM_ARGUMENT int fault, HSM_ARGUMENT int type, const void* HSM_ARGUMENT a, const void* HSM_ARGUMENT b,
                        float* HSM_ARGUMENT d) {
  uint32_t fragment_a[4], fragment_b[2];
  float fragment_d[4];
  const unsigned row = lane() / 4, column = 2 * (lane() % 4);
  for (unsigned i = 0; i < 4; ++i) fragment_d[i] = d[8 * (row + i / 2 * 8) + column + i % 2];
  if (type == tf32) {
    load_fragments<uint32_t, 8, 1>(fault, static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), fragment_a, fragment_b);
    mma_tf32(fragment_d, fragment_a, fragment_b);
  } else {
    load_fragments<uint16_t, 16, 2>(fault, static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), fragment_a, fragment_b);
    (type == bf16 ? mma_bf16 : mma_fp16)(fragment_d, fragment_a, fragment_b, sim::Where::here());
  }
  for (unsigned i = 0; i < 4; ++i) d[8 * (row + i / 2 * 8) + column + i % 2] = fragment_d[i];
}

template <class Half>
void convert(int64_t count, const float* floats, uint16_t* narrowed, const uint16_t* bits, float* widened) {
  for (int64_t i = 0; i < count; ++i) {
    narrowed[i] = narrow<Half>(floats[i]).bits;
    Half half;
    half.bits = bits[i];
    widened[i] = widen(half);
  }
}

}  // namespace

// Each returns a cudaError_t.
SIM_EXPORT int selftest_reverse(int fault, unsigned threads, int rounds, float* values) {
  return launch(reverse, {1, 1, 1, threads, threads * sizeof(float)}, nullptr, fault, threads, rounds, values);
}
SIM_EXPORT int selftest_warp_sum(int fault, unsigned threads, const int* values, int* out, unsigned* bits) {
  return launch(warp_sum, {1, 1, 1, threads, threads / 32 * sizeof(int)}, nullptr, fault, values, out, bits);
}
SIM_EXPORT int selftest_pairs(int fault, int* values) { return launch(pairs, {1, 1, 1, 128, 64 * sizeof(int)}, nullptr, fault, values); }
SIM_EXPORT int selftest_neighbours(int fault, bool own_barrier, unsigned blocks, int rounds, int* values, int* arrived) {
  return launch_together(neighbours, {blocks, 1, 1, 32}, {1, fault != not_cooperative}, nullptr, fault, own_barrier, rounds, values, arrived);
}
SIM_EXPORT int selftest_all_to_all(int fault, unsigned ranks, int rounds, uint32_t* values) {
  return launch_together(all_to_all, {ranks, 1, 1, 32, 2 * ranks * sizeof(Words4) + 2 * sizeof(Mbarrier)}, {ranks, false}, nullptr, fault, rounds,
                         values);
}
SIM_EXPORT int selftest_distributed(int fault, unsigned ranks, int rounds, int* values) {
  return launch_together(distributed, {ranks, 1, 1, 32, sizeof(int)}, {ranks, false}, nullptr, fault, rounds, values);
}
SIM_EXPORT int selftest_multiply(int fault, int type, const void* a, const void* b, float* d) {
  return launch(multiply, {1, 1, 1, 32}, nullptr, fault, type, a, b, d);
}
SIM_EXPORT void selftest_convert(bool bfloat, int64_t count, const float* floats, uint16_t* narrowed, const uint16_t* bits, float* widened) {
  (bfloat ? convert<bfloat16> : convert<float16>)(count, floats, narrowed, bits, widened);
}
