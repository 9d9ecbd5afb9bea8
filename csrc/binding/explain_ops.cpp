// hsm_kernels::explain_forward on the CPU. Schema and meaning: hsm_kernels/_ops.py.
#include "binding/layer.h"

namespace hsm {
namespace binding {
namespace {

std::tuple<Tensor, Tensor> explain_forward(Tensor input, Tensor weight_ih, Tensor weight_hh, bool is_lstm, bool projection, bool bidirectional,
                                           bool training) {
  const char* op = "explain_forward";
  STD_TORCH_CHECK(input.dim() == 3 && weight_ih.dim() == 2, op, ": input must have shape (L, N, I), got ", text(shape_of(input)));
  ForwardParams p{};
  p.sizes = sizes_of(op, is_lstm ? CellKind::lstm : CellKind::gru, input, input.size(0), input.size(1), bidirectional ? 2 : 1, weight_hh,
                     projection);
  p.input_size = weight_ih.size(1);
  p.training = training;
  p.bfloat16_weights = !training && input.scalar_type() == ScalarType::Float && weight_hh.scalar_type() == ScalarType::BFloat16;
  const cpu::Plan schedule(p.sizes, p.boundaries, false);
  p.schedule = schedule.schedule();
  cpu::Threads pool = threads();
  pool.count = static_cast<int>(torch::stable::get_num_threads());  // whatever else runs at the moment
  const ForwardPlan plan = cpu::kernels().forward_plan(p, pool);
  const int64_t numbers[] = {plan.batch_groups, plan.unit_groups, static_cast<int64_t>(plan.input_packing),
                             static_cast<int64_t>(plan.state_packing), plan.chunk_sequences, plan.chunk_steps};
  const std::string name = plan.instruction_set;
  Tensor found = empty({static_cast<int64_t>(std::size(numbers))}, aoti_torch_dtype_int64());
  std::memcpy(found.mutable_data_ptr(), numbers, sizeof numbers);
  Tensor letters = empty({static_cast<int64_t>(name.size())}, aoti_torch_dtype_uint8());
  std::memcpy(letters.mutable_data_ptr(), name.data(), name.size());
  return {letters, found};
}

STABLE_TORCH_LIBRARY_IMPL(hsm_kernels, CPU, m) { m.impl("explain_forward", TORCH_BOX(&explain_forward)); }

}  // namespace
}  // namespace binding
}  // namespace hsm
