"""What a model attends to, recorded from its own operators, and the plain roll-out of it: written without looking at the library."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}


def _scores(q, k, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    q, k = q.double(), k.double()
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    if attn_mask is None:
        return scores
    return scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask.double()


class Attentions(TorchFunctionMode):
    """``found``: every softmax over keys, (…, N, M) in float64, in the order of the calls; ``masks``: what was added to its scores."""

    def __init__(self):
        super().__init__()
        self.found: list[torch.Tensor] = []
        self.masks: list[torch.Tensor | None] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
            options = {name: given[name] for name in ("attn_mask", "is_causal", "scale", "enable_gqa") if name in given}
            self.note(_scores(given["query"], given["key"], **options).softmax(-1), given["query"].dtype)
            self.masks.append(given.get("attn_mask"))
        out = func(*args, **kwargs)
        if func in _SOFTMAX and out.dim() >= 3 and kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, out.dim() - 1):
            self.note(out.double(), out.dtype)
        return out

    def note(self, attention, dtype):
        """An attention in float64, of a model that computes in ``dtype``."""
        self.found.append(attention)


@torch.no_grad()
def attentions_of(model, x) -> list[torch.Tensor]:
    with Attentions() as mode:
        model(x)
    return mode.found


def _square(found, batch, tokens):
    """(B, N, N), mean over heads, of those that are between all tokens."""
    chosen = [a for a in found if tuple(a.shape[-2:]) == (tokens, tokens)]
    return [a.reshape(batch, -1, tokens, tokens).mean(1) for a in chosen]


def _chained(matrices):
    """(A_L + I)/2 … (A_1 + I)/2; matrices that are not square (merged patches) as they are."""
    product = torch.eye(matrices[0].shape[-1], dtype=torch.float64)
    for a in matrices:
        product = (a + torch.eye(a.shape[-1], dtype=a.dtype)) / 2 @ product if a.shape[-1] == a.shape[-2] else a @ product
    return product


def _plain(model, x, tokens):
    return _chained(_square(attentions_of(model, x), len(x), tokens))


def _parallel(model, x, tokens):
    """Two attentions of one input, whose outputs are added: their mean."""
    layers = _square(attentions_of(model, x), len(x), tokens)
    return _chained([(a + b) / 2 for a, b in zip(layers[0::2], layers[1::2], strict=True)])


@torch.no_grad()
def _cait(model, x, tokens):
    """Talking heads as they reach the values; then the cls token, which only class attention sees: its row, the patches stay."""
    seen, handles = [], []
    for block in model.blocks:
        handles.append(block.attn.attn_drop.register_forward_hook(lambda m, args, out: seen.append(args[0].double().mean(1))))
    with Attentions() as mode:
        model(x)
    for handle in handles:
        handle.remove()
    rows = [a.mean(1) for a in mode.found if tuple(a.shape[-2:]) == (1, tokens + 1)]
    assert (len(seen), len(rows)) == (len(model.blocks), len(model.blocks_token_only))
    own = torch.eye(tokens, dtype=torch.float64)
    steps = [a.clamp_min(0) + own for a in seen]  # where heads are subtracted, the rows of (A + I)/2 are made to sum to 1 again
    layers = [F.pad(2 * a / a.sum(-1, keepdim=True) - own, (1, 0, 1, 0)) for a in steps]
    for a in layers:
        a[:, 0, 0] = 1
    for row in rows:
        a = torch.eye(tokens + 1, dtype=torch.float64).repeat(len(x), 1, 1)
        a[:, :1] = row
        layers.append(a)
    return _chained(layers)


def _eomt(model, x, tokens):
    """Queries join in front on the way: before that their rows are the identity's."""
    queries = model.query.num_embeddings
    first, last = (_square(attentions_of(model, x), len(x), n) for n in (tokens, queries + tokens))
    assert len(first) + len(last) == len(model.layers)
    joined = torch.eye(queries + tokens, dtype=torch.float64).repeat(len(first), len(x), 1, 1)
    for own, a in zip(joined, first, strict=True):
        own[:, queries:, queries:] = a
    return _chained([*joined, *last])


@torch.no_grad()
def _mae(model, x, tokens):
    """Patches that are not shuffled, as the model is told; a decoder's layers are not counted."""
    with Attentions() as mode:
        model(x, noise=torch.arange(tokens - 1.0).expand(len(x), -1))
    return _chained(_square(mode.found, len(x), tokens)[: model.config.num_hidden_layers])


# ------------------------------------------------------------------------------------------------ windows


def _places(rows, sources):
    """For each row (nW*B, n, C) the token of ``sources`` (B, HW, C) that it is, and -1 for padding: found by the very numbers."""
    where = {row.numpy().tobytes(): i for i, row in enumerate(sources.flatten(0, 1))}
    return torch.tensor([[where.get(row.numpy().tobytes(), -1) for row in window] for window in rows])


def _full(attention, places, batch, tokens):
    """(B, HW, HW) from (nW*B, h, n, n)."""
    out = torch.zeros(batch * tokens, tokens, dtype=torch.float64)
    for window, place in zip(attention.mean(1), places, strict=True):
        real = (place >= 0).nonzero().flatten()
        out[place[real, None], place[real] % tokens] = window[real][:, real]
    return out.unflatten(0, (batch, tokens))


def _merge(fine, coarse):
    """(coarse tokens, fine tokens): 2 x 2 patches, or those of them that exist, share alike."""
    a = torch.zeros(*coarse, *fine, dtype=torch.float64)
    for row in range(coarse[0]):
        for column in range(coarse[1]):
            a[row, column, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    a = a.flatten(2).flatten(0, 1)
    return a / a.sum(1, keepdim=True)


def _grid(size, tokens):
    stride = round((size[0] * size[1] / tokens) ** 0.5)
    assert size[0] // stride * (size[1] // stride) == tokens, (size, tokens)
    return size[0] // stride, size[1] // stride


@torch.no_grad()
def _swin(model, x, tokens):
    """Each block's windows, put back where the numbers of its normalised (V2: raw) tokens are found."""
    blocks = [m for m in model.modules() if hasattr(m, "window_size") and hasattr(m, "shift_size")]
    calls, handles, sources, rows = [], [], [], []
    with Attentions() as mode:

        def enter(_, args):
            sources[:] = [args[0]]

        def normed(_, args, out):
            sources.append(out)

        def attend(_, args, kwargs):
            rows[:] = [args[0] if args else kwargs["hidden_states"]]

        def leave(_, args, out):
            calls.append((mode.found[-1], rows[0], [s.detach().clone() for s in sources]))

        for block in blocks:
            attn = getattr(block, "attn", None) or block.attention
            norm = getattr(block, "norm1", None) or block.layernorm_before
            handles += [block.register_forward_pre_hook(enter), norm.register_forward_hook(normed), block.register_forward_hook(leave)]
            handles.append(attn.register_forward_pre_hook(attend, with_kwargs=True))
        model(x)
    for handle in handles:
        handle.remove()
    matrices, last = [], None
    for attention, windows, candidates in calls:
        flat = [s.reshape(len(x), -1, windows.shape[-1]) for s in candidates if s.shape[-1] == windows.shape[-1]]
        places = max((_places(windows, s) for s in flat), key=lambda p: len(p[p >= 0].unique()))
        n = flat[0].shape[1]
        assert len(places[places >= 0].unique()) == len(x) * n, "windows do not hold every token"
        grid = _grid(x.shape[2:], n)
        if last is not None and grid != last:
            matrices.append(_merge(last, grid))
        matrices.append(_full(attention, places, len(x), n))
        last = grid
    return _chained(matrices)


@torch.no_grad()
def _sam(model, x, tokens):
    """Windows of the padded grid from its corner on, without a shift; a window of 0 is the whole grid."""
    blocks, calls, handles = [m for m in model.modules() if hasattr(m, "window_size") and hasattr(m, "attn")], [], []
    with Attentions() as mode:
        for block in blocks:
            keep = lambda m, args, out: calls.append((mode.found[-1], m.window_size))  # noqa: E731
            handles.append(block.register_forward_hook(keep))
        model(x)
    for handle in handles:
        handle.remove()
    H, W = _grid(x.shape[2:], tokens)
    numbers, matrices = torch.arange(len(x) * tokens).view(len(x), H, W), []
    for attention, window in calls:
        h, w = (window, window) if window else (H, W)
        padded = F.pad(numbers, (0, -W % w, 0, -H % h), value=-1)
        places = padded.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3).flatten(3).flatten(0, 2)
        matrices.append(_full(attention.reshape(len(places), -1, h * w, h * w), places, len(x), tokens))
    return _chained(matrices)


# ------------------------------------------------------------------------------------------------ pooling


def window_means(grid, kernel, stride, prefix):
    """((pooled tokens, tokens), the pooled grid): each row the mean over a window, by pooling the identity; ``prefix`` as they are."""
    each = torch.eye(grid[0] * grid[1], dtype=torch.float64).view(-1, 1, *grid)
    pooled = F.avg_pool2d(each, kernel, stride, [k // 2 for k in kernel], count_include_pad=False)
    return torch.block_diag(torch.eye(prefix, dtype=torch.float64), pooled.flatten(1).T), tuple(pooled.shape[2:])


def _mvit(model, x, tokens):
    """Pooled keys and skip connections, by the strides of the layers that pool them."""
    seen, grid, product = iter(attentions_of(model, x)), tuple(-(-n // 4) for n in x.shape[2:]), None
    for block in (block for stage in model.stages for block in stage.blocks):
        prefix, pool = int(block.has_cls_token), block.shortcut_pool_attn
        keys, _ = window_means(grid, block.attn.pool_k.kernel_size, block.attn.pool_k.stride, prefix)
        skip, grid = window_means(grid, *((1, 1), (1, 1)) if pool is None else (pool.kernel_size, pool.stride), prefix)
        layer = (next(seen).mean(1) @ keys + skip) / 2
        product = layer if product is None else layer @ product
    return product


CHAINS = {"plain": _plain, "parallel": _parallel, "cait": _cait, "eomt": _eomt, "swin": _swin, "sam": _sam, "mvit": _mvit, "mae": _mae}
"""How the attention of a host's layers makes a roll-out: (model, x, number of tokens) -> (B, output tokens, input tokens)."""
