"""What lifeops/hosts reads from a layer, a call or a model, piece by piece, where whole models seldom lead."""

from types import SimpleNamespace

import pytest
import torch
from hosts import small_vit
from torch import nn

from lifeops.hosts import attention, heads, images, packed, positions
from lifeops.hosts.host import grid_size_of, pair
from lifeops.hosts.pooling import POOLINGS
from lifeops.nn.rotary import rotate

N, C, H = 7, 24, 3


@pytest.mark.parametrize("bias", [True, False])
def test_a_pooling_head_by_a_probe(bias):
    """The weights of torch's own MultiheadAttention, with biases and without."""
    head = nn.Module()
    head.probe, head.attention = nn.Parameter(torch.randn(1, 1, C)), nn.MultiheadAttention(C, H, bias=bias, batch_first=True)
    if bias:
        nn.init.normal_(head.attention.in_proj_bias)
    x = torch.randn(2, N, C)
    pooling = next(kind for kind in POOLINGS if kind.has[0] == "probe")
    found = pooling.read(head, x, None)
    _, expected = head.attention(head.probe.expand(2, -1, -1), x, x, average_attn_weights=False)
    torch.testing.assert_close(found.weights(found.scores(slice(None))), expected)
    values = (expected @ found.v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(pooling.projected(head, values), head.attention(head.probe.expand(2, -1, -1), x, x)[0])


BESIDE = (
    "attn_mask", "attention_mask", "shared_rel_pos_bias", "shared_rel_pos", "relative_position_bias", "rope", "position_embeddings",
    "other",
)  # fmt: skip
GIVEN = {  # of these, what each kind of attention knows what to do with
    "LIFE": (), "talking heads": (), "pooled": (), "fused": BESIDE[:7], "cosine": BESIDE[1:2], "separate": BESIDE[:7], "class": (),
    "beside an MLP": BESIDE[:1],
}  # fmt: skip


class _Anything(nn.Module):
    def forward(self, x, **kwargs):
        return x


class _Gathering(nn.Module):
    def forward(self, x, **options):
        return x


@pytest.mark.parametrize("kind", attention.KINDS, ids=lambda kind: kind.name)
def test_tensors_beside_the_tokens_are_known_or_refused(kind):
    module, x = _Anything(), torch.randn(1, N, C)
    for name in BESIDE:
        if name in GIVEN[kind.name]:
            assert attention.call_of("rollout", "blocks.0.attn", kind, module, (x,), {name: x[0]}).given[name] is not None
        else:
            with pytest.raises(ValueError, match=f"^rollout: blocks.0.attn was called with {name} beside the tokens, which is not known"):
                attention.call_of("rollout", "blocks.0.attn", kind, module, (x,), {name: (None, x[0])})
    assert set(GIVEN) == {kind.name for kind in attention.KINDS}


def test_calls_without_tokens_are_refused():
    kind = attention.KINDS[3]
    for x, found in ((torch.randn(N, C), rf"\({N}, {C}\)"), ([1], "list")):
        with pytest.raises(ValueError, match=rf"^rollout: attn is given {found}, looked for tokens \(B, N, C\) or \(B, H, W, C\)"):
            attention.call_of("rollout", "attn", kind, _Anything(), (x,), {})
    with pytest.raises(ValueError, match="attn was called with bias beside the tokens"):
        attention.call_of("rollout", "attn", kind, _Gathering(), (torch.randn(1, N, C),), {"bias": torch.ones(1)})
    with pytest.raises(ValueError, match="attn was called with is_causal beside the tokens"):
        attention.call_of("rollout", "attn", kind, _Anything(), (torch.randn(1, N, C),), {"is_causal": True})


def test_arguments_by_name():
    """Those of a call, the tokens left out; by their places where the signature does not fit or gathers them."""

    class Layer(nn.Module):
        def forward(self, x, mask=None, *args, scale=1, **kwargs):
            return x

    assert attention.arguments(Layer(), ("x", "m", "a", "b"), {"scale": 2, "more": 3}) == {
        "mask": "m", "scale": 2, "argument 2": "a", "argument 3": "b", "more": 3,
    }  # fmt: skip
    assert attention.arguments(_Gathering(), ("x",), {"rope": 1}) == {"rope": 1}
    assert attention.arguments(nn.Linear(2, 2), ("x", "m", "n"), {"k": 1}) == {"argument 2": "m", "argument 3": "n", "k": 1}


def test_sizes_of_images():
    """Patches and grids that are not square, in that order."""
    table = nn.Module()
    table.pos_embed_grid_size, table.patch_size = (3, 5), (4, 8)
    assert images.image_sizes(table) == [(12, 40)]
    table.pretrained_cfg = {"input_size": (3, 20, 30)}
    table.img_size = 16
    assert images.image_sizes(table) == [(16, 16), (12, 40), (20, 30)]
    embed = SimpleNamespace(patch_size=(4, 8), grid_size=(3, 5))
    assert images.image_size(SimpleNamespace(teller=embed, trunk=None, staged=False)) == (12, 40)


def test_padded_images_say_which_patches_are_there():
    patches, shapes = torch.randn(2, 6, C), torch.tensor([[2, 3], [1, 4]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    whole = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    assert packed.packed_of("rollout", whole).grids == ((2, 3), (1, 4))
    for change, message in (
        ({"pixel_attention_mask": mask[:, 1:]}, r"pixel_attention_mask must have shape \(B, N\) = \(2, 6\)"),
        ({"pixel_attention_mask": torch.ones(2, 6)}, r"of image 1 must be true of its first 1 x 4 = 4 patches"),
        ({"pixel_attention_mask": mask.flip(1)}, r"of image 1 must be true of its first 1 x 4 = 4 patches"),
        ({"spatial_shapes": shapes.flip(1) * 2}, "must be grids of at least one and at most 6 patches"),
        ({"spatial_shapes": shapes * 1.0}, r"spatial_shapes must be ints of shape \(B, 2\) = \(2, 2\)"),
        ({"pixel_values": patches[0]}, r"pixel_values must be packed patches \(B, N, …\)"),
    ):
        with pytest.raises(ValueError, match=f"^rollout: .*{message}"):
            packed.packed_of("rollout", {**whole, **change})
    y, x = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    coord = torch.stack((y, x), -1).flatten(0, 1).expand(2, -1, -1)
    whole = {"patches": patches, "patch_coord": coord, "patch_valid": torch.ones(2, 6, dtype=torch.bool)}
    assert packed.packed_of("rollout", whole).grids == ((2, 3), (2, 3))
    for change, message in (
        ({"patch_coord": coord[:, :5]}, r"patch_coord must have shape \(B, N, 2\) = \(2, 6, 2\)"),
        ({"patch_coord": None}, "patch_coord must have shape"),
        ({"patch_valid": None}, "the last patch_coord"),
        ({"patch_coord": coord.flip(2)}, "patch_coord of image 0 must go row by row over its 3 x 2 grid"),
    ):
        with pytest.raises(ValueError, match=f"^rollout: .*{message}"):
            packed.packed_of("rollout", {**whole, **change})
    assert packed.packed_of("rollout", patches) is packed.packed_of("rollout", {"pixel_values": patches}) is None


def test_no_model_and_no_host():
    assert positions.host_or_none("structured_", "vit") is None
    assert positions.host_or_none("structured_", nn.Linear(2, 2)) is None
    assert positions.host_or_none("structured_", small_vit()()).prefix == 1


def test_a_call_for_some_of_its_images():
    """Masks that differ by image are picked with the tokens; what all images share, however many rows it has, is not."""
    x, masks, shared, rope = torch.randn(3, N, C), torch.randn(3, 1, N, N), torch.randn(1, H, N, N), torch.randn(3, 8)
    given = {"attn_mask": masks, "shared_rel_pos_bias": shared, "rope": rope, "position_embeddings": None}
    picked = heads.Call(nn.Identity(), x, None, given).of([2, 0])
    assert torch.equal(picked.x, x[[2, 0]])
    assert torch.equal(picked.given["attn_mask"], masks[[2, 0]])
    assert picked.given["shared_rel_pos_bias"] is shared
    assert picked.given["rope"] is rope
    assert picked.given["position_embeddings"] is None


def test_a_call_for_one_padded_image():
    """The tokens that are there, with what is said of them; a mask that hides nothing of these is none."""
    x, mask, rope = torch.randn(2, N, C), torch.zeros(2, 1, 1, N), torch.randn(2, 1, N - 1, 8)  # angles of all but a prefix token
    mask[1, ..., 5:] = torch.finfo(torch.float32).min
    call = heads.Call(nn.Identity(), x, None, {"attn_mask": mask, "rope": rope, "is_causal": False})
    alone = call.alone("rollout", "attn", 1, 5)
    assert torch.equal(alone.x, x[1:, :5])
    assert alone.given["attn_mask"] is None
    assert torch.equal(alone.given["rope"], rope[1:, :, :4])
    mask[1, ..., 2] = -3.0
    assert torch.equal(call.alone("rollout", "attn", 1, 5).given["attn_mask"], mask[1:, :, :, :5])
    with pytest.raises(ValueError, match=r"^rollout: attn attends to the padding of image 0: no mask of its call hides tokens 5 to 6"):
        call.alone("rollout", "attn", 0, 5)
    whole = mask.expand(2, 1, N, N).clone()
    assert torch.equal(call._replace(given={"attn_mask": whole}).alone("rollout", "attn", 1, 5).given["attn_mask"], whole[1:, :, :5, :5])
    shared = torch.zeros(1, 1, 1, N)  # one mask for both images, and angles that differ by nothing
    shared[..., 5:], shared[..., 1] = -torch.inf, -2.0
    given = call._replace(given={"attn_mask": shared, "rope": rope[0, 0]}).alone("rollout", "attn", 1, 5).given
    assert torch.equal(given["attn_mask"], shared[..., :5])
    assert torch.equal(given["rope"], rope[0, 0, :4])
    whole[1, :, 3, 6] = 0  # one query attends to padding
    with pytest.raises(ValueError, match="attends to the padding of image 1"):
        call._replace(given={"attn_mask": whole}).alone("rollout", "attn", 1, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_mixed_heads(bias):
    """Talking heads: heads are mixed before and behind the softmax, with what is added to them."""
    before, behind = nn.Linear(H, H, bias=bias), nn.Linear(H, H, bias=bias)
    q, k = torch.randn(2, H, N, 4), torch.randn(2, H, N, 4)
    found = heads.Heads(q, k, None, 0.5, mix=(before, behind))
    scores = before((0.5 * q @ k.mT).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(found.scores(slice(None)), scores)
    torch.testing.assert_close(found.weights(scores), behind(scores.softmax(-1).movedim(1, -1)).movedim(-1, 1))
    assert not found.plain
    assert found._replace(mix=None).plain


@pytest.mark.parametrize("groups", [1, 2])
def test_queries_that_share_keys(groups):
    """Grouped queries: each key and value serves as many heads as there are queries for it."""
    layer = nn.Module()
    layer.num_heads, layer.scale = 4, 0.3
    layer.q_proj, layer.k_proj, layer.v_proj = (nn.Linear(C, width) for width in (C, C // groups, C // groups))
    x = torch.randn(2, N, C)
    kind = next(kind for kind in attention.KINDS if kind.name == "separate")
    found = kind.read(heads.Call(layer, x, None, {}), True)
    q, k, v = (p(x).unflatten(2, (-1, C // 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found.weights(found.scores(slice(None))) @ found.v, expected)


def test_angles_of_layers_that_do_not_say_which_pairs_they_turn():
    """timm's: neighbouring channels; those that say rotate_half: channels half a head apart."""
    q, k, rope = torch.randn(1, H, N, 8), torch.randn(1, H, N, 8), torch.randn(N - 1, 16)
    plain, halves = nn.Identity(), nn.Identity()
    halves.rotate_half = True
    for module, half in ((plain, False), (halves, True)):
        found = heads.rotated(heads.Call(module, q, None, {"rope": rope}), q, k)
        assert torch.equal(found[0], rotate(q, rope, half))
        assert torch.equal(found[1], rotate(k, rope, half))
    cos, sin = torch.randn(N - 1, 8), torch.randn(N - 1, 8)
    found = heads.rotated(heads.Call(plain, q, None, {"position_embeddings": (cos, sin)}), q, k)
    assert torch.equal(found[0], rotate(q, torch.cat((sin, cos), -1), True))
    assert heads.rotated(heads.Call(plain, q, None, {}), q, k) == (q, k)


def test_tables_of_positions():
    """Of the width asked for: (1, N, C), (N, C) and, on a grid, (1, H, W, C); nothing else of that name."""
    model = nn.Module()
    for name, shape in (("pos_embed", (1, 4, 6, C)), ("part.pos_embed", (1, 24, C)), ("other.position_embeddings", (24, C))):
        holder = model
        for part in name.split(".")[:-1]:
            holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        holder.register_parameter(name.rpartition(".")[2], nn.Parameter(torch.randn(shape)))
    model.wrong, model.narrow = nn.Module(), nn.Module()
    model.wrong.pos_embed, model.narrow.pos_embed = nn.Parameter(torch.randn(1, 1, 4, 6, C)), nn.Parameter(torch.randn(24, C - 1))
    assert set(positions.tables(model, C)) == {"pos_embed", "part.pos_embed", "other.position_embeddings"}


def test_relative_positions_are_asked_for_as_the_model_asks():
    """transformers' Data2Vec: the grid of the image's resolution, whether the table is stretched to it, the number of tokens."""

    class Table(nn.Module):
        def forward(self, *args, **options):
            return args, options

    layer = nn.Module()
    layer.relative_position_bias, layer.config = Table(), SimpleNamespace(patch_size=8)
    assert heads.module_bias(layer, {"resolution": (16, 24)}, N) == (((2, 3), False), {"dim_size": N})
    given = {"resolution": (16, 24), "interpolate_pos_encoding": True}
    assert heads.module_bias(layer, given, N) == (((2, 3), True), {"dim_size": N})
    assert heads.module_bias(layer, {}, N) == ((), {})
    assert heads.module_bias(nn.Module(), given, N) is None


def test_grids_that_are_told():
    """By a grid, or by the sizes of images and patches, each one number or two; not by anything else."""
    for told, grid in (
        ({"grid_size": (4, 6)}, (4, 6)), ({"image_size": (32, 48), "patch_size": 8}, (4, 6)),
        ({"image_size": 32, "patch_size": (8, 4)}, (4, 8)), ({"grid_size": [2, 3], "image_size": 32, "patch_size": 8}, (2, 3)),
        ({"image_size": 32}, None), ({"patch_size": 8}, None), ({"image_size": (1, 2, 3), "patch_size": 8}, None), ({"grid_size": 4}, None),
    ):  # fmt: skip
        assert grid_size_of(SimpleNamespace(**told)) == grid
    assert (pair(3), pair([1, 2]), pair((1, 2, 3)), pair("ab")) == ((3, 3), (1, 2), None, None)
