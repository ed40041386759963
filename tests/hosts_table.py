"""Every host on every system, and docs/hosts.md from it: `make hosts` runs all and writes the page, test_hosts_matrix.py checks each."""

import copy
import json
import sys
from itertools import groupby
from pathlib import Path

import host_configs_timm  # noqa: F401
import host_configs_transformers  # noqa: F401
import host_oracles as oracles
import torch
from host_configs import HOSTS, HostConfig, made
from hosts import SYSTEMS, hooks_of, timm, transformers

import lifeops
from lifeops.hosts.host import CONVERSION

PAGE = Path(__file__).parent.parent / "docs" / "hosts.md"
CELLS = Path(__file__).parent / "host_cells.json"
VERSIONS = {"timm": timm.__version__, "transformers": transformers.__version__}
COLUMNS = {  # what a refusal must begin with
    **dict.fromkeys(SYSTEMS, "convert: "), "rollout": "rollout: ", "impulse": "structured_: ", "mimetic": "structured_: ",
    **({"accelerate": "accelerate: "} if hasattr(lifeops, "accelerate") else {}),
}  # fmt: skip
LONGEST = 90
FAILS = {}  # (host, column): the cause of a cell that is wrong and known to be

HEAD = """# Hosts

Which models each function takes. Yours: look for its family (timm's name of the architecture, transformers' class) below, then for the
line that says what is special about it (registers, rotary positions, windows …); or ask it: `print(lifeops.describe(model))` says what is
known of a model without changing it, and `lifeops.convert` and the others refuse what they do not take, with the reason. "works" is
followed by the largest difference found, "mass" by the attention that an impulse is reported to move / that it moves, a number in
brackets is a refusal.

All models are in evaluation mode. With patch dropout a converted model works there alone: in training the forward pass is a ValueError.

## How it was tested

Written by `make hosts` from what `tests/test_hosts_matrix.py` finds, on {versions}: small configurations with random weights, layer
scales, biases and tables, mostly 4 x 6 patches.

`life`, `localvit`, `dw_shortcut`: `lifeops.convert(model, …)`. Every replaced module's output in a forward pass of the model is compared
with a plain PyTorch transcription, which knows grid and prefix from the configuration; LocalViT's blocks also with the original block
without its feed-forward. `lifeops.revert` then gives equal outputs and the same keys, and leaves no hook. `rollout`: the maps of the
default target, a patch and the mean against the plain product of the attention matrices that the model was seen to compute.
`impulse`, `mimetic`: `lifeops.init.structured_`; of an impulse the attention mass of the first layer as the report says it, and as the
model has it on a blank image, of a mimetic start each layer's q k and v·proj against the formula's, drawn again. {accelerate}Numbers
are the largest difference over the largest entry. A model that is refused is untouched; one whose forward passes are refused, where its
patches do not all reach the blocks, is reverted.

{counts}
"""
ACCELERATE = "`accelerate`: outputs and the image's gradient before and after `lifeops.accelerate`. "


# ------------------------------------------------------------------------------------------------ one host


class Case:
    """A host built once: its model, which stays as it is, an input, and what the model makes of it."""

    def __init__(self, host: HostConfig):
        self.host, self.model = host, made(host)
        self.x = torch.randn(2, 3, *host.size)
        self.output = self.run(self.model)

    @torch.no_grad()
    def run(self, model):
        torch.manual_seed(1)
        return oracles.tensors(model(self.x))

    def same(self, model) -> None:
        """The model is the original's twin: keys in order, weights, outputs to the bit, no hooks."""
        before, after = self.model.state_dict(), model.state_dict()
        assert list(before) == list(after), "other keys"
        assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True)), "other weights"
        assert hooks_of(model) == hooks_of(self.model), "hooks are left"
        pairs = zip(self.output, self.run(model), strict=True)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs), "other outputs"


def _within(worst: float, allowed: float = oracles.TOLERANCE) -> str:
    assert worst <= allowed, f"off by {worst:.1e}"
    return f"works {worst:.0e}"


def _converted(case, model, system):
    lifeops.convert(model, system)
    reverted = copy.deepcopy(model)
    worst = oracles.check_converted(system, case.model, model, case.x, case.host)
    case.same(lifeops.revert(reverted))
    return _within(worst)


def _rollout(case, model):
    worst = oracles.check_rollout(model, case.x, case.host)
    case.same(model)
    return _within(worst)


def _structured(case, model, method):
    report = lifeops.init.structured_(model, method, generator=torch.Generator().manual_seed(0))
    assert all(a.isfinite().all() for a, b in zip(case.run(model), case.output, strict=True) if b.isfinite().all()), "not finite"
    assert list(model.state_dict()) == list(case.model.state_dict()), "other keys"
    expected = oracles.layers(case.model, case.x)
    assert report.num_layers == expected, f"{report.num_layers} layers set, {expected} attend"
    if method == "mimetic":
        return _within(oracles.check_mimetic(model, report, torch.Generator().manual_seed(0)), 1e-3)  # a cut between singular values
    told, real = oracles.check_impulse(model, report, case.host)
    assert abs(told - real) <= 0.05, f"mass {told:.2f} reported, {real:.2f} real"
    return f"mass {told:.2f}/{real:.2f}"


def _accelerated(case, model):
    before = oracles.outputs_and_gradient(model, case.x)
    lifeops.accelerate(model)
    return _within(max(oracles.error(b, a) for a, b in zip(before, oracles.outputs_and_gradient(model, case.x), strict=True)))


def _run(case, model, column):
    if column in SYSTEMS:
        return _converted(case, model, column)
    if column in ("impulse", "mimetic"):
        return _structured(case, model, column)
    return {"rollout": _rollout, "accelerate": _accelerated}[column](case, model)


def cell(case: Case, column: str) -> str:
    """ "works …", "mass …" or "refused: …"; raises where the answer is wrong."""
    model = copy.deepcopy(case.model)
    try:
        return _run(case, model, column)
    except ValueError as refusal:  # a TypeError about a model would be an accident
        op, message = COLUMNS[column], " ".join(str(refusal).split())
        if not message.startswith(op):
            raise AssertionError(f"ValueError without {op!r}: {message}") from refusal
        case.same(lifeops.revert(model) if hasattr(model, CONVERSION) else model)  # where it is a forward pass that is refused
        message = message.removeprefix(op)
        return "refused: " + (message if len(message) <= LONGEST else message[:LONGEST].rstrip() + "…")


def row(host: HostConfig) -> dict[str, str]:
    """Every cell of a host; raises AssertionError with all that are wrong."""
    case, cells, wrong = Case(host), {}, []
    for column in COLUMNS:
        try:
            cells[column] = cell(case, column)
        except Exception as fault:  # whatever it is, it is no answer
            known = FAILS.get((host.name, column))
            cells[column] = f"fails: {known}"
            wrong += [] if known else [f"{column}: {type(fault).__name__}: {fault}"]
        else:
            wrong += [f"{column} works now"] if (host.name, column) in FAILS else []
    assert not wrong, f"{host.name}: " + "; ".join(wrong)
    return cells


def settled(cells: dict[str, str]) -> dict[str, str]:
    """Without the numbers, which differ from machine to machine."""
    return {column: text.partition(" ")[0] if text.startswith(("works", "mass")) else text for column, text in cells.items()}


# ------------------------------------------------------------------------------------------------ the page


def _shown(text: str, refusals: list[str]) -> str:
    if not text.startswith("refused: "):
        return text
    reason = text.removeprefix("refused: ")
    if reason not in refusals:
        refusals.append(reason)
    return f"[{refusals.index(reason) + 1}](#refusals)"


def page(state: dict) -> str:
    rows, versions = state["rows"], " and ".join(f"{name} {version}" for name, version in state["versions"].items())
    columns = list(next(iter(rows.values())))
    hosts = [HOSTS[name] for name in rows]
    counts = "; ".join(f"`{c}` {sum(not r[c].startswith('refused') for r in rows.values())}" for c in columns)
    of = " and ".join(f"{sum(h.library == library for h in hosts)} of {library}" for library in VERSIONS)
    counts = f"{of}. Accepted: {counts}. A number in brackets is a refusal, below."
    lines = [HEAD.format(versions=versions, counts=counts, accelerate=ACCELERATE * ("accelerate" in columns))]
    refusals: list[str] = []
    for library, group in groupby(hosts, lambda host: host.library):
        lines += [f"## {library}", "", "| family | host | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
        for host in group:
            cells = [_shown(rows[host.name][column], refusals) for column in columns]
            lines.append(f"| {host.family} | {host.name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Refusals", ""] + [f"{i}. {reason.replace('|', chr(92) + '|')}" for i, reason in enumerate(refusals, 1)]
    return "\n".join(lines) + "\n"


def read() -> dict:
    return json.loads(CELLS.read_text())


def main() -> None:
    """Run all; write the page unless a cell is wrong."""
    rows, wrong = {}, []
    for host in sorted(HOSTS.values(), key=lambda host: list(VERSIONS).index(host.library)):
        try:
            rows[host.name] = row(host)
        except AssertionError as fault:
            wrong.append(str(fault))
    if wrong:
        sys.exit("\n".join(wrong))
    state = {"versions": VERSIONS, "rows": rows}
    CELLS.write_text(json.dumps(state, indent=0, ensure_ascii=False) + "\n")
    PAGE.write_text(page(state))


if __name__ == "__main__":
    main()
