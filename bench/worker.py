"""One fresh process of a benchmark run: times the problems it reads from stdin, one a line, and answers each with a line of JSON.

It times nothing while it waits for the next line: meanwhile rows are saved.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from itertools import cycle

import torch

from bench import ceilings, columns, device, systems
from bench.case import Case, Inputs, check, inputs_of, runner
from bench.measure import Timing, interleaved
from bench.problems import KINKED, Problem, cold_too, level_of

SETS = 2  # of inputs, used in turn
ROUNDS = {"op": 5, "block": 15, "model": 5}  # at least: what a block costs with an op and without lies a few hundredths apart


def wrong_on(case: Case, i: Inputs) -> dict[str, str]:
    """What is wrong with the results of which variants on ``i``."""
    wrong, known = {}, {}
    for name, v in case.variants.items():
        try:
            check(case, v, i, known)
        except (AssertionError, RuntimeError) as error:  # a wrong result, or none, has no speed
            wrong[name] = str(error)[:300]
    return wrong


def checked(case: Case, seed: int, where: str) -> tuple[list[Inputs], dict[str, str]]:
    """The sets of inputs, and what is wrong on any of them; those variants are taken out of ``case``.

    LocalViT's h-swish has kinks: where a value lies within rounding of one, the right gradient in float32 is not that in float64 (seen
    in one of six draws of vit_localvit). Those inputs are drawn anew, twice at most; what is wrong on all three is wrong.
    """
    kinked = case.problem.system in KINKED and case.problem.mode != "fwd"
    sets, wrong = [], {}
    for n in range(SETS):
        for attempt in range(3 if kinked else 1):
            with torch.device(where):
                i = inputs_of(case, 1000 * seed + n + 100 * attempt)
            found = wrong_on(case, i)
            if not found:
                break
        sets.append(i)
        wrong |= found
    for name in wrong:
        del case.variants[name]
    return sets, wrong


def timed(runs: dict, where: str, cache: str, seconds: float, least: int) -> dict[str, Timing]:
    if where == "cpu":
        return interleaved(runs, seconds, cache, least)
    turning = {name: functools.partial(lambda turn: next(turn)(), cycle(of)) for name, of in runs.items()}
    return device.interleaved(turning, device.clock(where, seconds, cold=cache == "cold"))


def measured(p: Problem, args) -> list[dict]:
    """One entry per cache: every right variant's times and columns, the ceilings, and what was wrong."""
    with torch.device(args.device):
        case = systems.case(p, p in args.compiled, args.backend, args.device)
    sets, wrong = checked(case, args.seed, args.device)
    costs = {name: columns.facts(case, name, sets[0], args.device)._asdict() for name in case.variants}
    runs = {name: [runner(v, p.mode, i) for i in sets] for name, v in case.variants.items()}
    shared = {"problem": p, "wrong": wrong, "issue_ms": ceilings.issue_ms(p, args.device)}
    if not runs:
        return [shared | {"cache": "warm", "variants": {}, "clone_gbs": None, "gemm_tflops": None}]
    moved = costs["lifeops" if "lifeops" in costs else next(iter(costs))]["bytes"]
    source = ceilings.clone_source(moved, args.device)
    runs["clone"], moved = [source.clone], 2 * source.nbytes
    costs["clone"] = columns.Facts(moved, 0, source.nbytes, None, 1)._asdict()
    found = []
    for cache in args.cache.split(",") if args.cache != "auto" else ("warm", "cold") if cold_too(p) else ("warm",):
        times = timed(runs, args.device, cache, args.seconds, ROUNDS[level_of(p.system)])
        variants = {name: t._asdict() | costs[name] for name, t in times.items()}
        rates = {"clone_gbs": moved / times["clone"].q25 / 1e6, "gemm_tflops": ceilings.gemm_tflops(p.dtype, args.device)}
        found.append(shared | {"cache": cache, "variants": variants} | rates)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"threads": 2, "seconds": 0.6, "seed": 1, "device": "cpu", "cache": "auto", "backend": "auto"}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.compiled = set()
    for line in sys.stdin:
        fields, compiles = json.loads(line)
        p = Problem(*fields)
        args.compiled |= {p} if compiles else set()
        print(json.dumps(measured(p, args)), flush=True)


if __name__ == "__main__":
    main()
