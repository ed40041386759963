#!/usr/bin/env bash
# Everything worth knowing about lifeops on the GPU at hand, in 9 minutes on 16 cores and without a network:
#   bench/gpu.sh [OUT [STAGE…]]       OUT: folder for rows, logs and times, default bench/results/gpu; STAGE: only these, in this order
# Needs an NVIDIA GPU, nvcc and a Python with torch (CUDA), triton, setuptools, pybind11 and ninja; pytest, pytest-xdist for the tests.
# PYTHON=… picks the Python, one in a venv as well as another: nothing is installed into it, packages are built below build/gpu.
# Each stage has its own time limit and log and saves as it goes; a failure of one does not stop the next, and each runs alone.
# DEVICE=cpu rehearses it on tiny sizes where there is no GPU (LIFEOPS_BUILD=none: without compiled kernels, in a minute or two).
#
# stage          s   what, and where its limit comes from
# machine       10   driver, compilers, versions
# package       15   lifeops without compiled kernels: what runs, Triton included, where the next stage fails or is cut off
# build        125   CPU and CUDA kernels; nvcc takes about 400 s of CPU for one architecture, 45 to 70 s on 16 cores with ninja
# cuda_tests    55   CUDA kernels against the oracle: nothing is compiled at run time; broken contexts cost one test
# warm          75   Triton compiles every launch of the rows below into one cache, a process a core: about 900 s of CPU (Triton 3.6)
#                    (measured for sm_90, per problem: token_dwconv with its gradients 5 at K 3 and 14 at K 5, LIFE's chain 8, LocalViT's 11,
#                    a strided convolution 7; 192 problems, those of the largest grids with the kernels of others)
# ops          110   rows of all ops and blocks, one small problem of each system first; goes on with the next after a broken context
# triton_tests  55   Triton kernels against the oracle, bfloat16 and float32: compiles as it goes, failures are written at once
# models        40   training and inference of whole models
# memcheck      30   compute-sanitizer over every CUDA kernel, inputs made on the CPU, as many calls as fit
# racecheck     25
set -u
cd "$(dirname "$0")/.."
ROOT=$PWD
OUT=${1:-${OUT:-bench/results/gpu}}
[ $# -gt 0 ] && shift
STAGES=${*:-machine package build cuda_tests warm ops triton_tests models memcheck racecheck}
PYTHON=${PYTHON:-python3}
PYTHON=$(command -v "$PYTHON") || { echo "gpu.sh: no ${PYTHON:-python3}" >&2; exit 1; }
DEVICE=${DEVICE:-cuda}
TINY=$([ "$DEVICE" = cuda ] || echo --tiny)
WORK=${WORK:-$ROOT/build/gpu}  # packages and Triton's cache; stages that build nothing take what lies there
JOBS=$(nproc)
mkdir -p "$OUT" "$WORK/run"
OUT=$(cd "$OUT" && pwd)
WORK=$(cd "$WORK" && pwd)
export TRITON_CACHE_DIR="$WORK/triton" LIFEOPS_FAILURES="$OUT/failures.txt" PYTHONUNBUFFERED=1
export PATH="$(dirname "$PYTHON"):$PATH"  # a venv's ninja
BEFORE=${PYTHONPATH:-}
cd "$WORK/run"  # `python -m` would take lifeops from the repository's root, which has no kernels in it

stage() {  # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code after $((SECONDS - start)) s" | tee -a "$OUT/stages.txt"
  tail -n 3 "$OUT/$name.log" | sed 's/^/    /'
  return $code
}

use() {  # the package built last, whole
  local package=$WORK/plain
  [ -e "$WORK/built/complete" ] && package=$WORK/built
  export PYTHONPATH="$package:$ROOT${BEFORE:+:$BEFORE}"
}

make_package() {  # name, seconds, folder, what to compile
  rm -rf "${WORK:?}/$3" "$WORK/$3.tmp"
  mkdir -p "$WORK/$3.tmp"
  stage "$1" "$2" env -C "$ROOT" LIFEOPS_BUILD="$4" MAX_JOBS="$JOBS" "$PYTHON" setup.py build \
    --build-base "$WORK/$3.tmp" --build-lib "$WORK/$3" --build-temp "$WORK/$3.tmp/objects" && touch "$WORK/$3/complete"
}

pytests() {  # name, seconds, arguments...
  local name=$1 limit=$2
  shift 2
  local parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$JOBS")
  stage "$name" "$limit" "$PYTHON" -m pytest -q --maxfail=40 --tb=short -p no:cacheprovider -p bench.at_once "${parallel[@]}" \
    -c "$ROOT/pyproject.toml" --rootdir "$ROOT" "$@"
}

run() {
  case $1 in
  machine) stage machine 10 bash -c "nvidia-smi; nvcc --version; lscpu | head -20; command -v ninja || echo 'no ninja: the build is serial';
    '$PYTHON' -c 'import torch, triton; print(torch.__version__, triton.__version__)'" ;;
  package) rm -rf "$WORK/built" && make_package package 15 plain none ;;
  build)
    if [ "$DEVICE" = cuda ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
      TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') && export TORCH_CUDA_ARCH_LIST
    fi
    make_package build 125 built "${LIFEOPS_BUILD:-auto}"
    use
    "$PYTHON" -m lifeops info >>"$OUT/build.log" 2>&1 ;;
  cuda_tests) pytests cuda_tests 55 "$ROOT/tests/test_gpu.py" -k "cuda- or more_than_2" ;;
  warm) stage warm 75 "$PYTHON" -m bench.gpu warm --device "$DEVICE" $TINY --out "$OUT" --seconds 70 --jobs "$JOBS" ;;
  ops) stage ops 110 "$PYTHON" -m bench.gpu ops --device "$DEVICE" $TINY --out "$OUT" --seconds 100 ;;
  triton_tests) pytests triton_tests 55 "$ROOT/tests/test_gpu.py" -k "triton- and (bfloat16 or float32)" ;;
  models) stage models 40 "$PYTHON" -m bench.gpu models --device "$DEVICE" $TINY --out "$OUT" --seconds 30 ;;
  memcheck) sanitize memcheck 30 ;;
  racecheck) sanitize racecheck 25 ;;
  *) echo "gpu.sh: no stage $1" >&2; exit 2 ;;
  esac
}

sanitize() {  # tool, seconds
  if [ "$DEVICE" = cuda ] && command -v compute-sanitizer >/dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 9 \
      "$PYTHON" -m bench.sanitized --seconds $(($2 - 12))
  else
    echo "$1: left out: $([ "$DEVICE" = cuda ] && echo no compute-sanitizer || echo no GPU)" | tee -a "$OUT/stages.txt"
  fi
}

: >>"$OUT/stages.txt"
use
for name in $STAGES; do
  case $name in
  machine | package | build) ;;
  *) [ -e "$WORK/plain/complete" ] || { run package; use; } ;;
  esac
  run "$name"
  use
done
cat "$OUT/stages.txt"
