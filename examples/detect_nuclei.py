"""Detect real cell nuclei: transformers' DETR decoder and loss on the feature pyramid of a ViT's tokens, plain or with LIFE.

    python examples/detect_nuclei.py --system life

Queries look at the pyramid's maps of strides 4, 8 and 16 side by side (lifeops.nn.TokenPyramid; 64 x 64 crops, patches of 8) and become
boxes and classes; the loss matches them with the nuclei's boxes (Carion et al., arXiv 2005.12872), no non-maximum suppression is needed.
Each query starts from a point of a 5 x 5 grid, which it learns to move (as in Wang et al., arXiv 2109.07107). examples/nuclei.py says
where the picture comes from and which part of it is for tests; F1 counts boxes that are found with a probability above one half and
overlap a nucleus' box by an IoU of one half, one to one.
Needs stardist (its picture), transformers 5, scipy, Pillow.
"""

import argparse
from pathlib import Path

import nuclei
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss, box_iou
from transformers.models.detr.modeling_detr import DetrDecoder, DetrMLPPredictionHead

from lifeops.cli.main import ended_plainly

LEAST = 16  # pixels of a nucleus inside a crop that make it one to find
QUERIES = 5  # along each side
SMALL = -1.5  # the logit of the width and height that boxes start with


def centres(count: int) -> Tensor:
    """(count * count, 2): (x, y) of the cells of a grid, in shares of its side, row by row."""
    along = (torch.arange(count) + 0.5) / count
    return torch.cartesian_prod(along, along).flip(1)


def waves(points: Tensor, dim: int) -> Tensor:
    """(…, 2) to (…, dim): sines and cosines of x and of y, of wave lengths from 2 sides on down."""
    angles = points[..., None] * torch.pi * 2 ** torch.linspace(0, 5, dim // 4)
    return torch.cat((angles.sin(), angles.cos()), -1).flatten(-2)


class Detector(nn.Module):
    """(B, 1, 64, 64) to logits (B, layers, queries, 2) of nucleus and nothing, and boxes (B, layers, queries, 4) as (x, y, w, h) of
    centres in shares of the crop, of every layer of the decoder: the last one's are the answer.
    """

    def __init__(self, system: str, dim: int = 64, layers: int = 3):
        super().__init__()
        sizes = {"decoder_layers": layers, "decoder_attention_heads": 4, "decoder_ffn_dim": 2 * dim, "dropout": 0.0, "num_labels": 1}
        self.config = DetrConfig(d_model=dim, auxiliary_loss=True, **sizes)
        self.backbone, self.decoder = nuclei.Backbone(system, dim, strides=(4, 8, 16)), DetrDecoder(self.config)
        places = torch.cat([centres(nuclei.SIZE // stride) for stride in self.backbone.pyramid.strides])
        self.register_buffer("positions", waves(places, dim), persistent=False)
        self.points = nn.Parameter(centres(QUERIES).logit())
        self.classes, self.boxes = nn.Linear(dim, 2), DetrMLPPredictionHead(dim, dim, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.cat([m.flatten(2).transpose(1, 2) for m in self.backbone(x)], 1)
        queries = waves(self.points.sigmoid(), places.shape[2])
        positions, queries = (t.expand(len(x), -1, -1) for t in (self.positions, queries))
        states = self.decoder(
            inputs_embeds=torch.zeros_like(queries), encoder_hidden_states=places, spatial_position_embeddings=positions,
            object_queries_position_embeddings=queries,
        ).intermediate_hidden_states.transpose(0, 1)  # fmt: skip
        starts = F.pad(self.points, (0, 2), value=SMALL)  # a point and a small size, as logits
        return self.classes(states), (self.boxes(states) + starts).sigmoid()


def boxes_of(mask: Tensor) -> Tensor:
    """(n, 4): centre, width and height of each nucleus of (H, W) numbers, in shares of the crop."""
    height, width = mask.shape
    found = []
    for number in mask.unique().tolist():
        rows, columns = (mask == number).nonzero(as_tuple=True)
        if number and len(rows) >= LEAST:
            (top, bottom), (left, right) = ((t.min().item(), t.max().item() + 1) for t in (rows, columns))
            found.append(((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height))
    return torch.tensor(found).view(-1, 4)


def targets_of(masks: Tensor) -> list[dict]:
    """For the loss: boxes, all of class 0."""
    boxes = map(boxes_of, masks)
    return [{"boxes": b, "class_labels": torch.zeros(len(b), dtype=torch.int64)} for b in boxes]


def loss_of(model: Detector, images: Tensor, targets: list[dict]) -> Tensor:
    """Classes, distances and overlaps of matched boxes, of every layer of the decoder."""
    logits, boxes = model(images)
    every = {"outputs_class": logits.transpose(0, 1), "outputs_coord": boxes.transpose(0, 1)}
    return ForObjectDetectionLoss(logits[:, -1], targets, images.device, boxes[:, -1], model.config, **every)[0]


def corners(boxes: Tensor) -> Tensor:
    """(left, top, right, bottom)."""
    centres, sizes = boxes.split(2, -1)
    return torch.cat((centres - sizes / 2, centres + sizes / 2), -1)


@torch.no_grad()
def detected(model: Detector, images: Tensor) -> list[Tensor]:
    """The boxes (n, 4) of every image that are more likely a nucleus than nothing."""
    logits, boxes = model.eval()(images)
    nucleus = logits[:, -1].argmax(-1) == 0
    return [b[kept] for b, kept in zip(boxes[:, -1], nucleus, strict=True)]


def f1(found: list[Tensor], wanted: list[Tensor]) -> float:
    """2 hits / (boxes found + boxes wanted), over all images."""
    hits = 0
    for ours, theirs in zip(found, wanted, strict=True):
        overlaps = box_iou(corners(ours), corners(theirs))[0]
        hits += int((overlaps[linear_sum_assignment(overlaps, maximize=True)] > 0.5).sum())
    return 2 * hits / max(1, sum(map(len, found)) + sum(map(len, wanted)))


def train(model: Detector, picture: nuclei.Picture, steps: int, batch_size: int, lr: float, seed: int):
    """Yields each step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images, masks = nuclei.random_crops(picture, batch_size, generator)
        loss = loss_of(model.train(), images, targets_of(masks))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=("plain", "life"), default="life")
    options = {"steps": 1500, "batch-size": 16, "lr": 1e-3, "seed": 0}
    for name, value in options.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default: %(default)s")
    parser.add_argument("--image", type=Path, help="a grey picture of your own")
    parser.add_argument("--mask", type=Path, help="its mask: 0, and for each object a number of its own")
    args = parser.parse_args()
    picture, test = nuclei.load(args.image, args.mask)
    images, masks = nuclei.tiles(test)
    wanted = [*map(boxes_of, masks)]
    torch.manual_seed(args.seed)
    model = Detector(args.system)
    for step, loss in enumerate(train(model, picture, args.steps, args.batch_size, args.lr, args.seed), start=1):
        if step == args.steps or step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}, F1 of the test tiles {100 * f1(detected(model, images), wanted):.1f} %", flush=True)


if __name__ == "__main__":
    raise SystemExit(ended_plainly("detect_nuclei.py", main))
