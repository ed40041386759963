"""Annotations of what is public: that they are there, that a type checker finds wrong calls by them, that they allow what runs."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import lifeops
from lifeops import config, options
from lifeops.attention_maps import rollout
from lifeops.init import structured
from lifeops.integrations.convert import SYSTEMS
from lifeops.models.regionvit import CORNER_MASKS, STEMS
from lifeops.nn import conv_projection, localvit, pooling_attention, relative
from lifeops.ops import rollout_step
from lifeops.ops.channel import activations
from lifeops.ops.life_qkv import spec as life_spec
from lifeops.ops.token_dwconv import spec as dwconv_spec
from lifeops.ops.token_pool import spec as pool_spec

HERE = Path(__file__).parent
MISTAKES = HERE / "typed" / "mistakes.py"


def test_a_type_checker_finds_every_mistake_and_no_other(tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}", str(MISTAKES)]
    env = {**os.environ, "MYPYPATH": str(Path(lifeops.__file__).parent.parent)}
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False).stdout
    found = {(int(line), code) for line, code in re.findall(r"mistakes\.py:(\d+): error: .*\[([a-z-]+)\]$", said, re.M)}
    lines = enumerate(MISTAKES.read_text().splitlines(), start=1)
    assert found == {(n, match[1]) for n, line in lines if (match := re.search(r"# error: ([a-z-]+)$", line))}, said


CHECKED = {
    "Backend": config.BACKENDS,
    "Prefix": dwconv_spec.PREFIX,
    "MapPrefix": rollout.PREFIX,
    "PoolMode": (*pool_spec.MODES, "subsample"),
    "HeadFusion": rollout_step.FUSIONS,
    "AuxKey": life_spec.AUX_KEYS,
    "Act": activations.PROLOGUES,
    "GateAct": tuple(localvit.ACTS),
    "Projection": conv_projection.METHODS,
    "Pooling": pooling_attention.MODES,
    "System": tuple(SYSTEMS),
    "Initialisation": structured.METHODS,
    "Resize": relative.RESIZES,
    "Stem": STEMS,
    "CornerMask": CORNER_MASKS,
}


@pytest.mark.parametrize("name", CHECKED)
def test_types_allow_what_is_checked_at_run_time(name):
    assert set(get_args(getattr(options, name))) == set(CHECKED[name])


def callables():
    for module in (lifeops, lifeops.nn, lifeops.models, lifeops.init):
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isclass(found) and not issubclass(found, (tuple, Exception)):
                yield f"{module.__name__}.{name}", found.__init__
            elif inspect.isfunction(found):
                yield f"{module.__name__}.{name}", found


@pytest.mark.parametrize(("name", "function"), tuple(callables()))
def test_everything_public_is_annotated(name, function):
    signature = inspect.signature(function)
    parameters = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    assert not parameters
    assert function.__name__ == "__init__" or signature.return_annotation is not signature.empty
