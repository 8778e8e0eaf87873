// The Python module sparkme._C. It has no functions: importing it registers the kernels of the operators that
// sparkme/ops/library.py defines.
#include <Python.h>

extern "C" PyObject *PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
