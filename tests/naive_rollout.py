"""The roll-out by its definition, from the attention matrices that a model is seen to use."""

import host_attention
import torch


class Attentions(host_attention.Attentions):
    """``seen``: every square softmax of the pass, (…, N, N) in the model's dtype, fused attention's included."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self, attention, dtype):
        if attention.shape[-1] == attention.shape[-2] > 1:
            self.seen.append(attention.detach().to(dtype))


def attentions_of(model, images):
    """(B, h, N, N) of every layer, in order."""
    with torch.no_grad(), Attentions() as record:
        model(**images) if isinstance(images, dict) else model(images)
    batch = (images["pixel_values"] if isinstance(images, dict) else images).shape[0]
    return [a.unflatten(0, (batch, -1)) if a.dim() == 3 else a for a in record.seen]


def layer(attention, head_fusion="mean", residual=0.5, discard_ratio=0.0):
    """(B, N, N) with rows that sum to 1, from (B, h, N, N)."""
    fused = {"mean": attention.mean(1), "max": attention.amax(1), "min": attention.amin(1)}[head_fusion].clone()
    for row in fused.flatten(0, 1):
        row[row < row.sort().values[int(discard_ratio * len(row))]] = 0
    mixed = (1 - residual) * fused + residual * torch.eye(fused.shape[-1], dtype=fused.dtype)
    return mixed / mixed.sum(-1, keepdim=True)


def product(layers):
    """(B, N, N): the last layer first."""
    out = layers[0]
    for matrix in layers[1:]:
        out = matrix @ out
    return out


def off(found, expected):
    """The largest difference over the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
