"""Lines of the library that no test runs here, and why, by how they begin; `make coverage` complains of every other one, and of these
once a test runs them.
"""

REASONS: dict[str, dict[str, tuple[str, ...]]] = {
    "another processor: `make machines` runs it, emulated": {
        "csrc/cpu/isa.h": (
            'if (__builtin_cpu_supports("avx2")',
        ),
    },
    "another instruction set than the one that gcov counts: `make test` runs it": {
        "csrc/cpu/vec.h": (
            "return (vu32)_mm256_cvtepu16_epi32(",
            "return __builtin_convertvector(v, vu",
            "inline float half_to_float(uint16_t h) {",
            "const uint32_t sign = uint32_t(h & 0x8000) << 16;",
            "uint32_t bits = h & 0x7fff;",
            "if (bits >= 0x7c00) {",
            "bits = 0x7f800000 | ((bits & 0x3ff) << 13);",
            "} else if (bits >= 0x400) {",
            "bits = (bits << 13) + 0x38000000;",
            "float value = float(bits) * 5.9604644775390625e-8f;",
            "__builtin_memcpy(&bits, &value, 4);",
            "bits |= sign;",
            "return f;",
            "inline uint16_t float_to_half(float f) {",
            "__builtin_memcpy(&bits, &f, 4);",
            "const uint16_t sign = uint16_t((bits >> 16) & 0x8000);",
            "bits &= 0x7fffffff;",
            "if (bits > 0x7f800000) return sign | 0x7e00;",
            "if (bits >= 0x477ff000) return sign | 0x7c00;",
            "if (bits < 0x38800000) {",
            "magnitude += 0.5f;",
            "return uint16_t(sign | (bits - 0x3f000000));",
            "bits += 0xfff + ((bits >> 13) & 1);",
            "return uint16_t(sign | ((bits - 0x38000000) >> 13));",
            "inline vec_t<float> load(const f16* p) {",
            "for (int l = 0; l < Vec<float>::kLanes; ++l)",
            "return v;",
            "inline void store(f16* p, vec_t<float> v) {",
            "}",
        ),
    },
    "inlined calls, whose instructions gcov books at the called functions; the lines around, which need what they do, are counted": {
        "csrc/cpu/token_dwconv_forward.h": (
            "const vec_t<A> value = in_register(at.column(x, t, j + t",
        ),
        "csrc/cpu/token_conv_planes.h": (
            "store(all, value);",
        ),
        "csrc/cpu/token_conv_sums.h": (
            "const vec_t<A> value = in_register(load(x));",
        ),
        "csrc/cpu/token_pool_kernels.h": (
            "if constexpr (kWhole) return load(at);",
        ),
        "csrc/cpu/vec.h": (
            "store(lanes, v);",
        ),
    },
    "only torch.compile goes there, which translates frames instead of running them: tests/test_capture.py compares what it makes": {
        "lifeops/pointwise.py": (
            "return False  # a compiler chooses products itself",
        ),
    },
}  # fmt: skip
