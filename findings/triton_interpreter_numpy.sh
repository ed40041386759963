#!/usr/bin/env bash
# Triton 3.6.0: its interpreter runs no loop whose bound is an argument, with numpy 2.4
#
# Expected: TRITON_INTERPRET=1 runs `for i in range(n)` in a kernel as the compiler does; Triton asks for no numpy of any kind.
# What happens: InterpreterError, "TypeError('only 0-dimensional arrays can be converted to Python scalars')": the interpreter keeps
#   scalars as arrays of one element and calls int() on them, which numpy deprecated in 1.25 and refuses since 2.4. With numpy 2.3 it runs.
# Versions: triton 3.6.0 and 3.9.0, numpy 2.3.5 and 2.4.6, torch 2.13.0.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip torch==2.13.0
cat > "$work/run.py" <<'PYTHON'
import warnings

import numpy
import torch
import triton
import triton.language as tl

warnings.simplefilter("ignore")


@triton.jit
def count(out, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(out, total)


out = torch.zeros(1, dtype=torch.int32)
try:
    count[(1,)](out, 4)
    said = str(out.item())
except triton.runtime.errors.InterpreterError as error:
    said = str(error)
print(f"{triton.__version__} {numpy.__version__} {said}")
PYTHON
for versions in "3.6.0 2.3.5" "3.6.0 2.4.6" "3.9.0 2.4.6"; do
    set -- $versions
    pip triton=="$1" numpy=="$2"
    TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/run.py" | tee -a "$work/seen"
done
diff - "$work/seen" <<'SEEN' || { echo "the behaviour has changed"; exit 1; }
3.6.0 2.3.5 6
3.6.0 2.4.6 TypeError('only 0-dimensional arrays can be converted to Python scalars')
3.9.0 2.4.6 6
SEEN
