// SPDX-License-Identifier: Apache-2.0
// The limits of the architectures that the stand-in runtime can pretend to be.
#pragma once

#include <cstdint>

namespace ptxsim {

struct Architecture {
  int capability;
  int sm_count;                 // of the named device
  int64_t shared_bytes_per_sm;  // a block can opt in to 1 KiB less
  int max_threads_per_sm, max_blocks_per_sm;
  int64_t l2_bytes;
  const char* device;  // whose sm_count and l2_bytes are given

  int64_t shared_optin() const { return shared_bytes_per_sm - kReservedSharedBytes; }

  static constexpr int64_t kReservedSharedBytes = 1024;  // per resident block, by the system
};

// CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
inline constexpr Architecture kArchitectures[] = {
    {75, 40, 65 << 10, 1024, 16, 4 << 20, "T4"},  // 64 KiB, nothing reserved
    {80, 108, 164 << 10, 2048, 32, 40 << 20, "A100"},
    {86, 82, 100 << 10, 1536, 16, 6 << 20, "GeForce RTX 3090"},
    {89, 128, 100 << 10, 1536, 24, 72 << 20, "GeForce RTX 4090"},
    {90, 132, 228 << 10, 2048, 32, 50 << 20, "H100 SXM"},
    {100, 148, 228 << 10, 2048, 32, 126 << 20, "B200"},
    {120, 170, 100 << 10, 1536, 24, 96 << 20, "GeForce RTX 5090"},
};

inline constexpr int kMaxThreadsPerBlock = 1024;
inline constexpr int kRegistersPerSm = 65536;
inline constexpr int64_t kSharedBytesPerBlock = 48 << 10;  // without the opt-in attribute

// Null for a capability that is not in the table.
inline const Architecture* find_architecture(int capability) {
  for (const Architecture& architecture : kArchitectures) {
    if (architecture.capability == capability) return &architecture;
  }
  return nullptr;
}

}  // namespace ptxsim
