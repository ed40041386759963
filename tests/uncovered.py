"""Lines of the library that no test runs here, and why, by how they begin; `make coverage` complains of every other one, and of these
once a test runs them.
"""

REASONS: dict[str, dict[str, tuple[str, ...]]] = {
    "another processor: `make machines` runs it, emulated": {
        "csrc/cpu/isa.h": (
            'if (__builtin_cpu_supports("avx2")',
        ),
    },
    "two inlined calls, whose instructions gcov books at the called functions; the lines behind it, which need its value, are counted": {
        "csrc/cpu/token_dwconv_forward.h": (
            "const vec_t<A> value = in_register(at.column(x, t, j + t",
        ),
    },
    "only torch.compile goes there, which translates frames instead of running them: tests/test_capture.py compares what it makes": {
        "lifeops/pointwise.py": (
            "return False  # a compiler chooses products itself",
        ),
    },
}  # fmt: skip
