// SPDX-License-Identifier: Apache-2.0
// What the stand-in runtime reads from a fat binary besides the PTX: the register counts that ptxas
// left in the machine code.
#pragma once

#include <string>

namespace ptxsim {

// Registers per thread of `kernel` in the machine code for `capability` (or for the nearest lower
// one of the same generation, which such a device would run); 0 if there is none.
int registers_per_thread(const void* fatbin_wrapper, int capability, const std::string& kernel);

}  // namespace ptxsim
