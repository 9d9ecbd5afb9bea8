// Stands in for csrc/cpu/amx_tiles.h in a library that is built for the tests: the tile instructions in plain C++, as the manual of
// Intel's instruction set describes them. What faults on a CPU ends the process and says why.
//
// Functions for the tests stand at the end.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace hsm {
namespace cpu {

static inline bool obtain_tiles() { return true; }

struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

namespace emulated {

constexpr int tile_count = 8, most_rows = 16, most_bytes = 64;

struct Tile {
  int rows, row_bytes;  // none: not configured
  alignas(64) uint8_t data[most_rows][most_bytes];
};

// What a thread has. Variables are those of the whole library; functions are each source's own, compiled for its instruction set.
struct State {
  bool configured = false;
  Tile tiles[tile_count] = {};
};

inline thread_local State state;
inline int64_t configured_threads = 0, configurations = 0, products = 0;  // of all threads

static inline void count(int64_t& counter, int64_t more) { __atomic_fetch_add(&counter, more, __ATOMIC_RELAXED); }

[[noreturn]] static inline void fault(const char* instruction, const char* reason) {
  std::fprintf(stderr, "emulated %s: %s\n", instruction, reason);
  std::abort();
}

static inline void set_configured(bool configured) {
  count(configured_threads, static_cast<int>(configured) - static_cast<int>(state.configured));
  state = State{};
  state.configured = configured;
}

static inline void ldtilecfg(const TileShapes& shapes) {
  uint8_t bytes[64];
  static_assert(sizeof shapes == sizeof bytes, "the memory format of a configuration");
  std::memcpy(bytes, &shapes, sizeof bytes);
  const auto expect = [](bool fine, const char* reason) {
    if (!fine) fault("ldtilecfg", reason);
  };
  expect(bytes[0] <= 1, "there is no such palette");
  if (bytes[0] == 0) return set_configured(false);
  expect(bytes[1] == 0, "the first row is for restarts only");
  for (int at = 2; at < 64; ++at)
    expect(bytes[at] == 0 || (at >= 16 && at < 16 + 2 * tile_count) || (at >= 48 && at < 48 + tile_count), "a reserved byte is not zero");
  set_configured(true);
  count(configurations, 1);
  for (int k = 0; k < tile_count; ++k) {
    Tile& tile = state.tiles[k];
    tile.rows = shapes.rows[k];
    tile.row_bytes = shapes.row_bytes[k];
    expect(tile.rows <= most_rows && tile.row_bytes <= most_bytes, "a tile is too large");
    expect((tile.rows == 0) == (tile.row_bytes == 0), "a tile has rows and no columns, or columns and no rows");
  }
}

static inline Tile& tile_for(const char* instruction, int tile) {
  if (!state.configured) fault(instruction, "no tiles are configured");
  Tile& found = state.tiles[tile];
  if (found.rows == 0) fault(instruction, "the tile is not configured");
  if (found.row_bytes % 4 != 0) fault(instruction, "the tile's rows are not whole elements");
  return found;
}

static inline void tilezero(int tile) { std::memset(tile_for("tilezero", tile).data, 0, most_rows * most_bytes); }

// Rows and columns behind the tile's own become zero.
static inline void tileloadd(int tile, const void* from, int64_t stride) {
  Tile& to = tile_for("tileloadd", tile);
  std::memset(to.data, 0, sizeof to.data);
  for (int row = 0; row < to.rows; ++row) std::memcpy(to.data[row], static_cast<const uint8_t*>(from) + row * stride, to.row_bytes);
}

static inline void tilestored(int tile, void* to, int64_t stride) {
  const Tile& from = tile_for("tilestored", tile);
  for (int row = 0; row < from.rows; ++row) std::memcpy(static_cast<uint8_t*>(to) + row * stride, from.data[row], from.row_bytes);
}

// A subnormal number counts as zero, as operand and as result.
static inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f * x : x; }

static inline float element(const Tile& tile, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, tile.data[row] + 2 * column, sizeof bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return flushed(value);
}

// The products of even and of odd elements are summed apart, from the first to the last, then both together, and then what there was.
static inline void tdpbf16ps(int sum, int a, int b) {
  const char* name = "tdpbf16ps";
  Tile& c = tile_for(name, sum);
  const Tile &left = tile_for(name, a), &right = tile_for(name, b);
  if (sum == a || sum == b || a == b) fault(name, "a tile is used twice");
  if (c.rows != left.rows || c.row_bytes != right.row_bytes || left.row_bytes / 4 != right.rows) fault(name, "the tiles' shapes do not fit");
  count(products, 1);
  constexpr int columns = most_bytes / 4;  // those behind the tile's own are zero
  const int pairs = left.row_bytes / 4;
  float right_values[most_rows][2 * columns];
  for (int k = 0; k < pairs; ++k)
    for (int n = 0; n < columns; ++n) {
      right_values[k][n] = element(right, k, 2 * n);
      right_values[k][columns + n] = element(right, k, 2 * n + 1);
    }
  for (int m = 0; m < c.rows; ++m) {
    float even[columns] = {}, odd[columns] = {}, row[columns];
    for (int k = 0; k < pairs; ++k) {
      const float first = element(left, m, 2 * k), second = element(left, m, 2 * k + 1);
      for (int n = 0; n < columns; ++n) even[n] = flushed(__builtin_fmaf(first, right_values[k][n], even[n]));
      for (int n = 0; n < columns; ++n) odd[n] = flushed(__builtin_fmaf(second, right_values[k][columns + n], odd[n]));
    }
    std::memcpy(row, c.data[m], sizeof row);
    for (int n = 0; n < columns; ++n) row[n] = flushed(flushed(row[n]) + flushed(even[n] + odd[n]));
    std::memcpy(c.data[m], row, c.row_bytes);
  }
}

}  // namespace emulated

static inline void configure_tiles(const TileShapes& shapes) { emulated::ldtilecfg(shapes); }
static inline void release_tiles() { emulated::set_configured(false); }
template <int tile>
void zero_tile() {
  emulated::tilezero(tile);
}
template <int tile>
void load_tile(const void* from, int64_t stride) {
  emulated::tileloadd(tile, from, stride);
}
template <int tile>
void store_tile(void* to, int64_t stride) {
  emulated::tilestored(tile, to, stride);
}
template <int sum, int a, int b>
void add_tile_product() {
  emulated::tdpbf16ps(sum, a, b);
}

}  // namespace cpu
}  // namespace hsm

// For the tests, by ctypes.
extern "C" {
#define HSM_FOR_TESTS __attribute__((visibility("default"), weak))
// Threads that have tiles at the moment, and how many configurations and products there were.
HSM_FOR_TESTS int64_t emulated_configured_threads() { return hsm::cpu::emulated::configured_threads; }
HSM_FOR_TESTS int64_t emulated_configurations() { return hsm::cpu::emulated::configurations; }
HSM_FOR_TESTS int64_t emulated_products() { return hsm::cpu::emulated::products; }
// The instructions themselves.
HSM_FOR_TESTS void emulated_ldtilecfg(const void* from) {
  hsm::cpu::TileShapes shapes;
  std::memcpy(&shapes, from, sizeof shapes);
  hsm::cpu::emulated::ldtilecfg(shapes);
}
HSM_FOR_TESTS void emulated_tilerelease() { hsm::cpu::release_tiles(); }
HSM_FOR_TESTS void emulated_tilezero(int tile) { hsm::cpu::emulated::tilezero(tile); }
HSM_FOR_TESTS void emulated_tileloadd(int tile, const void* from, int64_t stride) { hsm::cpu::emulated::tileloadd(tile, from, stride); }
HSM_FOR_TESTS void emulated_tilestored(int tile, void* to, int64_t stride) { hsm::cpu::emulated::tilestored(tile, to, stride); }
HSM_FOR_TESTS void emulated_tdpbf16ps(int sum, int a, int b) { hsm::cpu::emulated::tdpbf16ps(sum, a, b); }
}
