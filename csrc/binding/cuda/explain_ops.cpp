// hsm_kernels::explain_recurrence on a GPU. Schema and meaning: hsm_kernels/_ops.py.
#include "binding/cuda/device.h"

namespace hsm {
namespace binding {
namespace {

// "cluster: ..." in UTF-8.
Tensor explain_recurrence(Tensor input, Tensor weight_hh, bool is_lstm, bool projection, bool bidirectional, bool backward, bool cuts,
                          bool allow_tf32) {
  const char* op = "explain_recurrence";
  STD_TORCH_CHECK(input.dim() == 3, op, ": input must have shape (L, N, I), got ", text(shape_of(input)));
  const Sizes sizes = sizes_of(op, is_lstm ? CellKind::lstm : CellKind::gru, input, input.size(0), input.size(1), bidirectional ? 2 : 1,
                               weight_hh, projection);
  const CudaDevice device(op, input, allow_tf32);
  const std::string words = device.explain(sizes, backward ? cuda::PassKind::backward : cuda::PassKind::forward, cuts);
  Tensor letters = empty({static_cast<int64_t>(words.size())}, aoti_torch_dtype_uint8());
  std::memcpy(letters.mutable_data_ptr(), words.data(), words.size());
  return letters;
}

STABLE_TORCH_LIBRARY_IMPL(hsm_kernels, CUDA, m) { m.impl("explain_recurrence", TORCH_BOX(&explain_recurrence)); }

}  // namespace
}  // namespace binding
}  // namespace hsm
