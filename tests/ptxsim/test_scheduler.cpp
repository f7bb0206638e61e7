// SPDX-License-Identifier: Apache-2.0
// Scheduling and checks that are hard to see from one instruction: spin locks between blocks and
// between lanes, divergence, barriers, deadlock, races, copies in flight, undefined values.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../native/check.h"
#include "ptxsim.h"

namespace {

using namespace ptxsim;

// A kernel of two pointers: the text goes between the parameters and ret. %a and %b hold them.
std::string kernel(const std::string& body) {
  return ".version 8.0\n.target sm_80\n.address_size 64\n.file 1 \"scheduler.cu\"\n"
         ".visible .entry k(.param .u64 p0, .param .u64 p1)\n{\n"
         ".reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<30>;\n.reg .b64 %a, %b, %l<9>;\n"
         ".shared .align 16 .b8 tile[1024];\n"
         "ld.param.u64 %a, [p0];\nld.param.u64 %b, [p1];\n"
         "mov.u32 %r0, %tid.x;\nmov.u32 %r1, tile;\n" +
         body + "\nret;\n}\n";
}

struct Run {
  std::vector<uint32_t> a, b;
  std::vector<Finding> findings;
  LaunchReport report;

  bool only(const std::string& kind, int line) const {
    return findings.size() == 1 && findings[0].kind == kind && findings[0].line == line &&
           findings[0].file == "scheduler.cu";
  }
  bool has(const std::string& kind, int line) const {
    return std::any_of(findings.begin(), findings.end(),
                       [&](const Finding& f) { return f.kind == kind && f.line == line; });
  }
};

Run run(const std::string& body, uint32_t blocks, uint32_t threads, std::vector<uint32_t> a,
        std::vector<uint32_t> b) {
  Device& device = Device::get();
  device.clear();
  Run out;
  out.a = std::move(a);
  out.b = std::move(b);
  device.add_range(out.a.data(), out.a.size() * 4, "a", true);
  device.add_range(out.b.data(), out.b.size() * 4, "b", true);
  const Module module = Module::parse(kernel(body), "test");
  const void* pointers[] = {out.a.data(), out.b.data()};
  const void* params[] = {&pointers[0], &pointers[1]};
  device.launch(*module.find("k"), {blocks, 1, 1}, {threads, 1, 1}, 0, params);
  device.remove_range(out.a.data());
  device.remove_range(out.b.data());
  out.findings = device.findings();
  out.report = device.reports().back();
  return out;
}

// a[0] is a lock, b[0] a counter that only its holder reads and writes.
const char* const kLockedIncrement = R"(
$try:
  atom.global.cas.b32 %r2, [%a], 0, 1;
  setp.ne.u32 %p0, %r2, 0;
  @%p0 bra $try;
  ld.volatile.global.u32 %r3, [%b];
  add.u32 %r3, %r3, 1;
  st.volatile.global.u32 [%b], %r3;
  membar.gl;
  atom.global.exch.b32 %r4, [%a], 0;
)";

void test_spin_locks() {
  Config& config = Device::get().config;
  const Config before = config;
  for (const int slice : {1, 7, 2000}) {
    for (const int resident : {1, 2, 5}) {
      config.slice = slice;
      config.resident_blocks = resident;
      const std::string one_lane = "setp.ne.u32 %p1, %r0, 0;\n@%p1 ret;\n";
      const Run blocks = run(one_lane + kLockedIncrement, 12, 32, {0}, {0});
      CHECK(blocks.b[0] == 12 && blocks.a[0] == 0 && blocks.findings.empty());
      const Run lanes = run(kLockedIncrement, 2, 64, {0}, {0});
      CHECK(lanes.b[0] == 128 && lanes.a[0] == 0 && lanes.findings.empty());
    }
  }
  config = before;
  // A block that waits for one which is not resident never ends, and says so.
  config.resident_blocks = 1;
  config.max_instructions = 100000;
  const Run waits = run(R"(
  mov.u32 %r2, %ctaid.x;
  setp.ne.u32 %p0, %r2, 0;
  @%p0 bra $set;
$wait:
  .loc 1 40 1
  ld.volatile.global.u32 %r3, [%a];
  setp.eq.u32 %p1, %r3, 0;
  @%p1 bra $wait;
  bra $end;
$set:
  st.volatile.global.u32 [%a], 1;
$end:
)",
                        2, 1, {0}, {0});
  CHECK(waits.only("endless", 40));
  config = before;
}

void test_divergence() {
  // Lane l counts to l; all are together again at the store, and the vote sees all of them.
  const Run r = run(R"(
  mov.u32 %r2, 0;
$loop:
  setp.ge.u32 %p0, %r2, %r0;
  @%p0 bra $done;
  add.u32 %r2, %r2, 1;
  bra $loop;
$done:
  activemask.b32 %r3;
  mul.wide.u32 %l0, %r0, 4;
  add.u64 %l1, %a, %l0;
  add.u64 %l2, %b, %l0;
  st.global.u32 [%l1], %r2;
  st.global.u32 [%l2], %r3;
)",
                    1, 32, std::vector<uint32_t>(32), std::vector<uint32_t>(32));
  for (uint32_t l = 0; l < 32; ++l) CHECK(r.a[l] == l && r.b[l] == 0xffffffffu);
  CHECK(r.report.total.store_sectors == 8);  // together: 4 sectors each
  CHECK(r.findings.empty());
}

void test_barriers() {
  const std::string half =
      "setp.lt.u32 %p0, %r0, 16;\n@!%p0 bra $skip;\n.loc 1 50 1\n"
      "bar.sync 0;\n$skip:\n.loc 1 51 1\n";
  CHECK(run(half, 1, 32, {0}, {0}).only("barrier", 50));
  const Run apart = run(half + "bar.sync 0;\n", 1, 32, {0}, {0});
  CHECK(apart.has("barrier", 50) && apart.findings[0].message.find("line 51") != std::string::npos);
  // Whole warps may leave before.
  const std::string warp = "setp.ge.u32 %p0, %r0, 32;\n@%p0 ret;\nbar.sync 0;\n";
  CHECK(run(warp, 1, 64, {0}, {0}).findings.empty());
  // A shuffle that names lanes which wait at a barrier.
  const Run stuck = run(R"(
  setp.lt.u32 %p0, %r0, 16;
  @!%p0 bra $other;
  .loc 1 60 1
  shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
  bra $end;
$other:
  .loc 1 61 1
  bar.sync 0;
$end:
)",
                        1, 32, {0}, {0});
  CHECK(stuck.findings.size() == 2 && stuck.findings[0].kind == "deadlock");
  CHECK(stuck.findings[0].line + stuck.findings[1].line == 60 + 61);
}

void test_races() {
  // Thread t writes word t and reads word 63 - t, of the other warp.
  const std::string exchange = R"(
  shl.b32 %r2, %r0, 2;
  add.u32 %r3, %r1, %r2;
  st.shared.u32 [%r3], %r0;
  BARRIER
  sub.u32 %r4, 252, %r2;
  add.u32 %r4, %r1, %r4;
  .loc 1 70 1
  ld.shared.u32 %r5, [%r4];
  mul.wide.u32 %l0, %r0, 4;
  add.u64 %l1, %a, %l0;
  st.global.u32 [%l1], %r5;
)";
  const auto with = [&](const char* barrier) {
    std::string s = exchange;
    return s.replace(s.find("BARRIER"), 7, barrier);
  };
  const Run good = run(with("bar.sync 0;"), 1, 64, std::vector<uint32_t>(64), {0});
  CHECK(good.findings.empty() && good.a[0] == 63);
  const Run bad = run(with(""), 1, 64, std::vector<uint32_t>(64), {0});
  CHECK(bad.has("race", 70));
  // Bytes of one word written by two warps are no race; the same byte is one.
  const std::string bytes =
      "shl.b32 %r2, %r0, SHIFT;\nand.b32 %r2, %r2, 1023;\n"
      "add.u32 %r3, %r1, %r2;\ncvt.u16.u32 %h0, %r0;\n.loc 1 80 1\n"
      "st.shared.u8 [%r3], %h0;\n";
  std::string apart =
      "shr.u32 %r6, %r0, 5;\nand.b32 %r7, %r0, 31;\nshl.b32 %r7, %r7, 1;\n"
      "add.u32 %r6, %r6, %r7;\nadd.u32 %r3, %r1, %r6;\ncvt.u16.u32 %h0, %r0;\n"
      "st.shared.u8 [%r3], %h0;\n";  // byte 2 * lane + warp
  CHECK(run(apart, 1, 64, {0}, {0}).findings.empty());
  std::string same = bytes;
  same.replace(same.find("SHIFT"), 5, "5");  // byte 32 t mod 1024: thread t and t + 32
  CHECK(run(same, 1, 64, {0}, {0}).only("race", 80));
  // Atomics of two warps do not race with each other.
  CHECK(run("atom.shared.exch.b32 %r2, [tile], 0;\n", 1, 64, {0}, {0}).findings.empty());
}

void test_copies() {
  const std::string copy = R"(
  shl.b32 %r2, %r0, 2;
  add.u32 %r3, %r1, %r2;
  mul.wide.u32 %l0, %r0, 4;
  add.u64 %l1, %a, %l0;
  add.u64 %l2, %b, %l0;
  cp.async.ca.shared.global [%r3], [%l1], 4;
  cp.async.commit_group;
  WAIT
  .loc 1 90 1
  ld.shared.u32 %r4, [%r3];
  st.global.u32 [%l2], %r4;
)";
  const auto with = [&](const char* wait) {
    std::string s = copy;
    return s.replace(s.find("WAIT"), 4, wait);
  };
  const std::vector<uint32_t> a(32, 5), b(32);
  const Run good = run(with("cp.async.wait_group 0;"), 1, 32, a, b);
  CHECK(good.b[31] == 5 && good.findings.empty());
  CHECK(run(with(""), 1, 32, a, b).only("in-flight", 90));
  CHECK(run(with("cp.async.wait_group 1;"), 1, 32, a, b).only("in-flight", 90));
}

void test_undefined() {
  const std::string dead = ".loc 1 100 1\nld.shared.u32 %r2, [%r1];\nadd.u32 %r3, %r2, 1;\n";
  CHECK(run(dead, 1, 32, {0}, {0}).findings.empty());
  CHECK(run(dead + ".loc 1 101 1\nst.global.u32 [%a], %r3;\n", 1, 1, {0}, {0})
            .only("uninitialised", 101));
  CHECK(run(dead + ".loc 1 102 1\nsetp.eq.u32 %p0, %r3, 0;\n.loc 1 103 1\n@%p0 bra $end;\n$end:\n",
            1, 1, {0}, {0})
            .only("uninitialised", 103));
  // A register that only some lanes wrote; and one that nobody did.
  const std::string some =
      "setp.lt.u32 %p0, %r0, 16;\n@%p0 mov.u32 %r9, 1;\nmul.wide.u32 %l0, "
      "%r0, 4;\nadd.u64 %l1, %a, %l0;\n.loc 1 104 1\n"
      "st.global.u32 [%l1], %r9;\n";
  const std::vector<uint32_t> a(32);
  const Run partly = run(some, 1, 32, a, {0});
  CHECK(partly.only("uninitialised", 104) && partly.findings[0].lane == 16);
  CHECK(run(some, 1, 16, a, {0}).findings.empty());
  CHECK(
      run(".loc 1 105 1\nst.global.u32 [%a], %r20;\n", 1, 1, {0}, {0}).only("uninitialised", 105));
}

void test_bounds() {
  const std::string far =
      "mul.wide.u32 %l0, %r0, 4;\nadd.u64 %l1, %a, %l0;\n.loc 1 110 1\n"
      "st.global.u32 [%l1+8], %r0;\n";
  const Run r = run(far, 1, 32, std::vector<uint32_t>(32), {0});
  CHECK(r.only("out-of-bounds", 110) && r.findings[0].count == 2 && r.findings[0].lane == 30);
  CHECK(r.findings[0].message.find("0 bytes past the end of a (128 bytes)") != std::string::npos);
  CHECK(r.a[31] == 29);
  const Run s = run(".loc 1 111 1\nst.shared.u32 [%r1+1024], %r0;\n", 1, 1, {0}, {0});
  CHECK(s.only("out-of-bounds", 111));
  CHECK(run(".loc 1 112 1\nst.global.u32 [%a+2], %r0;\n", 1, 1, {0}, {0}).only("misaligned", 112));
}

}  // namespace

int main() {
  test_spin_locks();
  test_divergence();
  test_barriers();
  test_races();
  test_copies();
  test_undefined();
  test_bounds();
  return failures() != 0;
}
