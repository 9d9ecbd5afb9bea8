// What the lanes of a warp do together.
#pragma once

#include <cstring>

#include "runtime.h"
#include "scalars.h"

namespace sim {

constexpr unsigned all_lanes = 0xffffffffu;

// The value that lane `source` brought. A lane that names none below 32 keeps its own; one that is not there gives NaN.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, Where where) {
  struct Lane {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  const auto apply = [](const WarpData& data) {
    for (void* pointer : data.lanes) {
      Lane* lane = static_cast<Lane*>(pointer);
      if (!lane || lane->source >= warp_size) continue;
      if (const void* from = data.lanes[lane->source])
        lane->result = static_cast<const Lane*>(from)->value;
      else
        std::memset(&lane->result, 0xff, sizeof lane->result);
    }
  };
  warp_meet(mask, "shuffle", &mine, apply, where);
  return mine.result;
}

// A bit for each lane whose condition holds.
inline unsigned ballot(unsigned mask, bool condition, Where where) {
  struct Lane {
    bool condition;
    unsigned result;
  } mine{condition, 0};
  const auto apply = [](const WarpData& data) {
    unsigned bits = 0;
    for (int i = 0; i < warp_size; ++i)
      if (data.lanes[i] && static_cast<Lane*>(data.lanes[i])->condition) bits |= 1u << i;
    for (void* lane : data.lanes)
      if (lane) static_cast<Lane*>(lane)->result = bits;
  };
  warp_meet(mask, "ballot", &mine, apply, where);
  return mine.result;
}

inline void sync_warp(unsigned mask, Where where) {
  warp_meet(mask, "sync_warp", nullptr, [](const WarpData&) {}, where);
}

// mma.sync.m16n8k16 for 16-bit T and .m16n8k8 for TF32: D (16, 8) += A (16, K) B (K, 8), by the fragments that PTX documents.
// Lane 4 g + t holds rows g and g + 8 of A and D, and column g of B.
struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
struct MmaTraits {  // a register holds two neighbours in k
  static constexpr int depth = 16;
  static float element(const uint32_t* registers, int row_half, int k, int row_halves) {
    const uint32_t word = registers[row_half + row_halves * (k / 8)];
    T x;
    x.bits = static_cast<uint16_t>(word >> 16 * (k % 2));
    return static_cast<float>(x);
  }
  static int thread(int k) { return k % 8 / 2; }
};

struct Tf32 {};
template <>
struct MmaTraits<Tf32> {
  static constexpr int depth = 8;
  static float element(const uint32_t* registers, int row_half, int k, int row_halves) {
    return float_of(registers[row_half + row_halves * (k / 4)] & 0xffffe000);  // the low bits are not read
  }
  static int thread(int k) { return k % 4; }
};

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  Fragments mine{d, a, b};
  const auto apply = [](const WarpData& data) {
    using Traits = MmaTraits<T>;
    const auto lane = [&](int group, int thread) { return static_cast<Fragments*>(data.lanes[4 * group + thread]); };
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        double sum = 0;
        for (int k = 0; k < Traits::depth; ++k)
          sum += static_cast<double>(Traits::element(lane(row % 8, Traits::thread(k))->a, row / 8, k, 2)) *
                 Traits::element(lane(column, Traits::thread(k))->b, 0, k, 1);
        float& out = lane(row % 8, column / 2)->d[2 * (row / 8) + column % 2];
        out = static_cast<float>(out + sum);
      }
  };
  warp_meet(all_lanes, "mma", &mine, apply, where);
}

// A look at memory that others change by atomics.
template <class T>
T load_acquire(const T* address, Where where) {
  poll("load_acquire", where);
  return *address;
}

template <class T>
T atomic_add(T* address, T value) {
  const T before = *address;
  *address += value;
  progress();
  return before;
}

}  // namespace sim
