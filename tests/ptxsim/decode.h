// SPDX-License-Identifier: Apache-2.0
// The decoder of one kernel: helpers on modifiers and operands that the opcodes' decoders use.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "half.h"
#include "module.h"

namespace ptxsim {

class Decoder {
 public:
  Decoder(Body& body, std::map<std::string, Variable>& globals, Kernel& kernel)
      : body_(body), globals_(globals), kernel_(kernel) {}
  void run();

 private:
  [[noreturn]] void fail(const std::string& message) const;

  // Modifiers of the mnemonic, each to be taken by someone.
  bool take(const char* modifier);
  bool take_one_of(std::initializer_list<const char*> modifiers, std::string* which);
  Type take_type();
  Space take_space();
  void need_all_taken();
  Round take_round();

  // Operands. Destinations first, each call appends to the instruction.
  void need_operands(size_t least, size_t most) const;
  void destination(const std::string& text, int bytes);
  int register_bytes(const std::string& text) const;  // of a register, else -1
  void source(const std::string& text, Type type);
  void predicate_source(const std::string& text);
  void sink(int bytes);
  void address(const std::string& text, int64_t* offset);
  Operand constant(uint64_t bits, int bytes);
  int find_register(const std::string& name) const;
  int special(const std::string& name);
  bool symbol(const std::string& text, Space space_of[1], uint64_t* value);
  int64_t immediate(const std::string& text) const;
  std::vector<std::string> vector_parts(const std::string& text) const;
  void set(Fn fn);

  void one();  // decodes *s_
  bool arithmetic();
  bool moves();
  bool memory();
  bool control();
  bool collective();
  void move();
  void convert();
  void load_store(bool load);
  void atomic(bool red);
  void async_copy();
  void mma();
  void set_predicate();
  void layout_variable(Variable& v);

  Body& body_;
  std::map<std::string, Variable>& globals_;
  Kernel& kernel_;
  const Statement* s_ = nullptr;
  std::string base_, opcode_;
  std::vector<std::string> mods_;
  Instr in_;
  std::vector<Operand> ops_;
  bool destinations_done_ = false;
  std::vector<std::pair<int, std::string>> branch_labels_;  // instruction -> label
  std::map<std::pair<int, uint64_t>, Operand> constants_;
  std::map<std::string, int> opcodes_;
  std::map<std::string, int> specials_;
  int sinks_[9] = {-1, -1, -1, -1, -1, -1, -1, -1, -1};
  int64_t shared_bytes_ = 0, local_bytes_ = 0;
};

}  // namespace ptxsim
