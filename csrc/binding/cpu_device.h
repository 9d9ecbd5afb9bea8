// How the operators run on the CPU. CudaDevice has the same members.
#pragma once

#include "binding/backward.h"

namespace hsm {
namespace binding {

class CpuDevice {
 public:
  static constexpr bool takes_strides = true;   // of the input
  static constexpr bool widens_weights = true;  // of bfloat16, in calls without training

  // `like`: a tensor of the call. There is nothing to allow in float32.
  CpuDevice(const char* op, const Tensor& like, bool /*allow_tf32*/) : op_(op), like_(like) {}

  Tensor empty(const Shape& shape) const { return binding::empty(like_, shape); }

  void forward(ForwardParams& p) const {
    const cpu::Plan plan(p.sizes, p.boundaries, false);
    p.schedule = plan.schedule();
    const cpu::Threads pool = threads();
    const Workspace workspace(cpu::kernels().forward_plan(p, pool).workspace_bytes);
    cpu::kernels().forward(p, pool, workspace.data());
  }

  LayerGradients backward(BackwardParams& p, const BackwardTensors& tensors) const {
    STD_TORCH_CHECK(!p.recompute || has_product(p.sizes.dtype), op_, ": gates must be given but for float32 and float64");
    const cpu::Plan plan(p.sizes, p.boundaries, true);
    p.schedule = plan.schedule();
    return BackwardPass(p, tensors, empty_gradients(*this, p.sizes, tensors)).run();
  }

 private:
  const char* op_;
  const Tensor& like_;
};

}  // namespace binding
}  // namespace hsm
