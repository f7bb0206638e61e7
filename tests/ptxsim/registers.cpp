// SPDX-License-Identifier: Apache-2.0
// Places of registers in a warp's register file.

#include "module.h"

namespace ptxsim {

void allocate_registers(const Body& body, Kernel& kernel) {
  // One place each: 32 lanes of 4 or 8 bytes, or one mask.
  std::vector<uint32_t> offset(body.register_bytes.size());
  uint32_t words = 0;
  for (size_t r = 0; r < offset.size(); ++r) {
    offset[r] = words;
    words += body.register_bytes[r] == 8 ? 2 * kLanes : body.register_bytes[r] == 0 ? 2 : kLanes;
  }
  kernel.file_words = words;
  kernel.masks = static_cast<uint32_t>(offset.size()) + 1;
  const auto place = [&](Operand& op) {
    if (op.reg < 0) return;
    op.offset = offset[static_cast<size_t>(op.reg)];
    op.undef = static_cast<uint32_t>(op.reg) + 1;
  };
  for (Operand& op : kernel.operands) place(op);
  for (SpecialRegister& s : kernel.specials) place(s.op);
  for (Instr& in : kernel.code) place(in.guard);
}

}  // namespace ptxsim
