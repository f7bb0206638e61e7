// SPDX-License-Identifier: Apache-2.0
// Round trips of the canonical stream and of the tiles, and one golden word.
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/layout.h"
#include "packing.h"

namespace {

std::vector<uint8_t> some_codes(int64_t count, int bits) {
  std::vector<uint8_t> codes(count);
  uint32_t state = 12345u + static_cast<uint32_t>(bits);
  for (uint8_t& code : codes) {
    state = state * 1664525u + 1013904223u;
    code = static_cast<uint8_t>((state >> 24) & static_cast<uint32_t>(mmq::max_code(bits)));
  }
  return codes;
}

// Buffers have exactly the stated sizes, so that the address sanitizer sees any step beyond them.
void check_round_trip(int64_t n, int64_t k, int bits) {
  const std::vector<uint8_t> codes = some_codes(n * k, bits);
  std::vector<uint32_t> words(n * mmq::row_words(k, bits), 0xdeadbeef);
  mmq::pack(codes.data(), n, k, bits, words.data());
  std::vector<uint8_t> unpacked(n * k);
  mmq::unpack(words.data(), n, k, bits, unpacked.data());
  CHECK(unpacked == codes);
  for (int64_t i = 0; i < n * k; ++i) {
    const uint32_t* row = words.data() + i / k * mmq::row_words(k, bits);
    CHECK(mmq::get_code(row, i % k, bits) == codes[i]);
  }
  std::vector<uint8_t> tiles(mmq::cpu::tiles_bytes(n, k, bits), 0xaa);
  mmq::cpu::repack(words.data(), n, k, bits, tiles.data());
  std::vector<uint32_t> back(words.size());
  mmq::cpu::unrepack(tiles.data(), n, k, bits, back.data());
  CHECK(back == words);
}

}  // namespace

int main() {
  for (int bits = mmq::kMinBits; bits <= mmq::kMaxBits; ++bits)
    for (int64_t n : {0, 1, 2, 7, 64})
      for (int64_t k : {1, 31, 32, 33, 127, 128, 129}) check_round_trip(n, k, bits);

  const uint8_t eight[] = {0, 1, 2, 3, 4, 5, 6, 7};
  uint32_t word = 0;
  mmq::pack(eight, 1, 8, 4, &word);
  CHECK(word == 0x76543210u);
  return failures();
}
