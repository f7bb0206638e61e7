// SPDX-License-Identifier: Apache-2.0
// Counters of memory requests, and the report of a launch.

#include "counters.h"

#include <algorithm>

namespace ptxsim {
namespace {

void note_read(Range& range, int64_t launch, int64_t sectors) {
  if (range.reader != launch) range.read_sectors = 0;
  range.reader = launch;
  range.read_sectors += sectors;
}

void add(Counts& to, const InstrCounts& from) {
  to.instructions += from.executed;
  to.shared_wavefronts += from.wavefronts;
  to.shared_ideal += from.wavefronts_ideal;
  to.load_sectors += from.load_sectors;
  to.load_sectors_ideal += from.load_ideal;
  to.store_sectors += from.store_sectors;
  to.store_sectors_ideal += from.store_ideal;
  to.load_requests += from.load_requests;
  to.load_requests_16_bytes += from.load_requests_16;
}

void count_distinct(Counts& counts, const Touched& touched) {
  counts.load_sectors_distinct = touched.read.count();
  counts.store_sectors_distinct = touched.written.count();
}

}  // namespace

void count_shared(InstrCounts& counts, const uint64_t* address, uint32_t mask, int bytes) {
  const int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  const int unit = bytes <= 4 ? 4 : bytes;  // lanes of wider accesses conflict in whole units
  const int shift = unit == 4 ? 2 : unit == 8 ? 3 : 4;
  const uint64_t banks = static_cast<uint64_t>(128 / unit);
  for (int first = 0; first < kLanes; first += group) {
    const uint32_t lanes = mask & (group == 32 ? kFull : ((1u << group) - 1) << first);
    if (lanes == 0) continue;
    ++counts.wavefronts_ideal;
    uint32_t seen[32];  // the first unit of every bank
    std::fill_n(seen, banks, kFull);
    bool conflict = false;
    for (uint32_t m = lanes; m != 0; m &= m - 1) {
      const auto u = static_cast<uint32_t>(address[__builtin_ctz(m)] >> shift);
      uint32_t& bank = seen[u & (banks - 1)];
      conflict |= bank != kFull && bank != u;
      bank = u;
    }
    if (!conflict) {
      ++counts.wavefronts;
      continue;
    }
    uint32_t units[32];
    int n = 0;
    for (uint32_t m = lanes; m != 0; m &= m - 1) {
      units[n++] = static_cast<uint32_t>(address[__builtin_ctz(m)] >> shift);
    }
    std::sort(units, units + n);
    n = static_cast<int>(std::unique(units, units + n) - units);
    int cost[32] = {};
    int most = 0;
    for (int i = 0; i < n; ++i) most = std::max(most, ++cost[units[i] & (banks - 1)]);
    counts.wavefronts += most;
  }
}

void count_global(Launch& launch, const Instr& in, const Access& a, Use use) {
  uint64_t sorted[kLanes];
  int n = 0;
  bool in_order = true;
  for (uint32_t m = a.mask; m != 0; m &= m - 1) {
    sorted[n] = a.address[__builtin_ctz(m)];
    in_order &= n == 0 || sorted[n] >= sorted[n - 1];
    ++n;
  }
  if (n == 0) return;
  if (!in_order) std::sort(sorted, sorted + n);
  const bool load = use == Use::kLoad || use == Use::kCopy || use == Use::kAtomic;
  const bool store = use == Use::kStore || use == Use::kAtomic;
  Touched& touched = launch.touched[static_cast<size_t>(in.line)];
  int64_t sectors = 0, distinct = 1;
  for (int i = 1; i < n; ++i) distinct += sorted[i] != sorted[i - 1];
  uint64_t last = ~0ull;
  for (int i = 0; i < n; ++i) {
    // An access is aligned to its size: up to 32 bytes lie in one sector.
    const uint64_t sector = sorted[i] >> 5;
    if (sector == last) continue;
    last = sector;
    ++sectors;
    if (load) touched.read.add(sector);
    if (store) touched.written.add(sector);
    if (load && a.range == nullptr) note_read(*launch.ranges->find(sorted[i]), launch.id, 1);
  }
  InstrCounts& counts = launch.counts[static_cast<size_t>(in.index)];
  const int64_t ideal = (distinct * a.bytes + 31) / 32;
  if (load) {
    counts.load_sectors += sectors;
    counts.load_ideal += ideal;
    ++counts.load_requests;
    counts.load_requests_16 += a.bytes == 16;
    if (a.range != nullptr) note_read(*a.range, launch.id, sectors);
  }
  if (store) {
    counts.store_sectors += sectors;
    counts.store_ideal += ideal;
  }
}

LaunchReport make_report(const Launch& launch) {
  LaunchReport report;
  const Kernel& kernel = *launch.kernel;
  report.kernel = kernel.info.name;
  report.grid = launch.grid;
  report.block = launch.block;
  report.shared_bytes = launch.shared_bytes;
  for (size_t i = 0; i < kernel.code.size(); ++i) {
    const InstrCounts& c = launch.counts[i];
    if (c.executed == 0) continue;
    const SourceLine& line = kernel.lines[static_cast<size_t>(kernel.code[i].line)];
    add(report.total, c);
    add(report.by_line[{line.file, line.line}], c);
    report.by_opcode[kernel.opcodes[static_cast<size_t>(kernel.code[i].opcode)]] += c.executed;
  }
  std::map<std::pair<std::string, int>, Touched> by_line;  // a line inlined twice is one
  Touched all;
  for (size_t i = 0; i < kernel.lines.size(); ++i) {
    const Touched& touched = launch.touched[i];
    if (touched.read.empty() && touched.written.empty()) continue;
    Touched& line = by_line[{kernel.lines[i].file, kernel.lines[i].line}];
    for (Touched* to : {&line, &all}) {
      to->read.add(touched.read);
      to->written.add(touched.written);
    }
  }
  for (const auto& [place, touched] : by_line) count_distinct(report.by_line[place], touched);
  count_distinct(report.total, all);
  for (const auto& [base, range] : launch.ranges->all()) {
    if (range->reader != launch.id) continue;
    LaunchReport::Range r;
    r.name = range->name;
    r.requested = range->read_sectors * 32;
    // A sector that two ranges share counts for both.
    r.distinct =
        all.read.count(base / 32, (base + static_cast<uint64_t>(range->bytes) - 1) / 32) * 32;
    r.bytes = range->bytes;
    report.reads.push_back(r);
  }
  return report;
}

}  // namespace ptxsim
