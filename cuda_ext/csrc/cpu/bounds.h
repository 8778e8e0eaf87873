// Checks of what index tensors hold. On the CPU only: on CUDA they would mean waiting for the device.
#pragma once

#include <algorithm>

#include "../checks.h"

namespace sparkme {

// Whether all entries are in [low, high).
inline void check_entries(const char *name, const Tensor &value, int64_t low, int64_t high) {
  const int32_t *entries = value.const_data_ptr<int32_t>();
  int32_t smallest = 0, largest = static_cast<int32_t>(low);
  for (int64_t i = 0; i < value.numel(); ++i) {
    smallest = std::min(smallest, entries[i]);
    largest = std::max(largest, entries[i]);
  }
  TORCH_CHECK_VALUE(smallest >= low && largest < std::max<int64_t>(high, low + 1), name, " names ",
                    smallest < low ? smallest : largest, ", allowed are ", low, " to ", high - 1);
}

inline void check_table(const char *name, const Tensor &table, int64_t num_sources) {
  check_int32(name, table, 2);
  check_entries(name, table, -1, num_sources);
}

inline Sites checked_sites(const Tensor &slots, const Tensor &patches) {
  const Sites sites = sites_of(slots, patches);
  check_entries("slots", slots, -1, patches.size(0));
  check_entries("patches", patches, 0, slots.numel());
  return sites;
}

}  // namespace sparkme
