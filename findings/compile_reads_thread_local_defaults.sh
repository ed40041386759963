#!/usr/bin/env bash
# torch 2.13.0: code compiled while a threading.local subclass has its class attribute's value never sees what the thread sets later.
#
# Expected: `class Settings(threading.local): mode = 1`, compile, then `settings.mode = 2`: a recompilation and 2, as for any other object.
# Seen: torch.compile(fullgraph=True) goes on with 1, without a recompilation, a graph break or a warning. With the default set in
# __init__ instead of on the class, every change and each thread's own value are followed.
#
# Output seen:
#   default as class attribute: Python 1 2 3, compiled 1 1 1
#   default set in __init__:    Python 1 2 3, compiled 1 2 3
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/run.py" <<'PY'
import threading

import torch


class ByClass(threading.local):
    mode = 1


class ByInit(threading.local):
    def __init__(self):
        self.mode = 1


def seen(settings):
    def f(x):
        return x * settings.mode

    compiled, plain, fast = torch.compile(f, backend="eager", fullgraph=True), [], []
    for value in (None, 2, 3):
        if value:
            settings.mode = value
        plain.append(int(f(torch.ones(1))))
        fast.append(int(compiled(torch.ones(1))))
    return plain, fast


print("torch", torch.__version__.split("+")[0])
found = {"default as class attribute:": seen(ByClass()), "default set in __init__:": seen(ByInit())}
for name, (plain, fast) in found.items():
    print(f"{name:27} Python {' '.join(map(str, plain))}, compiled {' '.join(map(str, fast))}")
assert list(found.values()) == [([1, 2, 3], [1, 1, 1]), ([1, 2, 3], [1, 2, 3])]
PY
"$folder/venv/bin/python" "$folder/run.py"
