"""Backends that fail: Triton that cannot be imported or cannot build, memory that runs out, a kernel that raises in mid-run."""

import dataclasses
import os
import sys

import pytest
import torch
from faults import each_fault, ended, fault

import lifeops
from lifeops import registry, torchlib

# ------------------------------------------------------------------------------------------------ a kernel that raises

ERRORS = {
    "RuntimeError": (RuntimeError("CUDA error: an illegal memory access"), "CUDA error: an illegal memory access"),
    "OutOfMemoryError": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "CUDA out of memory. Tried to allocate"),
    "MemoryError": (MemoryError(), "MemoryError"),
}
OPS = {"forward": "token_dwconv", "grad of x": "token_dwconv_bwd_dx", "grad of weight": "token_dwconv_bwd_dw"}


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 1 + 6, 5, requires_grad=True), torch.randn(5, 1, 3, 3, requires_grad=True)


def called(x, weight):
    y = lifeops.token_dwconv(x, weight, grid=(2, 3), num_prefix_tokens=1)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))


@fault(
    f"a kernel raises {', '.join(ERRORS)} in mid-run, in forward and in backward",
    "the same kind of error, which names op and backend; nothing else runs in its place; the next call is right",
)
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("place", OPS)
def test_a_kernel_raises(place, kind, monkeypatch):
    error, said = ERRORS[kind]
    error.args = (said,) if kind != "MemoryError" else ()
    x, weight = inputs()
    expected, before = called(x, weight), (x.detach().clone(), weight.detach().clone())
    op = registry.ops[OPS[place]]
    backend = torchlib.last_backend[op.name]

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setitem(op.impls, backend, dataclasses.replace(op.impls[backend], fn=fail))
        registry.forget_choices()
        with pytest.raises(type(error)) as raised:
            called(x, weight)
        assert raised.value is error
        assert str(error) == f"{op.name}: backend {backend!r} failed: {said}"
        assert torchlib.last_backend[op.name] == backend
    registry.forget_choices()
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])
    assert x.grad is weight.grad is None
    assert all(map(torch.equal, called(x, weight), expected))


def test_errors_that_name_their_op_are_left_alone():
    x, weight = inputs()
    with pytest.raises(lifeops.NotSupported, match=r"^token_dwconv: backend 'cuda' cannot run this problem"):
        lifeops.token_dwconv(x, weight, grid=(2, 3), num_prefix_tokens=1, backend="cuda")


MEMORY = """
import resource, torch, lifeops
from lifeops import registry
torch.set_num_threads(2)
x, weight = torch.randn(1, 1025, 64), torch.randn(64, 1, 3, 3, requires_grad=True)
call = lambda x: lifeops.token_dwconv(x, weight, grid=(32, 32), num_prefix_tokens=1)
expected, copy = call(x), x.clone()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, resource.RLIM_INFINITY))
try:
    call(x.expand(1024, -1, -1))  # 256 MiB of output
except RuntimeError as error:
    print(str(error).partition(chr(10))[0])
assert torch.equal(call(x), expected) and torch.equal(x, copy)
y = call(x.expand(4, -1, -1))
assert torch.equal(y[3:], expected) and torch.isfinite(torch.autograd.grad(y.sum(), weight)[0]).all()
print(registry.unavailable("cpu") is None)
"""


@fault("the machine has no more memory", "an error that names op and backend; the next call, with as little memory, is right")
def test_out_of_memory():
    out, _ = ended("-c", MEMORY)
    line, has_cpu = out.splitlines()
    assert line.startswith(f"token_dwconv: backend '{'cpu' if has_cpu == 'True' else 'reference'}' failed: ")
    assert "can't allocate memory" in line


# ------------------------------------------------------------------------------------------------ Triton

BUILD = """
import contextlib, os, warnings
os.environ["TRITON_INTERPRET"] = "1"
import torch, lifeops, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from lifeops import config, registry, torchlib
import lifeops.kernels.token_dwconv as kernels

x, weight = torch.randn(1, 5, 4), torch.randn(4, 1, 3, 3)
call = lambda **options: lifeops.token_dwconv(x, weight, grid=(2, 2), num_prefix_tokens=1, **options)
expected = call(backend="reference")
assert torch.allclose(call(backend="triton"), expected, atol=1e-5), "the interpreter works"


def wrong(p):  # adds a pointer to a pointer
    triton.language.store(p + p, 0)


def no_compiler():  # as Triton's driver is built
    os.environ.update(PATH="/nowhere", CC="")
    del os.environ["CC"]
    triton.runtime.build.compile_module_from_src("int a;", "lifeops_fault")


def compiled(source):
    triton.compile(ASTSource(JITFunction(source), {"p": "*fp32"}, {}), target=GPUTarget("cuda", 80, 32))


def fine(p):
    triton.language.store(p, 0)


def cache():
    os.environ["TRITON_CACHE_DIR"] = "/dev/null/cache"
    with contextlib.suppress(AttributeError):
        triton.knobs.cache.dir = "/dev/null/cache"
    compiled(fine)


def illegal():
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


class Failing:
    fn = kernels.token_dwconv_fwd_kernel.fn

    def __init__(self, fail):
        self.fail = fail

    def __getitem__(self, grid):
        return lambda **arguments: self.fail()


def tried(fail):
    kernels.token_dwconv_fwd_kernel = Failing(fail)
    registry._not_built.clear(), registry.forget_choices(), registry._warned.clear()
    try:
        call(backend="triton")
    except (lifeops.NotSupported, RuntimeError) as error:
        print(type(error).__name__ + ":", *str(error).splitlines())
    registry._not_built.clear(), registry.forget_choices()
    config.settings = config.settings._replace(backend="triton")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                assert torch.allclose(call(), expected, atol=1e-5)
        print(torchlib.last_backend["token_dwconv"] != "triton", len(seen), *(str(w.message) for w in seen))
    except RuntimeError as error:
        print("no fallback:", error)
    config.settings = config.settings._replace(strict=True)
    try:
        call()
    except RuntimeError as error:
        print(type(error).__name__ + ":", *str(error).splitlines())
    config.settings = config.settings._replace(backend="", strict=False)


for fail in (lambda: compiled(wrong), no_compiler, cache, illegal, memory):
    tried(fail)
"""
TRITON = {  # in the order in which they are tried
    "source": ("Triton's compiler refuses a kernel", "CompilationError: "),
    "no_compiler": ("Triton finds no C compiler", "Failed to find C compiler"),
    "cache": ("Triton's cache cannot be written to", "Not a directory"),
}
RUNNING = {
    "illegal": ("RuntimeError", "Triton Error [CUDA]: an illegal memory access was encountered"),
    "memory": ("OutOfMemoryError", "CUDA out of memory. Tried to allocate"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each fault led to where Triton was asked for, preferred, and preferred with LIFEOPS_STRICT=1."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    (folder / "fault.py").write_text(BUILD)  # Triton reads a kernel's source from its file
    out, _ = ended(folder / "fault.py", env={"TRITON_CACHE_DIR": str(folder / "cache"), "HOME": str(folder)})
    lines = iter(out.splitlines())
    return dict(zip((*TRITON, *RUNNING), zip(lines, lines, lines, strict=True), strict=True))


@each_fault(
    {name: what for name, (what, _) in TRITON.items()},
    "the next best backend runs, with one FallbackWarning; NotSupported where Triton was asked for, or with LIFEOPS_STRICT=1",
)
def test_triton_cannot_build(name, told):
    (asked, preferred, strict), cause = told[name], TRITON[name][1]
    assert asked.startswith("NotSupported: token_dwconv: backend 'triton' cannot run this problem: Triton cannot build token_dwconv_fwd")
    assert preferred.startswith("True 1 lifeops: token_dwconv runs on the slower ")
    assert strict.startswith("NotSupported: token_dwconv: backend 'triton' cannot run this problem: ")
    assert all(cause in line for line in (asked, preferred, strict))


@fault("a Triton kernel fails as it runs", "its own error, which names op and backend; nothing runs in its place")
@pytest.mark.parametrize("name", RUNNING)
def test_triton_fails_as_it_runs(name, told):
    kind, why = RUNNING[name]
    said = f"token_dwconv: backend 'triton' failed: {why}"
    assert told[name] == (f"{kind}: {said}", f"no fallback: {said}", f"{kind}: {said}")


IMPORTS = """
import sys, torch, lifeops
from lifeops import registry
op, x, weight = registry.ops["token_dwconv"], torch.ones(1, 5, 4), torch.ones(4, 1, 3, 3)
for body in {bodies!r}:
    for name in [n for n in sys.modules if n.partition(".")[0] == "triton" or n.startswith("lifeops.kernels")]:
        del sys.modules[name]
    registry._tried.discard("lifeops.kernels"), registry._unavailable.pop("triton", None), registry.forget_choices()
    open({path!r}, "w").write(body)
    (reason,) = registry.reasons_against(op, "triton", op.problem(x, weight))
    try:
        lifeops.token_dwconv(x, weight, grid=(2, 2), num_prefix_tokens=1, backend="triton")
    except lifeops.NotSupported as error:
        assert str(error).endswith(reason)
        print(reason)
    assert lifeops.token_dwconv(x, weight, grid=(2, 2), num_prefix_tokens=1)[0, 1:].eq(4).all()
"""
BROKEN = {  # the whole of a triton package, and what is said of it
    "raise ImportError('libfoo.so is missing')": "triton cannot be imported: ImportError: libfoo.so is missing",
    "raise RuntimeError('no driver')": "triton cannot be imported: RuntimeError: no driver",
    "import os.path as p; p.nothing": "triton cannot be imported: AttributeError: ",
    "raise OSError(5, 'Input/output error')": "triton cannot be imported: OSError: [Errno 5] Input/output error",
    "def": "triton cannot be imported: SyntaxError: ",
    "": "lifeops.kernels cannot be imported: ModuleNotFoundError: ",  # another package of that name
}


@fault("Triton cannot be imported, whatever it raises, or is another package", "the other backends run; asked for, NotSupported says why")
def test_triton_cannot_be_imported(tmp_path):
    code = IMPORTS.format(bodies=[body + "\n" * n for n, body in enumerate(BROKEN)], path=str(tmp_path / "triton.py"))
    out, _ = ended("-B", "-c", code, env={"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])})
    for line, expected in zip(out.splitlines(), BROKEN.values(), strict=True):
        assert line.startswith(expected)
