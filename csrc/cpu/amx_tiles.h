// The tile instructions of x86-64, AMX-TILE and AMX-BF16, and the right to use them.
//
// Written out as the assembler knows them: the functions of g++ 12's header do not tell the compiler that memory is read.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#define HSM_TILE_FUNCTION static inline __attribute__((always_inline))

namespace hsm {
namespace cpu {

// Whether the CPU has the instructions, and Linux lets this process use them: a process must ask, as each thread's saved state grows.
static inline bool obtain_tiles() {
  constexpr unsigned has_bf16 = 1u << 22, has_tiles = 1u << 24;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & has_bf16) == 0 || (d & has_tiles) == 0) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// The shapes of the eight tiles, at most 16 rows of 64 bytes. The rest is zero.
struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Every tile is zero then.
HSM_TILE_FUNCTION void configure_tiles(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }

HSM_TILE_FUNCTION void release_tiles() { __asm__ volatile("tilerelease"); }

template <int tile>
HSM_TILE_FUNCTION void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// Rows lie `stride` bytes apart.
template <int tile>
HSM_TILE_FUNCTION void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
HSM_TILE_FUNCTION void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

// sum (M, N) += a (M, 2 K) @ b (2 K, N): floats and bfloat16. A row of `b` holds a pair of rows, element by element.
template <int sum, int a, int b>
HSM_TILE_FUNCTION void add_tile_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}

}  // namespace cpu
}  // namespace hsm
