// SPDX-License-Identifier: Apache-2.0
// Memory ranges and shadows.

#include "memory.h"

#include <algorithm>
#include <cstring>

namespace ptxsim {

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

void SectorSet::turn_to(uint64_t page) {
  page_ = page;
  bits_ = pages_[page].data();
}

void SectorSet::add(const SectorSet& other) {
  for (const auto& [page, bits] : other.pages_) {
    Page& mine = pages_[page];
    for (size_t i = 0; i < kPageWords; ++i) mine[i] |= bits[i];
  }
}

int64_t SectorSet::count() const { return count(0, ~0ull); }

int64_t SectorSet::count(uint64_t first, uint64_t last) const {
  int64_t found = 0;
  for (const auto& [page, bits] : pages_) {
    for (uint64_t i = 0; i < kPageWords; ++i) {
      const uint64_t low = page * kPageSectors + 64 * i, high = low + 63;
      if (bits[i] == 0 || high < first || low > last) continue;
      uint64_t inside = bits[i];
      if (low < first) inside &= ~0ull << (first - low);
      if (high > last) inside &= ~0ull >> (high - last);
      found += __builtin_popcountll(inside);
    }
  }
  return found;
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
