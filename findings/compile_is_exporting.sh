#!/usr/bin/env bash
# torch 2.10.0: inside torch.compile, torch.compiler.is_exporting() is True
#
# Expected: False, as its documentation says ("would only be set to True when torch.export is used"), as eager code and torch 2.13.0 have it.
# What happens: torch.compile replaces the call by the constant True. Code that writes itself in torch's own operators for an exported
#   program does so in every compiled one, too, without its kernels, a warning or a wrong number. The variable that the function returns is
#   read as it is.
# Versions: torch 2.10.0 (2.11.0 has the same line; 2.12.0 reads the variable), and 2.13.0.
#
# Exits non-zero where the behaviour is another one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/run.py" <<'PYTHON'
import torch


def ask(x):
    return x + torch.compiler.is_exporting()


def read(x):
    return x + torch.compiler._is_exporting_flag


class Asks(torch.nn.Module):
    forward = staticmethod(ask)


x = torch.zeros(1, dtype=torch.int64)
compiled = (torch.compile(f, backend="eager", fullgraph=True) for f in (ask, read))
exported = torch.export.export(Asks(), (x,)).module()
version = torch.__version__.split("+")[0]
print(version, *(f"{name} {bool(f(x))}" for name, f in zip(("eager", "compiled", "variable", "exported"), (ask, *compiled, exported))))
PYTHON
for version in 2.10.0 2.13.0; do
    python3 -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir torch=="$version" numpy
    "$work/venv/bin/python" "$work/run.py" | tee -a "$work/seen"
    rm -rf "$work/venv"
done
diff - "$work/seen" <<'SEEN' || { echo "the behaviour has changed"; exit 1; }
2.10.0 eager False compiled True variable False exported True
2.13.0 eager False compiled False variable False exported True
SEEN
