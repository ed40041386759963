#!/usr/bin/env bash
# CPython 3.11.7: `warnings.warn_explicit(…, module=None)` warns of nothing.
#
# None is the default of `module`, and one would guess that to pass it is to leave it out: then the file's name stands for the module. But the
# C implementation takes a None that is passed for a sign that the interpreter is ending, and returns without a word, whatever the filters
# are; warnings.py, which says what it is meant to do, warns. A frame whose globals lack `__name__` (code run by `exec` in a dictionary) leads
# there: `frame.f_globals.get("__name__")`.
#
# Seen: module left out: 1 warning; module=None: 0 warnings; module=None in warnings.py: 1 warning.
set -euo pipefail
python3 - <<'PY'
import importlib.util
import sys
import warnings


def count(library, **options):
    with library.catch_warnings(record=True, module=library) as seen:
        library.simplefilter("always")
        library.warn_explicit("said", UserWarning, "file.py", 1, **options)
    return len(seen)


found = count(warnings), count(warnings, module=None)
sys.modules["_warnings"] = None  # as where there is no C implementation
spec = importlib.util.find_spec("warnings")
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)
found = *found, count(plain, module=None)
print(sys.version.split()[0], "module left out: {}, module=None: {}, module=None in warnings.py: {}".format(*found))
sys.exit(found != (1, 0, 1))
PY
