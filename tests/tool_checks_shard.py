"""FSDP2, FSDP1 and DistributedDataParallel, one process: outputs and gradients of the unsharded twin. Two processes: test_shard.py."""

import contextlib
import warnings

import torch
import torch.distributed as dist
from tool_cells import tool
from tool_systems import Host, build, fused, gradients
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lifeops.nn.plain import is_fused


@contextlib.contextmanager
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def blocks_of(model):
    return [model.block] if isinstance(model, Host) else list(model.blocks)


def layers_of(model):
    """Modules with parameters of their own, the model left out."""
    return [m for name, m in model.named_modules() if name and any(True for _ in m.parameters(recurse=False))]


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def compare(model, twin, x, tolerance=1e-7):
    """Training mode, output and every gradient."""
    results = []
    for m in (model.train(), twin.train()):
        inputs = x.clone().requires_grad_()
        y = m(inputs)
        results.append((y.detach(), {name: full(g) for name, g in gradients(m, y, inputs).items()}))
    (ours, got), (theirs, wanted) = results
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    got = {name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): g for name, g in got.items()}
    assert got.keys() == wanted.keys()
    for name, g in wanted.items():
        torch.testing.assert_close(got[name], g, rtol=10 * tolerance, atol=10 * tolerance)


def _ran_fused(model, x):
    """Which of lifeops' modules run fused, asked as they are called, with weights gathered; the outermost, the others have no hook."""
    seen, handles, inside = [], [], set()
    for name, m in model.named_modules():
        if hasattr(m, "fused_layers") and m not in inside:
            inside.update(m.modules())
            handles.append(m.register_forward_pre_hook(lambda m, args, name=name: seen.append((name, is_fused(m)))))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@tool("FSDP2", "`fully_shard` on every layer", "output, gradients")
def per_layer(system):
    model, twin, x = build(system)
    with one_process() as mesh:
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        compare(model, twin, x)
        assert len(fused(model)) < len(fused(build(system)[0]))


def _sharded_runs_fused(system, parts):
    model, twin, x = build(system)
    with one_process() as mesh:
        for part in parts(model):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        compare(model, twin, x)
        seen = _ran_fused(model.eval(), x)
        assert seen
        assert all(ran for _, ran in seen), seen


@tool("FSDP2", "`fully_shard` on every block", "output, gradients; the blocks run fused")
def per_block(system):
    _sharded_runs_fused(system, blocks_of)


@tool("FSDP2", "`fully_shard` on the model", "output, gradients; it runs fused")
def whole(system):
    _sharded_runs_fused(system, lambda model: ())


@tool("FSDP2", "`MixedPrecisionPolicy(param_dtype=torch.bfloat16)` on every block", "output, gradients within bfloat16's rounding; fused")
def mixed(system):
    model, twin, x = build(system, torch.float32)
    with one_process() as mesh:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        y, wanted = model(x), twin(x)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0.05 * wanted.abs().max().item())
        y.square().mean().backward()
        wanted.square().mean().backward()
        theirs = dict(twin.named_parameters())
        for name, p in model.named_parameters():
            assert p.grad.dtype == torch.float32
            error = (full(p.grad) - theirs[name].grad).norm() / theirs[name].grad.norm().clamp(min=1e-3)
            assert error < 0.2, (name, error)
        assert all(ran for _, ran in _ran_fused(model, x))


def _fsdp1(title, policy, **options):
    @tool("FSDP1", title, "output, gradients")
    def check(system):
        model, twin, x = build(system)
        with one_process(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)
            with torch.no_grad():
                torch.testing.assert_close(wrapped.eval()(x), twin(x), rtol=1e-7, atol=1e-7)
            if options.get("use_orig_params"):
                compare(wrapped, twin, x)

    return check


def _dense(module, recurse, nonwrapped_numel):
    return recurse or isinstance(module, (nn.Linear, nn.Conv2d))


_fsdp1("`FullyShardedDataParallel`", None, use_orig_params=True)
_fsdp1("`FullyShardedDataParallel`, every layer", _dense, use_orig_params=True)
_fsdp1("`FullyShardedDataParallel`, `use_orig_params=False`", None)


@tool("DDP", "`DistributedDataParallel`, `find_unused_parameters=False`", "output, gradients of two steps; no warning about strides")
def ddp(system):
    model, twin, x = build(system)
    with one_process(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Grad strides do not match")
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second call is the one that complains about parameters without a gradient
            compare(parallel, twin, x)


@tool("DDP", "`static_graph`, `gradient_as_bucket_view`", "output, gradients")
def ddp_static(system):
    model, twin, x = build(system)
    with one_process():
        compare(nn.parallel.DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True), twin, x)
