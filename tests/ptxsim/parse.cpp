// SPDX-License-Identifier: Apache-2.0
// PTX text to statements: directives, variables, scopes, labels and source lines. The meaning of
// instructions is decode.cpp's.

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "module.h"
#include "text.h"

namespace ptxsim {
namespace {

// What .loc says, before it is turned into a line of the user's own sources.
struct Location {
  int file = 0, line = 0, column = 0;
  int at_file = 0, at_line = 0, at_column = 0;  // inlined_at
};

bool is_identifier(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

class Parser {
 public:
  Parser(const std::string& text, std::string origin) : text_(text), origin_(std::move(origin)) {}

  std::map<std::string, Variable> globals;
  std::vector<Body> bodies;

  void run() {
    read_files();
    while (skip(), at_ < text_.size()) {
      if (text_[at_] == '.' && starts(".section")) {
        skip_braces();
      } else if (starts(".version") || starts(".target") || starts(".address_size") ||
                 starts(".file") || starts(".loc")) {
        read_line();
      } else {
        module_statement();
      }
    }
  }

 private:
  [[noreturn]] void fail(const std::string& message) const {
    throw Error(origin_ + ", PTX line " + std::to_string(text_line()) + ": " + message);
  }

  int text_line() const {
    if (at_ < counted_to_) counted_to_ = 0, counted_ = 1;
    counted_ += static_cast<int>(
        std::count(text_.begin() + counted_to_, text_.begin() + std::min(at_, text_.size()), '\n'));
    counted_to_ = std::min(at_, text_.size());
    return counted_;
  }

  bool starts(const char* word) const { return text_.compare(at_, std::strlen(word), word) == 0; }

  void skip() {  // white space and comments
    while (at_ < text_.size()) {
      if (std::isspace(static_cast<unsigned char>(text_[at_]))) {
        ++at_;
      } else if (starts("//")) {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (starts("/*")) {
        const size_t end = text_.find("*/", at_);
        if (end == std::string::npos) fail("expected the end of a comment");
        at_ = end + 2;
      } else {
        break;
      }
    }
  }

  std::string read_line() {
    const size_t end = std::min(text_.find('\n', at_), text_.size());
    std::string line = text_.substr(at_, end - at_);
    at_ = end;
    return line;
  }

  // Text up to one of `stops`, without comments.
  std::string read_until(const char* stops) {
    std::string out;
    while (at_ < text_.size() && std::strchr(stops, text_[at_]) == nullptr) {
      if (starts("//") || starts("/*")) {
        skip();
        out += ' ';
      } else {
        out += std::isspace(static_cast<unsigned char>(text_[at_])) ? ' ' : text_[at_];
        ++at_;
      }
    }
    if (at_ >= text_.size()) fail("expected more text");
    return trim(out);
  }

  void skip_braces() {
    at_ = text_.find('}', at_);
    if (at_ == std::string::npos) at_ = text_.size();
    if (at_ < text_.size()) ++at_;
  }

  void read_files() {
    size_t at = 0;
    while ((at = text_.find(".file", at)) != std::string::npos) {
      at += 5;
      const size_t quote = text_.find('"', at);
      if (quote == std::string::npos) break;
      const size_t end = text_.find('"', quote + 1);
      files_[std::atoi(text_.c_str() + at)] = text_.substr(quote + 1, end - quote - 1);
    }
  }

  void module_statement() {
    const std::string head = read_until(";{(");
    const std::vector<std::string> words = split_words(head);
    for (size_t i = 0; i < words.size(); ++i) {
      if (words[i] == ".entry") {
        if (i + 1 >= words.size()) fail("expected a kernel name");
        return kernel(words[i + 1]);
      }
      if (words[i] == ".func") fail("unsupported: .func (device code must be inlined)");
      if (words[i] == ".alias") fail("unsupported: .alias");
    }
    if (!words.empty() && words[0] == ".pragma") {
      ++at_;
      return;
    }
    std::string initial;
    std::string declaration = head;
    if (text_[at_] == '{') {
      ++at_;
      initial = "{" + read_until("}") + "}";
      ++at_;
      read_until(";");
    } else if (text_[at_] == '(') {  // generic(symbol)
      declaration += read_until(";");
    }
    ++at_;
    variable(declaration, initial, globals, true);
  }

  // ".visible .global .align 4 .b8 name[16] = {1, 2}"
  void variable(const std::string& declaration, const std::string& braces,
                std::map<std::string, Variable>& into, bool module_scope) {
    const size_t equal = declaration.find('=');
    std::string initial = braces;
    if (equal != std::string::npos && initial.empty())
      initial = trim(declaration.substr(equal + 1));
    const std::string names = trim(declaration.substr(0, equal));
    Variable v;
    Type type = Type::kNone;
    bool space = false;
    int vector = 1;
    const std::vector<std::string> words = split_words(names);
    size_t i = 0;
    for (; i < words.size() && words[i][0] == '.'; ++i) {
      const std::string& w = words[i];
      if (w == ".global" || w == ".const") {
        v.space = Space::kGlobal;
        v.constant = w == ".const";
        space = true;
      } else if (w == ".shared") {
        v.space = Space::kShared;
        space = true;
      } else if (w == ".local") {
        v.space = Space::kLocal;
        space = true;
      } else if (w == ".extern") {
        v.external = true;
      } else if (w == ".align") {
        v.align = std::atoll(words[++i].c_str());
      } else if (w == ".v2" || w == ".v4") {
        vector = w[2] - '0';
      } else if (w == ".visible" || w == ".weak" || w == ".common" || w == ".managed") {
        continue;
      } else {
        type = type_of(w.substr(1));
        if (type == Type::kNone) fail("unsupported: " + w + " in '" + names + "'");
      }
    }
    if (!space || type == Type::kNone || i >= words.size()) fail("unsupported: '" + names + "'");
    std::string rest;
    for (; i < words.size(); ++i) rest += words[i];
    const size_t bracket = rest.find('[');
    v.name = rest.substr(0, bracket);
    int64_t count = vector;
    for (size_t b = bracket; b != std::string::npos; b = rest.find('[', b + 1)) {
      count *= std::atoll(rest.c_str() + b + 1);
    }
    v.bytes = count * bytes_of(type);
    v.align = std::max<int64_t>(v.align, bytes_of(type));
    if (module_scope && v.space == Space::kGlobal) {
      if (v.external) fail("unsupported: external variable " + v.name);
      const size_t padded = static_cast<size_t>((v.bytes + 255) / 256 * 256);
      v.data = static_cast<uint8_t*>(std::aligned_alloc(256, std::max<size_t>(padded, 256)));
      std::memset(v.data, 0, padded);
      if (!initial.empty()) initialise(v, type, initial);
    }
    into[v.name] = v;
  }

  void initialise(Variable& v, Type type, std::string text) {
    for (char& c : text) {
      if (c == '{' || c == '}') c = ' ';
    }
    const int bytes = bytes_of(type);
    int64_t at = 0;
    for (std::string item : split_commas(text)) {
      if (at + bytes > v.bytes) fail("too many initial values for " + v.name);
      uint64_t bits = 0;
      if (item.compare(0, 8, "generic(") == 0) item = item.substr(8, item.find(')') - 8);
      if (globals.count(item) != 0) {
        bits = reinterpret_cast<uint64_t>(globals[item].data);
      } else if (!literal(item, type, &bits)) {
        fail("expected a number, got '" + item + "'");
      }
      std::memcpy(v.data + at, &bits, static_cast<size_t>(bytes));
      at += bytes;
    }
  }

  void kernel(const std::string& name) {
    Body body;
    body.name = name;
    body.origin = origin_;
    body.info.name = name;
    locations_.clear();
    if (text_[at_] == '(') {
      ++at_;
      const std::string list = read_until(")");
      ++at_;
      for (const std::string& item : split_commas(list)) parameter(item, body);
    }
    skip();
    while (at_ < text_.size() && text_[at_] != '{') {  // .maxntid and its like
      if (text_[at_] == ';') {                         // a declaration only
        ++at_;
        return;
      }
      const std::string line = read_until("\n{;");
      if (line.compare(0, 8, ".maxntid") == 0) {
        int threads = 1;
        for (const std::string& n : split_commas(line.substr(8))) threads *= std::atoi(n.c_str());
        body.info.max_threads = threads;
      } else if (line.compare(0, 7, ".reqnti") == 0) {
        fail("unsupported: .reqntid");
      }
      skip();
    }
    ++at_;
    read_body(body);
    bodies.push_back(std::move(body));
  }

  // ".param .u64 .ptr .global .align 16 name" or ".param .align 8 .b8 name[64]"
  void parameter(const std::string& text, Body& body) {
    const std::vector<std::string> words = split_words(text);
    int64_t align = 0, count = 1;
    Type type = Type::kNone;
    bool pointer = false;
    for (size_t i = 1; i + 1 < words.size(); ++i) {
      if (words[i] == ".ptr") {
        pointer = true;
      } else if (words[i] == ".align") {
        const int64_t value = std::atoll(words[++i].c_str());
        if (!pointer) align = value;  // else it is the pointee's
      } else if (type == Type::kNone) {
        type = type_of(words[i].substr(1));
      }
    }
    if (type == Type::kNone) fail("expected a parameter, got '" + text + "'");
    std::string name = words.back();
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos) {
      count = std::atoll(name.c_str() + bracket + 1);
      name.resize(bracket);
    }
    const int bytes = static_cast<int>(count) * bytes_of(type);
    const int unit = std::max(static_cast<int>(align), bytes_of(type));
    const int offset = (body.info.param_total_bytes + unit - 1) / unit * unit;
    body.params.push_back(name);
    body.info.param_offsets.push_back(offset);
    body.info.param_bytes.push_back(bytes);
    body.info.param_total_bytes = offset + bytes;
  }

  void read_body(Body& body) {
    std::vector<int> scopes{0};
    int line = add_line(body, SourceLine{});
    while (skip(), at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '{') {
        body.scope_parent.push_back(scopes.back());
        scopes.push_back(static_cast<int>(body.scope_parent.size()) - 1);
        ++at_;
      } else if (c == '}') {
        ++at_;
        scopes.pop_back();
        if (scopes.empty()) return;
      } else if (c == ';') {
        ++at_;
      } else if (starts(".loc") && !starts(".local")) {
        line = location(body, read_line(), line);
      } else if (starts(".pragma") || starts(".file")) {
        read_line();
      } else if (starts(".reg")) {
        registers(body, scopes.back(), read_until(";"));
      } else if (starts(".shared") || starts(".local")) {
        const std::string declaration = read_until(";");
        variable(declaration, "", body.variables, false);
      } else if (c == '.' && !is_identifier(text_[at_ + 1])) {
        fail("unsupported directive");
      } else {
        statement(body, scopes.back(), line);
      }
    }
    fail("expected the end of kernel " + body.name);
  }

  void statement(Body& body, int scope, int line) {
    Statement s;
    s.scope = scope;
    s.line = line;
    s.text_line = text_line();
    size_t end = at_;
    while (end < text_.size() && is_identifier(text_[end])) ++end;
    if (end > at_ && end + 1 < text_.size() && text_[end] == ':' && text_[end + 1] != ':') {
      body.labels[{scope, text_.substr(at_, end - at_)}] = static_cast<int>(body.statements.size());
      at_ = end + 1;
      return;
    }
    std::string text = read_until(";");
    ++at_;
    if (text[0] == '.') fail("unsupported directive: '" + text + "'");
    if (text[0] == '@') {
      const size_t space = text.find(' ');
      s.guard = text.substr(1, space - 1);
      if (s.guard == "!") fail("expected a guard without spaces");
      text = trim(text.substr(space));
    }
    const size_t space = std::min(text.find(' '), text.size());
    s.mnemonic = text.substr(0, space);
    s.operands = split_commas(text.substr(space));
    body.statements.push_back(std::move(s));
  }

  // ".reg .b32 %r<11>" or ".reg .pred p, q"
  void registers(Body& body, int scope, const std::string& text) {
    const std::vector<std::string> words = split_words(text);
    const Type type = words.size() > 2 ? type_of(words[1].substr(1)) : Type::kNone;
    if (type == Type::kNone) fail("unsupported: '" + text + "'");
    const int bytes = type == Type::kPred ? 0 : std::max(bytes_of(type), 2);
    std::string names;
    for (size_t i = 2; i < words.size(); ++i) names += words[i];
    for (const std::string& name : split_commas(names)) {
      const size_t angle = name.find('<');
      const int count = angle == std::string::npos ? 1 : std::atoi(name.c_str() + angle + 1);
      for (int i = 0; i < count; ++i) {
        const std::string full =
            angle == std::string::npos ? name : name.substr(0, angle) + std::to_string(i);
        body.registers[{scope, full}] = static_cast<int>(body.register_bytes.size());
        body.register_bytes.push_back(static_cast<uint8_t>(bytes));
      }
    }
  }

  bool own(int file) {  // a source of the user's, not a header of the toolkit
    const std::string& name = files_[file];
    const auto ends = [&](const char* tail) {
      const size_t n = std::strlen(tail);
      return name.size() >= n && name.compare(name.size() - n, n, tail) == 0;
    };
    return ends(".cu") || ends(".cuh");
  }

  int location(Body& body, const std::string& text, int before) {
    Location here;
    char function[256] = "";
    const char* s = text.c_str();
    if (std::sscanf(s, ".loc %d %d %d", &here.file, &here.line, &here.column) < 3) return before;
    const char* inlined = std::strstr(s, "inlined_at");
    if (inlined != nullptr) {
      std::sscanf(inlined, "inlined_at %d %d %d", &here.at_file, &here.at_line, &here.at_column);
    }
    (void)function;
    locations_[{here.file, here.line, here.column}] = here;
    if (here.line == 0) return before;
    // Climb out of the toolkit's headers, then note where the function was called.
    for (int depth = 0; depth < 8 && !own(here.file) && here.at_file != 0; ++depth) {
      const auto outer = locations_.find({here.at_file, here.at_line, here.at_column});
      Location next;
      next.file = here.at_file;
      next.line = here.at_line;
      next.column = here.at_column;
      if (outer != locations_.end() && next.file != here.file) next = outer->second;
      here = next;
    }
    SourceLine line;
    line.file = files_[here.file];
    line.line = here.line;
    if (here.at_file != 0) {
      line.inlined =
          "called at " + base_name(files_[here.at_file]) + ":" + std::to_string(here.at_line);
    }
    return add_line(body, line);
  }

  int add_line(Body& body, const SourceLine& line) {
    const std::string key = line.file + ":" + std::to_string(line.line) + ":" + line.inlined;
    if (body.lines.empty()) line_index_.clear();
    const auto found = line_index_.find(key);
    if (found != line_index_.end()) return found->second;
    body.lines.push_back(line);
    return line_index_[key] = static_cast<int>(body.lines.size()) - 1;
  }

  const std::string& text_;
  std::string origin_;
  size_t at_ = 0;
  mutable size_t counted_to_ = 0;
  mutable int counted_ = 1;
  std::map<int, std::string> files_;
  std::map<std::vector<int>, Location> locations_;
  std::map<std::string, int> line_index_;
};

}  // namespace

struct Module::Impl {
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::vector<std::string> order;
  std::map<std::string, Variable> globals;
  ~Impl() {
    for (auto& [name, v] : globals) {
      if (v.data != nullptr) Device::get().remove_range(v.data);
      std::free(v.data);
    }
  }
};

Module::Module() : impl_(new Impl) {}
Module::~Module() = default;
Module::Module(Module&&) noexcept = default;

Module Module::parse(const std::string& ptx, const std::string& origin) {
  Module module;
  Parser parser(ptx, origin);
  try {
    parser.run();
    for (Body& body : parser.bodies) {
      auto kernel = std::make_unique<Kernel>();
      kernel->origin = origin;
      decode(body, parser.globals, *kernel);
      allocate_registers(body, *kernel);
      module.impl_->order.push_back(body.name);
      module.impl_->kernels[body.name] = std::move(kernel);
    }
  } catch (...) {
    module.impl_->globals = std::move(parser.globals);  // its destructor frees the data
    throw;
  }
  module.impl_->globals = std::move(parser.globals);
  for (auto& [name, v] : module.impl_->globals) {
    if (v.data == nullptr || v.bytes == 0) continue;
    Device::get().add_range(v.data, static_cast<size_t>(v.bytes), name, true);
  }
  return module;
}

const Kernel* Module::find(const std::string& name) const {
  const auto found = impl_->kernels.find(name);
  return found == impl_->kernels.end() ? nullptr : found->second.get();
}

std::vector<KernelInfo> Module::kernels() const {
  std::vector<KernelInfo> out;
  for (const std::string& name : impl_->order) out.push_back(impl_->kernels.at(name)->info);
  return out;
}

void* Module::variable(const std::string& name, size_t* bytes) const {
  const auto found = impl_->globals.find(name);
  if (found == impl_->globals.end() || found->second.data == nullptr) return nullptr;
  if (bytes != nullptr) *bytes = static_cast<size_t>(found->second.bytes);
  return found->second.data;
}

const KernelInfo& info(const Kernel& kernel) { return kernel.info; }

}  // namespace ptxsim
