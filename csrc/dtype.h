// SPDX-License-Identifier: Apache-2.0
// Element types of the CUDA kernels: small packs of neighbouring channels, loaded and stored in one instruction.
// No torch in here; compiles with nvcc and, for the host tests, with g++.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "params.h"

namespace lifeops {

using bf16 = __nv_bfloat16;
using f16 = __half;

// Sums are kept in float, in double for double.
template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename T> using acc_t = typename Accumulator<T>::type;

inline __host__ __device__ int element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

template <int kBytes> struct Word;
template <> struct Word<2> { using type = uint16_t; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

// kVec neighbouring channels as they lie in memory. Kept packed until used: a bf16 pair costs one register, not two.
template <typename T, int kVec> struct Pack {
  using word = typename Word<sizeof(T) * kVec>::type;
  word bits;

  static __device__ __forceinline__ Pack load(const T* p) { return {*reinterpret_cast<const word*>(p)}; }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<word*>(p) = bits; }
};

namespace detail {
__device__ __forceinline__ float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
template <typename To, typename From> __device__ __forceinline__ To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_copy needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace detail

__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ float to_acc(f16 v) { return __half2float(v); }
__device__ __forceinline__ float to_acc(bf16 v) {
  return detail::bits_to_float(static_cast<uint32_t>(detail::bit_copy<uint16_t>(v)) << 16);
}

template <typename T> __device__ __forceinline__ T from_acc(acc_t<T> v) { return static_cast<T>(v); }
template <> __device__ __forceinline__ f16 from_acc<f16>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ bf16 from_acc<bf16>(float v) { return __float2bfloat16_rn(v); }

// Unpack to accumulators. A bf16 is the upper half of a float: one shift or one mask each, on every architecture.
template <typename T, int kVec>
__device__ __forceinline__ void unpack(const Pack<T, kVec>& pack, acc_t<T> (&out)[kVec]) {
  struct Elements { T v[kVec]; };
  const Elements e = detail::bit_copy<Elements>(pack.bits);
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = to_acc(e.v[i]);
}
template <> __device__ __forceinline__ void unpack<bf16, 2>(const Pack<bf16, 2>& pack, float (&out)[2]) {
  out[0] = detail::bits_to_float(pack.bits << 16);
  out[1] = detail::bits_to_float(pack.bits & 0xffff0000u);
}
template <> __device__ __forceinline__ void unpack<bf16, 4>(const Pack<bf16, 4>& pack, float (&out)[4]) {
  out[0] = detail::bits_to_float(pack.bits.x << 16);
  out[1] = detail::bits_to_float(pack.bits.x & 0xffff0000u);
  out[2] = detail::bits_to_float(pack.bits.y << 16);
  out[3] = detail::bits_to_float(pack.bits.y & 0xffff0000u);
}

// Round to nearest even, once.
template <typename T, int kVec>
__device__ __forceinline__ Pack<T, kVec> pack(const acc_t<T> (&in)[kVec]) {
  struct Elements { T v[kVec]; };
  Elements e;
#pragma unroll
  for (int i = 0; i < kVec; ++i) e.v[i] = from_acc<T>(in[i]);
  return {detail::bit_copy<typename Pack<T, kVec>::word>(e)};
}
template <> __device__ __forceinline__ Pack<bf16, 2> pack<bf16, 2>(const float (&in)[2]) {
  return {detail::bit_copy<uint32_t>(__floats2bfloat162_rn(in[0], in[1]))};
}
template <> __device__ __forceinline__ Pack<bf16, 4> pack<bf16, 4>(const float (&in)[4]) {
  return {uint2{detail::bit_copy<uint32_t>(__floats2bfloat162_rn(in[0], in[1])),
                detail::bit_copy<uint32_t>(__floats2bfloat162_rn(in[2], in[3]))}};
}
template <> __device__ __forceinline__ Pack<f16, 2> pack<f16, 2>(const float (&in)[2]) {
  return {detail::bit_copy<uint32_t>(__floats2half2_rn(in[0], in[1]))};
}

// Element i of an array whose type is known at run time only (filters, biases: read once per block).
template <typename Acc> __device__ __forceinline__ Acc load_as(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<Acc>(static_cast<const double*>(p)[i]);
    case DType::f32: return static_cast<Acc>(static_cast<const float*>(p)[i]);
    case DType::f16: return static_cast<Acc>(to_acc(static_cast<const f16*>(p)[i]));
    default: return static_cast<Acc>(to_acc(static_cast<const bf16*>(p)[i]));
  }
}
template <typename Acc> __device__ __forceinline__ void store_as(void* p, DType dtype, int64_t i, Acc value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(p)[i] = static_cast<double>(value); break;
    case DType::f32: static_cast<float*>(p)[i] = static_cast<float>(value); break;
    case DType::f16: static_cast<f16*>(p)[i] = __float2half_rn(static_cast<float>(value)); break;
    default: static_cast<bf16*>(p)[i] = __float2bfloat16_rn(static_cast<float>(value)); break;
  }
}

}  // namespace lifeops
