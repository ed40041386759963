"""convert and revert: what a user did to the model meanwhile stays done, what the model was comes back, and a failure changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lifeops
from conftest import declare_torchvision_ops

declare_torchvision_ops()
timm = pytest.importorskip("timm")
SYSTEMS = ("life", "localvit", "dw_shortcut")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}


def _vit(**options):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**SIZES, **options)


def _picture(model):
    """Everything that could change: modules by identity, parameters by identity and value, modes, hooks, flags."""
    modules = {name: (id(m), m.training, [*map(id, m._forward_hooks.values())], [*map(id, m._forward_pre_hooks.values())])
               for name, m in model.named_modules(remove_duplicate=False)}  # fmt: skip
    parameters = {name: (id(p), p.requires_grad, p.dtype, p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    return modules, parameters


def _assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (*facts, value) in before[1].items():
        assert facts == list(after[1][name][:-1]), name
        assert torch.equal(value, after[1][name][-1]), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_everything_comes_back(system):
    model = _vit(class_token=True, reg_tokens=2)
    model.blocks[1].mlp.eval().requires_grad_(False)
    model.blocks[2].attn.register_forward_hook(lambda *a: None)
    model.blocks[2].register_forward_pre_hook(lambda *a: None)
    model.register_forward_hook(lambda *a: None)
    before = _picture(model)
    for _ in range(2):
        lifeops.convert(model, system)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        model.zero_grad()
        lifeops.revert(model)
        _assert_same(before, _picture(model))


@pytest.mark.parametrize("system", SYSTEMS)
def test_modes(system):
    model = _vit(proj_drop_rate=0.3, drop_path_rate=0.3).eval()
    x = torch.randn(4, 3, 32, 32)
    expected = model(x)
    lifeops.convert(model, system)
    assert not any(m.training for m in model.modules())
    lifeops.revert(model.train().eval())
    assert torch.equal(model(x), expected)
    lifeops.revert(lifeops.convert(model, system).train())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.to("meta")])
@pytest.mark.parametrize("system", SYSTEMS)
def test_dtypes_and_devices(system, change):
    model = lifeops.revert(change(lifeops.convert(_vit(), system)))
    expected = change(_vit())
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p.dtype, p.device) == (q.dtype, q.device), name
    x = change(_Holder(torch.randn(1, 3, 32, 32))).x
    assert model(x).shape == (1, 5)


class _Holder(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.register_buffer("x", x)


@pytest.mark.parametrize("system", SYSTEMS)
def test_freezing(system):
    model = lifeops.revert(lifeops.convert(_vit(), system).requires_grad_(False))
    assert not any(p.requires_grad for p in model.parameters())
    lifeops.revert(lifeops.convert(model, system).requires_grad_(True))
    assert all(p.requires_grad for p in model.parameters())
    model.blocks[0].requires_grad_(False)
    lifeops.convert(model, system)
    assert not any(p.requires_grad for name, p in model.blocks[0].named_parameters() if "proj" in name)
    lifeops.revert(model)
    assert [any(p.requires_grad for p in b.parameters()) for b in model.blocks] == [False, True, True, True]


@pytest.mark.parametrize("system", SYSTEMS)
def test_hooks_act_on_what_stands_there(system):
    """Registered before: on the replacement. Registered or removed meanwhile: so afterwards."""
    model, ran = _vit().eval(), []
    x = torch.randn(2, 3, 32, 32)
    first = model.blocks[1].attn.register_forward_hook(lambda m, args, out: ran.append(type(m).__name__))
    plain = type(model.blocks[1].attn).__name__
    lifeops.convert(model, system)
    model(x)
    assert ran == ["LifeAttention" if system == "life" else plain]
    block = model.blocks[1].blocks[0] if system == "dw_shortcut" else model.blocks[1]
    block.attn.register_forward_hook(lambda m, args, out: ran.append("second"))
    block.register_full_backward_hook(lambda m, gi, go: ran.append("backward"))
    first.remove()
    lifeops.revert(model)
    ran.clear()
    model(x).sum().backward()
    assert ran == ["second", "backward"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_shared_blocks(system):
    """Blocks that the model holds twice (ALBERT-like) stay one block, converted and reverted."""
    model = _vit().eval()
    model.blocks[1] = model.blocks[0]
    model.blocks[3].attn = model.blocks[2].attn
    x = torch.randn(2, 3, 32, 32)
    expected, count = model(x), sum(p.numel() for p in model.parameters())
    lifeops.convert(model, system)
    assert model(x).shape == (2, 5)
    if system != "dw_shortcut":
        assert model.blocks[0] is model.blocks[1]
        assert model.blocks[2].attn is model.blocks[3].attn
    else:
        assert model.blocks[0].blocks[0] is model.blocks[1].blocks[0]
    lifeops.revert(model)
    assert model.blocks[0] is model.blocks[1]
    assert sum(p.numel() for p in model.parameters()) == count
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("system", SYSTEMS)
def test_blocks_taken_out(system, every):
    """prune_intermediate_layers, slices and a block put elsewhere between convert and revert."""
    options = {"every": every} if system == "dw_shortcut" else {}
    model, x = _vit().eval(), torch.randn(2, 3, 32, 32)
    blocks = list(model.blocks)
    lifeops.convert(model, system, **options)
    model.blocks = model.blocks[: 2 // every if options else 2]
    assert model(x).shape == (2, 5)
    lifeops.revert(model)
    assert list(model.blocks) == blocks[:2]
    assert type(model.blocks) is nn.Sequential
    assert not any(m._forward_hooks or m._forward_pre_hooks for b in blocks for m in b.modules())
    twin = _vit().eval()
    twin.blocks = twin.blocks[:2]
    assert torch.equal(model(x), twin(x))
    model = lifeops.convert(_vit(), system)
    model.prune_intermediate_layers([1])
    assert len(lifeops.revert(model).blocks) == 2


def _without_mlp(model):
    model.blocks[3].mlp = nn.Identity()


def _pruned(model):
    prune.random_unstructured(model.blocks[3].attn.proj, "weight", 0.5)
    prune.random_unstructured(model.blocks[3].mlp.fc1, "weight", 0.5)


FAILURES = {  # (system, options, what was done to the model before)
    "unknown option": ("life", {"heads": 3}, lambda m: None), "aux_key": ("life", {"aux_key": "scale2"}, lambda m: None),
    "act": ("localvit", {"act": "gelu"}, lambda m: None), "reduction": ("localvit", {"reduction": 10**6}, lambda m: None),
    "every": ("dw_shortcut", {"every": 3}, lambda m: None), "kernel": ("dw_shortcut", {"kernel_sizes": 4}, lambda m: None),
    "last block": ("localvit", {}, _without_mlp), "pruned": ("localvit", {}, _pruned), "pruned attention": ("life", {}, _pruned),
    "prefix": ("life", {"num_prefix_tokens": -1}, lambda m: None),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_conversion_that_fails_changes_nothing(name):
    system, options, prepare = FAILURES[name]
    model = _vit()
    prepare(model)
    before = _picture(model)
    with pytest.raises((ValueError, TypeError)):
        lifeops.convert(model, system, **options)
    _assert_same(before, _picture(model))
    with pytest.raises(ValueError, match=r"revert: the model was not converted"):
        lifeops.revert(model)
    _assert_same(before, _picture(model))


def test_a_second_conversion_is_refused_and_changes_nothing():
    model = lifeops.convert(_vit(), "life")
    before = _picture(model)
    with pytest.raises(ValueError, match=r"converted to 'life' before; call lifeops.revert"):
        lifeops.convert(model, "localvit")
    _assert_same(before, _picture(model))
    for call in (lifeops.convert, lifeops.revert):
        with pytest.raises(TypeError, match=r"(convert|revert): model must be a torch.nn.Module, got int"):
            call(3)


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_a_conversion_must_not_read(system):
    """Pruned, adapted or quantised layers are refused, not read at their old weights."""
    if system == "dw_shortcut":
        return  # reads none
    model = _vit()
    _pruned(model)
    with pytest.raises(ValueError, match=r"blocks.3.* cannot be read: it has forward pre hooks \(convert first"):
        lifeops.convert(model, system)


@pytest.mark.parametrize("system", SYSTEMS)
def test_copies_revert_on_their_own(system):
    model = lifeops.convert(_vit(), system)
    twin = copy.deepcopy(model)
    lifeops.revert(twin)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(twin.eval()(x), _vit().eval()(x), rtol=0, atol=1e-6)
    assert model(x).shape == (2, 5)
    lifeops.revert(model)


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradients_have_their_parameters_strides(system):
    """channels_last models: DistributedDataParallel copies, with a warning, what lies otherwise."""
    for build in (lambda: lifeops.convert(_vit(), system), lambda: lifeops.convert(_vit(), system, **_OPTIONS[system])):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            model = build().to(memory_format=memory_format)
            model(torch.randn(2, 3, 32, 32).to(memory_format=memory_format)).sum().backward()
            grads = [(n, p, p.grad) for n, p in model.named_parameters() if n.startswith("blocks") and p.grad is not None]
            assert not [n for n, p, grad in grads if grad.stride() != p.stride()]


_OPTIONS = {"life": {"recompute": True, "qkv_norm": True}, "localvit": {"act": "hs+eca"}, "dw_shortcut": {"kernel_sizes": (3, 5)}}
