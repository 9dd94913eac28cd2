"""Sizes of the axes, and where parameters go: no device is needed."""

from types import SimpleNamespace

import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mm_jax.errors import UserError
from mm_jax.models import DecoderConfig, MultimodalConfig
from mm_jax.parallel.mesh import AXES, Demand, MeshConfig, choose, parse_mesh
from mm_jax.parallel.rules import Rules, logical_axes, place, spec_of
from mm_jax.train.setup import abstract_params


def devices(count: int, slices: int = 1, kind: str = "TPU v5 lite") -> list:
    return [
        SimpleNamespace(device_kind=kind, slice_index=k * slices // count, platform="tpu")
        for k in range(count)
    ]


def mesh(**sizes: int) -> AbstractMesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes(config: MeshConfig, count: int, demand: Demand, slices: int = 1) -> dict[str, int]:
    return {axis: n for axis, n in choose(config, devices(count, slices), demand).items() if n > 1}


SMALL, LARGE = 10**9, 84 * 10**9  # bytes of state; a chip has 17e9


@pytest.mark.parametrize(
    "config, count, demand, expected",
    [
        (MeshConfig(), 8, Demand(8, SMALL), {"data": 8}),
        (MeshConfig(), 8, Demand(8, LARGE), {"fsdp": 8}),
        (MeshConfig(), 64, Demand(16, LARGE, 8), {"fsdp": 16, "tensor": 4}),  # four devices share a row
        (MeshConfig(context=4), 64, Demand(16, LARGE, 8), {"fsdp": 16, "context": 4}),
        (MeshConfig(fsdp=4), 8, Demand(8, SMALL), {"data": 2, "fsdp": 4}),
        (
            MeshConfig(data=2),
            8,
            Demand(8, SMALL),
            {"data": 2, "fsdp": 4},
        ),  # data is taken, fsdp takes the rest
        (MeshConfig(data=1, fsdp=4), 8, Demand(8), {"fsdp": 4, "tensor": 2}),
        (MeshConfig(data=1, fsdp=1, tensor=1), 1, Demand(1), {}),
    ],
)
def test_free_axes_are_chosen(config, count, demand, expected):
    assert sizes(config, count, demand) == expected


def test_slices_see_different_rows():
    assert sizes(MeshConfig(), 32, Demand(32, LARGE), slices=2) == {"dcn_data": 2, "fsdp": 16}


@pytest.mark.parametrize(
    "config, count, demand, message",
    [
        (MeshConfig(fsdp=3), 8, Demand(8), "fsdp 3 needs 3 devices or a multiple, there are 8"),
        (MeshConfig(fsdp=16), 8, Demand(8), "fsdp 16 needs 16 devices or a multiple, there are 8"),
        (MeshConfig(1, 2, 2, 1, 1, 1), 8, Demand(8), "data 2 x fsdp 2 needs 4 devices, there are 8; 0 lets"),
        (MeshConfig(tensor=-1), 8, Demand(8), "mesh.tensor is -1"),
        (MeshConfig(), 4, Demand(6), "6 rows cannot be spread over 4 devices"),
        (MeshConfig(), 64, Demand(16, LARGE, 2), "2 heads would have to be spread too"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(config, count, demand, message):
    with pytest.raises(UserError) as caught:
        choose(config, devices(count), demand)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mesh_in_words():
    assert parse_mesh("fsdp=64,tensor=4") == MeshConfig(fsdp=64, tensor=4)
    for text, message in (("fdsp=2", 'did you mean "fsdp"?'), ("fsdp", "fsdp=8"), ("fsdp=x", "fsdp=8")):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            parse_mesh(text)


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("decoder/layers/attention/query/kernel", (2, 64, 128), (None, ("fsdp",), ("tensor",))),
        ("decoder/layers/attention/key/bias", (2, 32), (None, ("tensor",))),
        ("decoder/layers/attention/out/kernel", (2, 128, 64), (None, ("tensor",), ("fsdp",))),
        ("decoder/layers/mlp/down/kernel", (2, 256, 64), (None, ("tensor",), ("fsdp",))),
        ("decoder/embedding/embedding", (1000, 64), (("tensor",), ("fsdp",))),
        ("decoder/norm/scale", (64,), (("fsdp",),)),
        ("vision/norm/scale", (64,), (None,)),
        ("vision/layers/mlp/up/kernel", (2, 64, 128), (None, ("fsdp",), None)),
        ("image_projector/hidden/kernel", (64, 128), (("fsdp",), None)),
        ("image_projector/query", (16, 64), (None, None)),
        ("vision/a_new_one/kernel", (8, 1024, 2048), (None, None, ("fsdp",))),  # large, without a line
        ("vision/a_new_one/kernel", (8, 16, 32), (None, None, None)),
    ],
)
def test_where_parameters_go(path, shape, expected):
    sharding = place(mesh(fsdp=4, tensor=2))(path, shape)
    assert sharding.spec == PartitionSpec(*expected)


def test_every_large_parameter_of_a_decoder_has_its_line():
    """Of one with all options: no matrix is left to the rule by size."""
    options = dict(tie_embeddings=False, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True)
    config = MultimodalConfig(None, None, decoder=DecoderConfig(**options))
    import jax

    for key, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        if leaf.ndim > 1 and min(leaf.shape[-2:]) > 8:
            assert [name for name in logical_axes(path, leaf.shape) if name], path


@pytest.mark.parametrize(
    "rules, shape, message",
    [
        (
            Rules(),
            (2, 66, 128),
            "decoder/layers/mlp/up/kernel [2, 66, 128]: embed 66 cannot be split over fsdp 4; ",
        ),
        (
            Rules(embed=("fsdp", "tensor")),
            (2, 64, 128),
            "embed and mlp are both split over mesh axis tensor; take it",
        ),
        (
            Rules(embed=("fdsp",)),
            (2, 64, 128),
            'rules.embed names the mesh axis "fdsp"; did you mean "fsdp"?',
        ),
    ],
)
def test_rules_that_cannot_hold_are_one_line(rules, shape, message):
    with pytest.raises(UserError) as caught:
        place(mesh(fsdp=4, tensor=2), rules)("decoder/layers/mlp/up/kernel", shape)
    assert message in str(caught.value)


def test_an_axis_of_size_one_splits_nothing():
    names = ("embed", "mlp")
    assert spec_of("x", (3, 5), names, mesh(), Rules(embed=("fsdp", "tensor"))) == PartitionSpec(None, None)
