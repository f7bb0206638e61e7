// SPDX-License-Identifier: Apache-2.0
// Places of registers in a warp's register file, shared by registers that are not alive together.
//
// A register lives from its first to its last instruction, stretched over every block at whose ends
// the data flow says it is alive. Registers of one size whose lives do not overlap share a place
// (linear scan). Lanes may be at different instructions, but each writes its own lane of a place
// only, so that what holds along the path of every lane holds for the warp. A register that may be
// read before it is written keeps a place of its own, undefined at the start of a warp; all others
// are written before they are read.

#include <algorithm>

#include "module.h"

namespace ptxsim {
namespace {

using Bits = std::vector<uint64_t>;

bool test(const Bits& bits, size_t i) { return bits[i / 64] >> (i % 64) & 1; }
void set(Bits& bits, size_t i) { bits[i / 64] |= 1ull << (i % 64); }
void reset(Bits& bits, size_t i) { bits[i / 64] &= ~(1ull << (i % 64)); }

struct Block {
  int first = 0, last = 0;  // instructions
  int next[2] = {-1, -1};   // blocks
  Bits uses, defines;       // read before any write; written by all lanes
  Bits in, out;
};

// Whether the operand is a full write: a guarded one leaves other lanes as they were.
bool defines(const Instr& in, int operand) { return operand < in.destinations && !in.guarded; }

std::vector<Block> find_blocks(const Kernel& kernel) {
  const int n = static_cast<int>(kernel.code.size());
  std::vector<char> starts(static_cast<size_t>(n) + 1, 0);
  starts[0] = 1;
  for (const Instr& in : kernel.code) {
    if (in.step == Step::kBranch) starts[static_cast<size_t>(in.target)] = 1;
    if (in.step == Step::kBranch || in.step == Step::kExit) {
      starts[static_cast<size_t>(in.index) + 1] = 1;
    }
  }
  std::vector<Block> blocks;
  std::vector<int> block_of(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    if (starts[static_cast<size_t>(i)]) {
      blocks.emplace_back();
      blocks.back().first = i;
    }
    blocks.back().last = i;
    block_of[static_cast<size_t>(i)] = static_cast<int>(blocks.size()) - 1;
  }
  for (Block& block : blocks) {
    const Instr& in = kernel.code[static_cast<size_t>(block.last)];
    if (in.step == Step::kBranch) block.next[0] = block_of[static_cast<size_t>(in.target)];
    const bool falls = in.guarded || (in.step != Step::kBranch && in.step != Step::kExit);
    if (falls && block.last + 1 < n) block.next[1] = block_of[static_cast<size_t>(block.last) + 1];
  }
  return blocks;
}

// What is alive at the ends of the blocks, to the fixed point.
void flow(const Kernel& kernel, std::vector<Block>& blocks, size_t registers) {
  const size_t words = registers / 64 + 1;
  for (Block& block : blocks) {
    block.uses.assign(words, 0);
    block.defines = block.in = block.out = block.uses;
    for (int i = block.last; i >= block.first; --i) {
      const Instr& in = kernel.code[static_cast<size_t>(i)];
      for (int o = 0; o < in.operands; ++o) {
        if (in.ops[o].reg < 0 || !defines(in, o)) continue;
        reset(block.uses, static_cast<size_t>(in.ops[o].reg));
        set(block.defines, static_cast<size_t>(in.ops[o].reg));
      }
      // The other lanes of a guarded write keep the old value: it is a use, too.
      for (int o = 0; o < in.operands; ++o) {
        if (in.ops[o].reg >= 0 && !defines(in, o))
          set(block.uses, static_cast<size_t>(in.ops[o].reg));
      }
    }
  }
  bool changed = true;
  while (changed) {
    changed = false;
    for (size_t b = blocks.size(); b-- > 0;) {
      Block& block = blocks[b];
      for (size_t w = 0; w < words; ++w) {
        uint64_t out = 0;
        for (const int next : block.next) {
          if (next >= 0) out |= blocks[static_cast<size_t>(next)].in[w];
        }
        const uint64_t in = block.uses[w] | (out & ~block.defines[w]);
        changed |= in != block.in[w];
        block.out[w] = out;
        block.in[w] = in;
      }
    }
  }
}

struct Life {
  int first = -1, last = -1, reg = 0;
  bool whole = false;  // a place of its own
};

}  // namespace

void allocate_registers(const Body& body, Kernel& kernel) {
  const size_t registers = body.register_bytes.size();
  std::vector<Block> blocks = find_blocks(kernel);
  flow(kernel, blocks, registers);
  std::vector<Life> lives(registers);
  const auto stretch = [&](size_t reg, int at) {
    Life& life = lives[reg];
    life.first = life.first < 0 ? at : std::min(life.first, at);
    life.last = std::max(life.last, at);
  };
  for (const Block& block : blocks) {
    for (size_t r = 0; r < registers; ++r) {
      if (test(block.in, r)) stretch(r, 2 * block.first);
      if (test(block.out, r)) stretch(r, 2 * block.last + 1);
    }
    for (int i = block.first; i <= block.last; ++i) {
      const Instr& in = kernel.code[static_cast<size_t>(i)];
      // A result alone may take the place of an operand that dies; several results may not, since
      // the first would be written before the operand is read for the second.
      const int written = in.destinations > 1 ? 2 * i : 2 * i + 1;
      for (int o = 0; o < in.operands; ++o) {
        if (in.ops[o].reg < 0) continue;
        const auto reg = static_cast<size_t>(in.ops[o].reg);
        if (o < in.destinations) {
          stretch(reg, written);
          stretch(reg, 2 * i + 1);
        } else {
          stretch(reg, 2 * i);
        }
      }
    }
  }
  for (size_t r = 0; r < registers; ++r) {
    lives[r].reg = static_cast<int>(r);
    lives[r].whole = test(blocks.front().in, r);
  }
  for (const SpecialRegister& s : kernel.specials)
    lives[static_cast<size_t>(s.op.reg)].whole = true;

  std::vector<Operand> places(registers);
  std::sort(lives.begin(), lives.end(), [](const Life& a, const Life& b) {
    return a.first != b.first ? a.first < b.first : a.reg < b.reg;
  });
  struct Active {
    int last;
    Operand place;
  };
  std::vector<Active> active[3];  // by size: masks, 4 bytes, 8 bytes
  std::vector<Operand> free[3];
  const uint32_t words_of[3] = {2, kLanes, 2 * kLanes};
  for (const Life& life : lives) {
    if (life.first < 0) continue;  // never used
    const int bytes = body.register_bytes[static_cast<size_t>(life.reg)];
    const int size = bytes == 0 ? 0 : bytes == 8 ? 2 : 1;
    std::vector<Active>& on = active[size];
    for (size_t i = 0; i < on.size();) {
      if (on[i].last < life.first) {
        free[size].push_back(on[i].place);
        on[i] = on.back();
        on.pop_back();
      } else {
        ++i;
      }
    }
    Operand place;
    if (!life.whole && !free[size].empty()) {
      place = free[size].back();
      free[size].pop_back();
    } else {
      if (size == 2) kernel.file_words += kernel.file_words & 1;
      place.offset = kernel.file_words;
      place.undef = kernel.masks++;
      kernel.file_words += words_of[size];
    }
    places[static_cast<size_t>(life.reg)] = place;
    if (life.whole) {
      kernel.undefined_at_entry.push_back(place);
    } else {
      on.push_back({life.last, place});
    }
  }
  const auto put = [&](Operand& op) {
    if (op.reg < 0) return;
    op.offset = places[static_cast<size_t>(op.reg)].offset;
    op.undef = places[static_cast<size_t>(op.reg)].undef;
  };
  for (Operand& op : kernel.operands) put(op);
  for (SpecialRegister& s : kernel.specials) put(s.op);
  for (Instr& in : kernel.code) put(in.guard);
}

}  // namespace ptxsim
