"""The GPU's benchmark set: ops, blocks and whole models beside their baselines, one row per variant, written as it is measured.

    python -m bench.gpu warm --out DIR --jobs 16             Triton's kernels of all of it, compiled into TRITON_CACHE_DIR
    python -m bench.gpu ops --out DIR [--seconds 120]        all ops and blocks; cold cache, eager, CUDA graphs, kernels alone
    python -m bench.gpu models --out DIR                     training and inference steps of whole models, plain and converted

``--device cpu --tiny`` rehearses it without a GPU. A variant whose result is wrong on the tensors to be timed gets no number, and no
variant costs another its row: what raises gets a note, and what ends the process, breaks its CUDA context or never ends is left out by the
process that goes on. No new problem is started when ``--seconds`` are over, so that a run that is cut off still has the first rows.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from bench import device as timing
from bench import gpu_set, warm
from bench.problems import Problem
from bench.rows import commit, triton_version
from lifeops import registry

FIELDS = ["device", "torch", "triton", "commit", *Problem._fields, "variant", "how", "median_ms", "q25_ms", "q75_ms", "peak_bytes", "note"]
BROKEN = 77  # exit status of a process whose CUDA context is broken
PATIENCE = 45.0  # seconds for one problem, then its process is ended
ALL = "all"  # of a problem's variants, in the place of one's name


class Rows:
    """A CSV file that gets every row as soon as there is one; rows of an earlier process stay."""

    def __init__(self, path: Path, device: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, FIELDS, restval="")
        if not self.file.tell():
            self.writer.writeheader()
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.facts = {"device": name, "torch": torch.__version__, "triton": triton_version(), "commit": commit()}

    def add(self, p: Problem, variant: str, how: str, time=None, peak=None, note=""):
        row = {**self.facts, **p._asdict(), "variant": variant, "how": how, "note": note}
        if time is not None:
            row.update(median_ms=round(time.median, 5), q25_ms=round(time.q25, 5), q75_ms=round(time.q75, 5))
        if peak is not None:
            row["peak_bytes"] = peak
        self.writer.writerow(row)
        self.file.flush()


class Progress:
    """A file of what was begun and what was done, by which the next process knows what the last one ended in."""

    def __init__(self, path: Path):
        self.path, self.done, self.lost = path, set(), {}
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for what, name, variant in lines:
            if what == "done":
                self.done.add(name)
            elif what == "lost":
                self.lost.setdefault(name, set()).add(variant)
        self.ended_in = tuple(lines[-1][1:]) if lines and lines[-1][0] == "try" else None
        if self.ended_in:
            self._write("lost", *self.ended_in)
            self.lost.setdefault(self.ended_in[0], set()).add(self.ended_in[1])

    def _write(self, *line) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def trying(self, name: str, variant: str) -> None:
        self._write("try", name, variant)

    def finish(self, name: str) -> None:
        self._write("done", name, ALL)
        self.done.add(name)


class Measurement:
    """One problem's variants, each step of which may fail for each of them."""

    def __init__(self, p: Problem, name: str, c: timing.Clock, rows: Rows, progress: Progress):
        self.p, self.name, self.clock, self.rows, self.progress = p, name, c, rows, progress

    def each(self, how: str, runs: dict[str, Callable], step: Callable[[Callable], object] | None = None) -> dict[str, object]:
        """``step`` of every run, or the run itself; those that raise get a note and are left out of what is returned."""
        found = {}
        for name, fn in runs.items():
            self.progress.trying(self.name, name)
            try:
                found[name] = step(fn) if step else fn()
                timing.synchronize(self.clock.device)
            except Exception as error:
                self.rows.add(self.p, name, how, note=registry.one_line(error))
                if timing.broken():
                    raise
        return found

    def checked(self, runs: dict[str, Callable], checks: dict[str, Callable]) -> dict[str, Callable]:
        """``runs`` without those that an earlier process ended in, those that are wrong and those that raise."""
        lost = self.progress.lost.get(self.name, set())
        runs = {name: fn for name, fn in runs.items() if name not in lost}
        right = self.each("none", {name: fn for name, fn in checks.items() if name in runs})
        runs = {name: fn for name, fn in runs.items() if name in right or name not in checks}
        ran = self.each("none", runs)
        return {name: fn for name, fn in runs.items() if name in ran}

    def timed(self, runs: dict[str, Callable]) -> None:
        """Eager calls behind a flushed cache, CUDA graphs, the kernels alone where they are short, and peak memory."""
        peaks = self.each("none", runs, lambda fn: timing.peak_bytes(fn, self.clock.device))
        runs = {name: fn for name, fn in runs.items() if name in peaks}
        shortest = self._interleaved("eager", runs, peaks)
        if self.clock.device == "cuda":
            graphs = self.each("graph", {name: fn for name, fn in runs.items() if not name.startswith("compiled")}, timing.captured)
            shortest |= self._interleaved("graph", graphs, peaks)
        short = {name: fn for name, fn in runs.items() if shortest.get(name, timing.SHORT_MS) < timing.SHORT_MS}
        for name, t in self.each("kernels", short, lambda fn: timing.kernel_times(fn, self.clock)).items():
            self.rows.add(self.p, name, "kernels", t, peaks[name])

    def _interleaved(self, how: str, runs: dict[str, Callable], peaks: dict) -> dict[str, float]:
        """{variant: median} of those called in turn."""
        if not runs:
            return {}
        self.progress.trying(self.name, ALL)
        times = timing.interleaved(runs, self.clock)
        for name, t in times.items():
            self.rows.add(self.p, name, how, t, peaks[name])
        return {name: t.median for name, t in times.items()}


Job = tuple[Problem, str, Callable[[], tuple[dict[str, Callable], dict[str, Callable]]]]


def op_jobs(tiny: bool, device: str) -> Iterator[Job]:
    for p in gpu_set.problems(tiny):
        yield p, "", lambda p=p: gpu_set.variants(p, device)
    for p in gpu_set.last(tiny):
        yield p, "compiled", lambda p=p: (gpu_set.compiled(p, device), {})


def model_jobs(tiny: bool, device: str) -> Iterator[Job]:
    for p, makers in gpu_set.models(tiny):
        yield p, "", lambda p=p, makers=makers: (gpu_set.model_runs(p, makers, device), {})


def measure(p: Problem, name: str, make: Callable, c: timing.Clock, rows: Rows, progress: Progress) -> None:
    """One problem: every variant checked, then timed."""
    progress.trying(name, ALL)
    m = Measurement(p, name, c, rows, progress)
    m.timed(m.checked(*make()))


def work(jobs: Iterable[Job], c: timing.Clock, rows: Rows, progress: Progress, seconds: float) -> int:
    """Measure what is not done yet, until the time is over; BROKEN where the CUDA context is."""
    start = time.perf_counter()
    for p, kind, make in jobs:
        name = f"{p.system} {p.mode} {p.name} {kind}".strip()
        if progress.ended_in and progress.ended_in[0] == name:
            rows.add(p, progress.ended_in[1], "none", note="the process ended in it")
        if name in progress.done or ALL in progress.lost.get(name, ()):
            continue
        if time.perf_counter() - start > seconds:
            print(f"stopped before {name}: {seconds:.0f} s are over", flush=True)
            break
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            measure(p, name, make, c, rows, progress)
        except Exception as error:
            rows.add(p, ALL, "none", note=registry.one_line(error))
            if timing.broken():
                return BROKEN
        finally:
            faulthandler.cancel_dump_traceback_later()
        progress.finish(name)
        print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)
    print(f"compiled by Triton meanwhile: {warm.counts['compiled']}", flush=True)
    return 0


def supervise(command: list[str], out: Path, stage: str, seconds: float) -> int:
    """Processes that measure, the next one after each that ended before its work was done."""
    start, progress = time.monotonic(), out / f"{stage}.progress"
    for path in (progress, out / f"{stage}.csv"):
        path.unlink(missing_ok=True)
    while True:
        before, left = progress.stat().st_size if progress.exists() else 0, max(0.0, seconds - (time.monotonic() - start))
        code = subprocess.run([*command, "--seconds", str(left), "--worker"], check=False).returncode
        if code == 0 or not progress.exists() or progress.stat().st_size == before:
            return code
        print(f"the process ended with {code}: {progress.read_text().splitlines()[-1]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("warm", "ops", "models"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="no new problem is started after these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny sizes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.gpu: no CUDA device; `--device cpu --tiny` rehearses the run")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage == "warm":
        return int(warm.run(list(gpu_set.problems(args.tiny)), args.device, args.jobs, args.seconds) > 0)
    if not args.worker:
        return supervise([sys.executable, "-m", "bench.gpu", *argv], args.out, args.stage, args.seconds)
    registry.load("reference")
    if triton_version() != "none":
        warm.listen()
    jobs = (op_jobs if args.stage == "ops" else model_jobs)(args.tiny, args.device)
    c = timing.clock(args.device, 0.02 if args.tiny else 0.25)
    code = work(jobs, c, Rows(args.out / f"{args.stage}.csv", args.device), Progress(args.out / f"{args.stage}.progress"), args.seconds)
    if code == BROKEN:
        os._exit(code)  # destructors of a broken context may wait for ever
    return code


if __name__ == "__main__":
    raise SystemExit(main())
