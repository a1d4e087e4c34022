# SPDX-License-Identifier: Apache-2.0
"""The mesh is what was asked for, and every parameter has a rule that splits what is large."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from lmjax import sharding
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.plan import chips
from lmjax.sharding import DATA, FSDP, TENSOR, Layout, path_of, spec
from lmjax.step import abstract_params, abstract_state

GPT2_SMALL = GPT(vocab=50257, context=1024, depth=12, width=768, heads=12)
GPT1 = GPT(
    vocab=40478, context=512, depth=12, width=768, heads=12, norm="post", one_table=True
)  # fmt: skip


# --- the mesh -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout(), (8, 1, 1, 1)),
        (Layout(-1, 2, 2), (2, 2, 2, 1)),
        (Layout(1, -1, 1), (1, 8, 1, 1)),
        (Layout(2, 1, -1), (2, 1, 4, 1)),
        (Layout(4, 2, 1), (4, 2, 1, 1)),
        (Layout(1, 2, 1, 4), (1, 2, 1, 4)),
        (Layout(-1, sequence=2), (4, 1, 1, 2)),
    ],
)
def test_a_layout_becomes_a_mesh_of_all_devices(layout: Layout, shape: tuple[int, ...]):
    mesh = layout.mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor", "sequence")
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_may_use_some_of_the_devices():
    mesh = Layout(2, 1, 1).mesh(jax.devices()[2:4])
    assert list(mesh.devices.flat) == jax.devices()[2:4]


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (Layout(3, 1, 1), "data=3×fsdp=1×tensor=1×sequence=1 does not fit 8 devices"),
        (Layout(-1, 3, 1), "fsdp=3×tensor=1×sequence=1 does not fit 8 devices"),
        (Layout(1, 1, 1, 3), r"sequence=3 does not fit 8 devices.*--mesh\.sequence"),
        (Layout(4, 4, 1), "does not fit 8 devices"),
        (Layout(-1, -1, 1), "one of them may be -1"),
        (Layout(0, 1, 1), "at least 1"),
        (Layout(-2, 1, 1), "at least 1"),
    ],
)
def test_an_impossible_mesh_is_refused(layout: Layout, says: str):
    with pytest.raises(ValueError, match=says) as error:
        layout.mesh()
    assert "mesh" in str(error.value)


def test_outside_a_mesh_everything_is_one_device():
    assert sharding.mesh() is None and sharding.axis_size(DATA, FSDP, TENSOR) == 1
    x = jnp.arange(4.0)
    assert sharding.constrain(x, FSDP) is x and sharding.split_batch(x) is x
    assert sharding.platform() == "cpu"


def test_the_mesh_in_use_is_left_again():
    outer, inner = Layout(8, 1, 1).mesh(), Layout(2, 2, 2).mesh()
    with sharding.use(outer):
        with pytest.raises(RuntimeError), sharding.use(inner):
            assert sharding.mesh() is inner
            assert sharding.axis_size(*sharding.BATCH_AXES) == 4
            raise RuntimeError
        assert sharding.mesh() is outer and sharding.axis_size(*sharding.BATCH_AXES) == 8
    assert sharding.mesh() is None


# --- the rules ------------------------------------------------------------------------------------


def test_parameters_rest_as_the_rules_say():
    with sharding.use(Layout(2, 2, 2).mesh()):
        placed = jax.tree_util.tree_leaves_with_path(abstract_params(GPT2_SMALL))
        got = {path_of(path): x.sharding.spec for path, x in placed}
    assert got == {
        "embedding": P(TENSOR, FSDP),
        "positions": P(None, FSDP),
        "blocks/attention/qkv/kernel": P(None, FSDP, None, TENSOR),
        "blocks/attention/qkv/bias": P(None, None, (TENSOR, FSDP)),
        "blocks/attention/out/kernel": P(None, TENSOR, FSDP),
        "blocks/attention/out/bias": P(None, FSDP),
        "blocks/mlp/up/kernel": P(None, FSDP, TENSOR),
        "blocks/mlp/up/bias": P(None, (TENSOR, FSDP)),
        "blocks/mlp/down/kernel": P(None, TENSOR, FSDP),
        "blocks/mlp/down/bias": P(None, FSDP),
        **{f"blocks/norm_{n}/{part}": P(None, FSDP) for n in (1, 2) for part in ("scale", "bias")},
        "final_norm/scale": P(FSDP),
        "final_norm/bias": P(FSDP),
    }


@pytest.mark.parametrize("layout", [Layout(1, 8, 1), Layout(2, 2, 2), Layout(1, 2, 4)])
@pytest.mark.parametrize("model", [GPT2_SMALL, GPT1], ids=["gpt2", "gpt1"])
def test_nothing_large_is_replicated(model: GPT, layout: Layout):
    """Of parameters and moments, a device holds its share, vectors included."""
    optimiser = AdamW(peak=1.0, warmup=1).transform(lambda step: step)
    with sharding.use(layout.mesh()):
        state = abstract_state(model, optimiser)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert sum("mu/" in path_of(p) for p, _ in leaves) == len(jax.tree.leaves(state.params))
    for path, x in leaves:
        share = math.prod(x.sharding.shard_shape(x.shape)) / max(x.size, 1)
        assert share <= (1 / layout.fsdp if x.shape else 1), path_of(path)


def test_vectors_rest_split_where_fsdp_divides_them_and_are_gathered_before_a_step():
    with sharding.use(Layout(1, 8, 1).mesh()):
        assert sharding.at_rest("norm/scale", (2, 12)) == P(None, None)
        assert sharding.at_rest("qkv/bias", (16, 3, 12)) == P(FSDP, None, TENSOR)
        assert sharding.at_rest("output_bias", (16,)) == P(TENSOR)  # a sparse step looks rows up
        rest = {"up": {"kernel": jnp.ones((16, 8)), "bias": jnp.arange(8.0)}}
        rest = jax.device_put(rest, sharding.shardings(rest))
        ready = jax.jit(sharding.gather_vectors)(rest)
    assert rest["up"]["bias"].addressable_shards[0].data.shape == (1,)
    assert ready["up"]["bias"].sharding.is_fully_replicated
    assert ready["up"]["kernel"].addressable_shards[0].data.shape == (2, 8)


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match=r"no sharding rule covers parameter odd/weight.*\(4, 4\)"):
        spec("odd/weight", (4, 4))
    assert spec("count", ()) == P()


def test_an_axis_that_does_not_divide_is_refused_by_name():
    with sharding.use(Layout(1, 8, 1).mesh()):
        with pytest.raises(ValueError, match=r"positions: dimension 1 has size 12.*fsdp=8.*--mesh"):
            spec("positions", (4, 12))
    with sharding.use(Layout(1, 1, 8).mesh()):
        with pytest.raises(ValueError, match=r"qkv/kernel: dimension 3 has size 12.*tensor=8"):
            spec("blocks/attention/qkv/kernel", (2, 16, 3, 12))
        with pytest.raises(ValueError, match=r"attention: heads has size 12.*tensor=8.*--mesh"):
            abstract_params(GPT2_SMALL)


def test_paths_are_written_with_slashes():
    tree = {"blocks": [{"kernel": 1}]}
    [(path, _)] = jax.tree_util.tree_leaves_with_path(tree)
    assert path_of(path) == "blocks/0/kernel"


# --- weights for compute --------------------------------------------------------------------------


def test_matrices_are_cast_and_gathered_and_vectors_stay_float32():
    with sharding.use(Layout(1, 8, 1).mesh()):
        rest = {
            "up": {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)},
            "norm": {"scale": jnp.ones(16)},
        }
        rest = jax.device_put(rest, sharding.shardings(rest))
        assert rest["up"]["kernel"].addressable_shards[0].data.shape == (2, 32)
        run = jax.jit(lambda p: sharding.for_compute(p, jnp.bfloat16))
        ready = run(rest)
        assert ready["up"]["kernel"].dtype == jnp.bfloat16
        assert ready["up"]["bias"].dtype == ready["norm"]["scale"].dtype == jnp.float32
        assert ready["up"]["kernel"].sharding.is_fully_replicated
        # What travels is the compute dtype, and the gradient comes home sharded and float32.
        lowered = run.lower(rest).as_text()
        moved = [line for line in lowered.splitlines() if "sharding_constraint" in line]
        assert any("16x32xbf16" in line for line in moved)
        assert not any("16x32xf32" in line for line in moved)

        def total(params):
            kernel = sharding.for_compute(params, jnp.bfloat16)["up"]["kernel"]
            return kernel.astype(jnp.float32).sum()

        grads = jax.jit(jax.grad(total))(rest)
    kernel = grads["up"]["kernel"]
    assert kernel.dtype == jnp.float32 and np.allclose(kernel, 1)
    assert kernel.addressable_shards[0].data.shape == (2, 32)


def test_collectives_over_an_axis_add_gather_and_scatter():
    def local(x):
        total = sharding.sum_over(x.sum(), *sharding.BATCH_AXES)
        top = sharding.max_over(x.max(), FSDP)
        place = sharding.index_on(FSDP) + jnp.zeros((1,), jnp.int32)
        whole = sharding.gather_over(x, FSDP, dim=0)
        part = sharding.scatter_over(whole, FSDP, dim=0)
        return total, top, place, whole, part

    x = jnp.arange(16.0)
    rows = P(FSDP)
    with sharding.use(Layout(1, 8, 1).mesh()):
        mapped = sharding.map_shards(local, (rows,), (P(), P(), rows, P(), rows))
        total, top, place, whole, part = jax.jit(mapped)(x)
    assert total == 120 and top == 15 and place.tolist() == list(range(8))
    assert np.array_equal(whole, x) and np.array_equal(part, 8 * x)
    alone = sharding.map_shards(local, (rows,), (P(), P(), rows, P(), rows))(x)
    assert alone[0] == 120 and alone[1] == 15 and alone[2].tolist() == [0]
    assert np.array_equal(alone[3], x) and np.array_equal(alone[4], x)


@pytest.mark.skipif(not chips.installed(), reason=chips.MISSING)
def test_only_data_crosses_slices():
    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2)
    mesh = Layout(-1, 4, 2).mesh(described.devices)
    assert mesh.devices.shape == (4, 4, 2, 1)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[:2] == 0).all() and (slices[2:] == 1).all()
    with pytest.raises(ValueError, match="mesh.data=1 does not divide among 2 slices"):
        Layout(1, 16, 2).mesh(described.devices)
