# SPDX-License-Identifier: Apache-2.0
"""What the real TPU compiler makes of the train step: memory, kernels and collectives.

One tiny program is compiled every time; those of the recipes take a minute or two each.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax import recipe, sharding
from lmjax.blocks import Remat
from lmjax.examples.windows import Windows
from lmjax.fingerprint import _of_each_device
from lmjax.losses import _CHUNK_BYTES
from lmjax.models.gpt import GPT
from lmjax.plan import chips
from lmjax.plan.hlo import bytes_of
from lmjax.plan.program import Program, compile_step, lower_step
from lmjax.run import Run, replace
from lmjax.sharding import Layout

pytestmark = pytest.mark.skipif(not chips.installed(), reason=chips.MISSING)

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
ROWS = 8  # windows of 1,024 tokens a chip
BF16_GATHERED_TWICE = 2 * 2 * 124_439_808  # bytes: forward and backward


@functools.cache
def small(topology: str, layout: Layout, experiment: str = "gpt2_small") -> Program:
    """The recipe's step with `ROWS` windows a chip, as it stands but for the batch."""
    run = recipe.load(str(EXPERIMENTS / f"{experiment}.py"))
    rows = ROWS * len(chips.devices(topology)) // layout.tensor
    return compile_step(lower_step(replace(run, batch=rows, accumulate=1, mesh=layout), topology))


def tiny(**changes) -> Run:
    run = recipe.load(str(EXPERIMENTS / "gpt2_small.py"), tiny=True)
    model = GPT(vocab=500, context=256, depth=3, width=128, heads=4, remat="full")
    data = replace(run.data, examples=Windows(length=256))
    return replace(run, model=model, data=data, batch=8, accumulate=1, **changes)


@functools.cache
def tiny_program() -> Program:
    return compile_step(lower_step(tiny(mesh=Layout(1, 2, 2)), "v5e:2x2"))


def state_bytes(run: Run) -> int:
    """Parameters and two moments in float32, padded rows included, and two counters."""
    return 4 * (3 * (run.parameters() + run.model.padding) + 2)


def assert_donated(program: Program, batch_bytes: int) -> None:
    m = program.memory
    assert m.alias_size_in_bytes > 0
    # What is not aliased is the batch, up to the padding of its tiles.
    assert 0 <= m.argument_size_in_bytes - m.alias_size_in_bytes <= batch_bytes


# --- every time -----------------------------------------------------------------------------------


def test_the_step_runs_splash_kernels_in_every_layer():
    names = [op.text.split()[0].lstrip("%") for op in tiny_program().kernels()]
    assert any(name.startswith("splash_mha_fwd") for name in names), names
    assert any(name.startswith("splash_mha_dkv") for name in names), names
    assert {op.times for op in tiny_program().kernels()} == {3}


def test_a_sharded_step_gathers_weights_and_permutes_nothing():
    program = tiny_program()
    assert program.collectives("collective-permute") == []
    gathered = [c for c in program.collectives("all-gather") if c.devices == 2]
    kernels = {(1, 128, 256), (1, 256, 128)}  # the MLP's, half of it on each tensor shard
    for shape in kernels:
        dtypes = {c.shapes[0][0] for c in gathered if c.shapes[0][1] == shape}
        assert dtypes == {"bf16"}, (shape, [c.shapes for c in gathered])


def test_the_state_is_donated():
    assert_donated(tiny_program(), batch_bytes=5 * 8 * 256 * 4)


def test_loops_count_in_every_figure():
    """The layers' loops gather their weights once a layer; what was moved out of them does not."""
    gathers = tiny_program().collectives("all-gather")
    assert {c.times for c in gathers if "/while/body" in c.source} == {3}
    assert {c.times for c in gathers if "/while/body" not in c.source} == {1}


@pytest.mark.parametrize("layout", [(16, 1, 1), (8, 1, 2), (2, 8, 1), (1, 8, 2), (4, 2, 2)])
def test_a_mesh_axis_may_be_part_of_a_torus_axis(layout: tuple[int, int, int]):
    devices = chips.devices("v5e:4x4")
    mesh = Layout(*layout).mesh(devices)
    assert mesh.devices.shape == (*layout, 1) and set(mesh.devices.flat) == set(devices)


@functools.cache
def parts(remat: Remat) -> Program:
    """Rows of 1,024 tokens on four chips each."""
    run = tiny(mesh=Layout(1, 1, 1, 4))
    model = run.model.clone(context=1024, remat=remat)
    run = replace(run, model=model, data=replace(run.data, examples=Windows(length=1024)))
    return compile_step(lower_step(run, "v5e:2x2"))


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("names", 1), ("full", 2)])
def test_parts_of_a_row_gather_keys_and_keep_their_own(remat: Remat, forward: int):
    program = parts(remat)
    kernels = [op for op in program.kernels() if "_fwd" in op.text.split()[0]]
    assert sum(op.times for op in kernels) == 3 * forward
    assert {c.axes for c in program.collectives()} == {("sequence",)}
    row = 8 * 1024 * 128 * 2  # bytes of a layer's keys, or of its values
    gathers = [c for c in program.collectives("all-gather") if c.bytes == row]
    scatters = [c for c in program.collectives("reduce-scatter") if c.bytes == row]
    assert sum(c.times for c in gathers) == 2 * 3 * (1 + forward)
    assert sum(c.times for c in scatters) == 2 * 3
    # No other array of a whole row is put together.
    rest = [c for c in program.collectives("all-gather") if c not in gathers]
    assert sum(c.times * c.bytes for c in rest) < row


# --- GPT-2 small ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_gpt2_small_fits_one_v5e_with_room():
    run = recipe.load(str(EXPERIMENTS / "gpt2_small.py"))
    program = small("v5e:1x1", Layout())
    assert program.peak_bytes <= 3.8 * 2**30
    assert program.memory.peak_memory_in_bytes <= 3.8 * 2**30
    assert program.memory.alias_size_in_bytes >= state_bytes(run)
    assert_donated(program, batch_bytes=5 * ROWS * 1024 * 4)


@pytest.mark.slow
def test_gpt2_small_never_holds_all_scores():
    scores = {
        dims
        for dtype in ("f32", "bf16")
        for dims in small("v5e:1x1", Layout()).buffers(dtype)
        if 50_304 in dims and dims != (50_304, 768)
    }
    assert scores
    assert max(bytes_of("f32", dims) for dims in scores) <= _CHUNK_BYTES["tpu"]
    assert _CHUNK_BYTES["tpu"] < ROWS * 1024 * 50_304 * 4


@pytest.mark.slow
def test_wide_heads_need_less_memory_and_time():
    wide = small("v5e:1x1", Layout(), "gpt2_small_hd128")
    usual = small("v5e:1x1", Layout())
    assert wide.peak_bytes <= min(3.8 * 2**30, usual.peak_bytes)
    assert wide.compute_seconds < 0.85 * usual.compute_seconds


@pytest.mark.slow
def test_fsdp_gathers_each_weight_twice_in_bfloat16_and_permutes_nothing():
    program = small("v5e:4x4", Layout(1, 16, 1))
    assert program.collectives("collective-permute") == []
    gathered = sum(c.bytes * c.times for c in program.collectives("all-gather"))
    assert 0.9 * BF16_GATHERED_TWICE <= gathered <= 1.1 * BF16_GATHERED_TWICE
    assert_donated(program, batch_bytes=5 * ROWS * 1024 * 4)


@pytest.mark.slow
def test_fsdp_costs_no_more_compute_than_one_chip():
    sharded = small("v5e:4x4", Layout(1, 16, 1))
    assert sharded.compute_seconds <= small("v5e:1x1", Layout()).compute_seconds


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(16, 1, 1), Layout(4, 2, 2)])
def test_other_meshes_sum_gradients_and_permute_nothing(layout: Layout):
    program = small("v5e:4x4", layout)
    assert program.collectives("collective-permute") == []
    assert program.peak_bytes <= 3.8 * 2**30
    gathers = sum(c.bytes * c.times for c in program.collectives("all-gather"))
    assert gathers <= 1.1 * BF16_GATHERED_TWICE * (layout.fsdp > 1)


# --- BERT -----------------------------------------------------------------------------------------


@functools.cache
def bert(name: str, topology: str, layout: Layout) -> Program:
    """The recipe's first phase with 32 sequences of 128 a chip."""
    run = recipe.load(str(EXPERIMENTS / f"{name}.py"))
    rows = 32 * len(chips.devices(topology)) // layout.tensor
    return compile_step(lower_step(replace(run, batch=rows, accumulate=1, mesh=layout), topology))


@pytest.mark.slow
def test_bert_scores_masked_tokens_only_and_keeps_its_state_in_place():
    program = bert("bert_base", "v5e:1x1", Layout())
    run = recipe.load(str(EXPERIMENTS / "bert_base.py"))
    assert program.memory.alias_size_in_bytes >= state_bytes(run)
    held = [dims for dtype in ("f32", "bf16") for dims in program.buffers(dtype)]
    scores = [dims for dims in held if 30_592 in dims and dims != (30_592, 768)]
    assert scores and max(bytes_of("f32", dims) for dims in scores) <= 32 * 20 * 30_592 * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert_base", "electra_small"])
def test_encoders_permute_nothing_over_fsdp(name: str):
    program = bert(name, "v5e:4x4", Layout(1, 16, 1))
    assert program.collectives("collective-permute") == []
    run = recipe.load(str(EXPERIMENTS / f"{name}.py"))
    gathered = sum(c.bytes * c.times for c in program.collectives("all-gather"))
    assert gathered <= 2.5 * 2 * run.parameters()


@pytest.mark.slow
def test_a_fingerprint_reads_the_array_once_and_keeps_nothing():
    spec = P(None, "fsdp")
    with sharding.use(Layout(2, 2, 1).mesh(chips.devices("v5e:2x2"))) as mesh:
        x = jax.ShapeDtypeStruct((50_304, 768), jnp.float32, sharding=NamedSharding(mesh, spec))
        compiled = _of_each_device(mesh, spec).lower(x).compile()
    share = 50_304 * 768 * 4 / 2
    assert compiled.memory_analysis().temp_size_in_bytes < share / 100
    assert compiled.cost_analysis()["bytes accessed"] < 1.05 * share
