"""LIFE's q, k and v in attention that does more with them than softmax(scale q kᵀ) v: each written out in plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hosts import hf, hooks_of, made, named, small_vit, staged, timm, unchanged, vit
from plain_systems import life_qkv
from torch import nn

import lifeops
from lifeops.integrations.life_projection import LifeInProjection, LifeProjection

GRID = (4, 6)
_SIZED = {"img_size": (64, 96), "embed_dim": 48, "num_heads": 3, "num_classes": 5}  # 4 x 6 patches


def _heads(t, n):
    return t.unflatten(2, (n, -1)).transpose(1, 2)


def _joined(t):
    return t.transpose(1, 2).flatten(2)


def _talking(attn, x, q, k, v):
    def mix(linear, a):
        return torch.einsum("oh,bhij->boij", linear.weight, a) + linear.bias[:, None, None]

    q, k, v = (_heads(t, 3) for t in (q, k, v))
    scores = mix(attn.proj_l, q @ k.mT / q.shape[-1] ** 0.5)
    return attn.proj(_joined(mix(attn.proj_w, scores.softmax(-1)) @ v))


def _differential(attn, x, q, k, v):
    (q1, q2), (k1, k2) = ((t[:, 0::2], t[:, 1::2]) for t in (_heads(q, 6), _heads(k, 6)))
    first, second = ((a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) for a, b in ((q1, k1), (q2, k2)))
    lam = (attn.lambda_q1 * attn.lambda_k1).sum().exp() - (attn.lambda_q2 * attn.lambda_k2).sum().exp() + attn.lambda_init
    y = (first - lam * second) @ _heads(v, 3)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * attn.sub_norm.weight * (1 - attn.lambda_init)
    return attn.proj(_joined(y))


def _channels(attn, x, q, k, v):
    q, k, v = (_heads(t, 3).mT for t in (q, k, v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * attn.temperature
    return attn.proj(_joined((scores.softmax(-1) @ v).mT))


def _gated(attn, x, q, k, v):
    q, k, v = (_heads(t, 3) for t in (q, k, v))
    y = _joined((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return attn.proj(y * attn.gate(x).sigmoid())


def _gated_vit():
    model = small_vit(embed_dim=48)()
    for block in model.blocks:
        block.attn = timm.layers.Attention(48, 3, qkv_bias=True, gated=True)
    return model


def _cait():
    return named("cait_xxs24_224", **_SIZED)()


ATTENTIONS = {
    "talking heads": (_cait, 0, _talking),
    "differential": (small_vit(embed_dim=48, attn_layer="diff"), 1, _differential),
    "channels": (staged("xcit_nano_12_p16_224", img_size=(64, 96), depth=2, embed_dim=48, num_heads=3), 0, _channels),
    "gated": (_gated_vit, 1, _gated),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    """In double precision, on 4 x 6 patches: the layer that was exchanged, and what the attention makes of it."""
    build, prefix, plain = ATTENTIONS[name]
    model = lifeops.convert(made(build).double())
    attn = model.blocks[1].attn
    assert type(attn.qkv) is LifeProjection
    x = torch.randn(2, prefix + 24, 48, dtype=torch.float64)
    q, k, v = life_qkv(attn.qkv, x, prefix, GRID)
    with lifeops.use_grid(model, GRID), torch.no_grad():
        torch.testing.assert_close(attn.qkv(x), torch.cat((q, k, v), -1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(attn(x), plain(attn, x, q, k, v), rtol=1e-6, atol=1e-6)  # timm: λ in float32


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"fuse_out_proj": True, "qk_norm": True}])
def test_attention_beside_the_mlp(options):
    """x + ls(attention and MLP of one norm): the MLP's part of the projection stays."""

    def block(*args, **kwargs):
        return vit.ParallelScalingBlock(*args, **{**kwargs, "qkv_bias": False, "init_values": 0.3, **options})

    original = made(small_vit(embed_dim=48, block_fn=block)).double()
    model = lifeops.convert(copy.deepcopy(original))
    old, new = original.blocks[1], model.blocks[1]
    assert type(new.in_proj) is LifeInProjection
    x = torch.randn(2, 25, 48, dtype=torch.float64)
    normed = old.in_norm(x)
    hidden = F.gelu(F.linear(normed, old.in_proj.weight, old.in_proj.bias)[..., :192] + (0 if old.mlp_bias is None else old.mlp_bias))
    q, k, v = (_heads(t, 3) for t in life_qkv(new.in_proj, normed, 1, GRID))
    y = _joined((old.q_norm(q) @ old.k_norm(k).mT / 4).softmax(-1) @ v)
    y = old.out_proj(torch.cat((y, hidden), -1)) if options.get("fuse_out_proj") else old.attn_out_proj(y) + old.mlp_out_proj(hidden)
    with lifeops.use_grid(model, GRID), torch.no_grad():
        torch.testing.assert_close(new(x), x + old.ls(y), rtol=1e-9, atol=1e-9)


def _swin(name, **options):
    sizes = {"img_size": (32, 64), "patch_size": 4, "window_size": 4, "depths": (2, 1), "embed_dim": 24, "num_heads": (3, 6)}
    return staged(name, **sizes, **options)


def _windows(x):
    """(8, 16) patches in windows of 4 x 4."""
    return x.unflatten(2, (4, 4)).unflatten(1, (2, 4)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _mask():
    """Of a shift by 2: windows hold patches of up to four places."""
    rows, columns = (torch.arange(n) // 4 * 4 + torch.arange(n) // 2 % 2 * (torch.arange(n) >= n - 4) for n in (8, 16))
    place = _windows((100 * rows[:, None] + columns)[None, ..., None])[..., 0]
    return (place[:, :, None] != place[:, None]).double()[:, None] * -100


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_windows(name, shift):
    """Convolved inside each window, after the cyclic shift."""
    model = lifeops.convert(made(_swin(name)).double())
    block = model.layers[0].blocks[shift // 2]
    attn, cosine = block.attn, "v2" in name
    x = torch.randn(2, 8, 16, 24, dtype=torch.float64)
    normed = x if cosine else block.norm1(x)
    tokens = _windows(normed.roll((-shift, -shift), (1, 2)))
    q, k, v = life_qkv(attn.qkv, tokens, 0, (4, 4))
    if cosine:
        q, v = q + attn.q_bias, v + attn.v_bias
        table = 16 * attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2).sigmoid()
        scale = attn.logit_scale.clamp(max=torch.tensor(100.0).log().item()).exp()
    else:
        table, scale = attn.relative_position_bias_table, 8**-0.5
    q, k, v = (_heads(t, 3) for t in (q, k, v))
    scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT if cosine else q @ k.mT) * scale
    scores = scores + table[attn.relative_position_index.flatten()].view(16, 16, 3).permute(2, 0, 1)
    scores = scores + (_mask().repeat(2, 1, 1, 1) if shift else 0)
    y = attn.proj(_joined(scores.softmax(-1) @ v)).unflatten(1, (4, 4)).unflatten(0, (2, 2, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    y = y.roll((shift, shift), (1, 2))
    z = x + (block.norm1(y) if cosine else y)
    z = z + (block.norm2(block.mlp(z)) if cosine else block.mlp(block.norm2(z)))
    with torch.no_grad():
        torch.testing.assert_close(block(x), z, rtol=1e-9, atol=1e-9)


MODELS = {
    "cait": _cait,
    "beside the MLP": small_vit(embed_dim=48, block_fn=vit.ParallelScalingBlock),
    "swin v2": _swin("swinv2_tiny_window8_256"),
    "sam": named("samvit_base_patch16", **_SIZED, window_size=3, global_attn_indexes=(1,)),
}


PAIRS = [(name, system) for system in ("life", "localvit") for name in MODELS if (name, system) != ("beside the MLP", "localvit")]


@pytest.mark.parametrize(("name", "system"), PAIRS)
def test_what_else_a_converted_model_does(name, system):
    """State dicts, copies, activation checkpointing, gradients everywhere, and all of it back."""
    model = made(MODELS[name])
    size = getattr(model.patch_embed, "img_size", None)
    x, before = torch.randn(2, 3, *size), copy.deepcopy(model)
    hooks = hooks_of(model)
    twin = lifeops.convert(copy.deepcopy(model), system)
    lifeops.convert(model, system)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        y = model(x)
        assert torch.equal(twin(x), y)
        assert torch.equal(copy.deepcopy(model)(x), y)
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    lifeops.revert(model).set_grad_checkpointing(False)
    with torch.no_grad():
        assert torch.equal(model(x), before(x))
    assert list(model.state_dict()) == list(before.state_dict())
    assert hooks_of(model) == hooks


def test_maps_of_two_sizes():
    """SAM's global blocks: the grid is that of the image, that of a window its own."""
    model = lifeops.convert(made(MODELS["sam"]))
    assert [block.attn.qkv.window for block in model.blocks] == [(3, 3), None]
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)


def test_windows_that_change():
    model = lifeops.convert(made(_swin("swin_tiny_patch4_window7_224")))
    model.set_input_size(window_size=(2, 8))  # as many tokens
    attn, x = copy.deepcopy(model).layers[0].blocks[0].attn, torch.randn(3, 16, 24)
    assert attn.qkv.window == (2, 8)
    with torch.no_grad():
        torch.testing.assert_close(attn.qkv(x), torch.cat(life_qkv(attn.qkv, x, 0, (2, 8)), -1))


def test_tokens_of_transformers_tell_no_grid():
    """Its blocks are no others then, and nothing binds the grid where checkpointing runs them again."""
    model = hf("BlipVision")()
    model.encoder.layers[1].self_attn.gate = nn.Linear(96, 96)
    message = r"^convert: encoder\.layers\.1 is BlipEncoderLayer with attention that does more .* is given tokens \(1, 17, 96\); .* maps"
    unchanged(model, lifeops.convert, message)


class _Twice(nn.Module):
    """An attention that projects twice, and one that reads the weight of its projection."""

    def __init__(self, attn, weight):
        super().__init__()
        self.qkv, self.num_heads, self.mixing, self.weight = attn.qkv, 3, nn.Linear(24, 24), weight

    def forward(self, x, attn_mask=None, is_causal=False):
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias) if self.weight else self.qkv(x) + self.qkv(2 * x)
        return self.mixing(qkv.chunk(3, -1)[0])


@pytest.mark.parametrize(("weight", "message"), [(True, "has no attribute 'weight'"), (False, "calls it 2 times, looked for once")])
def test_attention_that_does_not_go_by_its_layer(weight, message):
    model = small_vit()()
    model.blocks[1].attn = _Twice(model.blocks[1].attn, weight)
    with pytest.raises(ValueError, match=rf"convert: .*blocks\.1.*{message}"):
        lifeops.convert(model)
    assert isinstance(model.blocks[1].attn.qkv, nn.Linear)
