"""What holds of every system's module or model, whichever it is."""

import copy

import torch


def agrees(d, module, x, y):
    """``y`` of ``x`` by ``module`` is the authors' in the golden numbers ``d`` to 1e-10: gradients, where none is as good as zero, and
    running statistics, too.
    """
    y.backward(d["g"])
    found = {"y": y, "grad_x": x.grad}
    found |= {f"grad.{name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    found |= {key: module.state_dict()[key.removeprefix("after.")] for key in d if key.startswith("after.")}
    assert {key for key in d if key.startswith("grad.")} <= found.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, d[key], rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def compiled(model, x):
    """torch.compile of the whole: outputs and all gradients."""
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    y, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(x), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward(), expected.square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def exported(model, x):
    """A program of torch's own operators alone."""
    program = torch.export.export(model, (x,))
    assert not [n for n in program.graph.nodes if "lifeops" in str(n.target)]
    torch.testing.assert_close(program.module()(x), model(x))


def traced(model, x):
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def low_precision(module, x, grid, dtype):
    """Outputs and gradients in ``dtype``, as near to float64's as it is precise."""
    expected, low = copy.deepcopy(module)(x, grid), copy.deepcopy(module).to(dtype)
    y = low(x.to(dtype), grid)
    assert y.dtype == dtype
    y.sum().backward()
    assert all(p.grad.dtype == dtype for p in low.parameters())
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


def gradients_of_each_image(model, x, tolerance, unused=False):
    """Under torch.func as one by one; ``unused``: parameters without a gradient have one of zero there."""
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            expected = torch.zeros_like(p) if unused and p.grad is None else p.grad
            torch.testing.assert_close(found[name][i], expected, rtol=tolerance, atol=tolerance)
