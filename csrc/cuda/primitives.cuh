// Instructions of sm_90 and sm_80, and how kernels are launched that need each other: in clusters, or all at once.
// The simulator of tests/sim has the same names for a C++ compiler.
//
// HSM_HAS_MMA: the code at hand is for GPUs of compute capability 8.0 or later, which have the products and the orders of memory below.
// HSM_HAS_CLUSTERS: the code at hand is for GPUs that have them; elsewhere those instructions must not be used.
//
//   launch_together(kernel, shape, together, stream, arguments...)   launch() with clusters, or cooperative, and with all the shared memory and
//                                                                    the blocks of a cluster that the GPU can give
//   cluster_rank() cluster_blocks() cluster_arrive() cluster_wait()
//   map_to_rank(address, rank)             the same place in the shared memory of another block of the cluster
//   mbarrier_...                           a barrier in shared memory that also counts bytes
//   store_async(to, value, barrier)        16 bytes into another block's shared memory, which credits its barrier
//   load_relaxed, store_relaxed            16 or 4 bytes of global memory, word by word, seen by all blocks
//   fence()                                what was written or seen before it comes before what is written or looked for after it
//   any_lane(condition) ballot(condition)  of the warp: whether it holds for one, and a bit for each; all lanes call it
//   lowest_bit(bits)                       the number of the lowest that is set
//   atomic_add(address, number)            what was there before
//   nanoseconds()                          since some time
//   give_up()                              ends the grid with an error
//   mma_bf16(d, a, b) mma_fp16 mma_tf32    D += A B by one warp: m16n8k16, and m16n8k8 for TF32
//   round_to_tf32(x)                       the operand of mma_tf32 that is nearest to x
//   sync_warp()                            lanes of a warp meet, and see what the others wrote
//   shuffle_xor(value, bits)               the value of the lane whose number differs in these bits
//   trap()                                 ends the kernel with an error
//   let_next_kernel_start() wait_for_kernel_before()   of kernels that are launched to overlap
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace hsm {
namespace cuda {

struct Together {
  unsigned cluster = 1;
  bool cooperative = false;
  bool overlaps = false;  // starts before the kernel before it has ended
};

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

using Mbarrier = uint64_t;

}  // namespace cuda
}  // namespace hsm

#if defined(HSM_SIMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HSM_HAS_MMA
#endif
#if defined(HSM_SIMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HSM_HAS_CLUSTERS
#endif

#ifdef HSM_SIMULATOR
#include "sim/primitives.h"
#else

#include <cassert>

namespace hsm {
namespace cuda {

template <class... Arguments>
cudaError_t launch_together(void (*kernel)(Arguments...), const LaunchShape& shape, Together together, cudaStream_t stream,
                            const Arguments&... arguments) {
  // A kernel must say so before it may have more than this.
  constexpr size_t shared_bytes = 48 << 10;
  constexpr unsigned blocks = 8;
  cudaError_t status = cudaSuccess;
  if (shape.shared_bytes > shared_bytes)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
  if (status == cudaSuccess && together.cluster > blocks) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[3]{};
  unsigned count = 0;
  if (together.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {together.cluster, 1, 1};
  }
  if (together.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (together.overlaps) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

HSM_DEVICE unsigned blocks() { return gridDim.x; }
HSM_DEVICE unsigned lane() { return threadIdx.x % 32; }

HSM_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
HSM_DEVICE unsigned cluster_blocks() {
  unsigned count;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}
HSM_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
HSM_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

HSM_DEVICE uint32_t shared_address(const void* address) { return static_cast<uint32_t>(__cvta_generic_to_shared(address)); }

struct ClusterAddress {
  uint32_t value;
};
HSM_DEVICE ClusterAddress map_to_rank(const void* address, unsigned rank) {
  ClusterAddress mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped.value) : "r"(shared_address(address)), "r"(rank));
  return mapped;
}

HSM_DEVICE void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the inits and before a cluster barrier, so that other blocks find the barriers ready.
HSM_DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
HSM_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
HSM_DEVICE void mbarrier_arrive_remote(ClusterAddress barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.value) : "memory");
}
// Until the phase of this parity is complete.
HSM_DEVICE void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
}
HSM_DEVICE void store_async(ClusterAddress to, const Words4& value, ClusterAddress barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to.value),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier.value)
               : "memory");
}

HSM_DEVICE Words4 load_relaxed(const Words4* address) {
  Words4 value;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}
HSM_DEVICE void store_relaxed(Words4* address, const Words4& value) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

HSM_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}
HSM_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
HSM_DEVICE T shuffle_xor(T value, unsigned bits) {
  return __shfl_xor_sync(0xffffffffu, value, bits);
}
HSM_DEVICE void trap() { __trap(); }

HSM_DEVICE void store_relaxed(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

HSM_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

HSM_DEVICE bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }
HSM_DEVICE unsigned ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }
HSM_DEVICE int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }
HSM_DEVICE int32_t atomic_add(int32_t* address, int32_t number) { return atomicAdd(address, number); }
HSM_DEVICE uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}
HSM_DEVICE void give_up() {
  assert(!"hsm_kernels: a block waited too long for others");
  __trap();  // where assertions are compiled away
}

HSM_DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
HSM_DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#define HSM_MMA(name, shape, type)                                                                              \
  HSM_DEVICE void name(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {                            \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
                 "{%0, %1, %2, %3};"                                                                            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                           \
  }
HSM_MMA(mma_bf16, "m16n8k16", "bf16")
HSM_MMA(mma_fp16, "m16n8k16", "f16")
HSM_MMA(mma_tf32, "m16n8k8", "tf32")
#undef HSM_MMA

}  // namespace cuda
}  // namespace hsm

#endif
