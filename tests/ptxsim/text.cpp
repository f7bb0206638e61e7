// SPDX-License-Identifier: Apache-2.0
// Small helpers on PTX text.

#include "text.h"

#include <cctype>
#include <cstdlib>

#include "half.h"

namespace ptxsim {

std::string trim(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return "";
  return s.substr(first, s.find_last_not_of(" \t\r\n") - first + 1);
}

std::string base_name(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

std::vector<std::string> split_words(const std::string& s) {
  std::vector<std::string> out;
  std::string word;
  for (const char c : s) {
    if (std::isspace(static_cast<unsigned char>(c))) {
      if (!word.empty()) out.push_back(word);
      word.clear();
    } else {
      word += c;
    }
  }
  if (!word.empty()) out.push_back(word);
  return out;
}

std::vector<std::string> split_commas(const std::string& s) {
  std::vector<std::string> out;
  int depth = 0;
  std::string part;
  for (const char c : s) {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == ',' && depth == 0) {
      out.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  part = trim(part);
  if (!part.empty() || !out.empty()) out.push_back(part);
  return out;
}

std::vector<std::string> split_dots(const std::string& s) {
  std::vector<std::string> out(1);
  for (const char c : s) {
    if (c == '.') {
      out.emplace_back();
    } else {
      out.back() += c;
    }
  }
  return out;
}

bool literal(const std::string& text, Type type, uint64_t* bits) {
  if (text.empty()) return false;
  const bool wide_float = type == Type::kF64, is_float = type == Type::kF32;
  if (text == "WARP_SZ") {
    *bits = kLanes;
    return true;
  }
  const bool negative = text[0] == '-';
  const std::string s = negative ? trim(text.substr(1)) : text;
  if (s.empty() || !std::isdigit(static_cast<unsigned char>(s[0]))) return false;
  char* end = nullptr;
  const bool hex_float = s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F');
  const bool hex_double = s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D');
  if (hex_float || hex_double) {
    const uint64_t raw = std::strtoull(s.c_str() + 2, &end, 16);
    if (*end != 0) return false;
    double value = hex_float ? bit_cast<float>(static_cast<uint32_t>(raw)) : bit_cast<double>(raw);
    if (negative) value = -value;
    if (hex_float && !wide_float) {
      *bits = static_cast<uint32_t>(raw) ^ (negative ? 0x80000000u : 0u);  // NaN bits stay
    } else if (hex_double && !is_float) {
      *bits = raw ^ (negative ? 1ull << 63 : 0ull);
    } else {
      *bits =
          wide_float ? bit_cast<uint64_t>(value) : bit_cast<uint32_t>(static_cast<float>(value));
    }
    return true;
  }
  const bool decimal_point =
      s.find_first_of(".") != std::string::npos ||
      (s.find_first_of("eE") != std::string::npos && s.compare(0, 2, "0x") != 0);
  if (decimal_point || ((is_float || wide_float) && s.compare(0, 2, "0x") != 0)) {
    double value = std::strtod(s.c_str(), &end);
    if (*end != 0) return false;
    if (negative) value = -value;
    *bits = is_float ? bit_cast<uint32_t>(static_cast<float>(value)) : bit_cast<uint64_t>(value);
    return true;
  }
  const bool binary = s.size() > 2 && s[0] == '0' && (s[1] == 'b' || s[1] == 'B');
  const uint64_t value = std::strtoull(s.c_str() + (binary ? 2 : 0), &end, binary ? 2 : 0);
  if (*end == 'U' || *end == 'u') ++end;
  if (*end != 0) return false;
  *bits = negative ? 0 - value : value;
  return true;
}

}  // namespace ptxsim
