# SPDX-License-Identifier: Apache-2.0
"""The batch of a step depends on the step alone: not on processes, workers, mesh or history."""

import ast
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.batches import Plan, Ramp, Share, batches, host_batches, share_of
from lmjax.examples.windows import Windows
from lmjax.sharding import Layout
from lmjax.store import Split

LENGTH, BATCH, STEPS = 16, 8, 7
MESHES = {"8x1x1": Layout(8, 1, 1), "1x8x1": Layout(1, 8, 1), "2x2x2": Layout(2, 2, 2)}


def make_examples():
    starts = np.array([0, 100, 130, 500, 777])
    sizes = np.diff(starts)
    split = Split("train", np.arange(777, dtype=np.uint32), starts, sizes, Path("none"), 777, 0)
    return partial(Windows(LENGTH).train, split, 5)


def first_steps(plan: Plan) -> list[int]:
    return [stage.first_step for stage in plan.stages]


def gpt3_plan() -> Plan:
    return Plan(256, 2048, Ramp(start=16, increment=16, tokens=4e9))


def same(one, other) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[k], other[k]) for k in one)


# --- the plan -------------------------------------------------------------------------------------


def test_without_a_ramp_every_step_takes_the_next_batch():
    plan = Plan(6, 32)
    assert [plan.examples(s) for s in (0, 1, 5)] == [(0, 6), (6, 6), (30, 6)]
    assert plan.tokens_after(5) == 5 * 6 * 32
    assert plan.tokens_after(np.int64(5)) == 5 * 6 * 32


def test_a_ramp_takes_every_example_once_and_each_size_for_equal_tokens():
    plan = Plan(10, 4, Ramp(start=2, increment=3, tokens=100))  # sizes 2, 5, 8: 34 tokens each
    taken, sizes = [], []
    for step in range(20):
        first, size = plan.examples(step)
        taken += range(first, first + size)
        sizes.append(size)
    assert taken == list(range(len(taken)))
    assert sizes == [2] * 5 + [5] * 2 + [8] * 2 + [10] * 11
    assert [plan.tokens_after(s) for s in (0, 1, 5, 6)] == [0, 8, 40, 60]


def test_the_gpt_3_ramp():
    plan = gpt3_plan()
    assert [s.size for s in plan.stages] == list(range(16, 257, 16))
    edges = first_steps(plan)[1:]
    assert len(edges) == 15 and all(a < b for a, b in zip(edges, edges[1:], strict=False))
    for edge, before, after in zip(
        edges, [s.size for s in plan.stages], [s.size for s in plan.stages][1:], strict=False
    ):
        assert plan.examples(edge - 1)[1] == before and plan.examples(edge)[1] == after
        first, size = plan.examples(edge - 1)
        assert plan.examples(edge)[0] == first + size  # nothing skipped, nothing twice
    # Fifteen sizes share 4e9 tokens; each is rounded up to a whole step of at most 0.5 M tokens.
    tokens = plan.tokens_after(edges[-1])
    assert 4e9 <= tokens < 4e9 + 15 * 256 * 2048
    shares = np.diff([plan.tokens_after(s) for s in first_steps(plan)])
    assert (shares >= 4e9 / 15).all() and (shares < 4e9 / 15 + 240 * 2048).all()
    far = edges[-1] + 1000
    assert plan.tokens_after(far) == tokens + 1000 * 256 * 2048


def test_traced_tokens_equal_the_exact_ones():
    plan = gpt3_plan()
    steps = [0, 1, *(e + d for e in first_steps(plan)[1:] for d in (-1, 0, 1)), 100_000, 600_000]
    traced = jax.jit(jax.vmap(plan.tokens_after))(jnp.asarray(steps))
    exact = np.array([plan.tokens_after(s) for s in steps], np.float64)
    np.testing.assert_allclose(np.asarray(traced, np.float64), exact, rtol=1e-6)


@pytest.mark.parametrize("values", [(0, 16, 1e6), (16, 0, 1e6), (16, -16, 1e6), (16, 16, 0)])
def test_an_impossible_ramp_is_refused(values: tuple[int, int, float]):
    with pytest.raises(ValueError, match=r"ramp\.(start|increment|tokens)="):
        Ramp(*values)


def test_batches_that_do_not_divide_are_refused():
    with sharding.use(Layout(2, 2, 2).mesh()):
        Plan(8, 4).check(2)
        with pytest.raises(ValueError, match=r"batch=6 .* 4 devices.*accumulate=1.*multiple of 4"):
            Plan(6, 4).check(1)
        with pytest.raises(ValueError, match=r"batch=4 .*accumulate=2.*multiple of 8"):
            Plan(4, 4).check(2)
        with pytest.raises(ValueError, match="batch=2 "):  # the ramp's first size counts too
            Plan(8, 4, Ramp(start=2, increment=2, tokens=10)).check(1)
    with pytest.raises(ValueError, match="batch=0 "):
        Plan(0, 4).check(1)


# --- on the host ----------------------------------------------------------------------------------


def reference(plan: Plan, steps: range):
    make = make_examples()
    for step in steps:
        first, size = plan.examples(step)
        yield make(np.arange(first, first + size))


RAMPED = Plan(BATCH, LENGTH, Ramp(start=4, increment=4, tokens=200))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_no_batch(workers: int):
    got = list(host_batches((make_examples(),), RAMPED, 0, STEPS, workers=workers))
    expected = list(reference(RAMPED, range(STEPS)))
    assert len(got) == STEPS and [len(b["tokens_BL"]) for b in got] == [4] * 4 + [8] * 3
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_of_processes_make_up_the_batch(processes: int):
    shares = [
        list(host_batches((make_examples(),), RAMPED, 0, STEPS, share=Share((p,), processes)))
        for p in range(processes)
    ]
    for parts, whole in zip(
        zip(*shares, strict=True), reference(RAMPED, range(STEPS)), strict=True
    ):
        assert all(len(p["tokens_BL"]) * processes == len(whole["tokens_BL"]) for p in parts)
        joined = {key: np.concatenate([part[key] for part in parts]) for key in whole}
        assert same(joined, whole)


def test_uneven_shares_make_up_the_batch():
    parts = [
        next(host_batches((make_examples(),), RAMPED, 5, 6, share=share))
        for share in [Share((1,), 4), Share((0, 2, 3), 4)]
    ]
    whole = next(reference(RAMPED, range(5, 6)))
    assert [len(p["tokens_BL"]) for p in parts] == [2, 6]
    order = [2, 3, 0, 1, 4, 5, 6, 7]  # a host's rows need not be neighbours
    assert same(
        {k: np.concatenate([p[k] for p in parts]) for k in whole},
        {k: whole[k][order] for k in whole},
    )


def test_a_step_has_its_batch_wherever_reading_starts():
    sequence = list(host_batches((make_examples(),), RAMPED, 0, STEPS))
    for step in range(STEPS):
        alone = list(host_batches((make_examples(),), RAMPED, step, step + 1))
        assert len(alone) == 1 and same(alone[0], sequence[step])
    tail = list(host_batches((make_examples(),), RAMPED, 3, STEPS))
    assert len(tail) == STEPS - 3 and all(
        same(a, b) for a, b in zip(tail, sequence[3:], strict=True)
    )


# --- on devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", MESHES.values(), ids=MESHES.keys())
def test_meshes_hold_the_same_batches(layout: Layout):
    plan = Plan(BATCH, LENGTH)
    expected = list(reference(plan, range(2, 5)))
    with sharding.use(layout.mesh()), jax.transfer_guard("disallow"):
        got = list(batches((make_examples(),), plan, 2, 5))
    assert len(got) == 3
    for batch, whole in zip(got, expected, strict=True):
        assert same(jax.device_get(batch), whole)
        rows = BATCH // (layout.data * layout.fsdp)
        for array in batch.values():
            assert {s.data.shape[0] for s in array.addressable_shards} == {rows}
            assert array.sharding.spec[0] == sharding.BATCH_AXES


def test_one_process_has_the_whole_batch():
    with sharding.use(Layout(8, 1, 1).mesh()):
        assert share_of(0) == Share((0, 1, 2, 3, 4, 5, 6, 7), 8)
    with sharding.use(Layout(2, 2, 2).mesh()):
        assert share_of(0) == Share((0, 1, 2, 3), 4)
        assert share_of(1) == Share((), 4)


PROCESS = """
import os, sys
rank, port = int(sys.argv[1]), sys.argv[2]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"localhost:{port}", 2, rank, initialization_timeout=60)
from lmjax import sharding
from lmjax.batches import Plan, batches, share_of
asked = []
def make(examples):
    asked.extend(examples.tolist())
    return {"x": np.stack([examples, examples + 100], axis=1)}
with sharding.use(sharding.Layout(*map(int, sys.argv[3:6])).mesh()):
    share = share_of(rank)
    for batch in batches((make,), Plan(8, 1), 1, 3):
        held = [(s.index[0].indices(8)[:2], s.data.tolist()) for s in batch["x"].addressable_shards]
print(repr((share.parts, share.of, sorted(set(asked)), held)))
"""


@pytest.mark.parametrize(
    ("layout", "shares", "rows"),
    [((4, 1, 1), [[(0, 1), 4], [(2, 3), 4]], 2), ((1, 2, 2), [[(0,), 2], [(1,), 2]], 4)],
)
def test_two_processes_read_their_own_rows_and_no_others(layout, shares, rows: int):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), port, *map(str, layout)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=100)[0] for process in started]
    for rank, text in enumerate(printed):
        *share, asked, held = ast.literal_eval(text.strip().splitlines()[-1])
        assert share == shares[rank]
        # Steps 1 and 2 are examples 8 … 23; this process reads its half of each.
        halves = [range(8 * step + 4 * rank, 8 * step + 4 * rank + 4) for step in (1, 2)]
        assert asked == [i for half in halves for i in half]
        for (lo, hi), values in held:
            assert hi - lo == rows
            assert values == [[16 + i, 116 + i] for i in range(lo, hi)]
