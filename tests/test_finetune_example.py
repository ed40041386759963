"""examples/finetune_digits.py: both models begin alike, and the table, the rows and the picture are written."""

import csv
import runpy
from pathlib import Path

import pytest

from conftest import declare_torchvision_ops

declare_torchvision_ops()
for name in ("timm", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(name)

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_digits.py"


def test_finetune(tmp_path, monkeypatch, capsys):
    options = ("--out", str(tmp_path), "--sizes", "20", "--seeds", "2", "--pretrain-steps", "3", "--steps", "25")
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert stop.value.code == 0
    rows = list(csv.DictReader((tmp_path / "finetune.csv").open()))
    curves = {(row["seed"], row["model"], row["step"]): float(row["accuracy"]) for row in rows}
    assert len(curves) == len(rows) == 2 * 2 * 3  # seeds, models, steps 0, 20 and 25
    for seed in "01":
        assert curves[seed, "as it is", "0"] == curves[seed, "dw_shortcut", "0"]
    assert any(curves[seed, model, "25"] != curves[seed, model, "0"] for seed, model, _ in curves)
    assert (tmp_path / "finetune.png").stat().st_size > 1000
    assert "labelled images" in capsys.readouterr().out
