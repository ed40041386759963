"""What convert's modules, roll-outs and impulses must be: plain PyTorch, with the grid and the prefix that the configuration says."""

import copy
import math

import torch
import torch.nn.functional as F
from host_attention import CHAINS, Attentions, attentions_of
from plain_systems import life_qkv, locality, shortcut

import lifeops
from lifeops import nn as ours
from lifeops.integrations.life_projection import LifeProjection

TOLERANCE = 1e-5
FEED_FORWARD = (
    "mlp", "ffn", "output", "intermediate", "norm2", "ls2", "gamma_2", "layer_scale2", "layernorm_after", "layer_norm2", "lambda_2",
)  # fmt: skip


def error(found, expected) -> float:
    """The largest difference over the largest entry; infinite where something is not a number."""
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    value = ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()
    return value if value == value else float("inf")


def first_tensor(output):
    """The tensor of a model's output that its result is read from."""
    while not isinstance(output, torch.Tensor):
        values = output.values() if hasattr(output, "values") else output
        output = next(v for v in values if v is not None)
    return output


def tensors(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return [t for v in values for t in tensors(v)]


def grid_of(patches: int, host) -> tuple[int, int]:
    """(H, W) of that many patches: the configuration's grid, or a stage's, its own or with the image's proportions."""
    for grid in host.grids:
        if grid[0] * grid[1] == patches:
            return grid
    H, W = host.size if host.grid is None or host.grid[0] * host.grid[1] != patches else host.grid
    row = round((patches * H / W) ** 0.5)
    if row * row * W != patches * H:
        raise AssertionError(f"{patches} patches on no grid of {host.size}")
    return row, patches // row


# ------------------------------------------------------------------------------------------------ convert


def _turned(t, rope, half):
    """Pairs of channels of the patches (…, n, d) turned by sines and cosines (n, 2 d) side by side."""
    sin, cos = rope.double().chunk(2, -1)
    last = t.shape[-2] - rope.shape[-2]
    x = t[..., last:, :]
    if half:
        a, b = x.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    else:
        other = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return torch.cat((t[..., :last, :], x * cos + other * sin), -2)


def life(module, x, prefix, grid, bias, rope, half, old):
    """LIFE's attention: three scales, q, k and v the thirds of each, softmax, the projection; the norms of the ``old`` one between."""

    def normed(name, t):
        norm = getattr(old, name, None)
        if getattr(getattr(norm, "weight", None), "numel", int)() == x.shape[2] != t.shape[-1]:  # over the joined heads
            return norm(t.transpose(1, 2).flatten(2)).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        return norm(t) if isinstance(norm, torch.nn.Module) else t

    q, k, v = (t.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for t in life_qkv(module.qkv, x, prefix, grid))
    q, k = normed("q_norm", q), normed("k_norm", k)
    if rope is not None:
        q, k = _turned(q.double(), rope, half), _turned(k.double(), rope, half)
    scores = q.double() @ k.double().transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias.double()
    y = (scores.softmax(-1) @ v.double()).transpose(1, 2).flatten(2).to(x.dtype)
    return F.linear(normed("norm", y), module.proj.weight, module.proj.bias)


def _without_mlp(block):
    """A copy of a block whose feed-forward gives zeros: every weight of it, its scale and its norm, is one."""
    block = copy.deepcopy(block)
    for name, p in block.named_parameters():
        if name.startswith(FEED_FORWARD):
            p.data.zero_()
    return block


def _calls(model, kind, x):
    """[(path, module, args, kwargs, output)] of every module that ``kind`` is true of in one forward pass."""
    found, handles = [], []
    for path, module in model.named_modules():
        if kind(module):

            def keep(m, args, kwargs, out, path=path):
                found.append((path, m, args, kwargs, out.clone() if isinstance(out, torch.Tensor) else out))  # to which more may be added

            handles.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    assert found, "none of what was converted ran"
    return found


def _shown(model):
    """New branches with weights that show, batch norms with statistics."""
    for module in model.modules():
        if isinstance(module, (ours.LocalityFeedForward, ours.DWShortcut, ours.LifeQKV)):
            for p in module.parameters():
                p.data.normal_(std=max(p[0].numel() if p.dim() > 1 else 4, 1) ** -0.5)
            for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.running_mean is not None):
                norm.running_mean.normal_(std=0.3), norm.running_var.uniform_(0.5, 1.5)


def _around(original, path):
    """Of a layer: a copy of the module that holds it, which calls it, and the size of its windows, None without."""
    parent = path.rpartition(".")[0]
    block, old = original.get_submodule(parent.rpartition(".")[0]), copy.deepcopy(original.get_submodule(parent))
    window = getattr(block, "window_size", None)
    if hasattr(old, "qkv_bias_separate"):
        old.qkv_bias_separate = True
    return old, (window, window) if isinstance(window, int) and window else window or None


def check_projections(original, model, x, host) -> float:
    """LIFE in the place of a layer against its transcription, and the attention around it against the original one with that inside."""
    worst = 0.0
    for path, layer in [(path, m) for path, m in model.named_modules() if isinstance(m, LifeProjection)]:
        (old, window), wide = _around(original, path), copy.deepcopy(layer).double()

        def plain(tokens, wide=wide, window=window):
            grid = window or grid_of(math.prod(tokens.shape[1:-1]) - host.prefix, host)
            flat = tokens.flatten(1, -2).double()
            beside = [F.linear(flat, wide.fc1.weight, wide.fc1.bias)] if hasattr(wide, "fc1") else []
            q_k_v = torch.cat((*beside, *life_qkv(wide, flat, host.prefix, grid)), -1)
            return q_k_v.unflatten(1, tokens.shape[1:-1]).to(tokens.dtype)

        ((_, _, args, _, out),) = _calls(model, {layer}.__contains__, x)
        worst = max(worst, error(out, plain(args[0])))
        parent, _, name = path.rpartition(".")
        setattr(old, name, Called(plain))
        ((_, _, args, kwargs, out),) = _calls(model, {model.get_submodule(parent)}.__contains__, x)
        with torch.no_grad():
            worst = max(worst, error(first_tensor(out), first_tensor(old(*args, **kwargs))))
    return worst


class Called(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def check_life(original, model, x, host) -> float:
    """Each replaced attention against its transcription, with the biases and rotations that the original was seen to use."""
    if any(isinstance(m, LifeProjection) for m in model.modules()):
        assert not any(isinstance(m, ours.LifeAttention) for m in model.modules())
        return check_projections(original, model, x, host)
    with torch.no_grad(), Attentions() as mode:
        original(x)
    calls = _calls(model, lambda m: isinstance(m, ours.LifeAttention), x)
    masks = mode.masks if len(mode.masks) == len(calls) else [None] * len(calls)
    worst = 0.0
    for (path, module, args, kwargs, out), bias in zip(calls, masks, strict=True):
        tokens = args[0] if args else kwargs["hidden_states"]
        old = original.get_submodule(path)
        window = getattr(original.get_submodule(path.rpartition(".")[0]), "window_size", None)
        grid = (window, window) if window else grid_of(tokens.shape[1] - host.prefix, host)
        cos_sin = kwargs.get("position_embeddings")
        rope = kwargs.get("rope") if cos_sin is None else torch.cat((cos_sin[1], cos_sin[0]), -1)
        half = getattr(old, "rotate_half", False) or cos_sin is not None
        expected = life(module, tokens, host.prefix, grid, bias, rope, half, old)
        worst = max(worst, error(first_tensor(out), expected))
    return worst


def check_localvit(original, model, x, host) -> float:
    """Each block against the original one without its feed-forward, and then LocalViT's."""
    worst = 0.0
    for path, module, args, kwargs, out in _calls(model, lambda m: _branch(m) is not None, x):
        with torch.no_grad():
            attended = first_tensor(_without_mlp(original.get_submodule(path))(*args, **kwargs))
        grid, flat = grid_of(math.prod(attended.shape[1:-1]) - host.prefix, host), attended.flatten(1, -2)
        worst = max(worst, error(first_tensor(out).flatten(1, -2), flat + locality(_branch(module), flat, host.prefix, grid)))
    return worst


def _branch(block):
    """LocalViT's feed-forward of a block, its own or in a list of one."""
    inside = [c for child in block.children() for c in (child if type(child) is torch.nn.ModuleList else [child])]
    found = [c for c in inside if isinstance(c, ours.LocalityFeedForward)]
    return found[0] if found and not isinstance(block, torch.nn.ModuleList) else None


def _token_lists(values) -> list[torch.Tensor]:
    return [values] if isinstance(values, torch.Tensor) else [v for v in values if isinstance(v, torch.Tensor)]


def _whole(squares) -> torch.Tensor:
    """(B, T, N, C), T squares of N patches, as (B, T N, C) row after row of the whole square grid, patch by patch."""
    t, n = (round(count**0.5) for count in squares.shape[1:3])
    rows = [[(r // n * t + c // n, r % n * n + c % n) for c in range(t * n)] for r in range(t * n)]
    return torch.stack([squares[:, square, patch] for row in rows for square, patch in row], 1)


def _terms(module, given, made):
    """(shortcut, its tokens, what the blocks made of them, which of ``made`` it is) of a group; tokens in the order of the grid."""
    if isinstance(module.shortcut, torch.nn.ModuleList):  # CoaT's parallel blocks: the first scale stays
        assert len(module.shortcut) == len(given) - 1
        return [(s, given[i], made[i], i) for i, s in enumerate(module.shortcut, 1)]
    at = len(made) - 1  # TNT: pixels, then tokens
    return [(module.shortcut, given[at], made[at], at)]


def _flat(t, like):
    """Tokens, whatever they were; with the grid where they tell it themselves."""
    if t.dim() == 3:
        return t, None
    if type(like).__name__ == "SquareShortcutBlocks":
        side = round((t.shape[1] * t.shape[2]) ** 0.5)
        return _whole(t), (side, side)
    return t.flatten(1, 2), tuple(t.shape[1:3])


def check_dw_shortcut(original, model, x, host) -> float:
    """Each group of blocks: what went into its first, what came out of its last, and what came out of the group."""
    inner, handles = {}, []
    every = [m for m in model.modules() if _is_group(m)]
    groups = [m for m in every if isinstance(m, lifeops.nn.shortcut_blocks.ShortcutBlocks)]
    for group in groups:
        keep = lambda m, a, out, group=group: inner.__setitem__(id(group), out)  # noqa: E731
        handles.append(group.blocks[-1].register_forward_hook(keep))
    try:
        calls = _calls(model, _is_group, x)
    finally:
        for handle in handles:
            handle.remove()
    assert len(calls) == len(every)
    worst = 0.0
    for path, group, args, kwargs, out in calls:
        if id(group) in inner:
            made, out = _token_lists(inner[id(group)]), _token_lists(out)
        else:  # a layer of transformers, which holds its shortcut itself
            with torch.no_grad():
                made, out = [first_tensor(original.get_submodule(path)(*args, **kwargs))], [first_tensor(out)]
        terms = _terms(group, _token_lists(args), made)
        assert all(torch.equal(out[i], made[i]) for i in range(len(out)) if i not in [at for *_, at in terms])
        for module, tokens, y, at in terms:
            (tokens, grid), (y, _), (found, _) = (_flat(t, group) for t in (tokens, y, out[at]))
            P = 0 if tokens.shape[1] in [H * W for H, W in host.grids] else host.prefix  # PVT's class token joins in the last stage
            grid = grid_of(tokens.shape[1] - P, host) if grid is None else grid
            worst = max(worst, error(found, y + shortcut(module, tokens, P, grid)))
    return worst


def _is_group(module) -> bool:
    held = getattr(module, "shortcut", None)
    return isinstance(held[0] if isinstance(held, torch.nn.ModuleList) else held, ours.DWShortcut)


CONVERTED = {"life": check_life, "localvit": check_localvit, "dw_shortcut": check_dw_shortcut}


def check_converted(system, original, model, x, host) -> float:
    _shown(model)
    return CONVERTED[system](original, model, x, host)


# ------------------------------------------------------------------------------------------------ roll-out and impulses


def check_rollout(model, x, host) -> float:
    """The maps of the cls token or of the mean, of a patch, of the mean, against the plain product of recorded matrices."""
    found = {target: lifeops.rollout(model, x, target) for target in (None, (0, 1), "mean")}
    if host.chain not in CHAINS:
        raise AssertionError("accepted, and no product of its attention is known to compare with")
    late = {"cait": 1, "eomt": 3}.get(host.chain, 0)  # tokens that join on the way: the cls token itself, queries before it
    prefix = host.prefix + late
    product = CHAINS[host.chain](model, x, host.prefix + host.grid[0] * host.grid[1])
    cls, patch, mean = torch.zeros(3, product.shape[-2], dtype=product.dtype)
    cls[late if host.chain == "eomt" else 0] = patch[prefix + 1] = 1
    mean[prefix:] = 1 / (len(mean) - prefix)
    first = found[None].labels[0]
    default = cls if first == "cls token" else mean if first == "mean of the patch tokens" else found[None].weights[:, 0].double()
    worst = 0.0
    for result, weights in zip(found.values(), (default, patch, mean), strict=True):
        expected = (weights[..., None, :] @ product).reshape(len(x), -1)[:, prefix:]
        worst = max(worst, error(result.maps[:, 0], expected.unflatten(1, grid_of(expected.shape[1], host))))
        lost = weights.sum(-1) - expected.sum(1)  # on other tokens, and on the padding of windows
        worst = max(worst, (result.prefix[:, 0] - lost).abs().max().item())
    return worst


def layers(model, x) -> int:
    """How many attentions run over all tokens; a head that pools with a query of its own is none."""
    return sum(a.shape[-1] == a.shape[-2] for a in attentions_of(model, x))


def outputs_and_gradient(model, x) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    found = [t for t in tensors(model(x)) if t.is_floating_point() and t.isfinite().all()]  # a loss over no masked patch is not a number
    (gradient,) = torch.autograd.grad(sum(t.square().sum() for t in found if t.requires_grad), x)
    return [*(t.detach() for t in found), gradient]


_QKV = (("qkv",), ("to_qkv",), ("q_proj", "k_proj", "v_proj"), ("attention.query", "attention.key", "attention.value"))
_JOINS = ("proj", "o_proj", "out_proj", "projection", "projection_layer", "output.dense")


def _matrices(attn) -> list[torch.Tensor]:
    """The weights of q, k, v and the output projection, in float64."""
    layers = dict(attn.named_modules())
    inputs = next(names for names in _QKV if all(name in layers for name in names))
    weights = [layers[name].weight.double() for name in inputs]
    return [*(weights if len(weights) == 3 else weights[0].chunk(3)), next(layers[n] for n in _JOINS if n in layers).weight.double()]


def _near_identity(shape, noise, identity, generator):
    bound = (3 / shape[-1]) ** 0.5
    drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator).double()
    return noise * drawn + identity * torch.eye(shape[-1], dtype=torch.float64)


@torch.no_grad()
def check_mimetic(model, report, generator) -> float:
    """Of every layer: q k of a head is the part of rank d of 0.7 noise + 0.7 I, and v proj is 0.4 noise - 0.4 I, drawn again."""
    worst, paths = 0.0, dict.fromkeys(head.path for head in report.heads)
    for path in paths:
        q, k, v, proj = _matrices(model.get_submodule(path))
        heads, C, width = sum(head.path == path for head in report.heads), q.shape[1], len(v)
        U, S, Vh = torch.linalg.svd(_near_identity((heads, C, C), 0.7, 0.7, generator))
        d = width // heads
        expected = (U[..., :d] * S[:, None, :d]) @ Vh[:, :d]
        q, k = (t.unflatten(0, (heads, d)) for t in (q, k))
        worst = max(worst, error(q.mT @ k, expected))
        worst = max(worst, error(v @ proj, _near_identity((C, C), 0.4, -0.4, generator)[:width, :width]))
    return worst


@torch.no_grad()
def check_impulse(model, report, host) -> tuple[float, float]:
    """(the report's mass of layer 0, that of the first attention on a blank image without biases); patches behind ``prefix``."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if name.endswith(("bias", "cls_token")):
            p.zero_()
    (H, W), prefix = host.grid_at(host.own), host.prefix
    attention = next(a for a in attentions_of(model, torch.zeros(1, 3, *host.own)) if a.shape[-1] >= H * W and a.shape[-1] == a.shape[-2])
    attention = attention.reshape(-1, *attention.shape[-2:])
    heads = report.layer(report.heads[0].layer)
    assert len(heads) == len(attention)
    told, real = [], []
    for head, a in zip(heads, attention, strict=True):
        dy, dx = head.offset
        rows = [(y, u) for y in range(H) for u in range(W) if 0 <= y + dy < H and 0 <= u + dx < W]
        if rows:  # else nothing is hit on a grid that narrow
            told.append(head.mass)
            real.append(sum(a[prefix + y * W + u, prefix + (y + dy) * W + u + dx].item() for y, u in rows) / len(rows))
    return sum(told) / len(told), sum(real) / len(real)
