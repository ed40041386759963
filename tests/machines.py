"""`make machines`: lifeops as a user has it, on processors that this machine does not have, emulated by qemu.

On each: `lifeops info` names the kernels that this processor is to get, every operator runs on its tiny samples against the oracle, NaN and
infinities in everything, fuzzed cases of operators, functions and modules with their gradients, and a demo of one epoch.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import emulated
from junit import counts

from fuzz.page import put

HERE = Path(__file__).resolve().parent
DEMO = "--quick", "--seeds", "1", "--sizes", "20", "--epochs", "1", "--jobs", "1"


class Machine(NamedTuple):
    cpu: str  # qemu's name
    what: str  # for readers
    kernels: str  # as `lifeops info` names them
    beyond: str = ""  # an instruction that it lacks, as a compiler's assembler takes it

    @property
    def qemu(self) -> str:
        return "qemu-x86_64" if self.beyond else "qemu-aarch64"


MACHINES = [
    Machine("Nehalem", "Intel of 2008, no AVX", "baseline (SSE2 vectors)", "vpaddd %ymm0, %ymm0, %ymm0"),
    Machine("Haswell", "Intel of 2013, no AVX-512", "avx2", "vpaddd %zmm0, %zmm0, %zmm0"),
    Machine("neoverse-n1", "aarch64, AWS Graviton 2", "baseline (NEON vectors)"),
]


class Leg:
    """One machine: its interpreter, and the environment of all that runs there."""

    def __init__(self, machine: Machine, torch: str, cases: int, seed: int):
        self.machine, self.seed = machine, seed
        self.python = emulated.x86(machine.cpu) if machine.beyond else emulated.arm(machine.cpu, torch)
        self.folder, isa = self.python.parent.parent, machine.kernels.split()[0]
        self.env = emulated.environment() | {
            "LIFEOPS_STRICT": "1", "LIFEOPS_FUZZ_ISAS": isa, "LIFEOPS_FUZZ_CASES": str(cases),
            "LIFEOPS_FUZZ_LEDGER": str(self.folder / "cases.json"),
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",  # threads that spin as they wait take most of an emulated one's time
            "NPY_DISABLE_CPU_FEATURES": "X86_V3" if machine.beyond else "",  # its AVX2 argsort is wrong under qemu 7.2
        }  # fmt: skip
        if not machine.beyond:
            self.env["PYTHONPATH"] = str(emulated.build(self.python))
        self.tests = (["test_ops.py", "test_nan.py", "-k", isa], ["fuzz"])

    def call(self, *args) -> str:
        """What a Python command prints; SystemExit with all of it where it fails."""
        done = subprocess.run([self.python, *args], cwd=HERE, env=self.env, capture_output=True, text=True, check=False)
        if done.returncode:
            what = f"{self.machine.cpu}: {' '.join(map(str, args))} ended with {done.returncode}"
            raise SystemExit(f"machines: {what}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout

    def check_processor(self) -> None:
        """An instruction that the machine lacks ends a program; else kernels for another one could run unnoticed."""
        if self.machine.beyond:
            program = self.folder / "beyond"
            source = f'int main() {{ __asm__("{self.machine.beyond}"); }}'
            emulated.run([os.environ.get("CC", "cc"), "-x", "c", "-o", program, "-"], input=source)
            code = subprocess.run([self.machine.qemu, "-cpu", self.machine.cpu, program], capture_output=True, check=False).returncode
            if code not in (-4, 132):
                raise SystemExit(f"machines: {self.machine.cpu} runs {self.machine.beyond!r}, which it must not have")

    def info(self) -> dict[str, str]:
        """`lifeops info`, which must say that this machine has its kernels, for every operator."""
        found = dict(re.findall(r"^  (\S.*?)  +(.*)$", self.call("-m", "lifeops", "info"), re.MULTILINE))
        if found["CPU instruction set"] != self.machine.kernels or found["cpu"] != found["reference"]:
            raise SystemExit(f"machines: {self.machine.cpu} has other kernels than {self.machine.kernels}: {found}")
        return found

    def pytest(self, *args) -> tuple[int, int]:
        """(passed, failed) of one run, whose output is shown when it has ended: other machines' legs run beside this one."""
        report = self.folder / "tests.xml"
        report.unlink(missing_ok=True)
        options = "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={self.seed}", f"--junitxml={report}"
        command = [self.python, "-m", "pytest", *options, *args]
        done = subprocess.run(command, cwd=HERE, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(f"machines: {self.machine.cpu}: pytest {' '.join(args)}\n{done.stdout}", flush=True)
        if not report.exists():
            raise SystemExit(f"machines: {self.machine.cpu}: pytest ended without a result")
        found = counts(report)
        return found.passed, found.failed

    def demo(self) -> None:
        """Trains, measures and writes; the numbers of one epoch say nothing."""
        out = self.folder / "runs"
        self.call("-m", "lifeops", "demo", *DEMO, "--out", out)
        with (out / "life" / "table.csv").open() as file:
            if not list(csv.DictReader(file)):
                raise SystemExit(f"machines: {self.machine.cpu}: the demo's table is empty")


def versions() -> str:
    """Of what emulates and what compiled, by their own words."""
    texts = [subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
             for program in ("qemu-aarch64", "aarch64-linux-gnu-g++")]  # fmt: skip
    return "qemu " + re.search(r"version (\S+)", texts[0])[1] + ", aarch64-linux-gnu-g++ " + texts[1].split()[-1]


def row_of(machine: Machine) -> Path:
    return emulated.FOLDER / f"{machine.cpu}.row"


def leg(machine: Machine, args) -> tuple[str, int]:
    """A row of the table, and how many tests failed. The row is kept: a leg takes long, and others are run apart from it."""
    start = time.monotonic()
    here = Leg(machine, args.torch, args.cases, args.seed)
    kept = row_of(machine)
    kept.unlink(missing_ok=True)
    here.check_processor()
    found = here.info()
    print(f"machines: {machine.cpu}: {machine.kernels}, torch {found['torch']}, {time.monotonic() - start:.0f} s so far", flush=True)
    passed, failed = map(sum, zip(*(here.pytest(*files) for files in here.tests), strict=True))
    here.demo()
    cases = sum(json.loads((here.folder / "cases.json").read_text())["cases"].values())
    counts = f"{passed} tests passed, {failed} failed, {cases} fuzzed cases, the demo works"
    print(f"machines: {machine.cpu}: {counts}, {time.monotonic() - start:.0f} s", flush=True)
    python, torch = found["python"], found["torch"].split("+")[0].split()[0]
    row = f"| {machine.cpu} ({machine.what}) | {machine.kernels} | {python}, {torch} | {passed} | {cases} | runs | {failed} |"
    kept.write_text(row)
    return row, failed


def main() -> int:
    names = {machine.cpu.lower(): machine for machine in MACHINES}
    parser = argparse.ArgumentParser(prog="make machines", description=__doc__)
    parser.add_argument("--machine", choices=names, nargs="+", default=list(names), help="which; by default all")
    parser.add_argument("--torch", default=emulated.TORCH, help=f"what pip installs on aarch64 (default: {emulated.TORCH})")
    parser.add_argument("--cases", type=int, default=2, help="fuzzed cases of every property")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzed cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="machines at a time, one core each (default: one per core)")
    parser.add_argument("--page", action="store_true", help="write the table, of these and of those run before, into docs/reliability.md")
    args = parser.parse_args()
    if platform.machine() != "x86_64":
        raise SystemExit(f"machines: they are emulated on x86-64, this is {platform.machine()}")
    with ThreadPoolExecutor(args.jobs) as pool:
        rows, failed = zip(*pool.map(lambda name: leg(names[name], args), args.machine), strict=True)
    head = f"| {versions()} | kernels | Python, torch | tests passed | fuzzed cases | demo | failures |", "|---|---|---|---:|---:|---|---:|"
    print(*head, *rows, sep="\n")
    if args.page:
        put("machines", (*head, *(row_of(machine).read_text() for machine in MACHINES if row_of(machine).exists())))
    return bool(sum(failed))


if __name__ == "__main__":
    sys.exit(main())
