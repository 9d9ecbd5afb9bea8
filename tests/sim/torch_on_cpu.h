// Included before the sources of csrc/binding, so that their operators for CUDA tensors take CPU tensors, and stand in a namespace of their
// own. Those for CPU tensors are left out. torch's GPU library is the simulator's, and memory runs out where a test wants it to.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#define HSM_CUDA

namespace torch {
namespace stable {
namespace accelerator {

struct NoDeviceGuard {
  explicit NoDeviceGuard(int32_t) {}
};

}  // namespace accelerator
}  // namespace stable
}  // namespace torch

#define DeviceGuard NoDeviceGuard
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu

extern "C" {
void* sim_dlopen(const char* name, int flags);
void* sim_dlsym(void* library, const char* name);
AOTITorchError sim_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type, int32_t index,
                                 AtenTensorHandle* found);
AOTITorchError sim_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version);
}
#define dlopen sim_dlopen
#define dlsym sim_dlsym
#define aoti_torch_empty_strided sim_empty_strided
#define torch_call_dispatcher sim_call_dispatcher
#define torch_exception_get_what_without_backtrace sim_exception_what

namespace sim {

// A function that registers operators, kept until a namespace for them is known.
struct Registration {
  using Function = void (*)(torch::stable::detail::StableLibrary&);

  explicit Registration(Function function) { all().push_back(function); }
  static std::vector<Function>& all();
};

}  // namespace sim

#define SIM_REGISTER_CPU(m, unique) \
  template <class Never>            \
  [[maybe_unused]] static void C10_CONCATENATE(not_registered_, unique)(Never & m)
#define SIM_REGISTER_CUDA(m, unique)                                                                                     \
  static void C10_CONCATENATE(operators_, unique)(torch::stable::detail::StableLibrary&);                                \
  static const sim::Registration C10_CONCATENATE(registration_, unique)(&C10_CONCATENATE(operators_, unique));           \
  void C10_CONCATENATE(operators_, unique)(torch::stable::detail::StableLibrary & m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) SIM_REGISTER_##key(m, C10_UID)
