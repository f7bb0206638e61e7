// SPDX-License-Identifier: Apache-2.0
// The simulated device: allocations, ranges, findings and reports. Launches are in launch.cpp.

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "device_state.h"

namespace ptxsim {

DeviceState& device_state() {
  static DeviceState* state = new DeviceState;  // outlives static destructors of users
  return *state;
}

Device::Device() = default;

Device& Device::get() {
  static Device* device = new Device;
  return *device;
}

void* Device::allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  const size_t padded = (bytes + 255) / 256 * 256;
  void* p = std::aligned_alloc(256, padded);
  if (p == nullptr) return nullptr;
  std::memset(p, 0xff, padded);
  DeviceState& s = device_state();
  const std::string name = "allocation " + std::to_string(++s.allocations);
  s.ranges.add(reinterpret_cast<uint64_t>(p), static_cast<int64_t>(bytes), name, true, false);
  return p;
}

bool Device::release(void* pointer) {
  const auto address = reinterpret_cast<uint64_t>(pointer);
  Ranges& ranges = device_state().ranges;
  const Range* r = ranges.find(address);
  if (r == nullptr || r->base != address || !r->owned) return false;
  ranges.remove(address);
  std::free(pointer);
  return true;
}

void Device::add_range(const void* pointer, size_t bytes, const std::string& name, bool defined) {
  if (bytes == 0) return;
  device_state().ranges.add(reinterpret_cast<uint64_t>(pointer), static_cast<int64_t>(bytes), name,
                            false, defined);
}

bool Device::remove_range(const void* pointer) {
  return device_state().ranges.remove(reinterpret_cast<uint64_t>(pointer));
}

void Device::mark_defined(const void* pointer, size_t bytes, bool defined) {
  const auto address = reinterpret_cast<uint64_t>(pointer);
  Range* r = device_state().ranges.find(address);
  if (r == nullptr) return;
  const auto offset = static_cast<int64_t>(address - r->base);
  r->mark(offset, std::min(static_cast<int64_t>(bytes), r->bytes - offset), defined);
}

bool Device::contains(const void* pointer, size_t bytes) const {
  const auto address = reinterpret_cast<uint64_t>(pointer);
  const Range* r = device_state().ranges.find(address);
  return r != nullptr && address - r->base + bytes <= static_cast<uint64_t>(r->bytes);
}

std::vector<Finding>& Device::findings() { return device_state().findings; }
std::vector<LaunchReport>& Device::reports() { return device_state().reports; }

void Device::clear() {
  findings().clear();
  reports().clear();
}

}  // namespace ptxsim
