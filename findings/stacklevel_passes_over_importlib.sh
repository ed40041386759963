#!/usr/bin/env bash
# CPython 3.11.7: `warnings.warn(…, stacklevel=n)` does not count the frames of importlib, which sys._getframe shows.
#
# Who looks for the line of a user behind a library walks up the frames, counts them and hands the number to `stacklevel`. Where a module warns
# as it is imported, that points past the user: from stacklevel 2 on `warn` passes over the frames of importlib's bootstrap, which lie
# between the module and the `import` that runs it, and nothing says so in its documentation. `warn_explicit` with the frame's own file and
# line does what is meant.
#
# Seen: the import stands 6 frames above the module, and the warning that counts them points at "sys:1": it ran out of frames.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/warns.py" <<'PY'
import sys
import warnings

frame, level = sys._getframe(), 1
while not frame.f_code.co_filename.endswith("user.py"):
    frame, level = frame.f_back, level + 1
print(f"the import is at {frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}, {level - 1} frames above")
warnings.warn("said", stacklevel=level)
PY
cat > "$tmp/user.py" <<'PY'
import warnings


def load():
    import warns


with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    load()
told = f"{seen[0].filename.rpartition('/')[2]}:{seen[0].lineno}"
print("stacklevel points at", told)
raise SystemExit(told == "user.py:5")
PY
python3 "$tmp/user.py"
