#include "binding/cuda/device.h"

#include <map>
#include <mutex>

namespace hsm {
namespace binding {
namespace {

// Of cudaError_t.
constexpr cuda::Status insufficient_driver = 35, no_kernel_image = 209;

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

CUstream_st* current_stream(const char* op, int32_t device) {
  // torch exports it, but not from a library that a build without CUDA has.
  using Function = AOTITorchError(int32_t, void**);
  static Function* const function = reinterpret_cast<Function*>(torch_cuda_function(op, "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<CUstream_st*>(stream);
}

}  // namespace

CudaDevice::CudaDevice(const char* op, const Tensor& like, bool allow_tf32)
    : op_(op), index_(like.get_device_index()), allow_tf32_(allow_tf32), guard_(index_), stream_(current_stream(op, index_)) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype_));
}

Tensor CudaDevice::empty(const Shape& shape) const { return empty(shape, dtype_); }

Tensor CudaDevice::empty(const Shape& shape, int32_t dtype) const {
  const auto strides = contiguous_strides(shape);
  AtenTensorHandle handle;
  const AOTITorchError failed =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, aoti_torch_device_type_cuda(), index_, &handle);
  if (failed) fail_for_memory(op_, "tensor of shape " + text(shape), "cuda:" + std::to_string(index_));
  Tensor tensor(handle);
  if (poisons()) check(cuda::fill(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(tensor.numel()) * tensor.element_size(), stream_));
  return tensor;
}

Tensor CudaDevice::workspace(size_t bytes) const { return empty({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8()); }

void CudaDevice::check(cuda::Status status) const {
  if (status == 0) return;
  std::string hint;
  if (status == insufficient_driver) {
    int runtime = 0, driver = 0;
    cuda::versions(runtime, driver);
    hint = ": the driver serves CUDA " + version_text(driver) + ", hsm_kernels was compiled with " + version_text(runtime) +
           "; update the driver, or compile hsm_kernels with an older toolkit";
  } else if (status == no_kernel_image) {
    hint = ": hsm_kernels was not compiled for this GPU; compile it again with its architecture in HSM_KERNELS_CUDA_ARCHS";
  }
  STD_TORCH_CHECK(false, op_, ": CUDA error ", status, ", ", cuda::status_text(status), hint);
}

cuda::Setting CudaDevice::setting() const {
  cuda::Setting setting;
  setting.allow_tf32 = allow_tf32_;
  const char* text = std::getenv("HSM_KERNELS_CUDA_VARIANT");
  if (!text || !*text) return setting;
  const auto request = cuda::parse_request(text);
  STD_TORCH_CHECK(request, op_, ": HSM_KERNELS_CUDA_VARIANT must be step, cluster or grid, with a number of blocks as in cluster:8 if wanted, got ", text);
  setting.request = *request;
  if (request->variant == cuda::Variant::step) return setting;
  static std::mutex mutex;
  static std::map<int32_t, cuda::DeviceFacts> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index_);
  if (found != known.end()) {
    setting.device = found->second;
  } else {
    check(cuda::find_device_facts(setting.device));
    known[index_] = setting.device;
  }
  return setting;
}

std::string CudaDevice::explain(const Sizes& sizes, cuda::PassKind pass, bool cuts) const {
  return cuda::describe(cuda::plan_recurrence(sizes, pass, cuts, setting()));
}

void CudaDevice::forward(ForwardParams& p) const {
  const cuda::Setting way = setting();
  const Tensor memory = workspace(cuda::forward_workspace(p, way));
  Cublas cublas(op_, allow_tf32_);
  check(cuda::forward(p, memory.mutable_data_ptr(), way, cublas.products(), stream_));
}

LayerGradients CudaDevice::backward(BackwardParams& p, const BackwardTensors& t) const {
  const LayerGradients results = empty_gradients(*this, p.sizes, t);
  cuda::BackwardLayer layer{p, t.input.const_data_ptr(), t.input.size(-1)};
  layer.gradients.samples = t.samples;
  layer.params.output = t.output.const_data_ptr();
  layer.params.h_0 = t.h_0 ? t.h_0->const_data_ptr() : nullptr;
  layer.entering = t.entering ? t.entering->const_data_ptr() : nullptr;
  if (t.needs_input) layer.gradients.input = results.input.mutable_data_ptr();
  for (int d = 0; d < p.sizes.directions; ++d) {
    layer.params.weights[d].weight_ih = t.weight_ih[d].const_data_ptr();
    if (t.samples == 0) continue;
    layer.gradients.weight_ih[d] = results.weight_ih[d].mutable_data_ptr();
    layer.gradients.weight_hh[d] = results.weight_hh[d].mutable_data_ptr();
    layer.gradients.bias[d] = results.bias[d].mutable_data_ptr();
  }
  const cuda::Setting way = setting();
  const Tensor memory = workspace(cuda::backward_workspace(layer, way));
  Cublas cublas(op_, allow_tf32_);
  check(cuda::backward(layer, memory.mutable_data_ptr(), way, cublas.products(), stream_));
  return results;
}

}  // namespace binding
}  // namespace hsm
