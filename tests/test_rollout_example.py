"""examples/rollout_photo.py: both photographs, both maps, in numbers that are theirs, and a picture."""

import runpy
from pathlib import Path

import pytest
import torch

import lifeops

for name in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(name)

EXAMPLE = Path(__file__).parents[1] / "examples" / "rollout_photo.py"


def test_rollout_of_photographs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--out", str(tmp_path), "--steps", "1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for said in ("china: the class token draws most on", "flower: the patch in the middle draws most on", "% of fresh crops told apart"):
        assert said in out
    assert (tmp_path / "rollout_photo.png").stat().st_size > 1000


def test_its_maps_are_the_roll_out():
    script = runpy.run_path(str(EXAMPLE))
    photos = list(script["photographs"]().values())
    model = script["VisionTransformer"](**script["MODEL"], attn=lifeops.nn.LifeAttention).eval()
    images, found = script["maps"](model, photos)
    grid = tuple(n // script["PATCH"] for n in script["SIZE"])
    assert images.shape == (2, *script["SIZE"])
    expected = lifeops.rollout(model, images[:, None], "cls", prefix="normalize").maps[:, 0]
    torch.testing.assert_close(found["the class token"], expected * grid[0] * grid[1])
    row, column = script["CENTRE"]
    assert (found["the patch in the middle"][:, row, column] == 0).all()
    assert script["highest"](torch.eye(3)[:2] * 2) == "2.0 times a patch's even share in row 1 of 2, column 1 of 3"


def test_its_crops_are_parts_of_the_photograph():
    script = runpy.run_path(str(EXAMPLE))
    ramp = torch.arange(200.0).expand(1, 120, 200)  # grows to the right
    parts = script["crops"](ramp, 8, torch.Generator().manual_seed(0))
    assert parts.shape == (8, 1, *script["SIZE"])
    steps = parts[:, 0, 0, -1] - parts[:, 0, 0, 0]
    assert ((steps.abs() > 90) & (steps.abs() < 180)).all()
    assert steps.min() < 0 < steps.max()  # mirrored, or not
