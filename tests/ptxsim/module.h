// SPDX-License-Identifier: Apache-2.0
// Decoded PTX: what the parser makes and the interpreter runs.
//
// A register is an array of 32 lanes in its warp's register file (uint32_t for up to 32 bits, whose
// bits above the type are not looked at; uint64_t for 64), a predicate is one 32-bit mask. Every
// register has one more word: bit l says that lane l holds an undefined value. Constants are
// registers too, in the kernel's own constant file, so that instructions need not tell them apart.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ptxsim.h"

namespace ptxsim {

constexpr uint32_t kFull = 0xffffffffu;
constexpr int kLanes = 32;

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kF16x2,
  kBf16,
  kBf16x2,
  kF32,
  kF64,
};  // clang-format off
Type type_of(const std::string& name);  // kNone if it is no type
int bytes_of(Type type);
inline bool is_signed(Type t) { return t >= Type::kS8 && t <= Type::kS64; }
inline bool is_integer(Type t) { return t >= Type::kB8 && t <= Type::kS64; }
// clang-format on

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam };

struct Warp;
struct Instr;
// Executes one instruction for the lanes of `mask`, which is not empty.
using Fn = void (*)(Warp&, const Instr&, uint32_t mask);

struct Operand {
  uint32_t offset = 0;  // in words, from Warp::files[file]
  uint32_t undef = 0;   // index of the undefined mask; 0 is always defined
  int32_t reg = -1;     // the virtual register, -1 for a constant
  uint8_t file = 0;     // 0 registers, 1 constants
  uint8_t bytes = 4;    // 0 predicate, 2, 4, 8
  bool negate = false;  // !%p
};

// What the scheduler does with an instruction; everything else is kPlain.
enum class Step : uint8_t { kPlain, kBranch, kExit, kCollective, kBarrier };

struct Instr {
  Fn fn = nullptr;
  const Operand* ops = nullptr;  // destinations first
  uint8_t destinations = 0, operands = 0;
  Step step = Step::kPlain;
  bool guarded = false, guard_negate = false;
  bool sync = false;  // atomic or volatile: a loop around it may be waiting for another lane
  Operand guard;
  int32_t target = -1;                 // of a branch
  int32_t index = 0;                   // in Kernel::code
  int64_t imm = 0;                     // address offset, lop3 table, ...
  int64_t imm2 = 0;                    // the source's offset of cp.async
  uint8_t a = 0, b = 0, c = 0, d = 0;  // modifiers, each function's own
  int8_t member = -1;                  // operand that holds the member mask of a collective
  Space space = Space::kGeneric;
  int32_t line = 0;    // index into Kernel::lines
  int32_t opcode = 0;  // index into Kernel::opcodes
};

struct SourceLine {
  std::string file;
  int line = 0;
  std::string inlined;  // "called at x.cu:12", or empty
};

struct SpecialRegister {
  std::string name;
  Operand op;
};

struct Kernel {
  KernelInfo info;
  std::vector<Instr> code;
  std::vector<Operand> operands;
  std::vector<uint32_t> constants;   // the constant file
  std::vector<std::string> opcodes;  // names for the counters
  std::vector<SourceLine> lines;
  std::vector<SpecialRegister> specials;  // set when a warp starts
  uint32_t file_words = 0, masks = 1;     // register file and undefined masks of one warp
  std::vector<Operand> undefined_at_entry;
  bool bytewise_races = false;  // has shared stores below 4 bytes
  std::string origin;
};

struct Variable {
  std::string name;
  Space space = Space::kGlobal;
  bool constant = false, external = false;
  int64_t bytes = 0, align = 1;
  int64_t offset = -1;  // shared and local: in the kernel's window, -1 until it is used
  uint8_t* data = nullptr;
};

// A statement of a kernel's body, not yet decoded.
struct Statement {
  int scope = 0;  // of registers and labels declared inside { }
  int text_line = 0, line = 0;
  std::string guard;  // "%p1", "!%p1" or empty
  std::string mnemonic;
  std::vector<std::string> operands;  // at the top level; a vector keeps its braces
};

// A kernel's body between parsing and decoding.
struct Body {
  std::string name, origin;
  std::vector<Statement> statements;
  std::vector<int> scope_parent{-1};
  std::map<std::pair<int, std::string>, int> registers;  // (scope, name) -> virtual register
  std::vector<uint8_t> register_bytes;                   // 0 for a predicate
  std::map<std::pair<int, std::string>, int> labels;     // -> statement
  std::map<std::string, Variable> variables;             // .shared and .local of this kernel
  std::vector<SourceLine> lines;
  KernelInfo info;
  std::vector<std::string> params;
};

// Fills kernel.code and what goes with it. `globals` are the module's variables.
void decode(Body& body, std::map<std::string, Variable>& globals, Kernel& kernel);
// Gives every virtual register its place in the register file.
void allocate_registers(const Body& body, Kernel& kernel);

}  // namespace ptxsim
