"""``lifeops.accelerate(model)``: models that hold a depth-wise convolution of tokens already run it on token_dwconv, weights and all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from lifeops.arguments import check_choice, check_flags, check_module
from lifeops.hosts.token_convs import ENTRIES, STRIDED, entry_of
from lifeops.integrations.token_convs import TokenConv, accelerated
from lifeops.integrations.undisturbed import can_run, undisturbed
from lifeops.nn.plain import LEFT, forget

NAME = "accelerate"
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2}  # bfloat16: 4e-2

M = TypeVar("M", bound=nn.Module)


def _layout(module: TokenConv) -> str | None:
    """What of the layers is not as the kind of module has it; what was done to them (hooks, adapters) may be undone and does not count."""
    for path, rule in module.fused_layers():
        try:
            wrong = rule(module.get_submodule(path))
        except AttributeError:
            wrong = ["it is missing"]
        if wrong:
            return f"{path}: {wrong[0]}"
    return None


def _distance(module: TokenConv) -> float:
    """Largest difference from what the module's own class computes, over the largest value."""
    weight = next(p for p in module.parameters() if p.is_floating_point())

    def draw(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)

    args = module.sample(draw)
    wanted = module.original.forward(module, *(a.clone() if isinstance(a, torch.Tensor) else a for a in args)).double()
    return ((module(*args).double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def _tried(module: TokenConv) -> str | None:
    """Why the module is not what it was taken for, by its numbers."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    with undisturbed(module):
        try:
            found = _distance(module)
        except Exception as error:  # whatever a stranger's module raises, it is left as it was
            return f"called with the arguments of its kind it raised {type(error).__name__}: {error}"
    tolerance = _TOLERANCE.get(dtype, 4e-2)
    return None if found <= tolerance else f"its output differs by {found:.1e} of the largest value, more than {tolerance:.0e}"


def _take(module: nn.Module, kind: str, least: int, verify: bool) -> str | None:
    """Change the module's class, or say why not and leave it as it was."""
    if "forward" in module.__dict__:
        return "its forward was replaced (offloaded, patched)"
    own = type(module)
    module.__class__ = accelerated(own, kind)
    why = _layout(module)
    if why is None and max(conv.kernel_size[0] for conv in module.convs()) < least:
        why = f"measured slower than torch below kernel size {least}; kinds={kind!r} takes it"
    if why is None and verify and can_run(module):
        why = _tried(module)
    if why is not None:
        module.__class__ = own
        forget(module)
    return why


def _kinds(kinds) -> tuple[str, ...]:
    asked = (kinds,) if isinstance(kinds, str) else kinds
    if not isinstance(asked, Iterable):
        raise TypeError(f"{NAME}: kinds must be a name, several or None, got {type(kinds).__name__}")
    asked = tuple(asked)
    for kind in asked:
        check_choice(NAME, "kinds", kind, ENTRIES)
    return asked


def accelerate(model: M, *, kinds: str | Iterable[str] | None = None, verify: bool = True) -> M:
    """Run the depth-wise convolutions that a model of timm or transformers has over its tokens on :func:`lifeops.token_dwconv`, in place;
    returns ``model``. :func:`lifeops.revert` undoes it.

    Every module stays the object that it is: the same layers, parameters, state-dict keys and hooks; only its class becomes a subclass of
    its own, whose ``forward`` computes the same, input and parameter gradients included. Exchange, hook or adapt a layer inside, and the
    original ``forward`` runs. ``print(lifeops.explain(model))`` says which modules were taken, and why others were left.

    Taken is what a measurement found faster on a CPU (docs/accelerate.md has the table): Twins' PEG, CoaT's CPE and CRPE, XCiT's LPI, the
    feed-forwards of PVT v2 and Segformer, and from kernel size 5 on EdgeNeXt's blocks and FocalNet's levels, which gain in training.
    DaViT's CPE and TinyViT's local convolution are known and left, unless ``kinds`` names them. A feed-forward with GELU and XCiT's LPI
    in evaluation mode are then differentiable once.

    Args:
        kinds: names of what to take, whether it pays or not ("twins_peg", "coat_cpe", …; an unknown name raises with the list); None:
            all that pay.
        verify: call each module once on a few random tokens, in evaluation mode, and leave it as it was where the output differs by
            more than 1e-5 of its largest value (float32). Without it, classes of the same name and layers are trusted.

    Raises:
        ValueError: there is nothing to take (the message says what was looked for and why what was found was left), an unknown kind.
        TypeError: no module.
    """
    check_module(NAME, "model", model)
    check_flags(NAME, verify=verify)
    asked = None if kinds is None else _kinds(kinds)
    left, taken = {}, 0
    for path, module in list(model.named_modules()):
        if isinstance(module, TokenConv):
            taken += 1
            continue
        kind, why = entry_of(path, module), STRIDED.get(type(module).__name__)
        if kind is not None:
            entry = ENTRIES[kind]
            if asked is not None and kind not in asked:
                why = f"{kind!r} is not among the kinds asked for"
            elif asked is None and not entry.pays:
                why = f"not measured faster than torch; kinds={kind!r} takes it"
            else:
                why = _take(module, kind, 1 if asked else entry.least, verify)
                taken += why is None
        module.__dict__.pop(LEFT, None)
        if why is not None:
            left[path] = module.__dict__[LEFT] = why
    if not taken:
        for module in model.modules():
            module.__dict__.pop(LEFT, None)
        found = "; ".join(f"{why} ({list(left.values()).count(why)} modules)" for why in dict.fromkeys(left.values())) or "none"
        looked = ", ".join(f"{kind} ({entry.cls})" for kind, entry in ENTRIES.items())
        holds = f"{type(model).__name__} holds no depth-wise convolution over tokens that would be taken"
        raise ValueError(f"{NAME}: {holds}. Found: {found}. Looked for: {looked}; lifeops.convert gives a ViT such convolutions")
    return model


def put_back(model: nn.Module) -> int:
    """Give accelerated modules the class that they had; returns how many there were."""
    found = [m for m in model.modules() if isinstance(m, TokenConv)]
    for module in found:
        module.__class__ = module.original
        forget(module)
    for module in model.modules():
        module.__dict__.pop(LEFT, None)
    return len(found)
