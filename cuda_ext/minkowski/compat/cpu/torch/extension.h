// Stands for torch's header of this name in the CPU build, where it comes first on the include path: torch's own brings all of
// the C++ frontend and takes twice as long to read. MinkowskiEngine needs tensors, their factories, and their conversion to and
// from Python.
#pragma once

#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>
