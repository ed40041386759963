"""`make sanitize`: the compiled CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, or under ThreadSanitizer (--tsan), one
instruction set a leg.

A leg builds csrc/cpu into a folder of its own (build/sanitized/KIND/ISA), shows that the sanitizers see what that instruction set's kernels
touch, and runs the operator tests and fuzzed cases that are for it. The first finding ends the leg with its report.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from junit import counts

from fuzz.page import put

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ISAS = "baseline", "avx2", "avx512"
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fno-tree-vectorize -fsanitize="
# setup.py's own flags come first, so the last -O holds. Kernels of other instruction sets are linked in as they are, unoptimised.
COMPILER = """#!/bin/sh
case "$*" in
*/info.cpp*) exec {cxx} "$@" -O0 ;;
*/kernels_{isa}.cpp*) ;;
*/kernels_*.cpp*) exec {cxx} "$@" -O0 ;;
esac
exec {cxx} "$@" {flags}
"""
MISTAKE = """
import torch
from lifeops import registry
registry.load("cpu")
torch.set_num_threads(2)
x, weight = torch.ones(1, 12, 64), torch.ones(64, 1, 3, 3)  # whole vectors: partial ones are copied by memcpy, which is watched anyhow
print("called", flush=True)
{mistake}
"""
CALL = "torch.ops.lifeops.token_dwconv(x, weight, None, None, 3, 4, 0, 'keep', 'cpu')"
SHORT = "x.untyped_storage().resize_(x.untyped_storage().nbytes() - 4)"
SHIFTED = "weight = torch.frombuffer(bytearray(2305), dtype=x.dtype, offset=1).view(64, 1, 3, 3)"
TWICE = """x = torch.ones(8, 1024, 64)
y = torch.empty(1, 1024, 64).expand(8, 1024, 64)
torch.ops.lifeops_native.token_dwconv(x, weight, None, None, y, 32, 32, 0, 0, 0, False, 0)"""


class Kind(NamedTuple):
    """Sanitizers that go together. ``canaries``: a mistake, what the report then says, and of which function."""

    what: str
    sanitizers: str
    runtime: str
    options: dict[str, str]
    canaries: tuple[tuple[str, str, str], ...]


KINDS = {
    "memory": Kind(
        "AddressSanitizer, UndefinedBehaviorSanitizer", "address,undefined -fno-sanitize-recover=all", "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:malloc_context_size=8:quarantine_size_mb=64",
         "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1"},
        # a tensor whose memory ends too early, one that begins between two floats
        ((f"{SHORT}\n{CALL}", "ERROR: AddressSanitizer", "lifeops::{isa}::"),
         (f"{SHIFTED}\n{CALL}", "load of misaligned address", "pack_block")),
    ),
    "threads": Kind(
        "ThreadSanitizer", "thread", "libtsan.so",
        # Python and torch are not instrumented: what their threads do is not looked at
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:abort_on_error=1:history_size=4"},
        ((TWICE, "WARNING: ThreadSanitizer: data race", "lifeops::{isa}::"),),  # eight images that are written to one place
    ),
}  # fmt: skip


def build(isa: str, kind: str, flags: str) -> Path:
    """The folder of a package whose kernels for ``isa``, and the code around them, are compiled with ``flags``, below build/KIND."""
    folder = ROOT / "build" / kind / isa
    folder.mkdir(parents=True, exist_ok=True)
    compiler = folder / "c++"
    compiler.write_text(COMPILER.format(cxx=os.environ.get("CXX", "g++"), isa=isa, flags=flags))
    compiler.chmod(0o755)
    package, places = folder / "package", ("--build-base", folder, "--build-lib", folder / "package", "--build-temp", folder / "objects")
    command = [sys.executable, "setup.py", "-q", "build", *places]
    env = {**os.environ, "CXX": str(compiler), "LIFEOPS_BUILD": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind}: the build failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return package


def environment(kind: str, isa: str, package: Path) -> dict:
    """Python with the sanitizers' runtime before everything else, and libstdc++ beside it, whose exceptions it looks into."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    found = (subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
             for name in (KINDS[kind].runtime, "libstdc++.so"))  # fmt: skip
    return {
        **os.environ, **KINDS[kind].options, "PYTHONPATH": str(package), "LD_PRELOAD": ":".join(str(Path(f).resolve()) for f in found),
        "LIFEOPS_CPU_ISA": isa, "LIFEOPS_FUZZ_ISAS": isa, "LIFEOPS_STRICT": "1", "OMP_NUM_THREADS": "2",
    }  # fmt: skip


def check_canaries(kind: str, isa: str, env: dict) -> None:
    """The sanitizers report mistakes made on purpose inside this instruction set's kernels."""
    for mistake, report, function in KINDS[kind].canaries:
        command = [sys.executable, "-c", MISTAKE.format(mistake=mistake)]
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=False)
        seen = report in done.stderr and function.format(isa=isa) in done.stderr
        if not (done.returncode and done.stdout.startswith("called") and seen):
            raise SystemExit(f"sanitize: {isa}: no report of {mistake!r} ({report}):\n{done.stdout}{done.stderr[-4000:]}")


def widest() -> str:
    """The last instruction set of ``ISAS`` that this machine has."""
    command = [sys.executable, "-c", "from lifeops import _info; print(_info.isa())"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def leg(kind: str, isa: str, cases: int, seed: int) -> None:
    start = time.monotonic()
    env = environment(kind, isa, build(isa, f"sanitized/{kind}", FLAGS + KINDS[kind].sanitizers))
    built = time.monotonic()
    check_canaries(kind, isa, env)
    ledger = ROOT / "build" / "sanitized" / kind / isa / "cases.json"
    env |= {"LIFEOPS_FUZZ_CASES": str(cases), "LIFEOPS_FUZZ_LEDGER": str(ledger)}
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", f"--hypothesis-seed={seed}"]
    # attention and life_qkv are torch's own operators on the CPU
    tests = [["fuzz/test_operators.py", "-k", "not (image or attention or life_qkv)"]]
    if kind == "memory":
        tests.insert(0, ["test_ops.py", "test_nan.py", "-k", isa])
    else:  # larger than what is fuzzed: every operator in several tasks, at 1 to 4 threads
        tests.insert(0, ["test_determinism.py", "-k", "(any_thread_count or images_sums) and not attention"])
    report, passed = ledger.with_name("tests.xml"), []
    for files in tests:
        if subprocess.run([*pytest, f"--junitxml={report}", *files], cwd=HERE, env=env, check=False).returncode:
            raise SystemExit(f"sanitize: {kind}, {isa}: {' '.join(files)}: see above")
        passed.append(counts(report).passed)
    fuzzed, seconds = sum(json.loads(ledger.read_text())["cases"].values()), time.monotonic() - built
    print(f"sanitize: {kind}, {isa}: clean, {fuzzed} fuzzed cases; {built - start:.0f} s to build, {seconds:.0f} s to run", flush=True)
    row_of(kind, isa).write_text(f"| {isa}, {KINDS[kind].what} | {passed[0]} | {fuzzed} | 0 |")


def row_of(kind: str, isa: str) -> Path:
    """Where a leg that ended clean keeps its row of the table."""
    return ROOT / "build" / "sanitized" / kind / isa / "row.md"


def write_page() -> None:
    """The table of docs/reliability.md, of all legs that were run here."""
    kept = (row_of(kind, isa) for kind in KINDS for isa in ISAS)
    rows = (row.read_text() for row in kept if row.exists())
    put("sanitizers", ("| kernels | tests | fuzzed cases | findings |", "|---|---:|---:|---:|", *rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="make sanitize", description=__doc__)
    parser.add_argument("--isa", choices=(*ISAS, "widest"), nargs="+", help="the instruction sets; by default all that this machine has")
    parser.add_argument("--tsan", action="store_true", help="ThreadSanitizer in the place of the other two")
    parser.add_argument("--cases", type=int, default=20, help="fuzzed cases of every property")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzed cases")
    parser.add_argument("--page", action="store_true", help="write the table, also of legs that ran before, into docs/reliability.md")
    args = parser.parse_args()
    best = widest()
    for isa in args.isa or ISAS[: ISAS.index(best) + 1]:
        leg("threads" if args.tsan else "memory", best if isa == "widest" else isa, args.cases, args.seed)
    if args.page:
        write_page()


if __name__ == "__main__":
    main()
