"""The command line: ``lifeops <command>`` or ``python -m lifeops <command>``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

from lifeops import __version__


class Command(NamedTuple):
    """``module``, whose ``main(argv)`` runs it, is imported only then, and if what it ``needs`` (import names to packages) is installed."""

    module: str
    does: str
    needs: Mapping[str, str] = {}


_PICTURES = {"matplotlib": "matplotlib", "numpy": "numpy"}
COMMANDS = {
    "info": Command("lifeops.cli.info", "versions, backends and why one is missing, environment variables"),
    "rollout": Command(
        "lifeops.cli.rollout", "which patches a model's output draws on: pictures and arrays", _PICTURES | {"PIL": "pillow"}
    ),
    "flops": Command("lifeops.cli.flops", "parameters, multiply-accumulates and activation memory of a model, beside published sizes"),
    "demo": Command(
        "lifeops.demo.run",
        "train plain against LIFE, LocalViT, the DW shortcut or initialisations on small real images",
        _PICTURES | {"sklearn": "scikit-learn", "rich": "rich"},
    ),
}


_MENDABLE = ValueError, OSError, ModuleNotFoundError  # wrong input, files, missing packages


def image_pair(given: Sequence[int] | None) -> tuple[int, int] | None:
    """--img-size as (height, width)."""
    if given is None:
        return None
    if len(given) > 2 or min(given) < 1:
        raise ValueError(f"--img-size must be one or two positive numbers, got {' '.join(map(str, given))}")
    return (given[0], given[-1])


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaint about wrong options is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help)\n")


def _run(name: str, args: Sequence[str]) -> int:
    """One command; without the packages that it needs one line that says what to type, and 1."""
    command = COMMANDS[name]
    missing = [package for module, package in command.needs.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"lifeops {name} needs {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    return importlib.import_module(command.module).main(args)


@contextlib.contextmanager
def told_plainly(parser: argparse.ArgumentParser, kinds: tuple[type[Exception], ...] = _MENDABLE) -> Iterator[None]:
    """What users can mend is one line on stderr: warnings, and errors of ``kinds``, which exit with 2."""

    def line(kind: str, message) -> str:
        return f"{parser.prog}: {kind}: {' '.join(str(message).split())}\n"

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *place: sys.stderr.write(line("warning", message))
            yield
    except kinds as error:
        if isinstance(error, BrokenPipeError) or (isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("lifeops")):
            raise
        parser.exit(2, line("error", error))


def ended_plainly(prog: str, command: Callable[[], object]) -> int:
    """The exit code of ``command()``, as shells expect it: what it returns (0 for what is no int), for Ctrl-C one line and 130, for files
    and output that cannot be written one line and 2, for a reader that has gone (``| head``) no line and 141.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt as interrupt:
        print(f"{prog}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _drop_output()
        return 128 + 13  # SIGPIPE, which Windows' signal module lacks
    except OSError as error:
        _drop_output()
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """What standard output cannot take is written to nowhere: Python would try again, and complain, as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = Parser(
        prog="lifeops",
        description="Fused token ops that give Vision Transformers local structure.",
        epilog="commands:\n" + "".join(f"  {name:<9}{command.does}\n" for name, command in COMMANDS.items()) + "\nlifeops COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lifeops {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=f"one of: {', '.join(COMMANDS)}")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="the command's own options")
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    return ended_plainly(f"lifeops {args.command}", lambda: _run(args.command, args.args))
