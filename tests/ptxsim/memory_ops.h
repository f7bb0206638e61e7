// SPDX-License-Identifier: Apache-2.0
// Addresses of a warp's lanes, checked and counted; the instructions on memory.
#pragma once

#include "alu.h"
#include "warp.h"

namespace ptxsim {

enum class Use : uint8_t { kLoad, kStore, kAtomic, kCopy };

// The lanes of one instruction that access the same space.
struct Access {
  Space space = Space::kGlobal;
  uint32_t mask = 0;  // lanes that may access; others were reported
  int bytes = 0;      // of a lane
  uint64_t address[kLanes];
  uint8_t* base = nullptr;  // a lane's memory is base + address
  Range* range = nullptr;   // global, if all lanes lie in one
  uint8_t* at(int lane) const { return base + address[lane]; }
};

// Reads the address operand, reports undefined, misaligned and wild lanes, counts the request.
// A generic address may go to several spaces: up to 4 accesses. Returns their number.
int resolve(Warp& w, const Instr& in, const Operand& address, uint32_t mask, int bytes, Use use,
            Access out[4]);
// Shadows. `undef_out`: per lane of the mask, whether bytes [from, from + count) of its access are
// undefined.
uint32_t undefined_lanes(Warp& w, const Access& a, int from, int count);
void define(Warp& w, const Access& a, int from, int count, uint32_t undef);
// Reports lanes of a shared access that touch the target of a copy in flight, and returns them.
uint32_t check_in_flight(Warp& w, const Instr& in, const Access& a, Use use);
// Races of a shared access; `skip` lanes leave no trace.
void check_races(Warp& w, const Instr& in, const Access& a, Use use, bool atomic, uint32_t skip);
void note_shared(Warp& w, const Instr& in, int lane, uint64_t address, int bytes, bool write,
                 bool atomic);

Fn load_op(int element_bytes, int register_bytes, bool sign, int count);
Fn store_op(int element_bytes, int register_bytes, int count);
// add min max inc dec and or xor exch cas; `red` has no destination.
Fn atomic_op(const std::string& op, Type type, bool red);
Fn copy_async_op();  // ops: shared address, global address, optional source size
Fn commit_op();
Fn wait_op();                      // Instr::imm groups may stay
Fn ldmatrix_op();                  // Instr::a matrices, Instr::b transposed
Fn cvta_op(Space space, bool to);  // 64-bit
Fn isspacep_op(Space space);

}  // namespace ptxsim
