"""lifeops' own functions on models that tools have changed: the numbers of what runs, or one sentence that says what to do first."""

import torch
from tool_cells import tool
from tool_systems import SYSTEMS, build, timm_model
from torch import nn

import lifeops

FIRST = "convert first, then adapt, quantise, prune or shard"
MERGE = "merge adapters, remove parametrizations and hooks first"
CONVERSIONS = {"timm, life": "life", "timm, localvit": "localvit", "timm, dw_shortcut": "dw_shortcut"}
MODULES = [name for name in SYSTEMS if name not in CONVERSIONS]


def _lora(model, targets):
    from peft import LoraConfig, get_peft_model

    ranks = {name: m.groups for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, rank_pattern=ranks))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return adapted


def _own(title, packages, change):
    """``lifeops.convert`` reads ``attn.proj`` (life) and measures ``mlp.fc1`` (localvit); the shortcut goes around the blocks."""

    @tool("lifeops", title, "the shortcut reads none of the blocks' layers", packages,
          refused={"timm, life": FIRST, "timm, localvit": FIRST}, absent=MODULES)  # fmt: skip
    def check(system):
        model = change(timm_model().eval())
        x = torch.randn(2, 3, 32, 40)
        inner = getattr(model, "base_model", model)
        inner = getattr(inner, "model", inner)
        with torch.no_grad():
            before = model(x)
            lifeops.convert(inner, CONVERSIONS[system])
            assert (model(x) - before).abs().max() > 1e-6
            lifeops.revert(inner)
            assert torch.equal(model(x), before)

    return check


def _quantised(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


_own("`lifeops.convert` of a model with LoRA", ["peft"], lambda model: _lora(model, ["attn.proj", "mlp.fc1"]))
_own("`lifeops.convert` of a quantised model", ["torchao"], _quantised)

FOLDS = {"LocalViT": "conv.3", "LocalViT, ECA": "conv.7", "DW shortcut": "convs.1", "timm, localvit": "conv.0"}


@tool("lifeops", "`lifeops.fuse_` of a model with LoRA on a folded convolution", "", ["peft"], refused=dict.fromkeys(FOLDS, MERGE),
      absent=[name for name in SYSTEMS if name not in FOLDS])  # fmt: skip
def fold_adapted(system):
    model, _, x = build(system)
    adapted = _lora(model, [FOLDS[system]])
    with torch.no_grad():
        before = adapted(x)
        try:
            lifeops.fuse_(adapted)
        finally:
            assert torch.equal(adapted(x), before)  # all of it or nothing


@tool("lifeops", "`lifeops.fuse_` after `merge_and_unload`", "output", ["peft"],
      absent=[name for name in SYSTEMS if "conv.0" not in SYSTEMS[name].products])  # fmt: skip
def fold_merged(system):
    model, _, x = build(system)
    adapted = _lora(model, ["conv.0", "conv.7"])
    with torch.no_grad():
        before = adapted(x)
        torch.testing.assert_close(lifeops.fuse_(adapted.merge_and_unload())(x), before, rtol=1e-5, atol=1e-5)


@tool("lifeops", "`lifeops.rollout` of a model with LoRA", "the merged model's", ["peft"], absent=MODULES)
def rolled_out(system):
    model, _, x = build(system)
    adapted = _lora(model, [*SYSTEMS[system].products, *SYSTEMS[system].beside])
    inner = adapted.base_model.model
    before = lifeops.rollout(inner, x).maps
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(before, lifeops.rollout(merged, x).maps, rtol=1e-5, atol=1e-6)
    assert (before - lifeops.rollout(build(system)[0], x).maps).abs().max() > 1e-6
