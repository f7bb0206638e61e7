// SPDX-License-Identifier: Apache-2.0
// Reports of findings and launches: JSON for tests, a table for people.
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <sstream>

#include "ptxsim.h"

namespace ptxsim {
namespace {

constexpr size_t kTableLines = 12;  // source lines that a table of a launch shows

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') {
      result += '\\';
      result += letter;
    } else if (static_cast<unsigned char>(letter) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", letter);
      result += escape;
    } else {
      result += letter;
    }
  }
  return result + '"';
}

// One {...} or [...], with the commas in their places.
class Writer {
 public:
  Writer(std::ostream& out, char open, char close) : out_(out), close_(close) { out_ << open; }
  ~Writer() { out_ << close_; }
  std::ostream& item() {
    if (!first_) out_ << ", ";
    first_ = false;
    return out_;
  }
  std::ostream& key(const std::string& name) { return item() << quoted(name) << ": "; }
  void field(const std::string& name, const std::string& value) { key(name) << quoted(value); }
  void field(const std::string& name, int64_t value) { key(name) << value; }
  void field(const std::string& name, const Dim3& value) {
    key(name) << '[' << value.x << ", " << value.y << ", " << value.z << ']';
  }

 private:
  std::ostream& out_;
  char close_;
  bool first_ = true;
};

void write_counts(Writer* object, const Counts& counts) {
  object->field("instructions", counts.instructions);
  object->field("shared_wavefronts", counts.shared_wavefronts);
  object->field("shared_ideal", counts.shared_ideal);
  object->field("load_sectors", counts.load_sectors);
  object->field("load_sectors_ideal", counts.load_sectors_ideal);
  object->field("read_bytes_requested", counts.load_sectors * 32);
  object->field("read_bytes_distinct", counts.load_sectors_distinct * 32);
  object->field("store_sectors", counts.store_sectors);
  object->field("store_sectors_ideal", counts.store_sectors_ideal);
  object->field("written_bytes_requested", counts.store_sectors * 32);
  object->field("written_bytes_distinct", counts.store_sectors_distinct * 32);
  object->field("load_requests", counts.load_requests);
  object->field("load_requests_16_bytes", counts.load_requests_16_bytes);
}

void write_finding(std::ostream& out, const Finding& finding) {
  Writer object(out, '{', '}');
  object.field("kind", finding.kind);
  object.field("kernel", finding.kernel);
  object.field("file", finding.file);
  object.field("line", finding.line);
  object.field("message", finding.message);
  object.field("block", finding.block);
  object.field("warp", finding.warp);
  object.field("lane", finding.lane);
  object.field("count", finding.count);
}

void write_launch(std::ostream& out, const LaunchReport& report) {
  Writer object(out, '{', '}');
  object.field("kernel", report.kernel);
  object.field("grid", report.grid);
  object.field("block", report.block);
  object.field("shared_bytes", report.shared_bytes);
  {
    object.key("total");
    Writer total(out, '{', '}');
    write_counts(&total, report.total);
  }
  {
    object.key("by_opcode");
    Writer opcodes(out, '{', '}');
    for (const auto& [opcode, count] : report.by_opcode) opcodes.field(opcode, count);
  }
  {
    object.key("by_line");
    Writer lines(out, '[', ']');
    for (const auto& [place, counts] : report.by_line) {
      lines.item();
      Writer line(out, '{', '}');
      line.field("file", place.first);
      line.field("line", place.second);
      write_counts(&line, counts);
    }
  }
  object.key("reads");
  Writer reads(out, '[', ']');
  for (const LaunchReport::Range& range : report.reads) {
    reads.item();
    Writer read(out, '{', '}');
    read.field("name", range.name);
    read.field("requested", range.requested);
    read.field("distinct", range.distinct);
    read.field("bytes", range.bytes);
  }
}

template <typename... Values>
std::string format(const char* pattern, Values... values) {
  std::string line(std::snprintf(nullptr, 0, pattern, values...) + 1, '\0');
  std::snprintf(line.data(), line.size(), pattern, values...);
  line.pop_back();
  return line;
}

std::string factor(int64_t actual, int64_t ideal) {
  return ideal == 0 ? "-" : format("%.2f", static_cast<double>(actual) / ideal);
}

std::string place(const std::string& file, int line) {
  if (file.empty()) return "(no line)";
  const size_t slash = file.rfind('/');
  return file.substr(slash == std::string::npos ? 0 : slash + 1) + ":" + std::to_string(line);
}

// "_ZN3mmq4cuda12pack_kernelEPKh" -> "mmq::cuda::pack_kernel".
std::string readable(const std::string& kernel) {
  int status = 0;
  char* text = abi::__cxa_demangle(kernel.c_str(), nullptr, nullptr, &status);
  if (text == nullptr) return kernel;
  std::string name = text;
  std::free(text);
  if (name.compare(0, 5, "void ") == 0) name.erase(0, 5);  // of a template
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;)
    name.erase(at, anonymous.size());
  // Up to the arguments, which begin at the last bracket of depth zero.
  int depth = 0;
  for (size_t i = name.size(); i-- > 0;) {
    if (name[i] == ')') ++depth;
    if (name[i] == '(' && --depth == 0) return name.substr(0, i);
  }
  return name;
}

std::string dims(const Dim3& size) { return format("%ux%ux%u", size.x, size.y, size.z); }

void table_findings(std::ostream& out, const std::vector<Finding>& findings) {
  if (findings.empty()) {
    out << "findings: none\n";
    return;
  }
  out << "findings: " << findings.size() << '\n';
  for (const Finding& finding : findings) {
    out << format("  %-13s %s %s: %s (block %u,%u,%u warp %d lane %d, %lld times)\n",
                  finding.kind.c_str(), place(finding.file, finding.line).c_str(),
                  readable(finding.kernel).c_str(), finding.message.c_str(), finding.block.x,
                  finding.block.y, finding.block.z, finding.warp, finding.lane,
                  static_cast<long long>(finding.count));
  }
}

std::string table_work(const Counts& counts) {
  return format("%12lld %11lld %6s", static_cast<long long>(counts.instructions),
                static_cast<long long>(counts.shared_wavefronts),
                factor(counts.shared_wavefronts, counts.shared_ideal).c_str());
}

// Bytes requested, how many times the fewest sectors of their requests, and distinct bytes.
std::string table_bytes(int64_t sectors, int64_t ideal, int64_t distinct) {
  return format("%12lld %6s %12lld", static_cast<long long>(32 * sectors),
                factor(sectors, ideal).c_str(), static_cast<long long>(32 * distinct));
}

std::string table_memory(const Counts& c) {
  return table_bytes(c.load_sectors, c.load_sectors_ideal, c.load_sectors_distinct) + ' ' +
         table_bytes(c.store_sectors, c.store_sectors_ideal, c.store_sectors_distinct);
}

// The launch's row, then those of its lines that cost something, the most expensive first.
template <class Cost, class Row>
void table_lines(std::ostream& out, const LaunchReport& report, const std::string& header,
                 const Cost& cost, const Row& row) {
  std::multimap<int64_t, std::pair<std::string, std::string>, std::greater<int64_t>> lines;
  for (const auto& [at, counts] : report.by_line) {
    if (cost(counts) > 0) lines.insert({cost(counts), {place(at.first, at.second), row(counts)}});
  }
  const auto print = [&](const std::string& name, const std::string& numbers) {
    out << format("  %-26s ", name.c_str()) << numbers << '\n';
  };
  print("line", header);
  print("total", row(report.total));
  size_t left = kTableLines;
  for (auto line = lines.begin(); line != lines.end() && left > 0; ++line, --left) {
    print(line->second.first, line->second.second);
  }
  if (lines.size() > kTableLines) out << "  and " << lines.size() - kTableLines << " more lines\n";
}

void table_launch(std::ostream& out, const LaunchReport& report) {
  out << readable(report.kernel) << " grid " << dims(report.grid) << " block " << dims(report.block)
      << " shared " << report.shared_bytes << " bytes\n";
  table_lines(
      out, report, format("%12s %11s %6s", "instructions", "wavefronts", "factor"),
      [](const Counts& c) { return c.instructions; }, table_work);
  table_lines(
      out, report,
      format("%12s %6s %12s %12s %6s %12s", "bytes read", "factor", "distinct", "written", "factor",
             "distinct"),
      [](const Counts& c) { return c.load_sectors + c.store_sectors; }, table_memory);
  for (const LaunchReport::Range& range : report.reads) {
    out << "  read of " << range.name << ": " << range.requested << " bytes, distinct "
        << range.distinct << " of " << range.bytes << '\n';
  }
  std::vector<std::pair<int64_t, std::string>> opcodes;
  for (const auto& [opcode, count] : report.by_opcode) opcodes.emplace_back(-count, opcode);
  std::sort(opcodes.begin(), opcodes.end());
  out << "  opcodes:";
  for (const auto& [negative, opcode] : opcodes) out << ' ' << opcode << ' ' << -negative;
  out << '\n';
}

}  // namespace

std::string to_json(const std::vector<Finding>& findings,
                    const std::vector<LaunchReport>& reports) {
  std::ostringstream out;
  {
    Writer document(out, '{', '}');
    document.key("findings");
    {
      Writer list(out, '[', ']');
      for (const Finding& finding : findings) write_finding(list.item(), finding);
    }
    document.key("launches");
    Writer list(out, '[', ']');
    for (const LaunchReport& report : reports) write_launch(list.item(), report);
  }
  return out.str();
}

std::string to_table(const std::vector<Finding>& findings,
                     const std::vector<LaunchReport>& reports) {
  std::ostringstream out;
  out << "Counted by the PTX interpreter: no time on a GPU follows from it. Approximate functions "
         "are libm's, .ftz is ignored.\n";
  table_findings(out, findings);
  for (const LaunchReport& report : reports) table_launch(out, report);
  return out.str();
}

}  // namespace ptxsim
