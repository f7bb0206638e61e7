// SPDX-License-Identifier: Apache-2.0
// The addresses of a warp's lanes: bounds, alignment, undefined bytes, races, copies in flight.

#include <cstring>

#include "counters.h"
#include "lanes.h"
#include "memory_ops.h"

namespace ptxsim {
namespace {

const char* space_name(Space space) {
  switch (space) {
    case Space::kShared:
      return "shared";
    case Space::kLocal:
      return "local";
    case Space::kParam:
      return "parameter";
    default:
      return "global";
  }
}

std::string hex(uint64_t v) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

std::string accessed(Use use, int bytes) {
  const char* verb = use == Use::kStore ? "writes " : use == Use::kAtomic ? "updates " : "reads ";
  return verb + std::to_string(bytes) + " bytes ";
}

// Where a wild global address lies, seen from the allocation before or after it.
std::string whereabouts(Ranges& ranges, uint64_t address, int bytes) {
  if (address < 4096) return "at " + hex(address) + " (a null pointer)";
  const Range* before = ranges.nearest(address);
  const auto next = ranges.all().upper_bound(address);
  const uint64_t past =
      before == nullptr ? ~0ull : address - before->base - static_cast<uint64_t>(before->bytes);
  const uint64_t ahead = next == ranges.all().end() ? ~0ull : next->first - address;
  if (before != nullptr && address < before->base + static_cast<uint64_t>(before->bytes)) {
    return "across the end of " + before->name + " (" + std::to_string(before->bytes) +
           " bytes): " +
           std::to_string(address + static_cast<uint64_t>(bytes) - before->base -
                          static_cast<uint64_t>(before->bytes)) +
           " bytes past it";
  }
  if (past <= ahead && before != nullptr) {
    return std::to_string(past) + " bytes past the end of " + before->name + " (" +
           std::to_string(before->bytes) + " bytes)";
  }
  if (ahead != ~0ull) {
    return std::to_string(ahead) + " bytes before " + next->second->name + " (" +
           std::to_string(next->second->bytes) + " bytes)";
  }
  return "at " + hex(address) + ", there is no allocation";
}

void check_global(Warp& w, const Instr& in, Access& a, Use use) {
  Launch& launch = *w.launch;
  Range*& recent = launch.recent[static_cast<size_t>(in.index)];
  uint64_t low = ~0ull, high = 0;
  for (uint32_t m = a.mask; m != 0; m &= m - 1) {
    const uint64_t address = a.address[__builtin_ctz(m)];
    low = address < low ? address : low;
    high = address > high ? address : high;
  }
  const auto holds = [&](const Range* r) {
    return r != nullptr && low >= r->base &&
           high - r->base + static_cast<uint64_t>(a.bytes) <= static_cast<uint64_t>(r->bytes) &&
           high >= r->base;
  };
  if (holds(recent)) {
    a.range = recent;
    return;
  }
  recent = launch.ranges->find(low);
  if (holds(recent)) {
    a.range = recent;
    return;
  }
  for (uint32_t m = a.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t address = a.address[lane];
    const Range* r = launch.ranges->find(address);
    if (r != nullptr &&
        address - r->base + static_cast<uint64_t>(a.bytes) <= static_cast<uint64_t>(r->bytes)) {
      continue;
    }
    a.mask &= ~(1u << lane);
    w.report(in, lane, "out-of-bounds",
             accessed(use, a.bytes) + whereabouts(*launch.ranges, address, a.bytes));
  }
}

void check_window(Warp& w, const Instr& in, Access& a, Use use, uint64_t size) {
  for (uint32_t m = a.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t address = a.address[lane];
    if (address + static_cast<uint64_t>(a.bytes) <= size && address < size) continue;
    a.mask &= ~(1u << lane);
    w.report(
        in, lane, "out-of-bounds",
        accessed(use, a.bytes) + "at " + space_name(a.space) + " offset " +
            std::to_string(static_cast<int64_t>(address)) + ", " +
            std::to_string(static_cast<int64_t>(address + static_cast<uint64_t>(a.bytes) - size)) +
            " bytes past the end of " + std::to_string(size) + " bytes of " + space_name(a.space) +
            " memory");
  }
}

}  // namespace

int resolve(Warp& w, const Instr& in, const Operand& op, uint32_t mask, int bytes, Use use,
            Access out[4]) {
  const uint32_t undef = w.undef[op.undef] & mask;
  if (undef != 0) {
    w.report(in, __builtin_ctz(undef), "uninitialised", "the address is an undefined value");
    mask &= ~undef;
  }
  Access& a = out[0];
  a.space = in.space;
  a.mask = mask;
  a.bytes = bytes;
  a.range = nullptr;
  const auto offset = static_cast<uint64_t>(in.imm);
  uint64_t bits = 0;
  if (op.bytes == 8) {
    const uint64_t* from = data<uint64_t>(w, op);
    for (int l = 0; l < kLanes; ++l) a.address[l] = from[l] + offset;
  } else {
    const uint32_t* from = data<uint32_t>(w, op);
    for (int l = 0; l < kLanes; ++l) {
      a.address[l] = static_cast<uint32_t>(from[l] + static_cast<uint32_t>(offset));
    }
  }
  for (int l = 0; l < kLanes; ++l) bits |= mask >> l & 1 ? a.address[l] : 0;
  if (bits & static_cast<uint64_t>(bytes - 1)) {
    for (uint32_t m = mask; m != 0; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      if ((a.address[lane] & static_cast<uint64_t>(bytes - 1)) == 0) continue;
      a.mask &= ~(1u << lane);
      w.report(
          in, lane, "misaligned",
          accessed(use, bytes) + "at " + space_name(in.space) + " address " + hex(a.address[lane]));
    }
  }
  if (a.mask == 0) return 0;
  int count = 1;
  if (in.space == Space::kGeneric) {
    const uint32_t all = a.mask;
    count = 0;
    Access whole = a;
    for (int s = 0; s < 4; ++s) {
      const uint64_t window = static_cast<uint64_t>(s) << 56;
      uint32_t lanes = 0;
      for (int l = 0; l < kLanes; ++l) {
        lanes |= static_cast<uint32_t>((whole.address[l] & kWindowMask) == window) << l;
      }
      lanes &= all;
      if (lanes == 0) continue;
      static const Space kSpaces[] = {Space::kGlobal, Space::kShared, Space::kLocal, Space::kParam};
      Access& part = out[count++];
      part = whole;
      part.space = kSpaces[s];
      part.mask = lanes;
      for (int l = 0; l < kLanes; ++l) part.address[l] -= window;
    }
    // An address in none of the windows is a wild global one.
    uint32_t placed = 0;
    for (int i = 0; i < count; ++i) placed |= out[i].mask;
    for (uint32_t m = all & ~placed; m != 0; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      w.report(in, lane, "out-of-bounds",
               accessed(use, bytes) + whereabouts(*w.launch->ranges, whole.address[lane], bytes));
    }
  }
  Block& block = *w.block;
  for (int i = 0; i < count; ++i) {
    Access& part = out[i];
    InstrCounts& counts = w.launch->counts[static_cast<size_t>(in.index)];
    switch (part.space) {
      case Space::kShared:
        part.base = block.shared.bytes.data();
        check_window(w, in, part, use, static_cast<uint64_t>(w.launch->shared_bytes));
        if (use != Use::kCopy) count_shared(counts, part.address, part.mask, bytes);
        break;
      case Space::kLocal: {
        part.base = block.local.data();
        const auto size = static_cast<uint64_t>(w.launch->kernel->info.local_bytes);
        check_window(w, in, part, use, size);
        const auto first = static_cast<uint64_t>(w.index * kLanes);
        for (int l = 0; l < kLanes; ++l)
          part.address[l] += (first + static_cast<uint64_t>(l)) * size;
        break;
      }
      case Space::kParam:
        part.base = w.launch->params.data();
        check_window(w, in, part, use, w.launch->params.size());
        break;
      default:
        part.base = nullptr;
        check_global(w, in, part, use);
        count_global(*w.launch, in, part, use);
        break;
    }
  }
  return count;
}

uint32_t undefined_lanes(Warp& w, const Access& a, int from, int count) {
  uint32_t undef = 0;
  const auto any = [count](const uint8_t* shadow) {
    for (int i = 0; i < count; ++i) {
      if (shadow[i] == 0) return 1u;
    }
    return 0u;
  };
  if (a.space == Space::kShared || a.space == Space::kLocal) {
    const uint8_t* shadow =
        a.space == Space::kShared ? w.block->shared.defined.data() : w.block->local_defined.data();
    if (count == 4) {
      for (uint32_t m = a.mask; m != 0; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        uint32_t four;
        std::memcpy(&four, shadow + a.address[lane] + from, 4);
        undef |= static_cast<uint32_t>(four != 0x01010101u) << lane;
      }
      return undef;
    }
    for (uint32_t m = a.mask; m != 0; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      undef |= any(shadow + a.address[lane] + from) << lane;
    }
    return undef;
  }
  if (a.space == Space::kParam || (a.range != nullptr && a.range->all_defined)) return 0;
  for (uint32_t m = a.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t address = a.address[lane] + static_cast<uint64_t>(from);
    const Range* r = a.range != nullptr ? a.range : w.launch->ranges->find(address);
    if (r->all_defined) continue;
    undef |= any(r->defined.data() + (address - r->base)) << lane;
  }
  return undef;
}

void define(Warp& w, const Access& a, int from, int count, uint32_t undef) {
  for (uint32_t m = a.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t address = a.address[lane] + static_cast<uint64_t>(from);
    const uint8_t value = !(undef >> lane & 1);
    uint8_t* shadow = nullptr;
    if (a.space == Space::kShared) {
      shadow = w.block->shared.defined.data() + address;
    } else if (a.space == Space::kLocal) {
      shadow = w.block->local_defined.data() + address;
    } else {
      Range* r = a.range != nullptr ? a.range : w.launch->ranges->find(address);
      if (r->all_defined) {
        if (value != 0) continue;
        // Reported at the store; do not report its readers again.
        continue;
      }
      shadow = r->defined.data() + (address - r->base);
      std::memset(shadow, 1, static_cast<size_t>(count));
      continue;
    }
    std::memset(shadow, value, static_cast<size_t>(count));
  }
}

void note_shared(Warp& w, const Instr& in, int lane, uint64_t address, int bytes, bool write,
                 bool atomic) {
  SharedMemory& s = w.block->shared;
  const uint32_t epoch = w.block->epoch, me = 1u << w.index;
  const size_t first = static_cast<size_t>(address >> s.granule_shift);
  const size_t last =
      static_cast<size_t>((address + static_cast<uint64_t>(bytes) - 1) >> s.granule_shift);
  for (size_t i = first; i <= last; ++i) {
    Granule& g = s.granules[i];
    if (!write && g.write_epoch != epoch && g.read_epoch == epoch && !(g.read_atomic && !atomic)) {
      g.read_warps |= me;
      continue;
    }
    if (g.write_epoch == epoch && g.write_warp != w.index && !(atomic && g.write_atomic)) {
      w.report(in, lane, "race",
               std::string(write ? "writes" : "reads") + " shared offset " +
                   std::to_string(address) + ", which warp " + std::to_string(g.write_warp) +
                   " wrote since the last barrier");
    }
    if (write) {
      if (g.read_epoch == epoch && (g.read_warps & ~me) != 0 && !(atomic && g.read_atomic)) {
        w.report(in, lane, "race",
                 "writes shared offset " + std::to_string(address) + ", which warp " +
                     std::to_string(__builtin_ctz(g.read_warps & ~me)) +
                     " read since the last barrier");
      }
      g.write_epoch = epoch;
      g.write_warp = static_cast<uint8_t>(w.index);
      g.write_atomic = atomic;
    } else {
      if (g.read_epoch != epoch) {
        g.read_epoch = epoch;
        g.read_warps = 0;
        g.read_atomic = true;
      }
      g.read_warps |= me;
      g.read_atomic = g.read_atomic && atomic;
    }
  }
}

uint32_t check_in_flight(Warp& w, const Instr& in, const Access& a, Use use) {
  const SharedMemory& s = w.block->shared;
  if (!w.launch->config->checks || s.flying == 0) return 0;
  uint32_t lanes = 0;
  for (uint32_t m = a.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t address = a.address[lane];
    uint32_t flying = 0;  // copies are of 4 bytes or more and aligned
    for (int i = 0; i < a.bytes; i += 4) flying |= s.in_flight[address + static_cast<uint64_t>(i)];
    if (flying == 0) continue;
    lanes |= 1u << lane;
    w.report(in, lane, "in-flight",
             accessed(use, a.bytes) + "at shared offset " + std::to_string(address) +
                 ", the target of a cp.async that was not waited for");
  }
  return lanes;
}

void check_races(Warp& w, const Instr& in, const Access& a, Use use, bool atomic, uint32_t skip) {
  if (!w.launch->config->checks) return;
  for (uint32_t m = a.mask & ~skip; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    note_shared(w, in, lane, a.address[lane], a.bytes, use != Use::kLoad, atomic);
  }
}

}  // namespace ptxsim
