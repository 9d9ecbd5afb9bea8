// The kernels of the probes. Each does what a recurrence would do between two steps, many times over, and counts what went wrong, so that
// what is timed is known to work.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/primitives.cuh"

namespace probes {

using namespace hsm::cuda;

constexpr unsigned threads = 256;

// A word that no step sends, for step numbers below 2^20 and chunk numbers below 2^11; the sentinel is none of them.
constexpr uint32_t sentinel = UINT_MAX;
HSM_DEVICE uint32_t word_of(uint32_t step, uint32_t chunk) { return step << 11 | chunk; }

HSM_DEVICE Words4 chunk_of(uint32_t step, uint32_t chunk) {
  const uint32_t word = word_of(step, chunk);
  return {word, word, word, word};
}

HSM_DEVICE int wrong_words(const Words4& found, uint32_t step, uint32_t chunk) {
  const uint32_t word = word_of(step, chunk);
  return (found.x != word) + (found.y != word) + (found.z != word) + (found.w != word);
}

// One cluster. In every step each block sends its share of `chunks` chunks of 16 bytes to all blocks, and waits for those of all.
// Shared memory: two buffers of `chunks` chunks and two barriers. errors (ranks * threads).
HSM_KERNEL(threads) exchange_in_cluster(HSM_ARGUMENT unsigned chunks, HSM_ARGUMENT unsigned steps, int* HSM_ARGUMENT errors) {
  Words4* buffers = shared_storage<Words4>();
  Mbarrier* barriers = reinterpret_cast<Mbarrier*>(buffers + 2 * chunks);
  const unsigned ranks = cluster_blocks(), me = cluster_rank(), share = chunks / ranks, bytes = chunks * sizeof(Words4);
  if (thread() == 0)
    for (unsigned k = 0; k < 2; ++k) {
      mbarrier_init(barriers + k, 1);
      mbarrier_arrive_expect(barriers + k, bytes);
    }
  mbarrier_fence_init();
  cluster_arrive();
  cluster_wait();
  int wrong = 0;
  for (unsigned t = 0; t < steps; ++t) {
    Words4* buffer = buffers + t % 2 * chunks;
    Mbarrier* barrier = barriers + t % 2;
    // Neighbouring threads send neighbouring chunks to the same block.
    for (unsigned i = thread(); i < chunks; i += threads) {
      const unsigned chunk = me * share + i % share, to = (i / share + me) % ranks;
      store_async(map_to_rank(buffer + chunk, to), chunk_of(t, chunk), map_to_rank(barrier, to));
    }
    mbarrier_wait(barrier, t / 2 % 2);
    for (unsigned i = thread(); i < chunks; i += threads) wrong += wrong_words(buffer[i], t, i);
    // Nobody sends for step t + 2 before all of this block have read step t, as that takes their step t + 1.
    sync_threads();
    if (thread() == 0 && t + 2 < steps) mbarrier_arrive_expect(barrier, bytes);
  }
  errors[block_x() * threads + thread()] = wrong;
  cluster_arrive();
  cluster_wait();
}

// A cooperative grid. In every step each block writes its share of `chunks` chunks to memory and reads all, again and again until none
// holds the sentinel. A chunk is cleared by who wrote it, once all have read it: when all of the next step have come.
// buffers (3, chunks), all sentinel; errors (blocks * threads).
HSM_KERNEL(threads) gather_by_sentinel(HSM_ARGUMENT unsigned chunks, HSM_ARGUMENT unsigned steps, HSM_ARGUMENT bool fences,
                                       Words4* HSM_ARGUMENT buffers, int* HSM_ARGUMENT errors) {
  const unsigned share = chunks / blocks(), first = block_x() * share;
  int wrong = 0;
  for (unsigned t = 0; t < steps; ++t) {
    Words4* buffer = buffers + t % 3 * chunks;
    for (unsigned i = thread(); i < share; i += threads) store_relaxed(buffer + first + i, chunk_of(t, first + i));
    for (unsigned i = thread(); i < chunks; i += threads) {
      Words4 found;
      do {
        found = load_relaxed(buffer + i);
      } while (found.x == sentinel || found.y == sentinel || found.z == sentinel || found.w == sentinel);
      wrong += wrong_words(found, t, i);
    }
    sync_threads();
    Words4* before = buffers + (t + 2) % 3 * chunks;
    for (unsigned i = thread(); i < share; i += threads) store_relaxed(before + first + i, {sentinel, sentinel, sentinel, sentinel});
    // By the rules of the memory model, what is cleared must be ordered before the next step's chunks.
    if (fences) fence();
  }
  errors[block_x() * threads + thread()] = wrong;
}

// Each warp holds A (16, 256) in registers and multiplies it with B (256, N), again and again; B lies in shared memory, as fragments of
// two products side by side. A and B are ones, so that every sum is 256 * passes. errors (blocks * threads).
constexpr unsigned multiply_depth = 256, b_words_per_column = multiply_depth / 2;

template <int columns>
HSM_KERNEL(threads) multiply_from_registers(HSM_ARGUMENT unsigned passes, int* HSM_ARGUMENT errors) {
  constexpr uint32_t ones = 0x3f803f80;  // bfloat16
  constexpr int k_tiles = multiply_depth / 16, n_tiles = columns / 8;
  uint32_t* b = shared_storage<uint32_t>();
  for (unsigned i = thread(); i < b_words_per_column * columns; i += threads) b[i] = ones;
  sync_threads();
  // Loaded, so that the compiler does not know them.
  uint32_t a[k_tiles][4];
#pragma unroll
  for (int k = 0; k < k_tiles; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = b[lane() + 4 * k + i];
  float d[n_tiles][4] = {};
  const Words4* fragments = reinterpret_cast<const Words4*>(b) + lane();
  for (unsigned pass = 0; pass < passes; ++pass) {
#pragma unroll
    for (int k = 0; k < k_tiles; k += 2)
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
        const Words4 two = fragments[(k / 2 * n_tiles + n) * 32];
        const uint32_t first[2] = {two.x, two.y}, second[2] = {two.z, two.w};
        mma_bf16(d[n], a[k], first);
        mma_bf16(d[n], a[k + 1], second);
      }
  }
  int wrong = 0;
#pragma unroll
  for (int n = 0; n < n_tiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) wrong += d[n][i] != static_cast<float>(multiply_depth * passes);
  errors[block_x() * threads + thread()] = wrong;
}

// One of a chain of kernels, each of which adds one to what the one before has written.
HSM_KERNEL(threads) link(HSM_ARGUMENT unsigned before, int* HSM_ARGUMENT values) {
  let_next_kernel_start();
  wait_for_kernel_before();
  int& value = values[block_x() * threads + thread()];
  value = value == static_cast<int>(before) ? value + 1 : -1;
}

}  // namespace probes
