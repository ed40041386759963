"""accelerate's offloading: weights are on the meta device until a hook around their own module's forward fetches them."""

import tempfile

import torch
from tool_cells import tool
from tool_systems import SYSTEMS, build, fused, same

import lifeops

TOLERANCE = {"rtol": 1e-7, "atol": 1e-7}


def _expected(twin, x):
    with torch.no_grad():
        return twin(x)


def _offloaded(model, x, expected, tolerance=TOLERANCE):
    """Weights are away before and after a call; two calls give the expected output."""
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, **tolerance)
    assert any(p.is_meta for p in model.parameters())


@tool("accelerate", "`cpu_offload`", "output", ["accelerate"])
def cpu_offload(system):
    from accelerate import cpu_offload

    model, twin, x = build(system)
    expected, paths = _expected(twin, x), fused(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    _offloaded(model, x, expected)
    assert len(fused(model)) < len(paths)


@tool("accelerate", "`cpu_offload` after `lifeops.fuse_`", "output", ["accelerate"], absent=("LIFE", "LocalAttention", "timm, life"))
def cpu_offload_folded(system):
    from accelerate import cpu_offload

    model, twin, x = build(system)
    expected = _expected(twin, x)
    cpu_offload(lifeops.fuse_(model), execution_device=torch.device("cpu"))
    _offloaded(model, x, expected)


PRELOADED = {  # whole modules that a hook fetches at once: those inside a fused one, then the fused ones themselves
    "inside": ["LifeQKV", "_Scale", "SELayer", "ECALayer", "Sequential"],
    "fused": ["LifeAttention", "LocalAttention", "LocalityFeedForward", "DWShortcut"],
}


@tool("accelerate", "`cpu_offload(preload_module_classes=…)`, fused modules and those inside", "output; a whole fused module runs fused",
      ["accelerate"])  # fmt: skip
def preloaded(system):
    from accelerate import cpu_offload

    for which, classes in PRELOADED.items():
        model, twin, x = build(system)
        expected, paths = _expected(twin, x), fused(model)
        cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=classes)
        _offloaded(model, x, expected)
        assert which == "inside" or fused(model) == paths


@tool("accelerate", "`disk_offload`", "output", ["accelerate"])
def disk_offload(system):
    from accelerate import disk_offload

    model, twin, x = build(system)
    expected = _expected(twin, x)
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
        _offloaded(model, x, expected)


def _places(model):
    """Every other layer on disk, and what the model itself holds on the CPU."""
    layers = [name for name, m in model.named_modules() if name and (m._parameters or m._buffers)]
    own = [name for name, _ in model.named_parameters(recurse=False)]
    return {**{name: "disk" if i % 2 else "cpu" for i, name in enumerate(layers)}, **dict.fromkeys(own, "cpu")}


@tool("accelerate", "`dispatch_model`, every other layer on disk", "output", ["accelerate"])
def dispatch(system):
    from accelerate import dispatch_model

    model, twin, x = build(system)
    expected = _expected(twin, x)
    places = _places(model)
    with tempfile.TemporaryDirectory() as folder:
        dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
        _offloaded(model, x, expected)


BUFFERS = "output, with `offload_buffers=True`: without it accelerate loads no running statistics of batch norms that stay on disk"


@tool("accelerate", "`init_empty_weights`, `load_checkpoint_and_dispatch`", BUFFERS, ["accelerate", "safetensors"])
def load_and_dispatch(system):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from safetensors.torch import save_file

    model, twin, x = build(system, torch.float32)
    expected = _expected(twin, x)
    with init_empty_weights():
        empty = SYSTEMS[system].build().eval()
    assert all(p.is_meta for p in empty.parameters())
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.safetensors"
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, file)
        places = _places(empty)
        away = {"offload_folder": f"{folder}/away", "offload_buffers": True}
        loaded = load_checkpoint_and_dispatch(empty, file, device_map=places, **away)
        _offloaded(loaded, x, expected, {"rtol": 1e-5, "atol": 1e-5})


@tool("accelerate", "`Accelerator.prepare`, a training step", "output, gradients", ["accelerate"])
def prepare(system):
    from accelerate import Accelerator

    model, twin, x = build(system)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    same(prepared.train(), twin.train(), x)
