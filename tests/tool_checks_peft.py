"""peft's adapters, on every layer by its name, against the same adapters on the twin."""

import tempfile

import torch
from tool_cells import tool
from tool_systems import SYSTEMS, build, fused, same
from torch import nn

RANK = 2


def _names(system):
    s = SYSTEMS[system]
    return [*s.depthwise, *s.products, *s.beside]


def _config(system, targets=None, dropout=0.0, **options):
    from peft import LoraConfig

    model, _, _ = build(system)
    groups = {n: m.groups for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}  # peft: a multiple of them
    ranks = {"rank_pattern": groups, "alpha_pattern": {n: 2 * g for n, g in groups.items()}} if targets is None else {}
    return LoraConfig(r=RANK, lora_alpha=4, lora_dropout=dropout, target_modules=targets or _names(system), **ranks, **options)


def _randomise(model, pattern=""):
    """New values for all that an adapter added: initialised, it does nothing."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad and pattern in name and "original_module" not in name:
                draw = torch.Generator().manual_seed(i)
                p.add_(0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype))


def adapted(system, config, pattern="lora_", dtype=torch.float64):
    """(model, twin, x), both adapted in the same way, and the output from before."""
    from peft import get_peft_model

    model, twin, x = build(system, dtype)
    with torch.no_grad():
        before = model(x)
    both = []
    for m in (model, twin):
        config_ = config()
        torch.manual_seed(1)
        both.append(get_peft_model(m, config_))
        _randomise(both[-1], pattern)
    return (*both, x, before)


def _acts(model, twin, x, before, backward=True, tolerance=1e-7):
    """In training and evaluation as on the twin; every adapter has a gradient."""
    for training in (True, False):
        y, gradients = same(model.train(training), twin.train(training), x, tolerance, backward=backward)
    assert (y - before).abs().max() > 1e-4
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    if backward:
        assert wanted <= gradients.keys()
        assert all(gradients[name].abs().max() > 0 for name in wanted if "lora_" in name or "hada" in name)


@tool("peft", "LoRA on every layer by name", "output, gradients, training and evaluation", ["peft"])
def lora(system):
    model, twin, x, before = adapted(system, lambda: _config(system))
    assert sum(hasattr(m, "lora_A") for m in model.modules()) >= len(_names(system))
    _acts(model, twin, x, before)


@tool("peft", 'LoRA, `"all-linear"`', "output, gradients", ["peft"])
def lora_all_linear(system):
    _acts(*adapted(system, lambda: _config(system, "all-linear")))


@tool("peft", "LoRA in float32 on a bfloat16 model", "output within bfloat16's rounding", ["peft"])
def lora_bfloat16(system):
    model, twin, x, before = adapted(system, lambda: _config(system), dtype=torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    with torch.no_grad():
        y, wanted = model(x), twin(x)
    assert y.dtype == torch.bfloat16
    scale = wanted.abs().max().item()
    torch.testing.assert_close(y, wanted, rtol=0, atol=0.05 * scale)
    assert (y - before).abs().max() > 0.05 * scale


def _drop(x):
    return 2 * x * (torch.rand(x.shape, dtype=x.dtype) < 0.5)


@tool("peft", "LoRA with dropout", "output, gradients with the same random numbers", ["peft"])
def lora_dropout(system):
    model, twin, x, _ = adapted(system, lambda: _config(system, dropout=0.5))
    for m in (model, twin):
        for name, layer in m.named_modules():
            if name.endswith("lora_dropout.default"):
                layer.forward = _drop  # the same mask whatever the strides; who calls the adapter's dropout is what is tested
    first, _ = same(model.train(), twin.train(), x, seed=3)
    again, _ = same(model, twin, x, seed=4)
    assert (first - again).abs().max() > 1e-6


@tool("peft", "DoRA", "output, gradients; convolutions with groups by plain LoRA, peft's DoRA has none for them", ["peft"])
def dora(system):
    targets = [*SYSTEMS[system].products, *SYSTEMS[system].beside] or ["head"]
    model, twin, x, before = adapted(system, lambda: _config(system, targets, use_dora=True))
    assert any("magnitude" in name for name, _ in model.named_parameters())
    _acts(model, twin, x, before)


@tool("peft", '`bias="all"`', "output, gradients of every bias", ["peft"])
def bias_all(system):
    model, twin, x, before = adapted(system, lambda: _config(system, bias="all"), pattern="")
    biases = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert biases
    assert all(name.endswith("bias") for name in biases)
    _acts(model, twin, x, before)


SAVED = {  # a module that is trained whole; containers that a fused module holds too
    "LIFE": ["head", "qkv"], "LocalViT": ["head", "conv.8", "fc"], "LocalViT, ECA": ["head", "conv.4"],
    "DW shortcut": ["head", "batchnorms.0"], "LocalAttention": ["head", "local"], "timm, life": ["head", "scale2"],
    "timm, localvit": ["head", "conv.conv"], "timm, dw_shortcut": ["head", "shortcut"],
}  # fmt: skip


@tool("peft", "`modules_to_save`", "output, gradients; a layer, a container and the head trained whole", ["peft"])
def modules_to_save(system):
    targets = {"LIFE": ["block.proj"], "timm, life": ["attn.proj"], "DW shortcut": ["convs.1"], "LocalAttention": ["proj"]}.get(system)
    targets = targets or {"timm, localvit": ["attn.qkv"], "timm, dw_shortcut": ["mlp.fc1"]}.get(system, ["conv.0"])
    rank = {"DW shortcut": 12}.get(system, RANK)

    def config():
        from peft import LoraConfig

        return LoraConfig(r=rank, target_modules=targets, modules_to_save=SAVED[system])

    model, twin, x, before = adapted(system, config, pattern="")
    _acts(model, twin, x, before)


@tool("peft", "several adapters, `disable_adapter`", "output of each; without one, the output of before", ["peft"])
def several_adapters(system):
    model, twin, x, before = adapted(system, lambda: _config(system))
    for m in (model, twin):
        config = _config(system)
        torch.manual_seed(2)
        m.add_adapter("other", config)
        m.set_adapter("other")
        _randomise(m, "other")
    outputs = []
    for name in ("default", "other"):
        for m in (model, twin):
            m.set_adapter(name)
        outputs.append(same(model, twin, x)[0])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-5
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), outputs[1], rtol=0, atol=1e-9)


@tool("peft", "`merge_and_unload`", "output of before the merge to 1e-5, then fused again; products only", ["peft"])
def merge(system):
    from peft import PeftModel

    targets = [*SYSTEMS[system].products, *SYSTEMS[system].beside] or ["head"]
    model, twin, x, _ = adapted(system, lambda: _config(system, targets))
    y, _ = same(model, twin, x, backward=False)
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert fused(merged) == fused(build(system)[0])
    with torch.no_grad():
        torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-5)


NO_MERGE = "Merging is not supported for _ConvNd layers with groups > 1!"


@tool("peft", "`merge_and_unload`, depth-wise convolution", "peft merges into no convolution with groups: keep it as an adapter", ["peft"],
      refused=dict.fromkeys(SYSTEMS, NO_MERGE))  # fmt: skip
def merge_depthwise(system):
    adapted(system, lambda: _config(system))[0].merge_and_unload()


@tool("peft", "`save_pretrained`, `from_pretrained`", "output of the saved model", ["peft"])
def save_and_load(system):
    from peft import PeftModel

    model, _, x, _ = adapted(system, lambda: _config(system, modules_to_save=["head"]), pattern="")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(build(system)[0], folder).eval()
        torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=1e-9)


def _other(kind, system):
    import peft

    s = SYSTEMS[system]
    dense = [*s.products, *(n for n in s.beside if n != "conv.6.conv" or kind.startswith("Lo"))] or ["head"]  # others know no Conv1d
    if kind == "IA3":
        return peft.IA3Config(target_modules=dense, feedforward_modules=[], init_ia3_weights=False)
    if kind == "OFT":
        return peft.OFTConfig(target_modules=[n for n in dense if n not in ("fc.0", "fc.2")] or ["head"], r=1, oft_block_size=0)
    return getattr(peft, f"{kind}Config")(r=RANK, target_modules=dense, init_weights=False)


def _other_tool(kind):
    @tool("peft", kind, "output, gradients, merged", ["peft"])
    def check(system):
        pattern = {"LoHa": "hada", "LoKr": "lokr"}.get(kind, f"{kind.lower()}_")
        model, twin, x, before = adapted(system, lambda: _other(kind, system), pattern)
        _acts(model, twin, x, before)
        with torch.no_grad():
            y = model(x)
            torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-5, atol=1e-5)

    return check


for _kind in ("IA3", "LoHa", "LoKr", "OFT"):
    _other_tool(_kind)
