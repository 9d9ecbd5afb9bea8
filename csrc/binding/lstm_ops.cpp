// hsm_kernels::lstm_forward and hsm_kernels::lstm_backward. Schemas and meanings: hsm_kernels/_ops.py.
#include "binding/cpu_device.h"
#ifdef HSM_CUDA
#include "binding/cuda/device.h"
#endif

namespace hsm {
namespace binding {
namespace {

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(
    Tensor input, MaybeTensor h_0, MaybeTensor c_0, Tensor weight_ih, Tensor weight_hh, MaybeTensor bias_ih, MaybeTensor bias_hh,
    MaybeTensor weight_hr, MaybeTensor weight_ih_reverse, MaybeTensor weight_hh_reverse, MaybeTensor bias_ih_reverse,
    MaybeTensor bias_hh_reverse, MaybeTensor weight_hr_reverse, MaybeTensor reset_mask, MaybeTensor reset_h, MaybeTensor reset_c,
    MaybeTensor detach_mask, MaybeTensor lengths, int64_t detach_every, bool allow_tf32, bool return_states, bool recompute, bool training) {
  const char* op = "lstm_forward";
  const auto directions = directions_of({weight_ih, weight_hh, bias_ih, bias_hh, weight_hr},
                                        {weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse, weight_hr_reverse});
  ForwardParams p{};
  Sizes& z = p.sizes;
  z = sizes_of_forward(op, CellKind::lstm, input, directions.size(), weight_hh, weight_hr.has_value());
  const Device device(op, input, allow_tf32);
  Arguments arguments(op, input);
  p.boundaries = boundaries_of(arguments, z, reset_mask, reset_h, reset_c, detach_mask, lengths, detach_every);
  const Shape h_shape = state_shape(z, input, z.hidden_out), c_shape = state_shape(z, input, z.hidden);
  p.h_0 = arguments.pointer("h_0", h_0, h_shape);
  p.c_0 = arguments.pointer("c_0", c_0, c_shape);
  add_weights_and_input<Device>(arguments, input, directions, training, p);

  Tensor output = device.empty({z.steps, z.batch, z.directions * static_cast<int64_t>(z.hidden_out)});
  Tensor h_n = device.empty(h_shape), c_n = device.empty(c_shape);
  const bool keep_c = training || return_states, save_gates = training && !recompute;
  Tensor c_states = device.empty(keep_c ? Shape{z.steps, z.batch, z.directions, z.hidden} : Shape{0});
  Tensor gates = device.empty(save_gates ? Shape{z.steps, z.batch, z.directions, 4 * static_cast<int64_t>(z.hidden)} : Shape{0});
  p.training = training;
  p.gates = save_gates ? gates.mutable_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.c_states = keep_c ? c_states.mutable_data_ptr() : nullptr;
  p.h_n = h_n.mutable_data_ptr();
  p.c_n = c_n.mutable_data_ptr();
  device.forward(p);
  return {output, h_n, c_n, c_states, gates};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    MaybeTensor grad_output, MaybeTensor grad_h_n, MaybeTensor grad_c_n, MaybeTensor grad_c_states, Tensor input, MaybeTensor h_0,
    MaybeTensor c_0, Tensor output, Tensor c_states, MaybeTensor gates, MaybeTensor entering, Tensor weight_ih, Tensor weight_hh,
    MaybeTensor bias_ih, MaybeTensor bias_hh, MaybeTensor weight_hr, MaybeTensor weight_ih_reverse, MaybeTensor weight_hh_reverse,
    MaybeTensor bias_ih_reverse, MaybeTensor bias_hh_reverse, MaybeTensor weight_hr_reverse, MaybeTensor reset_mask,
    MaybeTensor reset_c, MaybeTensor detach_mask, MaybeTensor lengths, int64_t detach_every, bool allow_tf32, bool needs_input, int64_t samples) {
  const char* op = "lstm_backward";
  STD_TORCH_CHECK(c_states.dim() == 4, op, ": c_states must have shape (L, N, D, H), got ", text(shape_of(c_states)));
  const auto directions = directions_of({weight_ih, weight_hh, bias_ih, bias_hh, weight_hr},
                                        {weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse, weight_hr_reverse});
  BackwardParams p{};
  Sizes& z = p.sizes;
  z = sizes_of(op, CellKind::lstm, c_states, c_states.size(0), c_states.size(1), directions.size(), weight_hh, weight_hr.has_value());
  const int64_t hidden = z.hidden, out = z.hidden_out;
  const Shape h_shape = state_shape(z, input, out), c_shape = state_shape(z, input, hidden), c_steps{z.steps, z.batch, z.directions, hidden};
  const Device device(op, c_states, allow_tf32);
  Arguments arguments(op, c_states);
  p.boundaries = boundaries_of(arguments, z, reset_mask, {}, reset_c, detach_mask, lengths, detach_every);
  for (int d = 0; d < z.directions; ++d) p.weights[d] = weights_of(arguments, z, directions[d], c_states.scalar_type());
  arguments.pointer("h_0", h_0, h_shape);
  p.c_0 = arguments.pointer("c_0", c_0, c_shape);
  p.c_states = arguments.pointer("c_states", c_states, c_steps);
  p.gates = arguments.pointer("gates", gates, {z.steps, z.batch, z.directions, 4 * hidden});
  p.grad_output = arguments.pointer("grad_output", grad_output, {z.steps, z.batch, z.directions * out});
  p.grad_h_n = arguments.pointer("grad_h_n", grad_h_n, h_shape);
  p.grad_c_n = arguments.pointer("grad_c_n", grad_c_n, c_shape);
  p.grad_c_states = arguments.pointer("grad_c_states", grad_c_states, c_steps);

  const bool resets = reset_c.has_value();
  p.recompute = !gates;
  Tensor grad_h = device.empty(z.projection ? Shape{z.steps, z.batch, z.directions, out} : Shape{0});
  Tensor grad_h_0 = device.empty(h_shape), grad_c_0 = device.empty(c_shape);
  Tensor grad_reset_h = device.empty(resets ? Shape{z.directions, z.batch, out} : Shape{0});
  Tensor grad_reset_c = device.empty(resets ? Shape{z.directions, z.batch, hidden} : Shape{0});
  p.grad_h = grad_h.mutable_data_ptr();
  p.grad_h_0 = grad_h_0.mutable_data_ptr();
  p.grad_c_0 = grad_c_0.mutable_data_ptr();
  p.grad_reset_h = resets ? grad_reset_h.mutable_data_ptr() : nullptr;
  p.grad_reset_c = resets ? grad_reset_c.mutable_data_ptr() : nullptr;
  const BackwardTensors tensors = backward_tensors(op, z, p.boundaries, input, output, h_0, entering, directions, needs_input, samples);
  const LayerGradients g = device.backward(p, tensors);
  return {g.input,        grad_h,         grad_h_0,  grad_c_0,       grad_reset_h,   grad_reset_c,
          g.weight_ih[0], g.weight_hh[0], g.bias[0], g.weight_ih[1], g.weight_hh[1], g.bias[1]};
}

STABLE_TORCH_LIBRARY_IMPL(hsm_kernels, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward<CpuDevice>));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward<CpuDevice>));
}

#ifdef HSM_CUDA
STABLE_TORCH_LIBRARY_IMPL(hsm_kernels, CUDA, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward<CudaDevice>));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward<CudaDevice>));
}
#endif

}  // namespace
}  // namespace binding
}  // namespace hsm
