"""examples/segment_nuclei.py and detect_nuclei.py: the picture's parts, crops and classes, a short run that is broken off and goes on,
what it writes, and DETR's loss written down anew.
"""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import declare_torchvision_ops

for name in ("matplotlib", "rich", "PIL"):
    pytest.importorskip(name)

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch):
    """Imports an example by its name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: __import__(name)


@pytest.fixture(scope="module")
def own_picture(tmp_path_factory):
    """Discs on noise, as --image and --mask."""
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("picture"), np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :288]
    mask = np.zeros((64, 288), np.uint16)
    for number, (row, column) in enumerate([(20, 30), (40, 90), (15, 150), (44, 175), (20, 240), (48, 262)], start=1):
        mask[(rows - row) ** 2 + (columns - column) ** 2 < 130] = number
    image = (20 + 60 * (mask > 0) + generator.integers(0, 10, mask.shape)).astype(np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "mask.tif")
    return folder / "image.png", folder / "mask.tif"


def test_parts_of_the_picture(examples, own_picture):
    nuclei = examples("nuclei")
    train, test = nuclei.load(*own_picture)
    assert (train.image.shape, test.image.shape) == ((1, 64, 216), (1, 64, 72))
    whole = torch.cat((train.image, test.image), 2)
    torch.testing.assert_close((whole.mean(), whole.std()), (torch.tensor(0.0), torch.tensor(1.0)), atol=1e-5, rtol=0)
    assert (train.mask.unique().tolist(), test.mask.unique().tolist()) == ([0, 1, 2, 3, 4], [0, 5, 6])
    image, mask = nuclei.tiles(nuclei.Picture(torch.arange(2 * 128 * 64).view(1, 128, 128), torch.arange(128 * 128).view(128, 128)))
    assert (image.shape, mask.shape) == ((4, 1, 64, 64), (4, 64, 64))
    assert mask[1, 0, 0] == 64
    assert mask[2, 0, 0] == 64 * 128
    assert torch.equal(image[:, 0], mask)


def test_outlines(examples):
    """Both sides of an edge, also between two nuclei, and nothing at the border of the picture."""
    mask = torch.zeros(7, 8, dtype=torch.int64)
    mask[:, 2:5], mask[:, 5:] = 4, 9
    assert examples("nuclei").classes_of(mask)[3].tolist() == [0, 2, 2, 1, 2, 2, 1, 1]


def test_crops(examples):
    """Of every place and every way, picture and mask alike."""
    nuclei = examples("nuclei")
    numbers = torch.arange(70 * 66).view(70, 66)
    image, mask = nuclei.random_crops(nuclei.Picture(numbers[None].float(), numbers), 200, torch.Generator().manual_seed(0))
    assert torch.equal(image[:, 0].long(), mask)
    corners = mask[:, ::63, ::63].flatten(1)
    assert len({tuple((c - c.min()).tolist()) for c in corners}) == 8
    assert len({c.min().item() for c in corners}) == 7 * 3
    turned = torch.stack([nuclei.turned(numbers, way) for way in (0, 2, 4, 6)])
    assert torch.equal(turned[1], numbers.flip(0, 1))
    assert torch.equal(turned[2], numbers.flip(1))
    assert torch.equal(turned[3], numbers.flip(0))


def test_intersections_over_unions(examples):
    wanted = torch.tensor([0, 0, 0, 1, 1, 1])
    found = torch.tensor([0, 0, 1, 1, 1, 2])
    assert examples("segment_nuclei").intersections_over_unions(found, wanted) == [pytest.approx(2 / 3), pytest.approx(2 / 4), 0]
    assert examples("segment_nuclei").intersections_over_unions(found[:2], wanted[:2]) == [1, 1, 1]


def run(monkeypatch, out, picture, *options):
    """What the script exits with."""
    image, mask = picture
    options = ("--columns", "80", "--seeds", "1", "--steps", "6", "--image", str(image), "--mask", str(mask), *options)
    monkeypatch.setattr("sys.argv", ["segment_nuclei.py", "--out", str(out), *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "segment_nuclei.py"), run_name="__main__")
    return stop.value.code


def test_segment(examples, monkeypatch, tmp_path, own_picture, capsys):
    """Broken off behind the first model and gone on with: the same results as in one go."""
    segment, done = examples("segment_nuclei"), []

    def interrupted(*one):
        done.append(one[:3])
        if len(done) == 2:
            raise KeyboardInterrupt
        return train_one(*one)

    train_one = segment.train_one
    monkeypatch.setattr(segment, "train_one", interrupted)
    image, mask = map(str, own_picture)
    argv = ["x", "--columns", "80", "--seeds", "1", "--steps", "6", "--image", image, "--mask", mask, "--out", str(tmp_path / "broken")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(KeyboardInterrupt):
        segment.main()
    segment.main()
    assert done == [("plain", 80, 0), ("life", 80, 0), ("life", 80, 0)]
    assert run(monkeypatch, tmp_path / "whole", own_picture) == 0
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {"results.json", "table.md", "predictions.png", "rollout.png"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (tmp_path / "whole").glob("*.png"))
    broken, whole = ((tmp_path / name / "results.json").read_text() for name in ("broken", "whole"))
    assert broken == whole
    found = json.loads(whole)
    assert [(r["model"], r["columns"], r["seed"], len(r["mIoU"])) for r in found["runs"]] == [("plain", 80, 0, 5), ("life", 80, 0, 5)]
    for r in found["runs"]:
        assert r["mIoU"][-1] == [6, pytest.approx(sum(r["IoU"].values()) / 3, abs=0.02)]
    assert "| 80 |" in (tmp_path / "whole" / "table.md").read_text(encoding="utf-8")
    assert "columns trained on" in capsys.readouterr().out


def test_the_page_is_what_the_results_say(examples):
    """docs/dense.md has the table of docs/dense.json."""
    segment, docs = examples("segment_nuclei"), EXAMPLES.parent / "docs"
    runs = []
    for r in json.loads((docs / "dense.json").read_text())["runs"]:
        at, values = zip(*r["mIoU"], strict=True)
        runs.append(segment.Run(r["model"], r["columns"], r["seed"], at=[*at], accuracies=[value / 100 for value in values]))
    assert len(runs) == 2 * 2 * 3
    assert segment.table(runs).markdown() in (docs / "dense.md").read_text(encoding="utf-8")


def test_maps_of_classes(examples, own_picture):
    """A class's soft target is its pixels' mean probability over its share; the hard one the patches where that is the largest."""
    nuclei, segment = examples("nuclei"), examples("segment_nuclei")
    torch.manual_seed(0)
    model, (train, test) = segment.Segmenter("life").eval(), nuclei.load(*own_picture)
    images, shares = test.image[None, :, :, :64], segment.shares_of(train)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    with torch.no_grad():
        probabilities = model(images).softmax(1).unflatten(2, (8, 8)).unflatten(4, (8, 8)).mean((3, 5)) / shares.view(1, 3, 1, 1)
    soft = (probabilities / probabilities.sum(1, keepdim=True))[0]
    hard = torch.nn.functional.one_hot(probabilities.argmax(1)[0], 3).permute(2, 0, 1).float()
    for targets, weights in (("soft", soft), ("hard", hard)):
        expected = segment.lifeops.rollout(model, images, weights).maps
        torch.testing.assert_close(segment.class_maps(model, images, shares, targets), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--columns", "40"), "--columns must be between 64 and 216, got [40]"),
        (("--columns", "300"), "--columns must be between 64 and 216, got [300]"),
        (("--image", "", "--mask", ""), "pip install --no-deps stardist"),
    ],
)
def test_what_is_refused(examples, monkeypatch, tmp_path, own_picture, options, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert message in run(monkeypatch, tmp_path, own_picture, *options)


@pytest.mark.parametrize("options", [("--seeds", "0"), ("--image", "")])
def test_wrong_options(examples, monkeypatch, tmp_path, own_picture, options):
    assert run(monkeypatch, tmp_path, own_picture, *options) == 2


def test_pictures_that_do_not_fit(examples, own_picture):
    image, _ = own_picture
    with pytest.raises(SystemExit, match=r"at least 64 x 256, got \(64, 288\) and \(64, 300\)"):
        examples("nuclei").load(image, _wider(image))


def _wider(image):
    from PIL import Image

    Image.new("L", (300, 64)).save(image.with_name("wide.png"))
    return image.with_name("wide.png")


@pytest.mark.skipif(importlib.util.find_spec("stardist") is None, reason="needs stardist's picture")
def test_the_packages_nuclei(examples):
    train, test = examples("nuclei").load()
    assert (train.mask.shape, test.mask.shape) == ((512, 384), (512, 128))
    assert len(torch.cat((train.mask, test.mask), 1).unique()) == 1 + 125


# ------------------------------------------------------------------------------------------------ detection


@pytest.fixture
def detect(examples):
    declare_torchvision_ops()
    pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    return examples("detect_nuclei")


def test_boxes_of_a_mask(detect):
    mask = torch.zeros(64, 64, dtype=torch.int64)
    mask[8:16, 4:20], mask[40:48, 60:], mask[0, :15] = 3, 7, 9  # the last is too small
    expected = torch.tensor([[12 / 64, 12 / 64, 16 / 64, 8 / 64], [62 / 64, 44 / 64, 4 / 64, 8 / 64]])
    torch.testing.assert_close(detect.boxes_of(mask), expected)
    assert detect.boxes_of(mask[:8, 32:]).shape == (0, 4)
    torch.testing.assert_close(detect.corners(expected)[0] * 64, torch.tensor([4.0, 8, 20, 16]))


def test_places_and_their_waves(detect):
    """Row by row, as maps are flattened; near places are alike."""
    x, y = detect.centres(4).T
    assert x.tolist() == [0.125, 0.375, 0.625, 0.875] * 4
    assert y.view(4, 4)[:, 0].tolist() == [0.125, 0.375, 0.625, 0.875]
    alike = detect.waves(detect.centres(4), 16) @ detect.waves(detect.centres(4), 16).T
    assert detect.waves(detect.centres(4), 16).shape == (16, 16)
    assert torch.equal(alike.argmax(1), torch.arange(16))


def test_f1(detect):
    boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    near, far = boxes + torch.tensor([0.02, 0, 0, 0]), boxes + torch.tensor([0.15, 0, 0, 0])
    assert detect.f1([near], [boxes]) == 1
    assert detect.f1([far], [boxes]) == 0
    assert detect.f1([near[:1], boxes], [boxes, boxes[:0]]) == 2 * 1 / (3 + 2)
    assert detect.f1([near[[0, 0]]], [boxes]) == 2 * 1 / (2 + 2)  # one to one
    assert detect.f1([boxes[:0]], [boxes[:0]]) == 0


@pytest.mark.parametrize("system", ["plain", "life"])
def test_a_step_of_the_detector(detect, examples, own_picture, system):
    """Forward, loss and one training step, in which all parts have gradients and which makes the loss smaller."""
    nuclei = examples("nuclei")
    picture, _ = nuclei.load(*own_picture)
    torch.manual_seed(0)
    model = detect.Detector(system)
    images, masks = nuclei.random_crops(picture, 4, torch.Generator().manual_seed(0))
    logits, boxes = model(images)
    assert (logits.shape, boxes.shape) == ((4, 3, 25, 2), (4, 3, 25, 4))
    assert 0 < boxes.min() < boxes.max() < 1
    targets = detect.targets_of(masks)
    assert sum(len(t["boxes"]) for t in targets) == 4
    [loss] = detect.train(model, picture, 1, 4, 1e-3, 0)
    assert loss == pytest.approx(_loss_by_hand(logits, boxes, targets), rel=1e-4)
    assert detect.loss_of(model, images, targets).item() < loss
    idle = {name for name, p in model.named_parameters() if not p.grad.any()}
    assert {name for name in idle if not name.startswith("decoder.layers.0.self_attn")} == set()  # which attends among zeros
    assert len(detect.detected(model, images)) == 4


def _loss_by_hand(logits, boxes, targets):
    """DETR's: every decoder layer is matched for itself, weights 1, 5 and 2; nothing counts a tenth."""
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import box_convert, generalized_box_iou

    total, count = 0, sum(len(t["boxes"]) for t in targets)
    for layer in range(logits.shape[1]):
        classes, distances, overlaps = torch.ones(logits.shape[0], logits.shape[2], dtype=torch.int64), 0, 0
        for i, target in enumerate(targets):
            found, wanted = boxes[i, layer], target["boxes"]
            distance = (found[:, None] - wanted).abs().sum(-1)
            overlap = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (found, wanted)))
            cost = 5 * distance - 2 * overlap - logits[i, layer].softmax(-1)[:, :1]
            rows, columns = linear_sum_assignment(cost.detach())
            classes[i, rows] = 0
            distances, overlaps = distances + distance[rows, columns].sum(), overlaps + (1 - overlap[rows, columns]).sum()
        entropy = torch.nn.functional.cross_entropy(logits[:, layer].flatten(0, 1), classes.flatten(), torch.tensor([1, 0.1]))
        total = total + entropy + (5 * distances + 2 * overlaps) / count
    return total.item()


def test_detect(detect, monkeypatch, own_picture, capsys):
    image, mask = map(str, own_picture)
    monkeypatch.setattr("sys.argv", ["detect_nuclei.py", "--steps", "2", "--batch-size", "2", "--image", image, "--mask", mask])
    detect.main()
    assert capsys.readouterr().out.startswith("step 2: loss ")


def test_the_pages_snippets():
    """docs/dense.md: the pyramid, and a detector of torchvision's on it, whose losses reach every layer."""
    declare_torchvision_ops()
    pytest.importorskip("torchvision")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "dense.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, "docs/dense.md", "exec"), names)
    assert set(names["losses"]) == {"classification", "bbox_regression", "bbox_ctrness"}
    idle = [name for name, p in names["detector"].named_parameters() if p.grad is None]
    assert [name for name in idle if not name.startswith("backbone.vit.head.")] == []  # of the classifier, which is not called
