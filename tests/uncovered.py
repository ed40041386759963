"""Lines of the library that no test runs here, and why; `make coverage` complains of every other one."""

REASONS: dict[str, dict[str, tuple[str, ...]]] = {}  # why: {file: lines, or ("*",) for all of it}
