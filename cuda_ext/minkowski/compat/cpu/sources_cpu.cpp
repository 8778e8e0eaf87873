// All sources of MinkowskiEngine's CPU build but its Python interface, in one translation unit: each of them spends nine tenths
// of its compilation on the same headers. The first defines specialisations that others use.
#include "math_functions_cpu.cpp"
#include "coordinate_map_manager.cpp"
#include "convolution_cpu.cpp"
#include "convolution_transpose_cpu.cpp"
#include "local_pooling_cpu.cpp"
#include "local_pooling_transpose_cpu.cpp"
#include "global_pooling_cpu.cpp"
#include "broadcast_cpu.cpp"
#include "pruning_cpu.cpp"
#include "interpolation_cpu.cpp"
#include "quantization.cpp"
#include "direct_max_pool.cpp"
