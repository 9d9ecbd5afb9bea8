// The Python entry point of the extension. It is empty on purpose: importing `hsm_kernels._C` (or loading the file with
// torch.ops.load_library) runs the static registrations of the other binding files, and nothing else is needed from Python.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
