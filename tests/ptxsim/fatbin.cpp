// SPDX-License-Identifier: Apache-2.0
// Reads fat binaries: the payload that nvcc embeds and __cudaRegisterFatBinary is given.
//
//   wrapper  { i32 magic 0x466243b1, i32 version, data*, reserved* }
//   data     { u32 magic 0xba55ed50, u16 version, u16 header bytes, u64 bytes of all entries }
//   entry    { u16 kind (1 PTX, 2 ELF), u16, u32 header bytes, u64 payload bytes, ..., u32
//   capability
//              at byte 28 }, then the payload; the next entry follows it
#include "fatbin.h"

#include <elf.h>

#include <cctype>
#include <cstring>
#include <map>

#include "ptxsim.h"

namespace ptxsim {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1;
constexpr uint32_t kDataMagic = 0xba55ed50;
constexpr int kPtx = 1, kElf = 2;
constexpr size_t kCapabilityOffset = 28;

template <typename T>
T read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

struct Entry {
  int kind = 0, capability = 0;
  const char* payload = nullptr;
  size_t bytes = 0;
};

std::vector<Entry> entries(const void* fatbin_wrapper) {
  const char* wrapper = static_cast<const char*>(fatbin_wrapper);
  if (read<uint32_t>(wrapper) != kWrapperMagic) {
    throw Error("fat binary: expected a wrapper of magic 0x466243b1, got another number");
  }
  const char* data = read<const char*>(wrapper + 8);
  if (read<uint32_t>(data) != kDataMagic) {
    throw Error("fat binary: expected data of magic 0xba55ed50, got another number");
  }
  const char* at = data + read<uint16_t>(data + 6);
  const char* const end = at + read<uint64_t>(data + 8);
  std::vector<Entry> result;
  while (at < end) {
    const size_t header_bytes = read<uint32_t>(at + 4), payload_bytes = read<uint64_t>(at + 8);
    if (header_bytes < 32 || header_bytes + payload_bytes > static_cast<size_t>(end - at)) {
      throw Error("fat binary: expected an entry inside the binary, got one that reaches past it");
    }
    result.push_back({read<uint16_t>(at), read<int32_t>(at + kCapabilityOffset), at + header_bytes,
                      payload_bytes});
    at += header_bytes + payload_bytes;
  }
  return result;
}

// ".target sm_90a" -> 90, specific.
void read_target(PtxImage* image) {
  const std::string& text = image->text;
  size_t at = text.find(".target");
  at = at == std::string::npos ? at : text.find("sm_", at);
  if (at == std::string::npos) throw Error("fat binary: expected PTX with a .target, got none");
  size_t digit = at + 3;
  for (; digit < text.size() && std::isdigit(static_cast<unsigned char>(text[digit])); ++digit) {
    image->capability = image->capability * 10 + (text[digit] - '0');
  }
  image->specific = digit < text.size() && (text[digit] == 'a' || text[digit] == 'f');
}

// The sections of a 64-bit ELF file, by name; empty if it is none.
std::map<std::string, Elf64_Shdr> sections(const Entry& elf) {
  std::map<std::string, Elf64_Shdr> result;
  if (elf.bytes < sizeof(Elf64_Ehdr) || std::memcmp(elf.payload, ELFMAG, SELFMAG) != 0) {
    return result;
  }
  const auto file = read<Elf64_Ehdr>(elf.payload);
  if (file.e_shoff + uint64_t{file.e_shnum} * sizeof(Elf64_Shdr) > elf.bytes) return result;
  const auto section = [&](int index) {
    return read<Elf64_Shdr>(elf.payload + file.e_shoff + index * sizeof(Elf64_Shdr));
  };
  const Elf64_Shdr names = section(file.e_shstrndx);
  for (int i = 0; i < file.e_shnum; ++i) {
    const Elf64_Shdr header = section(i);
    result.emplace(elf.payload + names.sh_offset + header.sh_name, header);
  }
  return result;
}

// Section .nv.info is a list of attributes {u8 format, u8 attribute, u16 value or bytes that
// follow}. Attribute 0x2f, of format 4, holds {u32 symbol, u32 registers} of one function.
int registers_in(const Entry& elf, const std::string& kernel) {
  constexpr int kSized = 4, kRegisterCount = 0x2f;
  const auto found = sections(elf);
  if (found.count(".nv.info") == 0 || found.count(".symtab") == 0 || found.count(".strtab") == 0) {
    return 0;
  }
  const Elf64_Shdr info = found.at(".nv.info");
  const char* symbols = elf.payload + found.at(".symtab").sh_offset;
  const char* names = elf.payload + found.at(".strtab").sh_offset;
  const char* at = elf.payload + info.sh_offset;
  const char* const end = at + info.sh_size;
  while (at + 4 <= end) {
    const int format = at[0], attribute = at[1];
    if (format == kSized && attribute == kRegisterCount) {
      const auto symbol = read<Elf64_Sym>(symbols + read<uint32_t>(at + 4) * sizeof(Elf64_Sym));
      if (names + symbol.st_name == kernel) return read<int32_t>(at + 8);
    }
    at += 4 + (format == kSized ? read<uint16_t>(at + 2) : 0);
  }
  return 0;
}

}  // namespace

std::vector<PtxImage> ptx_images(const void* fatbin_wrapper) {
  std::vector<PtxImage> images;
  for (const Entry& entry : entries(fatbin_wrapper)) {
    if (entry.kind != kPtx) continue;
    // Text starts with a comment or a directive; compressed text does not.
    const unsigned char first = entry.bytes > 0 ? entry.payload[0] : 0;
    if (first != '/' && first != '.' && !std::isspace(first)) {
      throw Error(
          "fat binary: expected PTX text, got compressed PTX; compile with nvcc --no-compress (or "
          "-Xfatbin -compress=false)");
    }
    PtxImage image;
    image.text.assign(entry.payload, entry.bytes);
    image.text.resize(std::strlen(image.text.c_str()));  // padded with zeros
    read_target(&image);
    images.push_back(std::move(image));
  }
  return images;
}

int registers_per_thread(const void* fatbin_wrapper, int capability, const std::string& kernel) {
  int best = 0, registers = 0;
  for (const Entry& entry : entries(fatbin_wrapper)) {
    const bool runs = entry.kind == kElf && entry.capability / 10 == capability / 10 &&
                      entry.capability <= capability;
    if (!runs || entry.capability <= best) continue;
    best = entry.capability;
    registers = registers_in(entry, kernel);
  }
  return registers;
}

}  // namespace ptxsim
