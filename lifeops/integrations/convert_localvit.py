"""``convert(model, "localvit")``: LocalViT's feed-forward in place of each block's LayerNorm and MLP."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from lifeops.arguments import check_choice, check_int, check_positive
from lifeops.hosts.host import Block, Host
from lifeops.integrations.convert_check import check_branch, check_last_branch
from lifeops.integrations.convert_plan import Plan, beyond, check_options, host_of, one_list, readable
from lifeops.integrations.convert_probe import Probed, ran, sequence
from lifeops.integrations.host_block import host_block, local_block
from lifeops.nn.localvit import ACTS, LocalityFeedForward, LocalViTBlock

_PLAIN = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2", "gamma_2")  # the parts that LocalViT's own block has, or does without


class LocalityBranch(LocalityFeedForward):
    """What :class:`LocalityFeedForward` adds to its tokens, or maps: for blocks of hosts, which add it themselves."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x (B, P + H*W, C) -> (B, P + H*W, C), 0 for the prefix tokens; maps (B, H, W, C), which tell their grid, to such."""
        if x.dim() == 4:
            size = tuple(x.shape[1:3])
            return self.forward(x.flatten(1, 2), size).unflatten(1, size)
        return super().forward(x, grid) - x


class _Passed(nn.Module):
    """In place of the second half of an MLP: what the first gave, on top of the tokens where that half adds them."""

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        return x if tokens is None else tokens + x


def _mlp(path: str, block: Block) -> nn.Linear:
    """The last layer of the MLP, from its hidden channels to the tokens'."""
    mlp, kind = block.part("mlp"), type(block.module).__name__
    if hasattr(block.module, "in_split"):
        raise ValueError(f"convert: {path} is {kind}, whose attention and MLP share a projection (in_proj); LocalViT needs them apart")
    if not isinstance(mlp, nn.Module) or block.attn is None:
        lacks = ", ".join(name for name in ("attn", "mlp") if not isinstance(block.part(name), nn.Module))
        raise ValueError(f"convert: {path} is {kind} without {lacks or 'mlp'}; looked for a block with norm1, attn, norm2, mlp")
    layers = []
    for part in filter(None, (block.mlp, block.out)):
        found = getattr(block.module, part).named_modules()
        layers += [(name, m, part) for name, m in found if hasattr(m, "in_features") and hasattr(m, "out_features")]
    for name, layer, part in layers:
        if "." not in name.removesuffix(".base_layer"):
            readable(f"{path}.{part}.{name}", layer)
    if not layers:
        raise ValueError(f"convert: {path} is {kind} without {block.mlp}.fc1; looked for linear layers in its MLP")
    return layers[-1][1]


def _tells_grid(block: Block) -> bool:
    """Whether a block sees maps (windows), or tells its MLP the grid of its tokens (PVT v2)."""
    mlp = block.part("mlp")
    return hasattr(block.module, "window_size") or (isinstance(mlp, nn.Module) and len(inspect.signature(mlp.forward).parameters) > 1)


def _plain(host: Host, block: Block) -> bool:
    """Whether LocalViT's own block can stand for it."""
    known = host.library != "transformers" and block.order in ("pre", None) and block.norm1 is not None and block.norm2 is not None
    alone = not host.staged and not hasattr(block.module, "window_size")  # it is given nothing beside its tokens, and cuts no windows
    return known and alone and not beyond(block.module, _PLAIN) and block.attn == "attn" and block.mlp == "mlp"


def _own_block(block: Block, conv: LocalityFeedForward) -> LocalViTBlock:
    new = LocalViTBlock(block.part("norm1"), block.part("attn"), conv, block.part("drop_path1"), block.part("ls1"))
    new.training = block.module.training
    return new


def _same_block(host: Host, block: Block, branch: LocalityBranch) -> nn.Module:
    """The host's block with the branch in place of its MLP, and without the norm, the scale and the drop path that go with that alone."""
    new = host_block(block.module) if host.library == "transformers" else local_block(block.module)
    new._modules[block.mlp] = nn.ModuleList([branch]) if isinstance(block.part("mlp"), nn.ModuleList) else branch
    if block.out is not None:
        new._modules[block.out] = _Passed().train(block.module.training)
    for name in (block.norm2, block.ls2, "drop_path2"):
        if name in new._modules:
            new._modules[name] = nn.Identity().train(block.module.training)
        elif name in new._parameters and new._parameters[name] is not None:
            del new._parameters[name]
            new.__dict__[name] = 1.0
    return new


def convert_localvit(
    model: nn.Module, *, num_prefix_tokens: int | None = None, act: str = "hs+se", reduction: int | None = None,
    expand_ratio: float | None = None, **options,
) -> Plan:  # fmt: skip
    """Replace every block by one with the same attention and LocalViT's feed-forward instead of LayerNorm and MLP."""
    check_options(options, ("act", "reduction", "expand_ratio"))
    check_choice("convert", "act", act, ACTS)
    check_int("convert", "reduction", reduction, 1, optional=True), check_positive("convert", "expand_ratio", expand_ratio, optional=True)
    host, prefix = host_of(model, num_prefix_tokens)
    if not all(map(_tells_grid, host.blocks)):
        one_list(host, "localvit")
    made: dict[int, tuple[nn.Module, nn.Module]] = {}
    convs: dict[int, LocalityFeedForward] = {}
    for block in host.blocks:
        if id(block.module) in made:
            continue
        plain, last = _plain(host, block), _mlp(block.path, block)
        if not plain and block.order is None:
            odd = ", ".join(beyond(block.module, _PLAIN)) or "another layout"
            raise ValueError(f"convert: {block.path} is {type(block.module).__name__} with {odd}, which LocalViT's block does not have")
        dim, hidden, weight = last.out_features, last.in_features, last.weight
        conv = (LocalityFeedForward if plain else LocalityBranch)(
            dim, hidden / dim if expand_ratio is None else expand_ratio, act, dim if reduction is None else reduction,
            num_prefix_tokens=prefix, device=weight.device, dtype=weight.dtype,
        ).train(block.module.training)  # fmt: skip
        new = _own_block(block, conv) if plain else _same_block(host, block, conv)
        made[id(block.module)], convs[id(block.module)] = (block.module, new), conv
    described = {id(block.module): block for block in reversed(host.blocks)}

    def check(probed: Probed) -> None:
        for path, block, given in ran(host, probed):
            _, new = made[id(block)]
            if isinstance(new, LocalViTBlock):
                sequence(path, given.x)
                check_branch(path, block, new, given)
            else:
                grid = tuple(given.x.shape[1:3]) if given.x.dim() == 4 else probed.grid
                check_last_branch(path, described[id(block)], new, convs[id(block)], given, grid)

    swaps = list(made.values())
    news = [new for _, new in swaps]
    if host.library != "transformers":
        return Plan(host, swaps, list(convs.values()), news, prefix, True, check)
    return Plan(host, swaps, [*convs.values(), *news], [], prefix, True, check)
