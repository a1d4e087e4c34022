# SPDX-License-Identifier: Apache-2.0
"""`plan`: what it reads out of a program, what it makes of that, and what it prints."""

import json
import math
from pathlib import Path

import jax
import pytest
from commands import lmjax

from lmjax import recipe
from lmjax.examples.windows import Windows
from lmjax.models.gpt import GPT as Decoder
from lmjax.plan import chips, facts, hlo
from lmjax.plan.plan import plan
from lmjax.plan.predict import Times, transfer_seconds
from lmjax.plan.program import TooLarge, compiled
from lmjax.plan.table import table
from lmjax.run import replace
from lmjax.sharding import Layout

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
GPT = "experiments/gpt2_small.py"
needs_compiler = pytest.mark.skipif(not chips.installed(), reason=chips.MISSING)
MESH = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiny():
    return recipe.load(str(EXPERIMENTS / "gpt2_small.py"), tiny=True)


def quiet(_: str) -> None:
    pass


# --- programs -------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_step

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %g = bf16[64,32]{1,0} all-gather(%p), replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
  ROOT %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
}

%fused (q: f32[8]) -> f32[8] {
  ROOT %m = f32[8]{0} multiply(%q, %q), backend_config={"estimated_cycles":"999"}
}

%condition (p: f32[8]) -> pred[] {
  %n = s32[] constant(12)
  ROOT %c = pred[] compare(%n, %n), direction=LT
}

%usual (p: f32[8]) -> f32[8] {
  ROOT %u = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"3"}
}

%rare (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"700"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = f32[8]{0} while(%a), condition=%condition, body=%body
  %if = f32[8]{0} conditional(%w, %a, %a), branch_computations={%rare, %usual}
  ROOT %s = f32[8]{0} all-reduce(%if), replica_groups={{0,8},{1,9}}, to_apply=%add
}
"""


def test_loops_are_counted_and_of_a_conditional_the_cheaper_branch():
    ops = hlo.operations(PROGRAM)
    assert hlo.cycles(ops) == 12 * 10 + 3
    gather, total = hlo.collectives(ops, MESH)
    assert (gather.kind, gather.times, gather.bytes, gather.devices) == (
        "all-gather", 12, 64 * 32 * 2, 4,
    )  # fmt: skip
    assert (total.kind, total.times, total.bytes, total.axes) == ("all-reduce", 1, 32, ("data",))


@pytest.mark.parametrize(
    ("groups", "devices", "axes"),
    [
        ("replica_groups={{0,1},{2,3}}", 2, ("tensor",)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4, ("fsdp",)),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", 8, ("fsdp", "tensor")),
        ("replica_groups=[2,8]<=[16]", 8, ("fsdp", "tensor")),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", 2, ("data",)),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", 4, ("fsdp",)),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'data','fsdp'}", 8, ("data", "fsdp")),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", 8, ("data", "fsdp")),
        ("source_target_pairs={{0,2},{2,4}}", 2, ("fsdp",)),
        ("source_target_pairs={{0,0},{8,8},{2,4},{4,2}}", 2, ("fsdp",)),  # some keep their own
    ],
)
def test_collectives_name_the_axes_that_they_go_over(groups, devices, axes):
    line = f"  %x = f32[16]{{0}} all-reduce(%y), {groups}, to_apply=%add"
    program = f"ENTRY %main (y: f32[16]) -> f32[16] {{\n{line}\n}}\n"
    (found,) = hlo.collectives(hlo.operations(program), MESH)
    assert (found.devices, found.axes) == (devices, axes)


def test_collectives_over_parts_of_a_row_are_named():
    line = "  %x = f32[16]{0} all-gather(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
    program = f"ENTRY %main (y: f32[16]) -> f32[16] {{\n{line}\n}}\n"
    mesh = {"data": 2, "fsdp": 1, "tensor": 1, "sequence": 4}
    (found,) = hlo.collectives(hlo.operations(program), mesh)
    assert (found.devices, found.axes) == (4, ("sequence",))


def test_kernels_count_their_own_queries_and_all_keys():
    """Of a row on two devices: FLOPs of the forward kernel are 2 products, 2 each, 128 × 256."""
    operands = "s8[1,1,1]{2,1,0}, bf16[3,4,128,64]{3,2,1,0}, bf16[3,4,256,64]{3,2,1,0}"
    line = (
        "  %splash_mha_fwd_residuals.1 = (f32[3,4,128,128]{3,2,1,0}) custom-call(%a, %q, %k), "
        f'custom_call_target="tpu_custom_call", operand_layout_constraints={{{operands}}}'
    )
    program = f"ENTRY %main (a: f32[1]) -> f32[1] {{\n{line}\n}}\n"
    (op,) = hlo.operations(program)
    assert facts.kernel(op) == (2 * 2 * 3 * 4 * 128 * 256 * 64, 64, 1)


# --- times ----------------------------------------------------------------------------------------


def test_a_ring_sends_all_but_one_part_and_a_sum_goes_round_twice():
    v5e, v5p = chips.CHIPS["v5e"], chips.CHIPS["v5p"]
    size = 10**9
    ring = 15 / 16 * size / (2 * 4.5e10)
    # 16 chips in a row of a 16 × 16 torus, whose ends are linked.
    assert transfer_seconds("all-gather", size, 16, v5e, (16, 16)) == pytest.approx(ring)
    assert transfer_seconds("all-reduce", size, 16, v5e, (16, 16)) == pytest.approx(2 * ring)
    # Both axes of 4 × 4, which is no torus on v5e: two lines at once.
    found = transfer_seconds("reduce-scatter", size, 16, v5e, (4, 4))
    assert found == pytest.approx(15 / 16 * size / (2 * 4.5e10))
    # 4 chips of v5p's torus: one axis whose ends are linked.
    found = transfer_seconds("all-gather", size, 4, v5p, (4, 4, 4))
    assert found == pytest.approx(3 / 4 * size / (2 * 9e10))
    assert transfer_seconds("all-gather", size, 1, v5e, (4, 4)) == 0


def test_the_band_holds_the_prediction():
    one = Times(0.09, 0.006, {})
    assert (one.low, one.high) == (pytest.approx(0.048), pytest.approx(0.1008))
    assert one.step == pytest.approx((0.064 * 0.096) ** 0.5)
    sent = Times(0.09, 0.006, {("fsdp",): 0.08, ("data",): 0.02})
    assert (sent.low, sent.high) == (pytest.approx(0.1), pytest.approx(0.2008))
    assert sent.step == pytest.approx((0.1 * 0.196) ** 0.5)
    # Nothing is faster than the model's FLOPs at the peak.
    peak = Times(0.09, 0.006, {}, least=0.09)
    assert peak.low == peak.step == 0.09 < peak.high
    assert Times(0.09, 0.006, {}, least=0.2).high == 0.2


# Published speeds, and the share of the peak that cycles and transfers gave for our nearest models
# (benchmarks/plan_accuracy.py): 8192³, 164 M, 8 B and 124 M on v6e; 32 B on v5e; 32 B and 70 B on
# v5p; 22 B on v4.
@pytest.mark.parametrize(
    ("published", "by_cycles"),
    [
        (1.70 / 1.72, 1), (0.465, 0.235), (0.455, 0.25), (0.23, 0.217), (0.669, 0.566),
        (0.715, 0.594), (0.654, 0.587), (0.567, 0.590),
    ],
)  # fmt: skip
def test_the_band_holds_what_was_published(published, by_cycles):
    found = Times(1 / by_cycles, 0.0, {}, least=1.0)
    assert found.low <= 1 / published <= found.high


# --- plans ----------------------------------------------------------------------------------------

KEYS = {"topology", "fits", "peak_hbm_bytes", "step_seconds", "mfu", "tokens_per_second"}


@needs_compiler
def test_a_plan_is_of_the_recipes_own_step_and_is_kept():
    run = replace(tiny(), mesh=Layout(2, 2, 1), batch=8)
    said: list[str] = []
    found = plan(run, "v5e:2x2", price=2.0, say=said.append)
    assert len(said) == 2  # the batch, and half of it for the largest one
    assert found.keys() >= KEYS and found["topology"] == "v5e:2x2" and found["chips"] == 4
    assert found["fits"] and found["hbm_bytes"] == int(15.75 * 2**30)
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    # Matrices are split over fsdp, so a device has between half and all of what there is.
    stored = 4 * (run.parameters() + run.model.padding)
    assert stored / 2 <= found["parameters_bytes"] < 0.6 * stored
    assert found["optimizer_bytes"] == pytest.approx(2 * found["parameters_bytes"], abs=64)
    parts = ("parameters", "optimizer", "batch_and_padding", "temporaries")
    total = sum(found[f"{name}_bytes"] for name in parts)
    assert found["peak_hbm_bytes"] == pytest.approx(total, rel=0.05)
    axes = {(c["kind"], *c["axes"]) for c in found["collectives"]}
    assert ("all-gather", "fsdp") in axes
    assert any(kind == "all-reduce" and "data" in over for kind, *over in axes)
    assert found["step_seconds_low"] <= found["step_seconds"] <= found["step_seconds_high"]
    tokens = 8 * run.data.examples.length
    assert found["tokens_per_second"] == pytest.approx(tokens / found["step_seconds"])
    flops = run.model.flops_per_token(run.data.examples.length) * found["tokens_per_second"]
    assert found["mfu"] == pytest.approx(flops / (4 * 197e12))
    hours = run.steps * found["step_seconds"] / 3600
    assert found["hours"] == pytest.approx(hours) and found["cost"] == pytest.approx(8 * hours)
    assert found["largest_batch"] % 4 == 0 and found["largest_batch"] > 1000

    again = plan(run, "v5e:2x2", price=1.0, say=said.append)
    assert len(said) == 2 and again["cost"] == pytest.approx(4 * hours)
    plan(replace(run, keep=7, save_every=3), "v5e:2x2", largest=False, say=said.append)
    assert len(said) == 2  # what the program does not depend on
    text = table([again])
    assert "v5e:2x2" in text and "fits" in text and "GiB" in text and "data" in text


@needs_compiler
@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would():
    model = Decoder(vocab=512, context=1024, depth=4, width=1024, heads=8, remat="none")
    run = replace(tiny(), model=model, batch=256, accumulate=1)
    run = replace(run, data=replace(run.data, examples=Windows(length=1024)))
    found = plan(run, "v5e:1x1", say=quiet)
    assert found["fits"] is False and found["peak_hbm_bytes"] > found["hbm_bytes"]
    assert found["step_seconds"] is None and found["hours"] is None
    assert 0 < found["largest_batch"] < 256
    assert "NO" in table([found])


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x2", "v6e:4x4"])
@pytest.mark.parametrize("name", ["gpt2_small", "gpt2_xl", "bert_large", "elmo"])
def test_full_size_recipes_are_planned(name, topology):
    run = recipe.load(str(EXPERIMENTS / f"{name}.py"))
    rows = (128 if name == "elmo" else 2) * len(chips.devices(topology))
    run = replace(run, batch=rows, accumulate=1, mesh=Layout(1, -1, 1))
    found = plan(run, topology, largest=False, say=quiet)
    assert found["fits"] and found["memory_from"] == "compiler"
    state = found["parameters_bytes"] + found["optimizer_bytes"]
    assert state < found["peak_hbm_bytes"] < found["hbm_bytes"]
    assert 0 < found["mfu"] < 1 and found["step_seconds_low"] <= found["step_seconds"]
    assert found["hours"] > 0 and found["cost"] > 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "devices"), [("v4:2x2x1", 4), ("tpu7x:2x2x1", 8)])
def test_chips_of_two_cores_are_planned(topology, devices):
    run = replace(tiny(), batch=16, accumulate=1)
    found = plan(run, topology, largest=False, say=quiet)
    assert (found["chips"], found["devices"], found["mesh"]["data"]) == (4, devices, devices)
    assert found["fits"] and 0 < found["mfu"] < 1


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory: Used 20.50G of 15.75G hbm. Exceeded …", 20.5),
        ("required for HLO temporaries (1.50T) exceeds available HBM (15.75G).", 1536.0),
    ],
)
def test_the_compilers_words_for_no_room_are_understood(said, needed):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(said)

    with pytest.raises(TooLarge) as caught:
        compiled(Lowered(), None)
    assert caught.value.needed == int(needed * 2**30)
    assert caught.value.available == int(15.75 * 2**30)


@needs_compiler
def test_the_command_prints_an_object_a_topology_last(tmp_path):
    call = ("plan", GPT, "--tiny", "--batch=8", "--quick", "--topology=v5e:1x1,v6e:1x1", "--json")
    out, err = lmjax(*call)
    first, second = map(json.loads, out.strip().split("\n"))
    assert (first["topology"], second["topology"]) == ("v5e:1x1", "v6e:1x1")
    assert KEYS <= first.keys() and KEYS <= second.keys()
    assert first["step_from"] == "compiler"
    assert second["step_seconds"] < first["step_seconds"]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "CHIP:SHAPE is needed, as v5e:4x4"),
        ("v5e:4", "CHIP:SHAPE is needed"),
        ("v6:2x2", "no chip 'v6'; one of v4, .* did you mean 'v6e'"),
        ("v5e:0x2", "sizes are at least 1"),
        ("v5e:4x4x4", "v5e has two dimensions, each at most 16, such as v5e:4x4"),
        ("v6e:8x8x8", "v6e has two dimensions, each at most 16"),
        ("v6e:32x32", "v6e has two dimensions, each at most 16"),
        ("v5e:16x32", "v5e has two dimensions, each at most 16"),
        ("v5p:4x4", "v5p has three dimensions, and at most 8,960 chips, such as v5p:4x4x4"),
        ("v4:16x16x20", "v4 has three dimensions, and at most 4,096 chips"),
        ("v5e:3x5", "v5e comes as 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16$"),
        ("v5e:1x8", "v5e comes as 1x1, 2x2"),
        ("v5p:2x2x3", "v5p comes as 1x1x1, 2x2x1, .*, and multiples of 4 such as 4x4x8"),
        ("tpu7x:1x2x2", "tpu7x comes as 1x1x1, 2x2x1"),
    ],
)
def test_a_bad_topology_is_refused_before_anything_is_compiled(topology, message):
    with pytest.raises(ValueError, match=message):
        chips.split_name(topology)


@needs_compiler
@pytest.mark.parametrize(
    "topology",
    """v4:1x1x1 v4:2x2x1 v4:2x2x4 v4:12x16x16 v5e:1x1 v5e:2x2 v5e:2x4 v5e:4x2 v5e:4x8 v5e:8x16
    v5e:16x16 v5p:2x2x1 v5p:2x2x2 v5p:2x4x4 v5p:4x4x12 v5p:16x16x24 v6e:1x1 v6e:8x8 v6e:16x16
    tpu7x:1x1x1 tpu7x:2x2x1 tpu7x:4x8x8""".split(),
)
def test_the_compiler_has_every_slice_that_is_let_through(topology):
    chip, shape = chips.split_name(topology)
    assert len(chips.devices(topology)) == math.prod(shape) * chip.devices


@needs_compiler
@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Layout(3), "mesh data=3×fsdp=1×tensor=1×sequence=1 does not fit 4 devices: the product"),
        (Layout(-1, -1), r"mesh \[-1, -1, 1, 1\]: sizes are at least 1, and one of them may be -1"),
        (Layout(1, -2), "sizes are at least 1"),
        (Layout(-1, 0), "sizes are at least 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_the_words_of_train(mesh, message):
    with pytest.raises(ValueError, match=message):
        plan(replace(tiny(), mesh=mesh), "v5e:2x2", say=quiet)


@needs_compiler
def test_a_batch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="batch=6 cannot be split over 4 devices"):
        plan(replace(tiny(), batch=6), "v5e:2x2", say=quiet)
