#!/usr/bin/env bash
# torch 2.13.0, CPU: the gradient of batch norm is wrong for a batch of one that is, or whose gradient is, a view of a token sequence.
#
# Expected: one image has the same gradient as it has in a batch of two, whatever the strides. Seen: tokens (B, N, C) viewed as maps
# (B, C, H, W) by transpose and reshape get an arbitrary batch stride where B is 1. If either the input or the incoming gradient of batch
# norm is such a view and the other one is contiguous, backward reads channels and pixels of one of them in each other's place: wrong
# numbers, no warning, in evaluation mode, too. Batches of two are right; so is everything after x.contiguous() and grad.contiguous().
#
# Output seen:
#   1 image,  input a view of tokens, gradient contiguous: off by 8.17
#   1 image,  input contiguous, gradient a view of tokens: off by 5.96
#   1 image,  both views of tokens:                        off by 4.44e-16
#   1 image,  both contiguous:                             off by 8.88e-16
#   2 images, the worst of the four:                       off by 8.88e-16
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
norm = torch.nn.BatchNorm2d(3).double().eval()
with torch.no_grad():
    norm.weight.uniform_(0.5, 2)
scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]


def maps(batch, view):
    t = torch.randn(batch, 20, 3, dtype=torch.float64).transpose(1, 2).reshape(batch, 3, 4, 5)
    return t if view else t.clone(memory_format=torch.contiguous_format)


def off(batch, x_view, g_view):
    """Largest error of the gradient, which in evaluation mode is the incoming one times a constant per channel."""
    x, g = maps(batch, x_view).requires_grad_(), maps(batch, g_view)
    (gradient,) = torch.autograd.grad(norm(x), x, g)
    return (gradient - g * scale).abs().max().item()


found = off(1, True, False), off(1, False, True), off(1, True, True), off(1, False, False)
two = max(off(2, a, b) for a in (True, False) for b in (True, False))
names = "input a view of tokens, gradient contiguous:", "input contiguous, gradient a view of tokens:", "both views of tokens:", "both contiguous:"
for name, error in zip(names, found):
    print(f"1 image,  {name:44} off by {error:.3g}")
print(f"2 images, {'the worst of the four:':44} off by {two:.3g}")
assert min(found[:2]) > 1 and max(*found[2:], two) < 1e-12
PY
