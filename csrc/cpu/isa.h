// SPDX-License-Identifier: Apache-2.0
// Which instruction set this CPU runs. No torch in here.
#pragma once

namespace lifeops {

enum class Isa : int { baseline = 1, avx2 = 2, avx512 = 3 };

inline Isa supported_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// `limit` 0 means no limit; asking for more than the CPU has gives what it has.
inline Isa choose_isa(int limit) {
  static const Isa best = supported_isa();
  return limit > 0 && limit < int(best) ? Isa(limit) : best;
}

inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

// What `baseline` is here: the vectors that the compiler takes without being asked for more.
inline const char* baseline_vectors() {
#if defined(__SSE2__)
  return "SSE2";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "the compiler's own";
#endif
}

}  // namespace lifeops
