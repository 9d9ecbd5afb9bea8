// hsm_kernels::gru_forward and hsm_kernels::gru_backward. Schemas and meanings: hsm_kernels/_ops.py.
#include "binding/cpu_device.h"
#ifdef HSM_CUDA
#include "binding/cuda/device.h"
#endif

namespace hsm {
namespace binding {
namespace {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gru_forward(
    Tensor input, MaybeTensor h_0, Tensor weight_ih, Tensor weight_hh, MaybeTensor bias_ih, MaybeTensor bias_hh,
    MaybeTensor weight_ih_reverse, MaybeTensor weight_hh_reverse, MaybeTensor bias_ih_reverse, MaybeTensor bias_hh_reverse,
    MaybeTensor reset_mask, MaybeTensor reset_h, MaybeTensor detach_mask, MaybeTensor lengths, int64_t detach_every, bool allow_tf32, bool recompute,
    bool training) {
  const char* op = "gru_forward";
  const auto directions = directions_of({weight_ih, weight_hh, bias_ih, bias_hh, {}},
                                        {weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse, {}});
  ForwardParams p{};
  Sizes& z = p.sizes;
  z = sizes_of_forward(op, CellKind::gru, input, directions.size(), weight_hh, false);
  const int64_t hidden = z.hidden;
  const Device device(op, input, allow_tf32);
  Arguments arguments(op, input);
  p.boundaries = boundaries_of(arguments, z, reset_mask, reset_h, {}, detach_mask, lengths, detach_every);
  const Shape h_shape = state_shape(z, input, hidden);
  p.h_0 = arguments.pointer("h_0", h_0, h_shape);
  add_weights_and_input<Device>(arguments, input, directions, training, p);

  Tensor output = device.empty({z.steps, z.batch, z.directions * hidden});
  Tensor h_n = device.empty(h_shape);
  const bool save_gates = training && !recompute;
  Tensor gates = device.empty(save_gates ? Shape{z.steps, z.batch, z.directions, 4 * hidden} : Shape{0});
  p.training = training;
  p.gates = save_gates ? gates.mutable_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.h_n = h_n.mutable_data_ptr();
  device.forward(p);
  return {output, h_n, gates};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    MaybeTensor grad_output, MaybeTensor grad_h_n, Tensor input, MaybeTensor h_0, Tensor output, MaybeTensor gates, MaybeTensor entering,
    Tensor weight_ih, Tensor weight_hh, MaybeTensor bias_ih, MaybeTensor bias_hh, MaybeTensor weight_ih_reverse,
    MaybeTensor weight_hh_reverse, MaybeTensor bias_ih_reverse, MaybeTensor bias_hh_reverse, MaybeTensor reset_mask,
    MaybeTensor reset_h, MaybeTensor detach_mask, MaybeTensor lengths, int64_t detach_every, bool allow_tf32, bool needs_input, int64_t samples) {
  const char* op = "gru_backward";
  STD_TORCH_CHECK(output.dim() == 3, op, ": output must have shape (L, N, D * H), got ", text(shape_of(output)));
  const auto directions = directions_of({weight_ih, weight_hh, bias_ih, bias_hh, {}},
                                        {weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse, {}});
  BackwardParams p{};
  Sizes& z = p.sizes;
  z = sizes_of(op, CellKind::gru, output, output.size(0), output.size(1), directions.size(), weight_hh, false);
  const int64_t hidden = z.hidden;
  const Shape h_shape = state_shape(z, input, hidden), h_steps{z.steps, z.batch, z.directions * hidden};
  const Device device(op, output, allow_tf32);
  Arguments arguments(op, output);
  p.boundaries = boundaries_of(arguments, z, reset_mask, reset_h, {}, detach_mask, lengths, detach_every);
  for (int d = 0; d < z.directions; ++d) p.weights[d] = weights_of(arguments, z, directions[d], output.scalar_type());
  p.h_0 = arguments.pointer("h_0", h_0, h_shape);
  p.output = arguments.pointer("output", output, h_steps);
  p.gates = arguments.pointer("gates", gates, {z.steps, z.batch, z.directions, 4 * hidden});
  p.grad_output = arguments.pointer("grad_output", grad_output, h_steps);
  p.grad_h_n = arguments.pointer("grad_h_n", grad_h_n, h_shape);

  p.recompute = !gates;
  Tensor grad_h_0 = device.empty(h_shape), grad_reset_h = device.empty(reset_h ? Shape{z.directions, z.batch, hidden} : Shape{0});
  p.grad_h_0 = grad_h_0.mutable_data_ptr();
  p.grad_reset_h = reset_h ? grad_reset_h.mutable_data_ptr() : nullptr;
  const BackwardTensors tensors = backward_tensors(op, z, p.boundaries, input, output, h_0, entering, directions, needs_input, samples);
  const LayerGradients g = device.backward(p, tensors);
  return {g.input, grad_h_0, grad_reset_h, g.weight_ih[0], g.weight_hh[0], g.bias[0], g.weight_ih[1], g.weight_hh[1], g.bias[1]};
}

STABLE_TORCH_LIBRARY_IMPL(hsm_kernels, CPU, m) {
  m.impl("gru_forward", TORCH_BOX(&gru_forward<CpuDevice>));
  m.impl("gru_backward", TORCH_BOX(&gru_backward<CpuDevice>));
}

#ifdef HSM_CUDA
STABLE_TORCH_LIBRARY_IMPL(hsm_kernels, CUDA, m) {
  m.impl("gru_forward", TORCH_BOX(&gru_forward<CudaDevice>));
  m.impl("gru_backward", TORCH_BOX(&gru_backward<CudaDevice>));
}
#endif

}  // namespace
}  // namespace binding
}  // namespace hsm
