// SPDX-License-Identifier: Apache-2.0
// Memory ranges and shadows.

#include "memory.h"

#include <algorithm>
#include <cstring>

namespace ptxsim {

void Range::begin_launch(int64_t id) {
  if (launch == id) return;
  launch = id;
  // The base need not be aligned to a sector.
  const size_t words = static_cast<size_t>((bytes + 31 + 32) / 32 / 64 + 1);
  read_sectors.assign(words, 0);
  written_sectors.assign(words, 0);
  read_requested = read_distinct = written_requested = written_distinct = 0;
}

void Range::mark(int64_t offset, int64_t count, bool value) {
  if (offset == 0 && count == bytes) {
    all_defined = value;
    defined.clear();
    if (!value) defined.assign(static_cast<size_t>(bytes), 0);
    return;
  }
  if (all_defined) {
    if (value) return;
    defined.assign(static_cast<size_t>(bytes), 1);
    all_defined = false;
  }
  std::memset(defined.data() + offset, value ? 1 : 0, static_cast<size_t>(count));
}

Range* Ranges::add(uint64_t base, int64_t bytes, const std::string& name, bool owned,
                   bool defined) {
  auto range = std::make_unique<Range>();
  range->base = base;
  range->bytes = bytes;
  range->name = name;
  range->owned = owned;
  range->mark(0, bytes, defined);
  Range* out = range.get();
  ranges_[base] = std::move(range);
  return out;
}

bool Ranges::remove(uint64_t base) { return ranges_.erase(base) != 0; }

Range* Ranges::nearest(uint64_t address) {
  auto after = ranges_.upper_bound(address);
  if (after == ranges_.begin()) return nullptr;
  return std::prev(after)->second.get();
}

Range* Ranges::find(uint64_t address) {
  Range* range = nearest(address);
  if (range == nullptr || address - range->base >= static_cast<uint64_t>(range->bytes)) {
    return nullptr;
  }
  return range;
}

void SharedMemory::reset(int64_t size, bool bytewise) {
  granule_shift = bytewise ? 0 : 2;
  const size_t n = static_cast<size_t>(size);
  bytes.assign(n + 16, 0xff);
  defined.assign(n + 16, 0);
  in_flight.assign(n + 16, 0);
  flying = 0;
  granules.assign((n >> granule_shift) + 16, Granule{});
}

}  // namespace ptxsim
