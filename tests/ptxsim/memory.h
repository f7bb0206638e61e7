// SPDX-License-Identifier: Apache-2.0
// Global memory as ranges with exact bounds and defined-byte shadows; shared memory of a block with
// its defined, in-flight and race shadows.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptxsim {

// Generic addresses of the other spaces lie far above any host pointer.
constexpr uint64_t kSharedWindow = 1ull << 56, kLocalWindow = 2ull << 56, kParamWindow = 3ull << 56;
constexpr uint64_t kWindowMask = 0xffull << 56;

struct Range {
  uint64_t base = 0;
  int64_t bytes = 0;
  std::string name;
  bool owned = false, all_defined = false;
  std::vector<uint8_t> defined;  // one per byte, unless all are

  // The launch that read it last, and how many sectors its requests asked for.
  int64_t reader = -1, read_sectors = 0;

  void mark(int64_t offset, int64_t count, bool value);
};

// Which sectors of 32 bytes were touched: a bit each, in pages that are made at their first touch.
class SectorSet {
 public:
  SectorSet() = default;
  SectorSet(const SectorSet&) = delete;  // `bits_` points into the pages

  void add(uint64_t sector) {
    if (sector / kPageSectors != page_) turn_to(sector / kPageSectors);
    bits_[sector % kPageSectors / 64] |= 1ull << (sector % 64);
  }
  void add(const SectorSet& other);
  bool empty() const { return pages_.empty(); }
  int64_t count() const;
  int64_t count(uint64_t first, uint64_t last) const;  // of these, both included

 private:
  static constexpr uint64_t kPageWords = 256, kPageSectors = 64 * kPageWords;
  using Page = std::array<uint64_t, kPageWords>;
  void turn_to(uint64_t page);

  std::unordered_map<uint64_t, Page> pages_;
  uint64_t page_ = ~0ull;     // the last one touched,
  uint64_t* bits_ = nullptr;  // and its bits
};

class Ranges {
 public:
  Range* add(uint64_t base, int64_t bytes, const std::string& name, bool owned, bool defined);
  bool remove(uint64_t base);
  Range* find(uint64_t address);     // the range that holds this byte, or null
  Range* nearest(uint64_t address);  // the last one that starts at or before it, or null
  std::map<uint64_t, std::unique_ptr<Range>>& all() { return ranges_; }

 private:
  std::map<uint64_t, std::unique_ptr<Range>> ranges_;
};

// What was done to one granule of shared memory, in barrier epochs.
struct Granule {
  uint32_t write_epoch = 0, read_epoch = 0;
  uint32_t read_warps = 0;
  uint8_t write_warp = 0;
  bool write_atomic = false, read_atomic = false;
};

struct SharedMemory {
  std::vector<uint8_t> bytes, defined, in_flight;  // in_flight: copies under way per byte
  int64_t flying = 0;                              // sum of in_flight
  std::vector<Granule> granules;
  int granule_shift = 2;  // log2 of the bytes of a granule

  void reset(int64_t size, bool bytewise);
};

}  // namespace ptxsim
