// The Python module sparkme._C. It has no functions: importing it registers the kernels of the operators that sparkme/ops
// defines. sparkme/ops/__init__.py lists the families, and what a new operator touches.
//
// All families are one translation unit: to read torch's headers takes several times as long as to compile what is in these
// files. A name in an anonymous namespace is therefore unique among them.
//
// A family has its gradients in FAMILY.cpp and its kernels in cpu/FAMILY.cpp and cuda/FAMILY.cu. A kernel has the type of the
// operator, whose schema is in sparkme/ops/FAMILY.py; torch compares the two when it registers it. Inner loops that are
// compiled for each instruction set are apart, in cpu/*_kernels.inl, and are named in cpu/kernels.h and cpu/kernels.inl.
#include <Python.h>

#include "convolution.cpp"
#include "cpu/gemm.cpp"
#include "cpu/products.cpp"
#include "depthwise.cpp"
#include "linear_layers.cpp"
#include "norm.cpp"
#include "patches.cpp"
#include "pooling.cpp"

extern "C" PyObject *PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
