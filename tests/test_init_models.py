"""structured_ on this library's models: grids, prefixes, methods, LocalViT and LIFE."""

import copy

import pytest
import torch
import torch.nn.functional as F

import lifeops
from lifeops.init import impulse_qk, optimised_qk, sincos_position_embedding, structured_
from lifeops.models import VisionTransformer
from lifeops.nn import LifeAttention

SIZES = {"img_size": (32, 40), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}  # a 4 x 5 grid
GRID, HEADS, WIDTH = (4, 5), 3, 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vit(seed=0, **changes):
    torch.manual_seed(seed)
    return VisionTransformer(**{**SIZES, **changes})


def expected_qk(patches, layers=2, heads=HEADS, g=None, **options):
    """Q·K of every layer as structured_ draws it: the noise of a layer's heads, then its values."""
    g, found = g or generator(), []
    for _ in range(layers):
        Q, K = impulse_qk(patches.detach(), grid=GRID, num_heads=heads, head_dim=patches.shape[1] // heads, generator=g, **options)
        torch.empty(patches.shape[1], patches.shape[1]).uniform_(generator=g)
        found.append(49 * Q @ K)
    return found


def close(got, expected, atol=1e-4):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def qk_of(wq, wk, heads=HEADS):
    q, k = (w.detach().unflatten(0, (heads, -1)) for w in (wq, wk))
    return q.transpose(1, 2) @ k


# grids and prefixes -------------------------------------------------------------------------------------------------------

PREFIXES = {
    "none": {"class_token": False},
    "cls": {},
    "dist": {"dist_token": True},
    "registers": {"num_reg_tokens": 4},
}


@pytest.mark.parametrize("name", PREFIXES)
def test_any_prefix_on_a_rectangle(name):
    model = vit(**PREFIXES[name])
    P, before = model.num_prefix_tokens, model.pos_embed.detach().clone()
    report = structured_(model, generator=generator())
    close(model.pos_embed, 18 * before, 1e-6)
    for block, qk in zip(model.blocks, expected_qk(model.pos_embed[0, P:]), strict=True):
        close(qk_of(*block.attn.qkv.weight.chunk(3)[:2]), qk)
        product = block.attn.proj.weight @ block.attn.qkv.weight[48:]
        assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.1)
    assert [h.offset for h in report.layer(0)] == [(0, 0), (-1, 0), (0, 1)]
    assert all(h.mass > 0.4 for h in report.heads)


def test_more_heads_than_offsets():
    heads = 27
    model = vit(embed_dim=4 * heads, num_heads=heads, depth=1)
    report = structured_(model, kernel_size=5, generator=generator())
    assert [h.offset for h in report.heads[25:]] == [(0, 0), (-1, 0)]
    close(qk_of(*model.blocks[0].attn.qkv.weight.chunk(3)[:2], heads), expected_qk(model.pos_embed[0, 1:], 1, heads, kernel_size=5)[0])


def test_shared_solution():
    model = vit()
    structured_(model, generator=generator(), shared=True)
    first, second = (b.attn.qkv.weight.detach() for b in model.blocks)
    assert torch.equal(first[:48], second[:48])
    assert not torch.equal(first[48:], second[48:])


def test_same_seed_same_weights_whatever_the_global_state():
    one = vit()
    two = copy.deepcopy(one).bfloat16()
    structured_(one, generator=generator(5))
    torch.manual_seed(99)
    two.pos_embed.data = copy.deepcopy(vit()).pos_embed.data  # the same embedding in float32, weights in bfloat16
    structured_(two, generator=generator(5))
    assert torch.equal(one.blocks[1].attn.qkv.weight.bfloat16(), two.blocks[1].attn.qkv.weight)


# methods ------------------------------------------------------------------------------------------------------------------


def test_scales():
    one, two = vit(), vit()
    structured_(one, generator=generator())
    structured_(two, generator=generator(), position_scale=18, qk_scale=3.5, value_scale=0.5)
    q1, v1 = one.blocks[0].attn.qkv.weight.split((48, 24))
    q2, v2 = two.blocks[0].attn.qkv.weight.split((48, 24))
    close(q2, q1 / 2, 1e-6)
    close(v2, v1 / 2, 1e-6)
    close(two.blocks[0].attn.proj.weight, one.blocks[0].attn.proj.weight / 2, 1e-6)


def test_default_keeps_the_weights():
    model, same = vit(), vit()
    report = structured_(model, "default")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert report.heads[0].mass is None
    assert "head 0: no impulse" in str(report)
    structured_(model, "default", position_scale=2, qk_scale=3, value_scale=4)
    for name, a in model.named_parameters():
        factor = {"pos_embed": 2, "proj.weight": 4}.get(name if name == "pos_embed" else name[-11:] if "attn" in name else "", 1)
        if name.endswith("qkv.weight"):
            factor = torch.tensor([3.0, 3.0, 4.0]).repeat_interleave(24)[:, None]
        close(a, factor * same.get_parameter(name), 1e-6)


def test_mimetic():
    model = vit(embed_dim=96, num_heads=2)  # d 48 is more than the 20 patches: no impulses, but mimetic
    before = model.pos_embed.detach().clone()
    report = structured_(model, "mimetic", generator=generator())
    assert torch.equal(model.pos_embed, before)
    for block in model.blocks:
        weight = block.attn.qkv.weight.detach()
        traces = qk_of(*weight.chunk(3)[:2], 2).diagonal(dim1=1, dim2=2).mean(1)
        assert (traces > 0.35).all()  # the rank-d part of 0.7 noise + 0.7 I has at least half of its trace
        assert (block.attn.proj.weight @ weight[192:]).diagonal().mean().item() == pytest.approx(-0.4, abs=0.03)
    assert all(h.offset == (0, 0) and h.mass > 0.3 for h in report.heads)


def test_2024():
    model = vit(class_token=False)
    values = [(b.attn.qkv.weight.detach()[48:].clone(), b.attn.proj.weight.detach().clone()) for b in model.blocks]
    report = structured_(model, version=2024, steps=60, generator=generator(), progress=False)
    E = sincos_position_embedding(GRID, 24)
    assert torch.equal(model.pos_embed[0], E)
    assert not model.pos_embed.requires_grad
    fit = optimised_qk(E, grid=GRID, num_heads=HEADS, head_dim=WIDTH, steps=60, generator=generator())
    for block, (v, proj) in zip(model.blocks, values, strict=True):
        close(qk_of(*block.attn.qkv.weight.chunk(3)[:2]), fit.Q[0] @ fit.K[0])
        assert torch.equal(block.attn.qkv.weight[48:], v)
        assert torch.equal(block.attn.proj.weight, proj)
    assert report.loss == fit.loss.tolist()
    assert [h.offset for h in report.layer(1)] == fit.offsets[0]
    structured_(model, version=2024, steps=5, generator=generator(), progress=False, shared=False)  # the embedding is fixed by now
    assert not torch.equal(model.blocks[0].attn.qkv.weight[:48], model.blocks[1].attn.qkv.weight[:48])


# this library's modules ---------------------------------------------------------------------------------------------------


def test_localvit():
    torch.manual_seed(0)
    model = lifeops.models.localvit(**{**SIZES, "num_heads": 3}, reduction=4)
    structured_(model, generator=generator())
    for block, qk in zip(model.blocks, expected_qk(model.pos_embed[0, 1:]), strict=True):
        close(qk_of(*block.attn.qkv.weight.chunk(3)[:2]), qk)


def test_life_sets_the_heads_of_scale_1():
    """Attention of scale 1's head is the impulse exactly; the deeper scales keep their magnitude on white inputs."""
    model = vit(attn=LifeAttention)
    same = copy.deepcopy(model)
    report = structured_(model, generator=generator())
    assert [(h.layer, h.head, h.offset) for h in report.heads] == [(0, 0, (0, 0)), (1, 0, (0, 0))]
    assert all(h.mass > 0.9 for h in report.heads)
    attn, before = model.blocks[0].attn, same.blocks[0].attn
    x = F.layer_norm(model.pos_embed.detach()[:, 1:], (24,))
    x = torch.cat((torch.zeros(1, 1, 24), x), 1)
    q, k, _ = attn.qkv_heads(x, GRID)
    weights = (q @ k.transpose(-2, -1) / 8**0.5)[0, 0, 1:, 1:].softmax(-1)
    assert weights.diagonal().mean().item() == pytest.approx(report.heads[0].mass, abs=1e-5)
    scale1, deeper = attn.qkv.scale1.weight, attn.qkv.scale2.pointwise.weight
    ratio = before.qkv.scale1.weight.norm() / scale1.norm()
    close(deeper, ratio * before.qkv.scale2.pointwise.weight, 1e-6)
    assert torch.equal(attn.proj.weight[:, 8:], before.proj.weight[:, 8:])
    assert torch.equal(attn.qkv.scale3.pointwise.weight, before.qkv.scale3.pointwise.weight)


def test_life_explains_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"blocks.0.attn \(LifeAttention\) has qkv_norm: one LayerNorm over all channels couples"):
        structured_(vit(attn=lambda *sizes: LifeAttention(*sizes, qkv_norm=True)))
    with pytest.raises(ValueError, match=r"no head lies inside scale 1 \(8 channels, heads of 12\)"):
        structured_(vit(attn=LifeAttention, num_heads=2))
