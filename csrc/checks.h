// SPDX-License-Identifier: Apache-2.0
// One form for every refusal: "<op>: expected <what>, got <what>".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace mmq {

template <class Got>
[[noreturn]] void refuse(const char* op, const std::string& expected, const Got& got) {
  std::ostringstream message;
  message << op << ": expected " << expected << ", got " << got;
  throw std::invalid_argument(message.str());
}

template <class Got>
void check(bool ok, const char* op, const char* expected, const Got& got) {
  if (!ok) refuse(op, expected, got);
}

}  // namespace mmq
