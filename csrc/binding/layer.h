// What the LSTM and GRU operators share: sizes, boundaries, weights and input, and the run of the forward pass.
#pragma once

#include "binding/tensors.h"

namespace hsm {
namespace binding {

// The parameters of one direction as the operators take them; weight_hr stays empty for GRU.
struct DirectionTensors {
  MaybeTensor weight_ih, weight_hh, bias_ih, bias_hh, weight_hr;
};

// The directions that were given: one, or two if the second has weights.
inline std::vector<DirectionTensors> directions_of(const DirectionTensors& forward, const DirectionTensors& reverse) {
  if (!reverse.weight_hh) return {forward};
  return {forward, reverse};
}

inline Sizes sizes_of(const char* op, CellKind cell, const Tensor& like, int64_t steps, int64_t batch, size_t directions,
                      const Tensor& weight_hh, bool projection) {
  const int gates = cell == CellKind::lstm ? 4 : 3;
  const int64_t most = 1 << 28;
  STD_TORCH_CHECK(weight_hh.dim() == 2 && weight_hh.size(0) % gates == 0 && weight_hh.size(0) < most, op,
                  ": weight_hh must have shape (", gates, " * H, Hout), got ", text(shape_of(weight_hh)));
  STD_TORCH_CHECK(projection || weight_hh.size(1) * gates == weight_hh.size(0), op, ": weight_hh must have shape (", gates,
                  " * H, H) without a projection, got ", text(shape_of(weight_hh)));
  return {cell, scalar_kind(op, like), steps, batch, static_cast<int>(directions), static_cast<int>(weight_hh.size(0) / gates),
          static_cast<int>(weight_hh.size(1)), projection};
}

inline Sizes sizes_of_forward(const char* op, CellKind cell, const Tensor& input, size_t directions, const Tensor& weight_hh, bool projection) {
  STD_TORCH_CHECK(input.dim() == 2 || input.dim() == 3, op, ": input must have shape (L, N, I), or (N, I) for one step, got ",
                  text(shape_of(input)));
  return sizes_of(op, cell, input, input.dim() == 2 ? 1 : input.size(0), input.size(-2), directions, weight_hh, projection);
}

// Whether the call leaves out the dimensions of steps and directions, which are 1, in its input, its states and their gradients.
inline bool leaves_dimensions_out(const Sizes& z, const Tensor& input) { return input.dim() == 2 && z.steps == 1 && z.directions == 1; }

inline Shape input_shape(const Sizes& z, const Tensor& input) {
  if (leaves_dimensions_out(z, input)) return {z.batch, input.size(-1)};
  return {z.steps, z.batch, input.size(-1)};
}

inline Shape state_shape(const Sizes& z, const Tensor& input, int64_t size) {
  if (leaves_dimensions_out(z, input)) return {z.batch, size};
  return {z.directions, z.batch, size};
}

inline Boundaries boundaries_of(Arguments& arguments, const Sizes& z, const MaybeTensor& reset_mask, const MaybeTensor& reset_h,
                                const MaybeTensor& reset_c, const MaybeTensor& detach_mask, const MaybeTensor& lengths,
                                int64_t detach_every) {
  Boundaries b{};
  b.reset_mask = arguments.mask("reset_mask", reset_mask, {z.steps, z.batch}, b.reset_step_stride, b.reset_batch_stride);
  b.detach_mask = arguments.mask("detach_mask", detach_mask, {z.steps, z.batch}, b.detach_step_stride, b.detach_batch_stride);
  b.detach_every = detach_every;
  b.lengths = arguments.lengths(lengths, z.batch);
  b.reset_h = arguments.pointer("reset_h", reset_h, {z.directions, z.batch, z.hidden_out});
  b.reset_c = arguments.pointer("reset_c", reset_c, {z.directions, z.batch, z.hidden});
  return b;
}

inline Weights weights_of(Arguments& arguments, const Sizes& z, const DirectionTensors& w, ScalarType type) {
  const int64_t rows = gate_columns(z);
  return {nullptr, arguments.pointer("weight_hh", w.weight_hh, {rows, z.hidden_out}, type),
          arguments.pointer("weight_hr", w.weight_hr, {z.hidden_out, z.hidden}, type), arguments.pointer("bias_ih", w.bias_ih, {rows}),
          arguments.pointer("bias_hh", w.bias_hh, {rows})};
}

// All weights as the forward pass reads them, and the input (L, N, I).
template <class Device>
void add_weights_and_input(Arguments& arguments, const Tensor& input, const std::vector<DirectionTensors>& directions, bool training,
                           ForwardParams& p) {
  ScalarType type = input.scalar_type();
  p.bfloat16_weights = Device::widens_weights && !training && type == ScalarType::Float &&
                       directions[0].weight_hh->scalar_type() == ScalarType::BFloat16;
  if (p.bfloat16_weights) type = ScalarType::BFloat16;
  p.input_size = input.size(-1);
  const Shape shape = input_shape(p.sizes, input);
  if (Device::takes_strides) {
    p.input = arguments.rows("input", input, shape, p.input_step_stride, p.input_batch_stride);
  } else {
    p.input = arguments.pointer("input", input, shape);
    p.input_step_stride = p.sizes.batch * p.input_size, p.input_batch_stride = p.input_size;
  }
  for (int d = 0; d < p.sizes.directions; ++d) {
    p.weights[d] = weights_of(arguments, p.sizes, directions[d], type);
    p.weights[d].weight_ih = arguments.pointer("weight_ih", directions[d].weight_ih, {directions[d].weight_hh->size(0), p.input_size}, type);
  }
}

// What the gradients of a layer are made from, checked and contiguous.
struct BackwardTensors {
  Tensor input, output;
  // `output` (L, N, D * Hout) and `h_0` (D, N, Hout) or null give the states that entered the steps where nothing was reset and all
  // sequences have all steps; elsewhere `entering` (D, L, N, Hout) does.
  MaybeTensor h_0, entering;
  std::vector<Tensor> weight_ih, weight_hh;
  bool needs_input;
  int64_t samples;  // see hsm_kernels/_ops.py
};

inline BackwardTensors backward_tensors(const char* op, const Sizes& z, const Boundaries& boundaries, const Tensor& input, const Tensor& output,
                                        const MaybeTensor& h_0, const MaybeTensor& entering, const std::vector<DirectionTensors>& directions,
                                        bool needs_input, int64_t samples) {
  const Tensor& like = *directions[0].weight_hh;
  check_type(op, "output", output, like.scalar_type(), like);
  check_type(op, "input", input, like.scalar_type(), like);
  check_shape(op, "input", input, input_shape(z, input));
  check_shape(op, "output", output, {z.steps, z.batch, z.directions * int64_t{z.hidden_out}});
  STD_TORCH_CHECK(samples >= 0 && (samples == 0 || z.batch % samples == 0), op, ": samples must be a divisor of N = ", z.batch, ", got ", samples);
  STD_TORCH_CHECK(entering || !(boundaries.reset_mask || boundaries.lengths), op, ": entering must be given with reset_mask or lengths");
  BackwardTensors tensors{contiguous(op, "input", input), contiguous(op, "output", output)};
  tensors.needs_input = needs_input, tensors.samples = samples;
  if (h_0) tensors.h_0 = contiguous(op, "h_0", *h_0);
  if (entering) {
    check_type(op, "entering", *entering, like.scalar_type(), like);
    check_shape(op, "entering", *entering, {z.directions, z.steps, z.batch, z.hidden_out});
    tensors.entering = contiguous(op, "entering", *entering);
  }
  for (const DirectionTensors& w : directions) {
    check_type(op, "weight_ih", *w.weight_ih, like.scalar_type(), like);
    check_shape(op, "weight_ih", *w.weight_ih, {w.weight_hh->size(0), input.size(-1)});
    tensors.weight_ih.push_back(contiguous(op, "weight_ih", *w.weight_ih));
    tensors.weight_hh.push_back(contiguous(op, "weight_hh", *w.weight_hh));
  }
  return tensors;
}

struct LayerGradients {
  Tensor input;
  // Of each sample, where there are more than one.
  Tensor weight_ih[max_directions], weight_hh[max_directions];
  Tensor bias[max_directions];  // (4 * H,): of the parts of grad_gates, summed
};

// Room for the gradients of a layer; those that nothing needs have shape (0,).
template <class Device>
LayerGradients empty_gradients(const Device& device, const Sizes& z, const BackwardTensors& tensors) {
  const int64_t inputs = tensors.input.size(-1), gates = gate_columns(z);
  LayerGradients gradients;
  gradients.input = device.empty(tensors.needs_input ? input_shape(z, tensors.input) : Shape{0});
  for (int d = 0; d < max_directions; ++d) {
    const auto of_samples = [&](const Shape& shape) {
      if (tensors.samples == 0 || d >= z.directions) return device.empty({0});
      return device.empty(tensors.samples == 1 ? shape : shape.behind(tensors.samples));
    };
    gradients.weight_ih[d] = of_samples({gates, inputs});
    gradients.weight_hh[d] = of_samples({gates, z.hidden_out});
    gradients.bias[d] = of_samples({4 * int64_t{z.hidden}});
  }
  return gradients;
}

}  // namespace binding
}  // namespace hsm
