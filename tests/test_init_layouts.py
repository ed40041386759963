"""structured_ on other people's attention modules and models (timm, transformers, torch, vit-pytorch), and what it refuses."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from conftest import declare_torchvision_ops
from lifeops.init import structured_
from lifeops.models import VisionTransformer
from lifeops.nn import LifeAttention
from test_init_models import GRID, SIZES, close, expected_qk, generator, qk_of, vit

# other people's ----------------------------------------------------------------------------------------------------------


class Split(nn.Module):
    """transformers' and timm's names for separate projections."""

    def __init__(self, dim, heads, out):
        super().__init__()
        self.num_attention_heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        setattr(self, out, nn.Linear(dim, dim))


class Transformers4(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention, self.output = nn.Module(), nn.Module()
        self.attention.num_attention_heads = heads
        for name in ("query", "key", "value"):
            setattr(self.attention, name, nn.Linear(dim, dim))
        self.output.dense = nn.Linear(dim, dim)


class VitPytorch(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Sequential(nn.Linear(dim, dim), nn.Dropout())


LAYOUTS = {
    "o_proj": (lambda: Split(24, 3, "o_proj"), lambda m: (m.q_proj.weight, m.k_proj.weight)),
    "out_proj": (lambda: Split(24, 3, "out_proj"), lambda m: (m.q_proj.weight, m.k_proj.weight)),
    "transformers4": (lambda: Transformers4(24, 3), lambda m: (m.attention.query.weight, m.attention.key.weight)),
    "vit_pytorch": (lambda: VitPytorch(24, 3), lambda m: m.to_qkv.weight.chunk(3)[:2]),
    "torch": (lambda: nn.MultiheadAttention(24, 3), lambda m: m.in_proj_weight.chunk(3)[:2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_as_lists_of_blocks(name):
    make, weights = LAYOUTS[name]
    blocks = [nn.Sequential(nn.LayerNorm(24), make()) for _ in range(2)]
    E = torch.randn(20, 24, generator=generator(7))
    report = structured_(blocks, generator=generator(), position_embedding=E, grid=GRID)
    assert report.num_layers == 2
    for block, qk in zip(blocks, expected_qk(E), strict=True):
        close(qk_of(*weights(block[1])), qk)


def test_given_parameter_is_scaled_and_given_tensor_is_not():
    parameter = nn.Parameter(0.02 * torch.randn(1, 21, 24, generator=generator(7)))
    tensor, before = parameter.detach().clone(), parameter.detach().clone()
    structured_([VitPytorch(24, 3)], position_embedding=parameter, grid=GRID)
    structured_([VitPytorch(24, 3)], position_embedding=tensor, grid=GRID)
    close(parameter, 18 * before, 1e-6)
    assert torch.equal(tensor, before)


TIMM = {
    "cls": {},
    "registers": {"reg_tokens": 4},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "dynamic": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**SIZES, **TIMM[name])
    structured_(model, generator=generator())
    for block, qk in zip(model.blocks, expected_qk(model.pos_embed[0, -20:]), strict=True):
        close(qk_of(*block.attn.qkv.weight.chunk(3)[:2]), qk)
    assert torch.isfinite(model(torch.randn(1, 3, 32, 40))).all()


def test_timm_refusals():
    declare_torchvision_ops()
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match=re.escape("blocks.0.attn (Attention) has q_norm, k_norm")):
        structured_(timm.models.VisionTransformer(**SIZES, qk_norm=True))
    with pytest.raises(ValueError, match="no position embedding found in VisionTransformer"):
        structured_(timm.models.VisionTransformer(**SIZES, pos_embed="none"))
    structured_(timm.models.VisionTransformer(**SIZES, pos_embed="none"), "mimetic", generator=generator())


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_transformers(kind):
    declare_torchvision_ops()
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=(32, 40), patch_size=8
    )
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    report = structured_(model, generator=generator())
    E = next(p for n, p in model.named_parameters() if n.endswith("position_embeddings"))
    assert [h.offset for h in report.layer(0)] == [(0, 0), (-1, 0), (0, 1)]
    layers = [m for m in model.modules() if hasattr(m, "q_proj") or hasattr(m, "query")]
    E0 = torch.empty(E.shape).normal_(std=0.02, generator=(g := generator()))
    if kind == "DeiT":  # all zeros in transformers
        close(E, 18 * E0, 1e-6)
    for layer, qk in zip(layers, expected_qk(E[0, -20:], g=g if kind == "DeiT" else None), strict=True):
        wq, wk = (layer.q_proj.weight, layer.k_proj.weight) if hasattr(layer, "q_proj") else (layer.query.weight, layer.key.weight)
        close(qk_of(wq, wk), qk)


# refusals ----------------------------------------------------------------------------------------------------------------


def _unchanged(model, call, error, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        call(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


REFUSED = {
    "method": ({"method": "xavier"}, {}, "method must be one of 'impulse', 'mimetic', 'default', got 'xavier'"),
    "version": ({"version": 2023}, {}, "version must be 2024 or 2025, got 2023"),
    "kernel_size": ({"kernel_size": 4}, {}, "kernel_size must be 3 or 5, got 4"),
    "class_token": ({"version": 2024}, {}, "version=2024 is for models without prefix tokens (class token, registers), got 1"),
    "width": ({}, {"num_heads": 1}, "head width must be smaller than the number of patches 4*5 = 20, got 24"),
    "grid": ({"grid": (5, 5)}, {}, "must have rows for 5*5 = 25 patches and up to 1 prefix tokens, got 21"),
    "few_rows": ({"grid": (2, 5)}, {}, "must have rows for 2*5 = 10 patches and up to 1 prefix tokens, got 21"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_model_alone(name):
    options, changes, message = REFUSED[name]
    _unchanged(vit(**changes), lambda m: structured_(m, **options), ValueError, message)


def _cross():
    return nn.MultiheadAttention(24, 3, kdim=12)


def _two():
    attention = VitPytorch(24, 3)
    attention.to_q, attention.to_kv = nn.Linear(24, 24), nn.Linear(24, 48)
    del attention.to_qkv
    return attention


def _silent():
    attention = VitPytorch(24, 3)
    del attention.heads
    return attention


UNSETTABLE = [(_cross, "one in_proj_weight"), (_two, "in to_kv.weight"), (_silent, "does not say its heads")]


@pytest.mark.parametrize(("build", "message"), UNSETTABLE)
def test_layers_that_cannot_be_set(build, message):
    with pytest.raises(ValueError, match=message):
        structured_([build()], position_embedding=torch.randn(20, 24), grid=GRID)


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj"])
@pytest.mark.parametrize("changed", [nn.utils.parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_weights_that_are_computed_are_not_written_to(layer, changed):
    """What is written to them is lost at the next call."""
    model = vit()
    changed(model.blocks[0].get_submodule(layer))
    _unchanged(model, structured_, ValueError, f"blocks.0.attn (Attention): {layer[5:]}.weight is no parameter")


def test_computed_weights_of_life():
    model = vit(attn=LifeAttention)
    nn.utils.parametrizations.weight_norm(model.blocks[1].attn.qkv.scale1)
    _unchanged(model, structured_, ValueError, "blocks.1.attn (LifeAttention): qkv.scale1.weight is no parameter")


def test_low_rank_embedding_leaves_the_model_alone():
    model = vit()
    nn.init.ones_(model.pos_embed[:, 0])
    model.pos_embed.data[:, 1:] = torch.arange(24.0)
    _unchanged(model, structured_, ValueError, "rank 1, less than the head width 8")


def test_zero_embedding_is_drawn():
    model = vit()
    nn.init.zeros_(model.pos_embed)
    structured_(model, generator=generator())
    assert model.pos_embed.std().item() == pytest.approx(0.36, abs=0.05)


def test_more_refusals():
    with pytest.raises(TypeError, match="must be a module or a list of modules, got SimpleNamespace"):
        structured_(SimpleNamespace())
    with pytest.raises(ValueError, match=r"no attention found in Linear whose .*: found nothing called attention; looked for linear"):
        structured_(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="the grid is unknown"):
        structured_([VitPytorch(24, 3)], position_embedding=torch.randn(20, 24))
    with pytest.raises(ValueError, match=r"position_embedding must have shape \(1, N, 24\) or \(N, 24\), got \(20, 12\)"):
        structured_([VitPytorch(24, 3)], position_embedding=torch.randn(20, 12), grid=GRID)
    with pytest.raises(ValueError, match="impulses need the same width, heads and head width in all blocks"):
        structured_([VitPytorch(24, 3), VitPytorch(12, 3)], position_embedding=torch.randn(20, 24), grid=GRID)
    rotary = nn.ModuleDict({"attn": VitPytorch(24, 3), "rope_embeddings": nn.Identity()})
    with pytest.raises(ValueError, match=r"rotates queries and keys \(rope_embeddings\)"):
        structured_(rotary, position_embedding=torch.randn(20, 24), grid=GRID)
    talking = VitPytorch(24, 3)
    talking.mix_heads_pre_attn = nn.Parameter(torch.eye(3))
    with pytest.raises(ValueError, match="has mix_heads_pre_attn, so its attention is not"):
        structured_([talking], position_embedding=torch.randn(20, 24), grid=GRID)
    twice = vit()
    twice.blocks[0].pos_embed = nn.Parameter(torch.zeros(1, 21, 24))
    with pytest.raises(ValueError, match=r"several position embeddings found \(pos_embed, blocks.0.pos_embed\)"):
        structured_(twice)
    grouped = Split(24, 3, "o_proj")
    grouped.k_proj = nn.Linear(24, 8)
    with pytest.raises(ValueError, match=r"of one shape, got .*k \(8, 24\), .*grouped keys"):
        structured_([grouped], position_embedding=torch.randn(20, 24), grid=GRID)
    with torch.device("meta"):
        empty = VisionTransformer(**SIZES)
    with pytest.raises(ValueError, match="is on the meta device"):
        structured_(empty)


def test_a_second_call_warns():
    model = vit()
    structured_(model, generator=generator())
    with pytest.warns(UserWarning, match=r"has std 0\.3\d before it is multiplied by 18"):
        structured_(model, generator=generator())
