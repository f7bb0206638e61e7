// SPDX-License-Identifier: Apache-2.0
// What the device remembers between launches.
#pragma once

#include <vector>

#include "memory.h"
#include "ptxsim.h"

namespace ptxsim {

struct DeviceState {
  Ranges ranges;
  std::vector<Finding> findings;
  std::vector<LaunchReport> reports;
  int64_t launches = 0, allocations = 0;
};

DeviceState& device_state();

}  // namespace ptxsim
