"""The demo from the command line to the files it writes."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import torch

from lifeops.cli.main import Parser, told_plainly
from lifeops.demo import data
from lifeops.demo.data import Images
from lifeops.demo.measure import compare
from lifeops.demo.train import SYSTEMS, Recipe, Run, System, build, make_optimizer, run_one, tiny, trained, training_loss
from lifeops.demo.unfinished import Unfinished
from lifeops.files import make_folder, save

SIZES, QUICK_SIZES = (50, 100, 300, 1000), (50, 300)
SMALL_ROUNDS, LARGE_ROUNDS = 30, 5  # timed steps of the demo's own model, and of one of a published size
IMPULSE_SIZES = (50, 300)  # four models for each instead of two


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lifeops demo",
        description="Train a small DeiT from scratch on scikit-learn's digits, plain and with local structure (same seeds, data"
        " order and schedule), and compare accuracy, parameters, MACs, time and memory. Writes OUT/<system>/table.csv, table.md,"
        " curves.png, attention.png (impulse: heads.png) and the models' weights, <model>.pt, for `lifeops rollout`. A demo that was"
        " interrupted goes on where it stopped: what it trained is in OUT/<system>/unfinished until it ends.",
    )
    choices = [*SYSTEMS, "impulse"]
    parser.add_argument("--system", choices=choices, default="life", help="what to compare with the plain model (default: life)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder to write to (default: runs)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per model and training-set size (default: 3)")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"training-set sizes (default: {' '.join(map(str, SIZES))}; impulse: 50 300)")
    parser.add_argument("--epochs", type=int, help=f"passes over the training set (default: {Recipe().steps} steps at every size)")
    parser.add_argument("--jobs", type=int, help="training runs at a time, one thread each (default: one per CPU core)")
    parser.add_argument("--quick", action="store_true", help="two sizes, half the steps, costs of the demo's own model only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if any(n is not None and n < 1 for n in (args.seeds, args.epochs, args.jobs)):
        parser.error("--seeds, --epochs and --jobs must be at least 1")
    args.sizes = sorted(set(args.sizes or (QUICK_SIZES if args.quick else IMPULSE_SIZES if args.system == "impulse" else SIZES)))
    if not data.MIN_SIZE <= args.sizes[0] <= args.sizes[-1] <= data.MAX_SIZE:
        parser.error(f"--sizes must be between {data.MIN_SIZE} and {data.MAX_SIZE}, got {args.sizes}")
    with told_plainly(parser, (OSError,)):
        run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from lifeops.demo import report
    from lifeops.demo.progress import saying_where_it_stopped

    console = Console()
    recipe = replace(Recipe(), steps=Recipe().steps // 2 if args.quick else Recipe().steps, epochs=args.epochs)
    if args.system == "impulse":  # initialisations of the plain model: nothing to measure beside accuracy
        from lifeops.demo import impulse

        return impulse.run(args, console, recipe, train_all, args.jobs or _num_cores())
    system = SYSTEMS[args.system]
    folder = make_folder(args.out / system.name)
    unfinished = Unfinished(folder / "unfinished", recipe)
    runs = train_all(console, system, args.sizes, args.seeds, recipe, args.jobs or _num_cores(), unfinished)
    with saying_where_it_stopped(lambda: f"stopped after training, while costs were measured; {_goes_on(unfinished)}"):
        costs = measure_all(console, system, recipe, quick=args.quick)
    tables = [report.accuracy_table(system, runs), *(report.cost_table(system, setting, models) for setting, models in costs.items())]
    for table in tables:
        table.print(console)
    report.write_csv(folder / "table.csv", system, runs, costs)
    report.write_markdown(folder / "table.md", tables)
    report.plot_curves(folder / "curves.png", system, runs)
    report.plot_attention(folder / "attention.png", system, runs, recipe)
    for kept in (r for r in runs if r.weights is not None):
        save({"model": trained(kept, recipe).state_dict()}, folder / f"{kept.model}.pt")
    unfinished.clear()
    console.print(f"Tables, curves and attention maps are in {folder}{os.sep}", soft_wrap=True)


def train_all(console, system: System, sizes: Sequence[int], seeds: int, recipe: Recipe, jobs: int, unfinished: Unfinished) -> list[Run]:
    """Every run of the demo. Models this small gain nothing from threads, so runs go side by side with one thread each."""
    from lifeops.demo.progress import Finished, counter, saying_where_it_stopped

    # the weights of one pair are kept, for the attention maps
    todo = [(m, size, seed, recipe, size == sizes[-1] and seed == 0) for size in sizes for seed in range(seeds) for m in system.trained]
    found = {(m, size, seed): unfinished.load(m, size, seed, keep) for m, size, seed, _, keep in todo}
    left = [arguments for arguments in todo if found[arguments[:3]] is None]
    text = f"Training {len(todo)} models: {', '.join(system.trained)} x {seeds} seeds x {', '.join(map(str, sizes))} images"
    if len(left) < len(todo):
        text += f"; {len(todo) - len(left)} of them are done, in an earlier demo that did not end ({unfinished.folder})"
    console.print(text, highlight=False, soft_wrap=True)
    jobs, finished = min(jobs, len(left)), Finished(console, [size for _, size, *_ in left])

    def stopped() -> str:
        return f"stopped after {sum(run is not None for run in found.values())} of {len(todo)} runs; {_goes_on(unfinished)}"

    with saying_where_it_stopped(stopped), counter(console, f"training, {jobs} at a time", len(left)) as count:
        for run in _results(left, jobs):
            unfinished.keep(run)
            found[run.model, run.size, run.seed] = run
            finished(run)
            count()
    return list(found.values())


def _goes_on(unfinished: Unfinished) -> str:
    return f"the same command goes on from there ({unfinished.folder})"


def _results(todo: list[tuple], jobs: int):
    """The runs of ``todo`` as they end. No process outlives the one that started it, however that ends."""
    if jobs <= 1:
        yield from (run_one(*arguments) for arguments in todo)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads half alive
    pool, before = ProcessPoolExecutor(jobs, context, initializer=_prepare_worker), set(multiprocessing.active_children())
    try:
        with _deaf_to_interrupts():
            futures = [pool.submit(run_one, *arguments) for arguments in todo]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a training process was killed from outside (is there enough memory for --jobs of them?)") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()


@contextlib.contextmanager
def _deaf_to_interrupts():
    """Processes started inside do not hear Ctrl-C, which a terminal sends to all of them: the one that started them ends them. It hears
    one that comes meanwhile behind this.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start would take the block away
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker() -> None:
    """One thread, and an end when the demo's process ends: killed, it could not tell."""
    torch.set_num_threads(1)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def measure_all(console, system: System, recipe: Recipe, quick: bool) -> dict[str, dict]:
    """Setting to model to :class:`lifeops.demo.measure.Cost`: the demo's model and, unless ``quick``, DeiT-Tiny at 224."""
    from lifeops.demo.progress import counter

    costs, small, large = {}, SMALL_ROUNDS, 0 if quick else LARGE_ROUNDS
    with counter(console, "measuring time and memory of training steps", len(system.labels) * (small + large)) as count:
        models = {name: build(name, recipe) for name in system.labels}
        batch = data.load()[0].take(slice(recipe.batch_size))
        setting = f"a training step of the demo's model, batch {recipe.batch_size}, 1 thread"
        costs[setting] = _measure(models, batch, recipe, small, count)
        if large:
            models = {name: tiny(name) for name in system.labels}
            batch = Images(torch.randn(2, 3, 224, 224), torch.arange(2))
            costs[f"a training step of {system.tiny}, 224 x 224, batch 2, 1 thread"] = _measure(models, batch, recipe, large, count)
    return costs


def _measure(models, batch: Images, recipe: Recipe, rounds: int, count: Callable[[], object]):
    optimizers = {id(model): make_optimizer(model, recipe) for model in models.values()}

    def step(model) -> None:
        training_loss(model, batch).backward()
        optimizers[id(model)].step()
        optimizers[id(model)].zero_grad()

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, a busy core stalls a whole step, and ratios say more about the neighbours than the model
    try:
        return compare(models, step, batch.x[:1], rounds, count)
    finally:
        torch.set_num_threads(before)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
