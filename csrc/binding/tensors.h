// Tensors of the stable ABI as the kernels take them, and the checks that keep the kernels inside their memory.
// What users can get wrong is checked in Python, with better words.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/params.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"

// Why the call of torch's C interface that failed last did so. Not in torch before 2.13, which prints it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace hsm {
namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Sizes of a tensor, without an allocation.
class Shape {
 public:
  Shape(std::initializer_list<int64_t> sizes) : count_(std::min(sizes.size(), sizes_.size())) { std::copy_n(sizes.begin(), count_, sizes_.begin()); }
  explicit Shape(const Tensor& tensor) : count_(static_cast<size_t>(tensor.dim())) {
    STD_TORCH_CHECK(count_ <= sizes_.size(), "hsm_kernels: no tensor has more than ", sizes_.size(), " dimensions, got ", count_);
    for (size_t k = 0; k < count_; ++k) sizes_[k] = tensor.size(static_cast<int64_t>(k));
  }

  // With one more dimension in front.
  Shape behind(int64_t size) const {
    Shape longer{size};
    longer.count_ = std::min(count_ + 1, sizes_.size());
    std::copy_n(sizes_.begin(), longer.count_ - 1, longer.sizes_.begin() + 1);
    return longer;
  }

  size_t size() const { return count_; }
  const int64_t* data() const { return sizes_.data(); }
  int64_t operator[](size_t k) const { return sizes_[k]; }
  bool operator==(const Shape& other) const { return count_ == other.count_ && std::equal(data(), data() + count_, other.data()); }

 private:
  std::array<int64_t, 4> sizes_;
  size_t count_;
};

inline std::string text(const Shape& shape) {
  std::string out = "(";
  for (size_t k = 0; k < shape.size(); ++k) out += (k ? ", " : "") + std::to_string(shape[k]);
  return out + ")";
}

inline Shape shape_of(const Tensor& tensor) { return Shape(tensor); }

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const Shape& expected) {
  STD_TORCH_CHECK(shape_of(tensor) == expected, op, ": ", name, " must have shape ", text(expected), ", got ", text(shape_of(tensor)));
}

inline void check_shape(const char* op, const char* name, const MaybeTensor& tensor, const Shape& expected) {
  if (tensor) check_shape(op, name, *tensor, expected);
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "the CPU" : tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

inline bool on_one_device(const Tensor& tensor, const Tensor& other) {
  if (other.is_cpu()) return tensor.is_cpu();
  return tensor.is_cuda() && other.is_cuda() && tensor.get_device_index() == other.get_device_index();
}

// `like`: a tensor of the call that all others follow.
inline void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType expected, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, op, ": ", name, " must have the dtype of the other tensors");
  STD_TORCH_CHECK(on_one_device(tensor, like), op, ": ", name, " must be on ", device_of(like), " like the other tensors, got ", device_of(tensor));
}

// To be called where torch did not make `what`, most likely for want of memory. Where that is sure, or all that is known, Python makes a
// torch.OutOfMemoryError of "CUDA out of memory" (hsm_kernels/_ops.py).
[[noreturn]] inline void fail_for_memory(const char* op, const std::string& what, const std::string& device) {
  const std::string words = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "";
  const bool known = !words.empty();
  STD_TORCH_CHECK(!known || words.find("out of memory") != std::string::npos, op, ": torch made no ", what, " on ", device, ": ", words);
  STD_TORCH_CHECK(false, op, ": ", device == "the CPU" ? "" : "CUDA ", "out of memory", known ? "" : ", or another error, which torch has printed",
                  ": no room for ", what, " on ", device, "; take fewer steps or sequences at once, or recompute=True", known ? "; torch says: " : "",
                  words);
  std::abort();  // never reached, which the compiler does not know
}

// The tensor itself if it is contiguous, else a copy.
inline Tensor contiguous(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;  // torch's call costs something even then
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception&) {
    fail_for_memory(op, std::string("contiguous copy of ") + name + " " + text(shape_of(tensor)), device_of(tensor));
  }
}

inline ScalarKind scalar_kind(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return ScalarKind::float64;
    case ScalarType::Float: return ScalarKind::float32;
    case ScalarType::BFloat16: return ScalarKind::bfloat16;
    case ScalarType::Half: return ScalarKind::float16;
    default: STD_TORCH_CHECK(false, op, ": dtype must be float64, float32, bfloat16 or float16");
  }
}

inline ScalarType scalar_type(ScalarKind kind) {
  switch (kind) {
    case ScalarKind::float64: return ScalarType::Double;
    case ScalarKind::float32: return ScalarType::Float;
    case ScalarKind::bfloat16: return ScalarType::BFloat16;
    default: return ScalarType::Half;
  }
}

// Checks arguments of one call, and keeps the contiguous copies alive whose pointers it hands out.
class Arguments {
 public:
  // `like`: a tensor that has the dtype and the device of the others.
  Arguments(const char* op, const Tensor& like) : op_(op), like_(like), dtype_(like.scalar_type()) { kept_.reserve(most_arguments); }

  const void* pointer(const char* name, const Tensor& tensor, const Shape& shape) {
    return keep(name, tensor, shape, dtype_).const_data_ptr();
  }
  const void* pointer(const char* name, const MaybeTensor& tensor, const Shape& shape) {
    return tensor ? pointer(name, *tensor, shape) : nullptr;
  }
  const void* pointer(const char* name, const MaybeTensor& tensor, const Shape& shape, ScalarType dtype) {
    return tensor ? keep(name, *tensor, shape, dtype).const_data_ptr() : nullptr;
  }
  // A tensor of two or three dimensions keeps the strides of all but the last.
  const void* rows(const char* name, const Tensor& tensor, const Shape& shape, int64_t& stride_0, int64_t& stride_1) {
    const Tensor& kept = keep(name, tensor, shape, dtype_, tensor.stride(-1) == 1);
    stride_0 = kept.dim() == 3 ? kept.stride(0) : 0;
    stride_1 = kept.stride(-2);
    return kept.const_data_ptr();
  }
  const int64_t* lengths(const MaybeTensor& tensor, int64_t batch) {
    return tensor ? static_cast<const int64_t*>(keep("lengths", *tensor, {batch}, ScalarType::Long).const_data_ptr()) : nullptr;
  }
  // A mask keeps its strides: it may be a transposed or an expanded view.
  const bool* mask(const char* name, const MaybeTensor& tensor, const Shape& shape, int64_t& step_stride, int64_t& batch_stride) {
    if (!tensor) return nullptr;
    check_shape(op_, name, *tensor, shape);
    check_type(op_, name, *tensor, ScalarType::Bool, like_);
    step_stride = tensor->stride(0);
    batch_stride = tensor->stride(1);
    static const bool nothing = false;  // an empty tensor has no memory, but it was given
    return tensor->numel() ? static_cast<const bool*>(tensor->const_data_ptr()) : &nothing;
  }

 private:
  const Tensor& keep(const char* name, const Tensor& tensor, const Shape& shape, ScalarType dtype, bool as_it_is = false) {
    check_shape(op_, name, tensor, shape);
    check_type(op_, name, tensor, dtype, like_);
    kept_.push_back(as_it_is ? tensor : contiguous(op_, name, tensor));
    return kept_.back();
  }

  static constexpr size_t most_arguments = 24;

  const char* op_;
  const Tensor& like_;
  ScalarType dtype_;
  std::vector<Tensor> kept_;
};

// With HSM_KERNELS_POISON set, memory holds NaN before a kernel writes it, so that a read too early, or a result never written, shows.
inline bool poisons() {
  static const bool wanted = std::getenv("HSM_KERNELS_POISON") != nullptr;
  return wanted;
}

inline void poison(void* data, size_t bytes) {
  if (poisons() && bytes) std::memset(data, 0xff, bytes);
}

// Memory that torch got from the system is mapped page by page as it is written, which takes longer than many a kernel that writes
// it. With huge pages, where the system grants them on request, it takes a tenth of the time.
inline void ask_for_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t{1} << 21, worth_it = 2 * huge, page = 4096;
  if (bytes < worth_it) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = (begin + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / page * page, MADV_HUGEPAGE);  // a refusal changes nothing
#endif
}

inline std::array<int64_t, 4> contiguous_strides(const Shape& shape) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t k = shape.size(); k-- > 0; stride *= std::max<int64_t>(shape[k], 1)) strides[k] = stride;
  return strides;
}

// An uninitialised contiguous CPU tensor, by the shortest way to torch's allocator.
inline Tensor empty(const Shape& shape, int32_t dtype) {
  const auto strides = contiguous_strides(shape);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  ask_for_huge_pages(tensor.mutable_data_ptr(), bytes);
  poison(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

inline Tensor empty(const Tensor& like, const Shape& shape) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(shape, dtype);
}

// torch's thread pool.
inline cpu::Threads threads() {
  const auto parallel_for = [](int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context));
  };
  return {cpu::better_alone() ? 1 : static_cast<int>(torch::stable::get_num_threads()), parallel_for};
}

}  // namespace binding
}  // namespace hsm
