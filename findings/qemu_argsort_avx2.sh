#!/usr/bin/env bash
# qemu-user 7.2.22 (Debian 12), NumPy 2.4.6: argsort gives a wrong order, silently, on an emulated x86-64 processor with AVX2.
#
# One would guess that an emulator either runs an instruction or refuses it, and that tests passed under it say something. On `-cpu Haswell`
# NumPy takes its AVX2 argsort; for 64-bit integers that gives a wrong permutation from 9 values on (9 to 16, and 37 to 64 of the sizes up
# to 64), the same one every time. The same kernel is right on real hardware, and so is argsort with NPY_DISABLE_CPU_FEATURES=X86_V3 and on
# `-cpu Nehalem`, without AVX2.
#
# Needs x86-64 with AVX2 and Debian 12's apt; qemu is unpacked, not installed.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
apt-get download -qq qemu-user && dpkg -x qemu-user_*.deb qemu
qemu=$tmp/qemu/usr/bin/qemu-x86_64
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check numpy==2.4.6
cat >sizes.py <<'PY'
import numpy as np

rng = np.random.default_rng(0)
values = {n: rng.permutation(n) for n in range(1, 65)}
print(*(n for n, v in values.items() if not (np.sort(v) == v[np.argsort(v)]).all()))
PY
python=$(venv/bin/python -c "import os, sys; print(os.path.realpath(sys._base_executable))")
packages=$(venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
unset OPENBLAS_CORETYPE  # of the real processor
wrong() { PYTHONPATH=$packages "$@" sizes.py 2>/dev/null; }
"$qemu" --version | head -1
native=$(NPY_DISABLE_CPU_FEATURES=X86_V4 wrong "$python")
haswell=$(wrong "$qemu" -cpu Haswell "$python")
without=$(NPY_DISABLE_CPU_FEATURES=X86_V3 wrong "$qemu" -cpu Haswell "$python")
nehalem=$(wrong "$qemu" -cpu Nehalem "$python")
printf 'sizes sorted wrongly\n  real hardware, AVX2: %s\n  Haswell: %s\n  Haswell without NumPy AVX2: %s\n  Nehalem: %s\n' \
  "${native:-none}" "${haswell:-none}" "${without:-none}" "${nehalem:-none}"
[[ -n $haswell && -z $native && -z $without && -z $nehalem ]] || { echo "the behaviour has changed"; exit 1; }
