"""What the demo says while it works: in a terminal a bar with the time left, elsewhere a line for each training-set size that is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from lifeops.demo.train import Run


def clock(seconds: float) -> str:
    """"40 s", "2 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def time_left(done: float, total: float | None, seconds: float | None) -> str:
    """What is left of ``total`` equal pieces, ``done`` of which took ``seconds``: nothing is known before two of them are."""
    return f"about {clock(seconds / done * (total - done))} left" if total and seconds and done >= 2 else ""


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(time_left(task.completed, task.total, task.elapsed))


@contextlib.contextmanager
def counter(console: Console, what: str, total: int) -> Iterator[Callable[[], object]]:
    """A bar that a call of what is yielded moves by one of ``total``; without a terminal a line that says ``what``."""
    if not console.is_terminal:
        console.print(what, highlight=False, soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _TimeLeft()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


class Finished:
    """Counts finished runs, and without a terminal says so when a training-set size is done. ``todo``: the size of every run to come."""

    def __init__(self, console: Console, todo: Sequence[int]):
        self.console, self.left, self.total, self.start = console, list(todo), len(todo), time.monotonic()

    def __call__(self, run: Run) -> None:
        self.left.remove(run.size)
        if run.size in self.left or self.console.is_terminal:
            return
        done, seconds = self.total - len(self.left), time.monotonic() - self.start
        text = f"{run.size} images: {done} of {self.total} runs after {clock(seconds)}"
        left = time_left(done, self.total, seconds) if self.left else ""
        self.console.print(f"{text}, {left}" if left else text, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def saying_where_it_stopped(said: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C inside is a KeyboardInterrupt that says ``said()``."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(said()) from None
