// Biases as the cells add them.
#pragma once

#include "common/params.h"
#include "cpu/simd.h"

namespace hsm {
namespace cpu {
namespace HSM_ISA {

// One vector of units from u on for each row of `bias` (4, width). Rows: LSTM the summed biases of its gates; GRU r and z summed, then n's input and hidden
// bias apart.
template <class T, CellKind kind, class A>
void pack_bias(const Weights& w, int64_t hidden, int64_t u, A* bias) {
  constexpr bool is_lstm = kind == CellKind::lstm;
  const T* ih = static_cast<const T*>(w.bias_ih);
  const T* hh = static_cast<const T*>(w.bias_hh);
  const int units = static_cast<int>(smaller(lanes<A>(), hidden - u));
  for (int g = 0; g < 4; ++g) {
    const int64_t at = (is_lstm ? g : smaller(g, 2)) * hidden + u;
    const bool input_half = is_lstm || g != 3, hidden_half = is_lstm || g != 2;
    Vector<A> sum{};
    if (ih && input_half) sum += load(ih + at, units);
    if (hh && hidden_half) sum += load(hh + at, units);
    store(sum, bias + g * lanes<A>());
  }
}

}  // namespace HSM_ISA
}  // namespace cpu
}  // namespace hsm
