"""What a host makes of its last tokens: the norm behind the blocks, and the linear classifiers that read it."""

from __future__ import annotations

from torch import nn

from lifeops.hosts.host import Host

_NORMS = ("layernorm", "norm")
_CLASSIFIERS = ("head", "head_dist", "classifier", "cls_classifier", "distillation_classifier")


def final_norm(host: Host) -> nn.Module | None:
    """The module whose output the classifier reads."""
    found = (getattr(host.trunk, name, None) for name in _NORMS)
    return next((m for m in found if isinstance(m, nn.Module)), None)


def pooled_norm(host: Host) -> nn.Module | None:
    """The norm between pooling and classifier, of those that have one (timm)."""
    norm = getattr(host.trunk, "fc_norm", None)
    return norm if isinstance(norm, nn.Module) else None


def classifiers(model: nn.Module, host: Host) -> list[nn.Linear]:
    """The linear layers that give class scores: two with a distillation token (DeiT)."""
    found = {id(m): m for owner in (model, host.trunk) for m in (getattr(owner, name, None) for name in _CLASSIFIERS) if m is not None}
    inner = [getattr(m, "fc", m) for m in found.values()]  # timm's ClassifierHead
    return [m for m in inner if isinstance(m, nn.Linear)]
