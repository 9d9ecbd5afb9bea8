// The part of csrc/cuda/primitives.cuh that is for a GPU, for a C++ compiler: the same names, by the simulator.
#pragma once

#include "cuda/device.cuh"

namespace hsm {
namespace cuda {

template <class... Arguments>
cudaError_t launch_together(void (*kernel)(Arguments...), const LaunchShape& shape, Together together, cudaStream_t, const Arguments&... arguments) {
  if (const int failure = sim::planned_failure()) return static_cast<cudaError_t>(failure);
  sim::LaunchConfig config;
  config.grid = {shape.grid_x, shape.grid_y, shape.grid_z};
  config.block = {shape.threads, 1, 1};
  config.cluster = {together.cluster, 1, 1};
  config.cooperative = together.cooperative;
  config.shared_bytes = shape.shared_bytes;
  return sim::launch(config, [&] { kernel(arguments...); }) ? cudaSuccess : cudaErrorLaunchFailure;
}

inline unsigned blocks() { return sim::position().grid_size.x; }
inline unsigned lane() { return sim::position().lane; }
inline unsigned cluster_rank() { return sim::position().cluster_rank; }
inline unsigned cluster_blocks() { return sim::position().cluster_size.x; }

inline void cluster_arrive(sim::Where where = sim::Where::here()) { sim::cluster_arrive(where); }
inline void cluster_wait(sim::Where where = sim::Where::here()) { sim::cluster_wait(where); }

struct ClusterAddress {
  void* value;
};
inline ClusterAddress map_to_rank(const void* address, unsigned rank) { return {sim::map_shared(address, rank)}; }

inline void mbarrier_init(Mbarrier* barrier, unsigned arrivals) { sim::mbarrier_init(barrier, arrivals); }
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes, sim::Where where = sim::Where::here()) {
  sim::mbarrier_arrive(barrier, bytes, where);
}
inline void mbarrier_arrive_remote(ClusterAddress barrier, sim::Where where = sim::Where::here()) { sim::mbarrier_arrive(barrier.value, 0, where); }
inline void mbarrier_wait(Mbarrier* barrier, unsigned parity, sim::Where where = sim::Where::here()) { sim::mbarrier_wait(barrier, parity, where); }
inline void store_async(ClusterAddress to, const Words4& value, ClusterAddress barrier, sim::Where where = sim::Where::here()) {
  sim::store_async(to.value, &value, sizeof value, barrier.value, where);
}

inline Words4 load_relaxed(const Words4* address, sim::Where where = sim::Where::here()) {
  sim::poll("load_relaxed", where);
  return *address;
}
inline void store_relaxed(Words4* address, const Words4& value) {
  *address = value;
  sim::progress();
}

inline float round_to_tf32(float x) { return sim::round_to_tf32(x); }
inline void sync_warp(sim::Where where = sim::Where::here()) { sim::sync_warp(sim::all_lanes, where); }
template <class T>
T shuffle_xor(T value, unsigned bits, sim::Where where = sim::Where::here()) {
  return sim::shuffle(sim::all_lanes, value, sim::position().lane ^ bits, where);
}
inline void trap() { sim::fail("trap"); }
inline void store_relaxed(uint32_t* address, uint32_t value) {
  *address = value;
  sim::progress();
}

inline unsigned ballot(bool condition, sim::Where where = sim::Where::here()) { return sim::ballot(sim::all_lanes, condition, where); }
inline bool any_lane(bool condition, sim::Where where = sim::Where::here()) { return ballot(condition, where) != 0; }
inline int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }
inline int32_t atomic_add(int32_t* address, int32_t number) { return sim::atomic_add(address, number); }
inline uint64_t nanoseconds() { return sim::nanoseconds(); }
inline void give_up() { sim::fail("a block waited too long for others"); }

// Memory is one here, and kernels run one after the other.
inline void fence() {}
inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], sim::Where where = sim::Where::here()) {
  sim::mma<bfloat16>(d, a, b, where);
}
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], sim::Where where = sim::Where::here()) {
  sim::mma<float16>(d, a, b, where);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], sim::Where where = sim::Where::here()) {
  sim::mma<sim::Tf32>(d, a, b, where);
}

}  // namespace cuda
}  // namespace hsm
