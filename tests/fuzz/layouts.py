"""How a tensor may lie in memory: any strides and offsets, surrounded by NaN, so that a stray read shows."""

import torch

KEEPING = ("contiguous", "offset", "slice", "gaps", "permuted")  # the values are as given
SHARING = ("expand", "scalar", "overlap")  # elements share memory, so that values repeat
LAYOUTS = KEEPING + SHARING


def _holder(t, *sizes):
    return t.new_full(sizes, torch.nan if t.is_floating_point() else 1)


def lay_out(t, layout, turn=0):
    """``t`` in another layout; ``turn`` chooses among the variants of one."""
    if t.dim() == 0 or layout == "contiguous":
        return t.contiguous()
    if layout == "offset":  # 1 to 3 elements past an aligned address
        view = _holder(t, t.numel() + 4)[1 + turn % 3 :][: t.numel()].view(t.shape)
    elif layout == "slice":
        part = tuple(slice((turn + i) % 3, (turn + i) % 3 + n) for i, n in enumerate(t.shape))
        view = _holder(t, *(n + 2 + i for i, n in enumerate(t.shape)))[part]
    elif layout == "gaps":
        part = tuple(slice(None, None, 1 + (turn >> i) % 2 if turn else 2) for i in range(t.dim()))
        view = _holder(t, *(n * s.step for n, s in zip(t.shape, part, strict=True)))[part]
    elif layout == "permuted":
        order = torch.randperm(t.dim(), generator=torch.Generator().manual_seed(turn)).tolist()
        view = _holder(t, *(t.shape[i] for i in order)).permute([order.index(i) for i in range(t.dim())])
    elif not t.numel():
        return t
    elif layout == "expand":
        which = turn % t.dim()
        return t.narrow(which, 0, 1).expand(t.shape)
    elif layout == "scalar":
        return t.flatten()[:1].view((1,) * t.dim()).expand(t.shape)
    else:  # every row begins inside the one before
        strides = [1 + turn % 2] * t.dim()
        strides[-1] = 1
        needed = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
        return t.flatten().repeat(1 + needed // t.numel())[:needed].as_strided(t.shape, strides)
    return view.copy_(t)
