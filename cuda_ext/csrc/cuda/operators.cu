// All families of CUDA's operators in one translation unit, but for the kernels of the depthwise convolution: to read torch's
// headers takes nvcc longer than to compile what is in these files. A name in an anonymous namespace is therefore unique among
// them. The sparse convolution is Triton's (sparkme/ops/triton_conv.py).
#include "depthwise.cu"
#include "linear_layers.cu"
#include "norm.cu"
#include "patches.cu"
#include "pooling.cu"
