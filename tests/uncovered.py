"""Lines of the library that no test runs here, and why, by how they begin; `make coverage` complains of every other one, and of these
once a test runs them.
"""

REASONS: dict[str, dict[str, tuple[str, ...]]] = {
    "another processor: `make machines` runs it, emulated": {
        "csrc/cpu/isa.h": (
            'if (__builtin_cpu_supports("avx2")',
        ),
    },
    "infinities and NaN on another instruction set than the one that gcov counts: `make test` runs them": {
        "csrc/cpu/vec.h": (
            "bits = 0x7f800000 | ((bits & 0x3ff) << 13);",
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
