// SPDX-License-Identifier: Apache-2.0
// The two activation types as traits: what differs between f16 and bf16 in the GEMM kernels.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace mmq::cuda {

__device__ inline float2 unpack_f16x2(uint32_t pair) {
  float2 v;
  asm("{\n .reg .f16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n"
      " cvt.f32.f16 %1, high;\n}\n"
      : "=f"(v.x), "=f"(v.y)
      : "r"(pair));
  return v;
}

// A bf16 number is the upper half of a float.
__device__ inline float2 unpack_bf16x2(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

struct Float16 {
  static constexpr bool kIsBfloat = false;
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
  __device__ static void mma_first(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_first_f16(d, a, b);
  }
  __device__ static uint32_t pack(float low, float high) { return pack_f16x2(low, high); }
  __device__ static float2 unpack(uint32_t pair) { return unpack_f16x2(pair); }
};

struct Bfloat16 {
  static constexpr bool kIsBfloat = true;
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
  __device__ static void mma_first(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_first_bf16(d, a, b);
  }
  __device__ static uint32_t pack(float low, float high) { return pack_bf16x2(low, high); }
  __device__ static float2 unpack(uint32_t pair) { return unpack_bf16x2(pair); }
};

}  // namespace mmq::cuda
