// The equations of one LSTM and one GRU unit, forward and backward: the only place where they stand in C++.
//
// S is what one unit's numbers are held in: a float or double on a GPU, a vector of neighbouring units on a CPU.
// Math brings `static S sigmoid(S)` and `static S tanh(S)` for it.
#pragma once

#include "common/host_device.h"

namespace hsm {

template <class S>
struct LstmGates {
  S i, f, g, o;
};

// pre: the pre-activations i, f, g, o.
template <class Math, class S>
HSM_HOST_DEVICE LstmGates<S> lstm_gates(const S (&pre)[4]) {
  return {Math::sigmoid(pre[0]), Math::sigmoid(pre[1]), Math::tanh(pre[2]), Math::sigmoid(pre[3])};
}

// c: the new cell state. m: o * tanh(c), the hidden state before a projection.
template <class Math, class S>
HSM_HOST_DEVICE void lstm_cell_forward(const LstmGates<S>& gates, S c_prev, S& c, S& m) {
  c = gates.f * c_prev + gates.i * gates.g;
  m = gates.o * Math::tanh(c);
}

// grad_m, grad_c: gradients of m and of the new cell state from everything behind this step.
// grad_pre: gradients of the pre-activations i, f, g, o.
template <class Math, class S>
HSM_HOST_DEVICE void lstm_cell_backward(
    const LstmGates<S>& gates, S c_prev, S c, S grad_m, S grad_c, S (&grad_pre)[4], S& grad_c_prev) {
  const S tanh_c = Math::tanh(c);
  const S d = grad_c + grad_m * gates.o * (1 - tanh_c * tanh_c);
  grad_pre[0] = d * gates.g * gates.i * (1 - gates.i);
  grad_pre[1] = d * c_prev * gates.f * (1 - gates.f);
  grad_pre[2] = d * gates.i * (1 - gates.g * gates.g);
  grad_pre[3] = grad_m * tanh_c * gates.o * (1 - gates.o);
  grad_c_prev = d * gates.f;
}

// h_n is the hidden half of the candidate, W_hn h + b_hn.
template <class S>
struct GruGates {
  S r, z, n, h_n;
};

// pre: the pre-activations r and z, and the input and the hidden half of n.
template <class Math, class S>
HSM_HOST_DEVICE GruGates<S> gru_gates(const S (&pre)[4]) {
  const S r = Math::sigmoid(pre[0]);
  return {r, Math::sigmoid(pre[1]), Math::tanh(pre[2] + r * pre[3]), pre[3]};
}

// Returns the new hidden state.
template <class S>
HSM_HOST_DEVICE S gru_cell_forward(const GruGates<S>& gates, S h_prev) {
  return gates.n + gates.z * (h_prev - gates.n);
}

// grad_pre: gradients of r, z, the input half of n and the hidden half of n.
// grad_h_direct: what reaches the previous hidden state beside the recurrent product.
template <class S>
HSM_HOST_DEVICE void gru_cell_backward(
    const GruGates<S>& gates, S h_prev, S grad_h, S (&grad_pre)[4], S& grad_h_direct) {
  const S d_n = grad_h * (1 - gates.z) * (1 - gates.n * gates.n);
  grad_pre[0] = d_n * gates.h_n * gates.r * (1 - gates.r);
  grad_pre[1] = grad_h * (h_prev - gates.n) * gates.z * (1 - gates.z);
  grad_pre[2] = d_n;
  grad_pre[3] = d_n * gates.r;
  grad_h_direct = grad_h * gates.z;
}

}  // namespace hsm
