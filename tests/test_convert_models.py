"""Converted hosts of timm and transformers against plain PyTorch: the host's own code with convolutions on maps written into it."""

import copy
import inspect

import plain_systems
import pytest
import torch
from hosts import BEIT, SYSTEMS, hf, hooks_of, made, named, small_vit, staged, timm, unchanged, vit
from plain_systems import life_qkv, locality
from torch import nn

import lifeops

GRID = (4, 6)
TINY = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 64}


def _hf(name, model=None, **options):
    return hf(name, model, **{**TINY, **options})


def _beit(**options):
    return lambda: timm.models.Beit(**{**BEIT, "img_size": (32, 48), **options})


HOSTS = {  # (build, prefix, image)
    "ViT": (_hf("ViT"), 1, (32, 48)),
    "ViT, other heads": (_hf("ViT", "ViTForImageClassification", num_attention_heads=4), 1, (32, 48)),
    "DeiT": (_hf("DeiT"), 2, (32, 48)),
    "DINOv2": (_hf("Dinov2", layerscale_value=0.5), 1, (32, 48)),
    "DINOv2, classes": (_hf("Dinov2", "Dinov2ForImageClassification", use_swiglu_ffn=True, layerscale_value=0.5), 1, (32, 48)),
    "DINOv2 with registers": (_hf("Dinov2WithRegisters"), 5, (32, 48)),
    "DINOv3": (_hf("DINOv3ViT", num_register_tokens=3, layerscale_value=0.5, use_gated_mlp=True), 4, (32, 48)),
    "DINOv3, other heads": (_hf("DINOv3ViT", num_attention_heads=4), 1, (32, 48)),
    "CLIP": (_hf("CLIPVision"), 1, (32, 48)),
    "CLIP, projected": (_hf("CLIPVision", "CLIPVisionModelWithProjection"), 1, (32, 48)),
    "SigLIP": (_hf("SiglipVision"), 0, (32, 48)),
    "EVA-02": (named("eva02_tiny_patch14_224", img_size=(56, 84)), 1, (56, 84)),
    "timm DINOv3": (named("vit_small_patch16_dinov3", img_size=(64, 96)), 5, (64, 96)),
    "mixed rope": (named("vit_small_patch16_rope_mixed_224", img_size=(64, 96)), 1, (64, 96)),
    "PE": (named("vit_pe_core_tiny_patch16_384", img_size=(64, 96)), 1, (64, 96)),
    "BEiT": (_beit(init_values=0.1, use_rel_pos_bias=True, num_heads=4), 1, (32, 48)),
    "BEiT, shared": (_beit(use_shared_rel_pos_bias=True), 1, (32, 48)),
    "relative": (named("vit_relpos_small_patch16_224", img_size=(64, 96)), 0, (64, 96)),
    "relative, post norm": (named("vit_relpos_base_patch16_rpn_224", embed_dim=48, num_heads=3, img_size=(64, 96)), 0, (64, 96)),
    "shared relative": (named("vit_srelpos_small_patch16_224", img_size=(64, 96)), 0, (64, 96)),
    "post norm": (small_vit(block_fn=vit.ResPostBlock), 1, (32, 48)),
    "norms of q and k": (small_vit(qk_norm=True, scale_attn_norm=True), 1, (32, 48)),
    "side by side": (small_vit(block_fn=vit.ParallelThingsBlock, init_values=0.5), 1, (32, 48)),
    "CaiT": (named("cait_xxs24_224", img_size=(64, 96)), 0, (64, 96)),
}  # fmt: skip
NEW = {"life": lifeops.nn.LifeAttention, "localvit": lifeops.nn.LocalityFeedForward, "dw_shortcut": lifeops.nn.DWShortcut}
CASES = [(name, system) for name in HOSTS for system in SYSTEMS if (name, system) != ("CaiT", "life")]


def _run(model, x):
    """Whatever it gives, as one tensor."""
    known = inspect.signature(model.forward).parameters
    y = model(x, **({"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}))
    return y if isinstance(y, torch.Tensor) else y[0]


def _blocks(model):
    return lifeops.describe(model).host.blocks


def _random(module):
    """Values that show, of parameters and statistics."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4 if p.dim() < 2 else p[0].numel() ** -0.5)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.running_mean.normal_(std=0.2), m.running_var.uniform_(0.5, 2)


# ------------------------------------------------------------------------------------------------ plain PyTorch


class _Said(nn.Module):
    """A linear layer's place."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def _with_life(attn, life, P):
    """The host's own attention, its projections in LIFE's place; ``proj`` as trained."""
    if hasattr(attn, "qkv"):
        attn.qkv, attn.q_bias = _Said(lambda x: torch.cat(life_qkv(life.qkv, x, P, GRID), -1)), None
    else:
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            setattr(attn, name, _Said(lambda x, i=i: life_qkv(life.qkv, x, P, GRID)[i]))
    proj = next(getattr(attn, name) for name in ("proj", "o_proj", "out_proj") if hasattr(attn, name))
    proj.load_state_dict(life.proj.state_dict())


def _attended(block, x, args, kwargs):
    """x with the branch of the attention added, by the block's class."""
    kind, attns = type(block).__name__, getattr(block, "attns", None)
    if attns is not None:
        return x + sum(branch.ls(branch.attn(branch.norm(x))) for branch in attns)
    attn = next(getattr(block, n) for n in ("attn", "attention", "self_attn") if hasattr(block, n))
    if kind.startswith("ResPost"):
        return x + block.norm1(attn(x, *args, **kwargs))
    norm = next(getattr(block, n) for n in ("norm1", "layernorm_before", "layer_norm1") if hasattr(block, n))
    y = attn(norm(x), *args, **kwargs)
    y = y[0] if isinstance(y, tuple) else y
    scale = next((getattr(block, n) for n in ("gamma_1", "ls1", "layer_scale1") if getattr(block, n, None) is not None), None)
    return x + (y if scale is None else scale(y) if isinstance(scale, nn.Module) else scale * y)


def _written_out(system, twin, converted, P):
    """``twin``, never converted, computes what ``converted`` has to."""
    for old, new in zip(_blocks(twin), _blocks(converted), strict=True):
        block, here = old.module, new.module
        if system == "life":
            pairs = [(b.attn, n.attn) for b, n in zip(block.attns, here.attns, strict=True)] if hasattr(block, "attns") else []
            for attn, life in pairs or [(old.part("attn"), new.part("attn"))]:
                _with_life(attn, life, P)
            continue
        conv = next((m for m in here.modules() if isinstance(m, NEW["localvit"])), None)
        own = block.forward

        def forward(x, *args, block=block, here=here, conv=conv, own=own, **kwargs):
            if system == "dw_shortcut":
                return own(x, *args, **kwargs) + plain_systems.shortcut(here.shortcut, x, P, GRID)
            z = _attended(block, x, args, kwargs)
            return z + locality(conv, z, P, GRID)

        block.forward = forward


@pytest.mark.parametrize(("name", "system"), CASES)
def test_converted_is_what_is_written_out(name, system):
    build, P, size = HOSTS[name]
    model = made(build).double()
    with torch.no_grad():
        for p_name, p in model.named_parameters():
            if p.dim() < 2 or "proj" in p_name:
                p.normal_(std=0.5) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.3)
    twin, x = copy.deepcopy(model), torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        before, keys = _run(model, x), list(model.state_dict())
    lifeops.convert(model, system)
    added = [m for m in model.modules() if isinstance(m, NEW[system])]
    for m in added:
        assert m.num_prefix_tokens == P
        _random(m.qkv if system == "life" else m)
    y = _run(model, x)
    y.square().mean().backward()
    assert all(p.grad is not None for m in added for p in m.parameters())
    shows = [p.grad for m in added[:-1] for name, p in m.named_parameters() if ".fc." not in name]  # the gate's ReLU may be shut
    assert all(grad.any() for grad in shows)  # behind the last block a head may read the class token alone
    state = copy.deepcopy(model.state_dict())

    _written_out(system, twin, model, P)
    expected = _run(twin, x)
    expected.square().mean().backward()
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-9)
    mine, theirs = (lifeops.describe(m).host.embed for m in (model, twin))
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * q.grad.abs().max().item())

    again = lifeops.convert(made(build, seed=1).double(), system)
    again.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(_run(again, x), y, rtol=0, atol=1e-12)
        lifeops.revert(model)
        assert torch.equal(_run(model, x), before)
    assert list(model.state_dict()) == keys
    assert not hooks_of(model)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", ["ViT", "DINOv3", "CLIP"])
def test_what_transformers_does_to_layers(name, system):
    """Gradients with activations checkpointed, hidden states as the layers give them, copies; matrices that nobody makes are refused."""
    build, _, size = HOSTS[name]
    model, x = made(build), torch.randn(2, 3, *size)
    lifeops.convert(model, system)
    last, given = _blocks(model)[-1].module, []
    last.register_forward_hook(lambda m, args, y: given.append((args[0], y)))
    options = {} if name == "DINOv3" else {"interpolate_pos_encoding": True}
    y = model(x, output_hidden_states=True, **options)
    assert len(y.hidden_states) == 3
    assert torch.equal(y.hidden_states[1], given[0][0])
    assert name == "ViT" or torch.equal(y.hidden_states[2], given[0][1])
    assert torch.equal(_run(copy.deepcopy(model), x), y.last_hidden_state)
    if system == "life":
        with pytest.raises(ValueError, match="LifeAttention: output_attentions is not known here"):
            model(x, output_attentions=True, **options)
    grads = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        torch.manual_seed(5)
        _run(model, x).square().mean().backward()
        grads.append([p.grad.clone() for p in last.parameters()])
    for g in grads[1:]:
        for p, q in zip(grads[0], g, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5 * max(q.abs().max().item(), 1e-3))


@pytest.mark.parametrize("name", ["ViT", "DINOv2 with registers", "DINOv3", "BEiT, shared", "CaiT"])
def test_shortcuts_that_start_as_the_identity(name):
    build, _, size = HOSTS[name]
    model, x = made(build), torch.randn(2, 3, *size)
    with torch.no_grad():
        before = _run(model, x)
    lifeops.convert(model, "dw_shortcut", start="identity", kernel_sizes=(3, 5))
    y = _run(model, x)
    assert torch.equal(y, before)
    y.square().mean().backward()
    shortcuts = [m for m in model.modules() if isinstance(m, NEW["dw_shortcut"])]
    assert all(conv.weight.grad.any() for m in shortcuts[:-1] for conv in m.convs)
    optimizer = torch.optim.Adam([p for m in shortcuts for p in m.parameters()], 0.1)
    optimizer.step()
    assert not torch.equal(_run(model, x), before)


STAGES = {
    "PVT v2": staged("pvt_v2_b0", embed_dims=(8, 16, 24, 32), depths=(2, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "Swin V2": staged("swinv2_tiny_window8_256", img_size=(64, 96), window_size=2, embed_dim=24, depths=(2, 1), num_heads=(2, 2)),
}


@pytest.mark.parametrize("name", STAGES)
def test_shortcuts_in_stages(name):
    """Each stage's own grid: told to PVT's blocks, the shape of what Swin's are given."""
    model, x = made(STAGES[name]).double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    twin = copy.deepcopy(model)
    keys, before = list(model.state_dict()), model(x)
    lifeops.convert(model, "dw_shortcut")
    shortcuts = [m for m in model.modules() if isinstance(m, NEW["dw_shortcut"])]
    for m in shortcuts:
        _random(m)
    for block, shortcut in zip((b.module for b in _blocks(twin)), shortcuts, strict=True):

        def forward(x, *told, own=block.forward, shortcut=shortcut):
            y, grid = own(x, *told), tuple(told[0] if told else x.shape[1:3])
            return y + plain_systems.shortcut(shortcut, x.flatten(1, -2), 0, grid).view_as(y)

        block.forward = forward
    torch.testing.assert_close(model(x), twin(x), rtol=1e-7, atol=1e-9)
    assert torch.equal(lifeops.revert(model)(x), before)
    assert list(model.state_dict()) == keys


def test_stages_that_pool_inside_blocks():
    message = r"convert: MultiScaleVit cannot be tried on one image: IndexError"
    unchanged(made(staged("mvitv2_tiny", img_size=64)), lambda m: lifeops.convert(m, "dw_shortcut"), message)
