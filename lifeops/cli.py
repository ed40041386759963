"""The command line: ``lifeops <command>`` or ``python -m lifeops <command>``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# command -> (module whose ``main(argv)`` runs it, imported only then; what it does)
COMMANDS = {
    "info": ("lifeops.info", "versions, backends and why one is missing, environment variables"),
    "rollout": ("lifeops.rollout_cli", "which patches a model's output draws on: pictures and arrays"),
    "flops": ("lifeops.flops_cli", "parameters, multiply-accumulates and activation memory of a model, beside published sizes"),
    "demo": ("lifeops.demo.run", "train plain against LIFE, LocalViT, the DW shortcut or initialisations on small real images"),
}


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
