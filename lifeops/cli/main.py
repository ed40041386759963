"""The command line: ``lifeops <command>`` or ``python -m lifeops <command>``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence

# command -> (module whose ``main(argv)`` runs it, imported only then; what it does)
COMMANDS = {
    "info": ("lifeops.cli.info", "versions, backends and why one is missing, environment variables"),
    "rollout": ("lifeops.cli.rollout", "which patches a model's output draws on: pictures and arrays"),
    "flops": ("lifeops.cli.flops", "parameters, multiply-accumulates and activation memory of a model, beside published sizes"),
    "demo": ("lifeops.demo.run", "train plain against LIFE, LocalViT, the DW shortcut or initialisations on small real images"),
}


_MENDABLE = ValueError, OSError, ModuleNotFoundError  # wrong input, files, missing packages


def image_pair(given: Sequence[int] | None) -> tuple[int, int] | None:
    """--img-size as (height, width)."""
    if given is None:
        return None
    if len(given) > 2 or min(given) < 1:
        raise ValueError(f"--img-size must be one or two positive numbers, got {' '.join(map(str, given))}")
    return (given[0], given[-1])


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
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("lifeops"):
            raise
        parser.exit(2, line("error", error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="lifeops",
        description="Fused token ops that give Vision Transformers local structure.",
        epilog="commands:\n" + "".join(f"  {name:<9}{text}\n" for name, (_, text) in COMMANDS.items()) + "\nlifeops COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=f"one of: {', '.join(COMMANDS)}")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="the command's own options")
    args = parser.parse_args(argv)
    module, _ = COMMANDS[args.command]
    return importlib.import_module(module).main(args.args)
