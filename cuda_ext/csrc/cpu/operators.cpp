// All operators of the CPU in one translation unit: to read torch's headers takes several times as long as to compile what is
// in these files. A name in an anonymous namespace is therefore unique among them.
#include "convolution.cpp"
#include "depthwise.cpp"
#include "gemm.cpp"
#include "linear_norm.cpp"
#include "mlp.cpp"
#include "norm.cpp"
#include "patches.cpp"
#include "pooling.cpp"
#include "products.cpp"
#include "table.cpp"
