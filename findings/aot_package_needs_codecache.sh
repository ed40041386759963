#!/usr/bin/env bash
# torch 2.10.0: a process that only loads a model compiled ahead of time has to import torch._inductor.codecache first
#
# Expected: torch._inductor.aoti_load_package(path) loads, in a new process, what aoti_compile_and_package wrote.
# What happens: AttributeError, "module 'torch._inductor' has no attribute 'codecache'": in the process that compiled it is imported already,
#   so a test of both in one process passes. With `import torch._inductor.codecache` before, it loads. 2.11.0 imports it itself.
# Versions: torch 2.10.0.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir torch==2.10.0 numpy
cat > "$work/write.py" <<'PYTHON'
import sys

import torch

program = torch.export.export(torch.nn.ReLU(), (torch.ones(3),))
torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
PYTHON
"$work/venv/bin/python" "$work/write.py" "$work/model.pt2" 2> "$work/log" || { cat "$work/log"; exit 1; }
load='import sys, torch; print(torch._inductor.aoti_load_package(sys.argv[1])(-torch.ones(3)).sum().item())'
plain=$("$work/venv/bin/python" -c "$load" "$work/model.pt2" 2>&1 | tail -1) || true
imported=$("$work/venv/bin/python" -c "import torch._inductor.codecache; $load" "$work/model.pt2" 2> "$work/log" | tail -1)
printf 'alone: %s\nwith the import: %s\n' "$plain" "$imported"
[[ $plain == "AttributeError: module 'torch._inductor' has no attribute 'codecache'" && ${imported#-} == 0.0 ]] ||
    { echo "the behaviour has changed"; exit 1; }
