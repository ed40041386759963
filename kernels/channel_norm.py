"""A batch norm's constants and its parameters' gradients in Triton: a launch each, in float64."""

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.kernels import _tile
from lifeops.kernels._sums import BLOCK_C, ROWS, store_affine
from lifeops.kernels._tile import inside, load_block, per_channel
from lifeops.ops.channel import norm  # noqa: F401  (its operators are registered for here)


@triton.jit(do_not_specialize=["n"])
def norm_affine_kernel(mean_ptr, m2_ptr, gamma_ptr, beta_ptr, out_ptr, n, C: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr):
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    b_n = n.to(tl.float64)
    b_mean, b_m2 = per_channel(mean_ptr, o_c, m_c, 0.0, tl.float64), per_channel(m2_ptr, o_c, m_c, 0.0, tl.float64)
    store_affine(out_ptr, gamma_ptr, beta_ptr, b_mean, b_m2 / b_n, o_c, m_c, C, EPS)
    tl.store(out_ptr + 3 * C + o_c, (b_m2 / tl.maximum(b_n - 1.0, 1.0)).to(out_ptr.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["B", "n"])
def norm_gradients_kernel(dv_ptr, dvx_ptr, slope_ptr, slope_x_ptr, gate_ptr, pool_ptr, mean_ptr, scale_ptr, rstd_ptr, out_ptr, B, n,
                          C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    b_dv, b_dvx = tl.zeros([ROWS, BLOCK_C], dtype=tl.float64), tl.zeros([ROWS, BLOCK_C], dtype=tl.float64)
    for i in range(0, B, ROWS):
        o_b = i + tl.arange(0, ROWS)
        m = inside(o_b, B) & m_c
        o = o_b.to(tl.int64)[:, None] * C + o_c
        b_first, b_second = load_block(dv_ptr + o, m, True, tl.float64), load_block(dvx_ptr + o, m, True, tl.float64)
        if gate_ptr is not None:
            b_gate, b_pool = load_block(gate_ptr + o, m, True, tl.float64), load_block(pool_ptr + o, m, True, tl.float64)
            b_first = b_gate * b_first + b_pool * load_block(slope_ptr + o, m, True, tl.float64)
            b_second = b_gate * b_second + b_pool * load_block(slope_x_ptr + o, m, True, tl.float64)
        b_dv += b_first
        b_dvx += b_second
    b_dshift, b_dscale = tl.sum(b_dv, 0)[None, :], tl.sum(b_dvx, 0)[None, :]
    b_mean, b_scale = per_channel(mean_ptr, o_c, m_c, 0.0, tl.float64), per_channel(scale_ptr, o_c, m_c, 0.0, tl.float64)
    b_rstd, b_n = per_channel(rstd_ptr, o_c, m_c, 0.0, tl.float64), n.to(tl.float64)
    b_dgamma = b_rstd * (b_dscale - b_mean * b_dshift)
    b_b = -b_scale * b_rstd * b_dgamma / b_n
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + o_c, b_dgamma.to(ACC), mask=m_c)
    tl.store(out_ptr + C + o_c, b_dshift.to(ACC), mask=m_c)
    tl.store(out_ptr + 2 * C + o_c, (-b_scale * b_dshift / b_n - b_b * b_mean).to(ACC), mask=m_c)
    tl.store(out_ptr + 3 * C + o_c, b_b.to(ACC), mask=m_c)


def _launch(kernel, out, **arguments):
    tensors = {f"{name}_ptr": _tile.contiguous(t) for name, t in arguments.items() if not isinstance(t, (int, float))}
    numbers = {name: t for name, t in arguments.items() if isinstance(t, (int, float))}
    C = out.shape[1]
    _tile.launch(kernel, -(-C // BLOCK_C), out, dict(**tensors, out_ptr=out, **numbers, C=C, BLOCK_C=BLOCK_C))
    return out


def norm_affine(mean, m2, gamma, beta, eps, n, backend):
    out = torch.empty((4, len(mean)), dtype=mean.dtype, device=mean.device)
    return _launch(norm_affine_kernel, out, mean=mean, m2=m2, gamma=gamma, beta=beta, n=n, EPS=eps)


def norm_gradients(dv, dvx, slope, slope_x, gate, pool_grad, mean, scale, rstd, n, backend):
    (B, C), gated = dv.shape, {"slope": slope, "slope_x": slope_x, "gate": gate, "pool": pool_grad}
    out = torch.empty((4, C), dtype=dv.dtype, device=dv.device)
    rows = min(ROWS, triton.next_power_of_2(B))
    return _launch(norm_gradients_kernel, out, dv=dv, dvx=dvx, **gated, mean=mean, scale=scale, rstd=rstd, B=B, n=n, ROWS=rows)


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, norm_affine_kernel)


for _fn in (norm_affine, norm_gradients):
    registry.register(_fn.__name__, "triton", _fn, supports=supports, priority=10)
