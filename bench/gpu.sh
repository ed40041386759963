#!/usr/bin/env bash
# Everything worth knowing about lifeops on the GPU at hand, in under 9 minutes and without a network:
#   bench/gpu.sh [OUT]       OUT: folder for rows, logs and times, default bench/results/gpu
# Needs an NVIDIA GPU, nvcc, and a Python with torch (CUDA), triton, setuptools, pybind11, ninja and pytest: PYTHON=… picks it.
# Each stage has its own time limit and log and saves as it goes; a failure of one does not stop the next.
# DEVICE=cpu rehearses all of it on tiny sizes where there is no GPU.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-bench/results/gpu}}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
TINY=$([ "$DEVICE" = cuda ] || echo --tiny)
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # for bench/

stage() {  # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code after $((SECONDS - start)) s" | tee -a "$OUT/stages.txt"
  tail -n 3 "$OUT/$name.log" | sed 's/^/    /'
}

: >"$OUT/stages.txt"
stage machine 15 bash -c 'nvidia-smi; nvcc --version; lscpu | head -20; '"$PYTHON"' -c "import torch, triton; print(torch.__version__, triton.__version__)"'
if [ "$DEVICE" = cuda ]; then
  ARCH=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
  "$PYTHON" -m venv --system-site-packages build/gpu-venv && PYTHON="$PWD/build/gpu-venv/bin/python"
  stage build 150 env LIFEOPS_BUILD=auto TORCH_CUDA_ARCH_LIST="$ARCH" MAX_JOBS="$(nproc)" \
    "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -v -e .
fi
stage info 15 "$PYTHON" -m lifeops info
stage ops 125 "$PYTHON" -m bench.gpu ops --device "$DEVICE" $TINY --out "$OUT" --seconds 110
stage tests 125 "$PYTHON" -m pytest -q --maxfail=40 -p no:cacheprovider -n "$(nproc)" tests/test_gpu.py
stage models 35 "$PYTHON" -m bench.gpu models --device "$DEVICE" $TINY --out "$OUT"
if [ "$DEVICE" = cuda ] && command -v compute-sanitizer >/dev/null; then
  stage memcheck 35 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m bench.sanitized
  stage racecheck 35 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" -m bench.sanitized
fi
cat "$OUT/stages.txt"
