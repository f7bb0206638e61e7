// SPDX-License-Identifier: Apache-2.0
// Every inline PTX instruction of the GEMM kernels, one small function each, with its reason.
#pragma once

#include <cstdint>

namespace mmq::cuda {

// Shared-memory instructions want a 32-bit address of the shared window, not a generic pointer.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, from a place that the compiler cannot see: it keeps it in a register instead of
// computing it anew at every use, or the other way round. No instruction.
template <class T>
__device__ inline T kept_value(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

// --- copies -----------------------------------------------------------------------------------

// 16 bytes from global to shared memory without passing through registers; .cg keeps them out of
// L1. kOffset is added to the target.
template <int kOffset = 0>
__device__ inline void cp_async(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1], 16;\n" ::"r"(target), "l"(source),
               "n"(kOffset)
               : "memory");
}

// The same, but with valid == 0 nothing is read and the target is filled with zeros: for tails.
template <int kOffset = 0>
__device__ inline void cp_async_zfill(uint32_t target, const void* source, int valid) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;\n" ::"r"(target), "l"(source),
               "r"(valid), "n"(kOffset)
               : "memory");
}

// The same for weights, which are read once: the policy lets them leave L2 first, so that
// activations and scales stay. kOffset is added to both addresses, as part of the instruction.
template <int kOffset>
__device__ inline void cp_async_once(uint32_t target, const void* source, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0 + %3], [%1 + %3], 16, %2;\n" ::"r"(target),
      "l"(source), "l"(policy), "n"(kOffset)
      : "memory");
}

__device__ inline uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
#ifndef MMQ_MUTATE_NO_CP_ASYNC_WAIT
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// 16 bytes of weights straight into registers: read-only path, not kept in L1 (read once).
__device__ inline uint4 load_once(const uint4* source) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(source));
  return v;
}

// --- tensor-core operands ---------------------------------------------------------------------

// Four (two) 8x8 matrices of 16-bit elements; lanes 8q..8q+7 give the row addresses of matrix q,
// and every lane gets elements 2t, 2t+1 of row g: the layout of the mma operands, for free. A
// constant offset is part of the address and costs no addition.
template <int kOffset>
__device__ inline void ldmatrix_x4(uint32_t address, uint32_t (&a)[2], uint32_t (&b)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(a[0]), "=r"(a[1]), "=r"(b[0]), "=r"(b[1])
               : "r"(address), "n"(kOffset)
               : "memory");
}

__device__ inline void ldmatrix_x2(uint32_t address, uint32_t (&a)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(a[0]), "=r"(a[1])
               : "r"(address)
               : "memory");
}

// d += a . b on the tensor cores: a is 16x16 (weights), b 16x8 (activations), fp32 sums; or, to
// begin a sum, d = a . b: one register that holds zero serves as all four summands.
#ifdef MMQ_MUTATE_SWAPPED_OPERANDS
#define MMQ_MMA_OPERANDS "{%4, %6, %5, %7}, {%8, %9}, "
#else
#define MMQ_MMA_OPERANDS "{%4, %5, %6, %7}, {%8, %9}, "
#endif
#define MMQ_MMA(TYPE)                                                  \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE           \
      ".f32 {%0, %1, %2, %3}, " MMQ_MMA_OPERANDS "{%0, %1, %2, %3};\n" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define MMQ_MMA_FIRST(TYPE)                                                \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE               \
      ".f32 {%0, %1, %2, %3}, " MMQ_MMA_OPERANDS "{%10, %10, %10, %10};\n" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f))

__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MMQ_MMA("f16");
}

__device__ inline void mma_first_f16(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  MMQ_MMA_FIRST("f16");
}

__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MMQ_MMA("bf16");
}

__device__ inline void mma_first_bf16(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  MMQ_MMA_FIRST("bf16");
}
#undef MMQ_MMA
#undef MMQ_MMA_FIRST
#undef MMQ_MMA_OPERANDS

// --- bit tricks of the decoder ----------------------------------------------------------------

// (a & kMask) | c in one instruction; compilers do not always see it. Constants are immediate.
template <uint32_t kMask>
__device__ inline uint32_t and_or(uint32_t a, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(d) : "r"(a), "n"(kMask), "r"(c));
  return d;
}

template <uint32_t kMask, uint32_t kOr>
__device__ inline uint32_t and_or(uint32_t a) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(d) : "r"(a), "n"(kMask), "n"(kOr));
  return d;
}

// (a & kMask) ^ kXor.
template <uint32_t kMask, uint32_t kXor>
__device__ inline uint32_t and_xor(uint32_t a) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;\n" : "=r"(d) : "r"(a), "n"(kMask), "n"(kXor));
  return d;
}

// Two halves at once. Exact where the decoder uses them (see dequant.cuh). PTX takes packed halves
// in registers only; the compiler keeps the constants there or folds them.
template <uint32_t kB>
__device__ inline uint32_t sub_f16x2(uint32_t a) {
  uint32_t d;
  asm("sub.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(kB));
  return d;
}

template <uint32_t kB, uint32_t kC>
__device__ inline uint32_t fma_f16x2(uint32_t a) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(kB), "r"(kC));
  return d;
}

// sm_80 has no bf16 addition, only this.
template <uint32_t kB>
__device__ inline uint32_t fma_bf16x2(uint32_t a, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(kB), "r"(c));
  return d;
}

template <uint32_t kB, uint32_t kC>
__device__ inline uint32_t fma_bf16x2(uint32_t a) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(kB), "r"(kC));
  return d;
}

// --- conversions ------------------------------------------------------------------------------

// Two floats to two 16-bit numbers, each rounded to nearest even, `low` in the low half.
__device__ inline uint32_t pack_f16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ inline uint32_t pack_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// --- ordering between blocks ------------------------------------------------------------------

// Adds one and returns the value before. Release: what the block wrote before is visible to whoever
// sees the new value. Acquire: what others wrote before their increments is visible after it.
__device__ inline int increment_acq_rel(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;\n"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

#ifdef MMQ_MUTATE_UNINITIALISED_ACCUMULATOR
// A register that nothing wrote; the compiler cannot know and so cannot choose a value for it.
__device__ inline float initial_sum() {
  float v;
  asm volatile("{\n .reg .f32 never;\n mov.f32 %0, never;\n}\n" : "=f"(v));
  return v;
}
#else
__device__ inline float initial_sum() { return 0.0f; }
#endif

}  // namespace mmq::cuda
