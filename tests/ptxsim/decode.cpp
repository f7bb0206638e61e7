// SPDX-License-Identifier: Apache-2.0
// Statements to instructions: modifiers, operands, constants and variables. The opcodes themselves
// are in decode_ops.cpp and decode_memory.cpp.

#include "decode.h"

#include <algorithm>
#include <cstring>

#include "half.h"
#include "memory.h"
#include "text.h"

namespace ptxsim {

Type type_of(const std::string& name) {
  static const std::map<std::string, Type> kNames = {
      {"pred", Type::kPred}, {"b8", Type::kB8},         {"b16", Type::kB16},
      {"b32", Type::kB32},   {"b64", Type::kB64},       {"u8", Type::kU8},
      {"u16", Type::kU16},   {"u32", Type::kU32},       {"u64", Type::kU64},
      {"s8", Type::kS8},     {"s16", Type::kS16},       {"s32", Type::kS32},
      {"s64", Type::kS64},   {"f16", Type::kF16},       {"f16x2", Type::kF16x2},
      {"bf16", Type::kBf16}, {"bf16x2", Type::kBf16x2}, {"f32", Type::kF32},
      {"f64", Type::kF64}};
  const auto found = kNames.find(name);
  return found == kNames.end() ? Type::kNone : found->second;
}

int bytes_of(Type type) {
  switch (type) {
    case Type::kB8:
    case Type::kU8:
    case Type::kS8:
      return 1;
    case Type::kB16:
    case Type::kU16:
    case Type::kS16:
    case Type::kF16:
    case Type::kBf16:
      return 2;
    case Type::kB64:
    case Type::kU64:
    case Type::kS64:
    case Type::kF64:
      return 8;
    case Type::kNone:
    case Type::kPred:
      return 0;
    default:
      return 4;
  }
}

void Decoder::fail(const std::string& message) const {
  const SourceLine& line = body_.lines[static_cast<size_t>(s_->line)];
  throw Error(body_.origin + ": kernel " + body_.name + ", " + base_name(line.file) + ":" +
              std::to_string(line.line) + " (PTX line " + std::to_string(s_->text_line) +
              "): " + message + " in '" + s_->mnemonic + "'");
}

bool Decoder::take(const char* modifier) {
  const auto found = std::find(mods_.begin(), mods_.end(), modifier);
  if (found == mods_.end()) return false;
  mods_.erase(found);
  return true;
}

bool Decoder::take_one_of(std::initializer_list<const char*> modifiers, std::string* which) {
  for (const char* m : modifiers) {
    if (take(m)) {
      *which = m;
      return true;
    }
  }
  return false;
}

Type Decoder::take_type() {
  for (auto m = mods_.begin(); m != mods_.end(); ++m) {
    const Type type = type_of(*m);
    if (type == Type::kNone) continue;
    mods_.erase(m);
    return type;
  }
  fail("expected a supported type");
}

Space Decoder::take_space() {
  if (take("global") || take("const")) return Space::kGlobal;
  if (take("shared") || take("shared::cta")) return Space::kShared;
  if (take("local")) return Space::kLocal;
  if (take("param") || take("param::entry")) return Space::kParam;
  return Space::kGeneric;
}

Round Decoder::take_round() {
  take("rn");
  if (take("rz")) return Round::kZero;
  if (take("rm")) return Round::kDown;
  return take("rp") ? Round::kUp : Round::kNearest;
}

void Decoder::need_all_taken() {
  if (!mods_.empty()) fail("unsupported modifier ." + mods_.front());
}

void Decoder::need_operands(size_t least, size_t most) const {
  const size_t n = s_->operands.size();
  if (n < least || n > most) {
    fail("expected " + std::to_string(least) + " operands, got " + std::to_string(n));
  }
}

int Decoder::find_register(const std::string& name) const {
  for (int scope = s_->scope; scope >= 0; scope = body_.scope_parent[static_cast<size_t>(scope)]) {
    const auto found = body_.registers.find({scope, name});
    if (found != body_.registers.end()) return found->second;
  }
  return -1;
}

int Decoder::register_bytes(const std::string& text) const {
  const int reg = find_register(text);
  return reg < 0 ? -1 : body_.register_bytes[static_cast<size_t>(reg)];
}

void Decoder::sink(int bytes) {
  int& reg = sinks_[bytes];
  if (reg < 0) {
    reg = static_cast<int>(body_.register_bytes.size());
    body_.register_bytes.push_back(static_cast<uint8_t>(bytes));
  }
  Operand op;
  op.reg = reg;
  op.bytes = static_cast<uint8_t>(bytes);
  ops_.push_back(op);
  ++in_.destinations;
}

// `bytes` of the type written; registers of up to 4 bytes are interchangeable where PTX says so.
void Decoder::destination(const std::string& text, int bytes) {
  if (text == "_") return sink(bytes == 1 ? 2 : bytes);
  const int reg = find_register(text);
  if (reg < 0) fail("expected a register, got '" + text + "'");
  const int have = body_.register_bytes[static_cast<size_t>(reg)];
  if ((have == 8) != (bytes == 8) || (have == 0) != (bytes == 0)) {
    fail("expected a register of " + std::to_string(bytes) + " bytes, got '" + text + "'");
  }
  Operand op;
  op.reg = reg;
  op.bytes = static_cast<uint8_t>(have);
  ops_.push_back(op);
  ++in_.destinations;
}

Operand Decoder::constant(uint64_t bits, int bytes) {
  if (bytes <= 4 && bytes != 0) bits = static_cast<uint32_t>(bits);
  const int slot = bytes == 8 ? 8 : bytes == 0 ? 0 : 4;
  const auto found = constants_.find({slot, bits});
  if (found != constants_.end()) return found->second;
  Operand op;
  op.file = 1;
  op.bytes = static_cast<uint8_t>(slot);
  op.offset = static_cast<uint32_t>(kernel_.constants.size());
  if (slot == 0) {
    kernel_.constants.resize(kernel_.constants.size() + kLanes, bits != 0 ? kFull : 0);
  } else if (slot == 4) {
    kernel_.constants.resize(kernel_.constants.size() + kLanes, static_cast<uint32_t>(bits));
  } else {
    for (int l = 0; l < kLanes; ++l) {
      uint32_t words[2];
      std::memcpy(words, &bits, 8);
      kernel_.constants.push_back(words[0]);
      kernel_.constants.push_back(words[1]);
    }
  }
  constants_[{slot, bits}] = op;
  return op;
}

int Decoder::special(const std::string& name) {
  static const char* const kNames[] = {"%tid.x",
                                       "%tid.y",
                                       "%tid.z",
                                       "%ntid.x",
                                       "%ntid.y",
                                       "%ntid.z",
                                       "%ctaid.x",
                                       "%ctaid.y",
                                       "%ctaid.z",
                                       "%nctaid.x",
                                       "%nctaid.y",
                                       "%nctaid.z",
                                       "%laneid",
                                       "%warpid",
                                       "%lanemask_eq",
                                       "%lanemask_lt",
                                       "%lanemask_le",
                                       "%lanemask_gt",
                                       "%lanemask_ge",
                                       "%nwarpid",
                                       "%smid",
                                       "%nsmid",
                                       "%dynamic_smem_size",
                                       "%total_smem_size"};
  const auto found = specials_.find(name);
  if (found != specials_.end()) return found->second;
  for (const char* known : kNames) {
    if (name != known) continue;
    const int reg = static_cast<int>(body_.register_bytes.size());
    body_.register_bytes.push_back(4);
    SpecialRegister s;
    s.name = name;
    s.op.reg = reg;
    kernel_.specials.push_back(s);
    return specials_[name] = reg;
  }
  return -1;
}

void Decoder::layout_variable(Variable& v) {
  int64_t& end = v.space == Space::kShared ? shared_bytes_ : local_bytes_;
  v.offset = (end + v.align - 1) / v.align * v.align;
  end = v.offset + v.bytes;
}

// The address of a variable or parameter, with an optional "+n". space_of[0] gets its space.
bool Decoder::symbol(const std::string& text, Space space_of[1], uint64_t* value) {
  const size_t plus = text.find('+');
  const std::string name = trim(text.substr(0, plus));
  const uint64_t offset =
      plus == std::string::npos ? 0 : static_cast<uint64_t>(immediate(trim(text.substr(plus + 1))));
  const auto param = std::find(body_.params.begin(), body_.params.end(), name);
  if (param != body_.params.end()) {
    space_of[0] = Space::kParam;
    *value =
        offset + static_cast<uint64_t>(
                     body_.info.param_offsets[static_cast<size_t>(param - body_.params.begin())]);
    return true;
  }
  auto local = body_.variables.find(name);
  if (local == body_.variables.end()) {
    const auto global = globals_.find(name);
    if (global == globals_.end()) return false;
    if (global->second.space == Space::kGlobal) {
      space_of[0] = Space::kGlobal;
      *value = reinterpret_cast<uint64_t>(global->second.data) + offset;
      return true;
    }
    local = body_.variables.emplace(name, global->second).first;  // a copy placed in this kernel
  }
  Variable& v = local->second;
  if (v.offset < 0) layout_variable(v);  // dynamic shared memory was placed before: see run()
  space_of[0] = v.space;
  *value = static_cast<uint64_t>(v.offset) + offset;
  return true;
}

void Decoder::source(const std::string& text, Type type) {
  const int bytes = bytes_of(type);
  int reg = find_register(text);
  if (reg < 0 && text[0] == '%') reg = special(text);
  if (reg >= 0) {
    const int have = body_.register_bytes[static_cast<size_t>(reg)];
    if ((have == 8) != (bytes == 8) || have == 0) {
      fail("expected a register of " + std::to_string(bytes) + " bytes, got '" + text + "'");
    }
    Operand op;
    op.reg = reg;
    op.bytes = static_cast<uint8_t>(have);
    ops_.push_back(op);
    return;
  }
  uint64_t bits = 0;
  Space space = Space::kGeneric;
  if (!literal(text, type, &bits) && !symbol(text, &space, &bits)) {
    fail("unsupported operand '" + text + "'");
  }
  ops_.push_back(constant(bits, bytes));
}

void Decoder::predicate_source(const std::string& text) {
  const bool negate = text[0] == '!';
  const std::string name = trim(negate ? text.substr(1) : text);
  const int reg = find_register(name);
  Operand op;
  if (reg >= 0 && body_.register_bytes[static_cast<size_t>(reg)] == 0) {
    op.reg = reg;
    op.bytes = 0;
  } else {
    uint64_t bits = 0;
    if (!literal(name, Type::kPred, &bits)) fail("expected a predicate, got '" + text + "'");
    op = constant(bits != 0, 0);
  }
  op.negate = negate;
  ops_.push_back(op);
}

int64_t Decoder::immediate(const std::string& text) const {
  uint64_t bits = 0;
  if (!literal(text, Type::kS64, &bits)) fail("expected a number, got '" + text + "'");
  return static_cast<int64_t>(bits);
}

std::vector<std::string> Decoder::vector_parts(const std::string& text) const {
  if (text.empty() || text[0] != '{') return {text};
  return split_commas(text.substr(1, text.rfind('}') - 1));
}

// "[reg]", "[reg+4]", "[symbol+4]", "[4]"
void Decoder::address(const std::string& text, int64_t* offset) {
  if (text.size() < 2 || text[0] != '[') fail("expected an address, got '" + text + "'");
  const std::string inner = trim(text.substr(1, text.rfind(']') - 1));
  const size_t plus = inner.find('+');
  const std::string name = trim(inner.substr(0, plus));
  const int reg = find_register(name);
  if (reg >= 0) {
    *offset = plus == std::string::npos ? 0 : immediate(trim(inner.substr(plus + 1)));
    Operand op;
    op.reg = reg;
    op.bytes = body_.register_bytes[static_cast<size_t>(reg)];
    if (op.bytes < 4) fail("expected an address register, got '" + name + "'");
    ops_.push_back(op);
    return;
  }
  *offset = 0;
  uint64_t value = 0;
  Space space = Space::kGeneric;
  if (!symbol(inner, &space, &value)) value = static_cast<uint64_t>(immediate(inner));
  ops_.push_back(constant(value, 8));
}

void Decoder::set(Fn fn) {
  if (fn == nullptr) fail("unsupported types or modifiers");
  in_.fn = fn;
}

void Decoder::one() {
  in_ = Instr{};
  ops_.clear();
  mods_ = split_dots(s_->mnemonic);
  base_ = mods_.front();
  mods_.erase(mods_.begin());
  opcode_ = base_;
  in_.line = s_->line;
  in_.index = static_cast<int>(kernel_.code.size());
  if (!(control() || collective() || memory() || moves() || arithmetic())) {
    fail("unsupported instruction");
  }
  need_all_taken();
  if (!s_->guard.empty()) {
    const uint8_t destinations = in_.destinations;
    predicate_source(s_->guard);  // its last operand, for the register allocation
    in_.destinations = destinations;
    in_.guarded = true;
    in_.guard_negate = ops_.back().negate;
    ops_.back().negate = false;
  }
  in_.operands = static_cast<uint8_t>(ops_.size());
  const auto name = opcodes_.emplace(opcode_, static_cast<int>(opcodes_.size()));
  if (name.second) kernel_.opcodes.push_back(opcode_);
  in_.opcode = name.first->second;
  in_.imm2 = in_.imm2;
  kernel_.operands.insert(kernel_.operands.end(), ops_.begin(), ops_.end());
  kernel_.code.push_back(in_);
}

void Decoder::run() {
  // Dynamic shared memory begins where the static variables end: place those first.
  int64_t dynamic_align = 1;
  const auto is_shared = [](const Variable& v) { return v.space == Space::kShared; };
  std::vector<std::string> externals;
  for (auto& [name, v] : globals_) {
    if (!is_shared(v)) continue;
    const bool used =
        std::any_of(body_.statements.begin(), body_.statements.end(), [&](const Statement& s) {
          return std::any_of(s.operands.begin(), s.operands.end(), [&](const std::string& o) {
            return o.find(name) != std::string::npos;
          });
        });
    if (used) body_.variables.emplace(name, v);
  }
  for (auto& [name, v] : body_.variables) {
    if (v.external || (is_shared(v) && v.bytes == 0)) {
      dynamic_align = std::max(dynamic_align, v.align);
      externals.push_back(name);
    } else {
      layout_variable(v);
    }
  }
  if (!externals.empty()) {
    shared_bytes_ = (shared_bytes_ + dynamic_align - 1) / dynamic_align * dynamic_align;
    for (const std::string& name : externals) body_.variables[name].offset = shared_bytes_;
  }
  std::vector<int> first(body_.statements.size() + 1);
  for (size_t i = 0; i < body_.statements.size(); ++i) {
    first[i] = static_cast<int>(kernel_.code.size());
    s_ = &body_.statements[i];
    one();
  }
  first[body_.statements.size()] = static_cast<int>(kernel_.code.size());
  Instr end;  // a kernel may end without ret
  end.step = Step::kExit;
  end.index = static_cast<int>(kernel_.code.size());
  end.opcode = static_cast<int>(kernel_.opcodes.size());
  kernel_.opcodes.push_back("end");
  kernel_.code.push_back(end);
  for (const auto& [at, label] : branch_labels_) {
    s_ = &body_.statements[static_cast<size_t>(at)];
    int target = -1;
    for (int scope = s_->scope; scope >= 0 && target < 0;
         scope = body_.scope_parent[static_cast<size_t>(scope)]) {
      const auto found = body_.labels.find({scope, label});
      if (found != body_.labels.end()) target = first[static_cast<size_t>(found->second)];
    }
    if (target < 0) fail("unknown label '" + label + "'");
    kernel_.code[static_cast<size_t>(first[static_cast<size_t>(at)])].target = target;
  }
  size_t at = 0;
  for (Instr& in : kernel_.code) {  // the operands' vector no longer moves
    in.ops = kernel_.operands.data() + at;
    at += in.operands;
    if (in.guarded) in.guard = kernel_.operands[at - 1];
  }
  kernel_.lines = body_.lines;
  kernel_.info = body_.info;
  kernel_.info.static_shared_bytes = shared_bytes_;
  kernel_.info.local_bytes = (local_bytes_ + 15) / 16 * 16;
}

void decode(Body& body, std::map<std::string, Variable>& globals, Kernel& kernel) {
  Decoder(body, globals, kernel).run();
}

}  // namespace ptxsim
