// SPDX-License-Identifier: Apache-2.0
// Small helpers on PTX text.
#pragma once

#include <string>
#include <vector>

#include "module.h"

namespace ptxsim {

std::string trim(const std::string& s);
std::string base_name(const std::string& path);
std::vector<std::string> split_words(const std::string& s);
// At commas outside of any bracket; every part is trimmed; none for an empty text.
std::vector<std::string> split_commas(const std::string& s);
std::vector<std::string> split_dots(const std::string& s);
// The bits of a number written as PTX allows, for a value of `type`. False if it is none.
bool literal(const std::string& text, Type type, uint64_t* bits);

}  // namespace ptxsim
