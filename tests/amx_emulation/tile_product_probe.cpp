// The product by tiles for Python's ctypes, with emulated instructions.
#define HSM_ISA amx_bf16
#define HSM_VECTOR_BYTES 64
#define HSM_VECTOR_REGISTERS 32
#define HSM_BFLOAT16_TILES
#include "cpu/tile_product.h"

using namespace hsm::cpu::amx_bf16;

extern "C" void multiply_block(int columns, int rows, const float* start, int64_t start_stride, const BFloat16* state, int64_t row_stride,
                               const BFloat16* packed, int64_t depth, float* result) {
  const TileUse tiles;
  switch (columns) {
    case 1: return multiply_block_by_tiles<1>(rows, start, start_stride, state, row_stride, packed, depth, result);
    case 2: return multiply_block_by_tiles<2>(rows, start, start_stride, state, row_stride, packed, depth, result);
    case 3: return multiply_block_by_tiles<3>(rows, start, start_stride, state, row_stride, packed, depth, result);
    case 4: return multiply_block_by_tiles<4>(rows, start, start_stride, state, row_stride, packed, depth, result);
  }
}
