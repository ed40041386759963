"""One fresh process of a benchmark run: times the problems it reads from stdin, writes one JSON row per variant."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from bench import systems
from bench.measure import interleaved
from bench.problems import Problem


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for fields in json.load(sys.stdin):
        p = Problem(*fields)
        variants, check = systems.build(p)
        try:
            check()
        except AssertionError as error:  # a wrong result has no speed
            print(json.dumps({"problem": p, "error": str(error)}), flush=True)
            continue
        times = interleaved(variants, args.seconds)
        print(json.dumps({"problem": p, "times": times}), flush=True)


if __name__ == "__main__":
    main()
