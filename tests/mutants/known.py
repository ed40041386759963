"""Mutants that no test can tell from the library, and why."""

from mutants.places import Mutant

DWCONV, SHORTCUT, LIFE = "lifeops/ops/token_dwconv/", "lifeops/ops/dw_shortcut/", "lifeops/ops/life_qkv/"
EQUIVALENT: dict[str, tuple[tuple[str, str, str], ...]] = {  # why: (file, how the line begins, what is there instead)
    "filters are square: both sides are one number": (
        (DWCONV + "act_bwd_spec.py", "dw, db = dwconv.fake_bwd_dw(", "weight.shape[ 3]"),
        (DWCONV + "spec.py", "problem=lambda x, weight, *rest: Problem(", "weight.shape[ 3]"),
        (DWCONV + "spec.py", "return torch.nn.functional.conv2d(map_, weight, bias, padding", "weight.shape[~1]"),
        (SHORTCUT + "function.py", "return F.pad(weight,", "weight.shape[~1]"),
        (SHORTCUT + "function.py", "g, one = (_centre(", "weight.shape[- 2]"),
    ),
    "sums that nobody takes: slower, the same result": (
        (DWCONV + "act_function.py", "return _fwd(x, weight, bias, scale, shift, act,", "False, True, backend)[0]"),
        (DWCONV + "act_function.py", "return _fwd(x, weight, bias, scale, shift, act,", "True, False, backend)[0]"),
        (DWCONV + "act_function.py", "ctx.bias_dtype = bias.dtype if bias is not None", "or need[2]"),
    ),
    "there is always one layer, or three": (("lifeops/hosts/layouts.py", "return made[0].chunk(3, -1)", "len(made) <= 1"),),
    "called on the class alone, where a function is as good": (
        (SHORTCUT + "function.py", "@staticmethod", ""), (LIFE + "function.py", "@staticmethod", ""),
    ),
    "the formula does not read P": ((DWCONV + "act_spec.py", "return dwconv.flops(x, weight, bias, residual, H, W, 0)", "W, 1)"),),
    "computes again what is there already": ((LIFE + "function.py", "if scale1_key and P:  # z2's own prefix rows", "scale1_key or P"),),
    "an int more, which has no gradient": ((LIFE + "function.py", "elif torchlib.builds_graph(*args[:7])", "args[: 8]"),),
    "how many rows are held at a time: memory, not values": (
        ("lifeops/ops/rollout_step.py", "for rows in blocks(N, B * heads * N)", "B ^ heads"),
    ),
    "the product of truth values is their and": (("lifeops/hosts/pooled.py", "inside = ((place >= first)", "(place >= first) * (place"),),
    "the other ways come before it in the alphabet": (
        ("lifeops/hosts/describe.py", 'takes = "" if block.flow == "tokens"', '>= "tokens"'),
    ),
}  # fmt: skip


def reason(mutant: Mutant) -> str | None:
    """Why ``mutant`` is the library in other words; None if it is not known to be."""
    entries = ((why, entry) for why, some in EQUIVALENT.items() for entry in some)
    before, after = mutant.before.strip(), mutant.after
    return next((why for why, (path, begins, has) in entries if path == mutant.path and before.startswith(begins) and has in after), None)
