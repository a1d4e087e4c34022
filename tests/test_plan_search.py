# SPDX-License-Identifier: Apache-2.0
"""`plan --search`, and what it knows without a compiler: lines of memory, rooflines of time."""

import dataclasses
import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
from commands import lmjax

from lmjax import recipe, sharding
from lmjax.plan import chips, memory, roofline
from lmjax.plan import plan as plans
from lmjax.plan import search as searches
from lmjax.plan.facts import described
from lmjax.plan.flags import plan_by_flags
from lmjax.plan.plan import plan
from lmjax.plan.program import lower_step
from lmjax.plan.search import consider, layouts, search
from lmjax.plan.winners import winners
from lmjax.run import Run, replace
from lmjax.sharding import Layout

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
KEYS = {"topology", "fits", "peak_hbm_bytes", "step_seconds", "mfu", "tokens_per_second"}
pytestmark = pytest.mark.skipif(not chips.installed(), reason=chips.MISSING)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(name: str = "gpt2_small", tiny: bool = True) -> Run:
    return recipe.load(str(EXPERIMENTS / f"{name}.py"), tiny)


def quiet(_: str) -> None:
    pass


def shrink(monkeypatch, size: float) -> None:
    """Gives v5e's devices so many bytes."""
    small = dataclasses.replace(chips.CHIPS["v5e"], memory=int(size))
    monkeypatch.setitem(chips.CHIPS, "v5e", small)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2_xl", "bert_large"])
def test_parameters_and_optimiser_fall_with_the_devices_of_fsdp(name):
    """Per device times devices, against two devices: what is not split is biases and norms."""
    rests = {
        count: memory.resting_bytes(
            replace(load(name, tiny=False), batch=64, accumulate=1, mesh=Layout(1, count, 1)),
            topology,
        )
        for topology, count in (("v5e:2x2", 4), ("v5e:4x4", 16), ("v5e:8x8", 64))
    }
    whole = {n: n * (found.parameters + found.optimiser) for n, found in rests.items()}
    assert whole[16] == pytest.approx(whole[4], rel=0.02)
    assert whole[64] == pytest.approx(whole[4], rel=0.1)
    run = load(name, tiny=False)
    assert whole[4] >= 12 * run.parameters()


def test_parameters_and_optimiser_fall_with_the_devices_of_tensor():
    run = replace(load("bert_large", tiny=False), batch=64, mesh=Layout(1, 1, 4))
    four = memory.resting_bytes(run, "v5e:2x2")
    sixteen = memory.resting_bytes(replace(run, mesh=Layout(1, 1, 16)), "v5e:4x4")
    assert 16 * sixteen.parameters == pytest.approx(4 * four.parameters, rel=0.1)
    assert 16 * sixteen.optimiser == pytest.approx(4 * four.optimiser, rel=0.1)


def test_a_row_saves_what_its_remat_policy_keeps():
    run = load()
    saved = {
        policy: memory.saved_bytes(replace(run, model=run.model.clone(remat=policy)), "v5e:1x1")
        for policy in ("none", "names", "full")
    }
    model, length = run.model, run.data.examples.length
    deeper = replace(run, model=model.clone(depth=model.depth + 1, remat="full"))
    assert model.width <= 128  # a row of memory is 128 numbers, filled or not
    a_layer = 2 * length * 128  # the input of a layer in bfloat16
    assert memory.saved_bytes(deeper, "v5e:1x1") - saved["full"] == a_layer
    inputs = model.depth * a_layer
    # Beside them queries, keys, values and attention's result by head, and the MLP's inner part.
    assert saved["names"] >= saved["full"] + (4 * model.heads + 1) * inputs
    assert saved["none"] > saved["names"] + 4 * inputs


def test_the_line_adds_up_what_rests_and_what_rows_save():
    run = replace(load(), mesh=Layout(2, 1, 2), batch=16, accumulate=1)
    rests = memory.resting_bytes(run, "v5e:2x2")
    assert (rests.added, rests.gradients) == (0, rests.parameters)
    rows = memory.line(run, "v5e:2x2") - rests.always - rests.gradients
    assert rows == pytest.approx(16 / 4 * memory.saved_bytes(run, "v5e:2x2"), abs=1)
    halves = replace(run, accumulate=2)
    assert memory.resting_bytes(halves, "v5e:2x2").added == rests.parameters
    assert memory.line(halves, "v5e:2x2") == pytest.approx(
        memory.line(run, "v5e:2x2") + rests.parameters - rows / 2, abs=2
    )


def test_what_surely_does_not_fit_is_not_compiled(monkeypatch):
    def never(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(plans, "find", never)
    run = replace(load(), batch=8, accumulate=1)
    shrink(monkeypatch, memory.least(run, "v5e:1x1") - 1)
    found = plan(run, "v5e:1x1", largest=False, say=quiet)
    assert (found["fits"], found["memory_from"]) == (False, "line")
    assert found["peak_hbm_bytes"] > found["hbm_bytes"] and found["step_seconds"] is None
    with pytest.raises(AssertionError, match="compiled"):
        shrink(monkeypatch, memory.least(run, "v5e:1x1"))
        plan(run, "v5e:1x1", largest=False, say=quiet)


# --- rooflines ------------------------------------------------------------------------------------


def test_what_is_sent_follows_the_axes():
    run = replace(load(), mesh=Layout(4, 1, 1), batch=16, accumulate=1)
    sent = {
        layout: roofline.transfers(replace(run, mesh=Layout(*layout)), "v5e:2x2")
        for layout in ((4, 1, 1), (1, 4, 1), (2, 1, 2))
    }
    assert [axis for axis, t in sent[4, 1, 1].items() if t] == [sharding.DATA]
    assert [axis for axis, t in sent[1, 4, 1].items() if t] == [sharding.FSDP]
    assert sent[2, 1, 2][sharding.TENSOR] > 0
    # A mesh that splits a weight into less than a tile sends padding.
    wide = replace(run, model=run.model.clone(width=512), mesh=Layout(1, 4, 1))
    run = replace(run, mesh=Layout(1, 4, 1))
    thin = roofline._weights(run, "v5e:2x2", 0)[0] / 32**2
    assert thin > roofline._weights(wide, "v5e:2x2", 0)[0] / 512**2


def test_microbatches_send_again_and_recomputing_costs_time():
    run = replace(load(), mesh=Layout(1, 4, 1), batch=16, accumulate=1)
    once = roofline.step_seconds(run, "v5e:2x2")
    assert roofline.step_seconds(replace(run, accumulate=4), "v5e:2x2") > 2 * once
    big = replace(load(tiny=False), batch=128, accumulate=1, mesh=Layout(16, 1, 1))
    full, names = (
        roofline.step_seconds(replace(big, model=big.model.clone(remat=policy)), "v5e:4x4")
        for policy in ("full", "names")
    )
    assert names < full < 1.3 * names


def test_a_narrow_model_gets_no_tensor_parallelism():
    ranked = consider(replace(load(tiny=False), batch=512), "v5e:4x4").ranked
    assert all(candidate.run.mesh.tensor == 1 for candidate in ranked[:5])
    assert ranked[0].seconds < min(c.seconds for c in ranked if c.run.mesh.tensor > 1)


# --- combinations ---------------------------------------------------------------------------------


def test_meshes_are_all_factorisations():
    found = {(m.data, m.fsdp, m.tensor) for m in layouts(8)}
    sizes = range(1, 9)
    every = {(a, b, c) for a in sizes for b in sizes for c in sizes if a * b * c == 8}
    assert found == every and len(layouts(8)) == len(every)


def test_what_train_refuses_is_not_considered():
    run = replace(load(), batch=16)  # two heads
    found = consider(run, "v5e:2x2")
    meshes = {candidate.run.mesh for candidate in found.ranked}
    assert meshes == {m for m in layouts(4) if m.tensor <= 2}
    assert found.refused and "does not divide" in found.reason
    with pytest.raises(ValueError, match="does not divide"):
        lower_step(replace(run, mesh=Layout(1, 1, 4)), "v5e:2x2")
    lower_step(found.ranked[0].run, "v5e:2x2")
    assert [c.seconds for c in found.ranked] == sorted(c.seconds for c in found.ranked)


def test_too_large_combinations_take_more_microbatches_or_fall_out(monkeypatch):
    run = replace(load(), batch=256)
    found = {described(c.run): c for c in consider(run, "v5e:1x1").ranked}
    assert not consider(run, "v5e:1x1").large
    assert {c.run.accumulate for c in found.values()} == {1}
    by_policy = {c.run.model.remat: c.memory for c in found.values()}
    shrink(monkeypatch, by_policy["names"] / searches._ROOM + 1)
    tight = consider(run, "v5e:1x1")
    assert tight.large
    parts = {c.run.model.remat: c.run.accumulate for c in tight.ranked}
    assert parts["full"] == parts["names"] == 1 < parts["none"]
    shrink(monkeypatch, 1000)
    with pytest.raises(ValueError, match="no mesh of v5e:1x1 .* it fits none of them"):
        search(run, "v5e:1x1", say=quiet)


# --- the search -----------------------------------------------------------------------------------


def stand_in(monkeypatch, hours):
    """Plans by a function of the run, None for what does not fit; returns what was asked for."""
    asked: list[Run] = []

    def fake(run, topology, price, largest, say):
        asked.append(run)
        took = hours(run)
        return {"fits": took is not None, "hours": took, "remat": run.model.remat}

    monkeypatch.setattr(searches, "plan", fake)
    return asked


def test_the_search_goes_to_the_fastest_neighbour_within_its_budget(monkeypatch):
    run = replace(load(), batch=16)

    def hours(run):
        slow = {"none": 1.0, "names": 4.0, "full": 2.0}[run.model.remat]
        return slow + (run.mesh != Layout(4, 1, 1)) - 0.5 * (run.model.unroll == 2)

    asked = stand_in(monkeypatch, hours)
    found = search(run, "v5e:2x2", most=20, say=quiet)
    assert len(asked) == len({described(one) for one in asked}) == len(found) < 20
    best = found[0]
    assert (best["remat"], best["unroll"]) == ("none", 2)
    assert best["line"].startswith("mesh=Layout(data=4, fsdp=1)")
    assert [one["rank"] for one in found] == list(range(1, len(found) + 1))
    assert [one["hours"] for one in found] == sorted(one["hours"] for one in found)

    asked.clear()
    assert len(search(run, "v5e:2x2", most=3, say=quiet)) == len(asked) == 3


def test_what_the_compiler_finds_too_large_is_tried_in_more_parts(monkeypatch):
    run = replace(load(), batch=64)
    asked = stand_in(monkeypatch, lambda run: 1.0 if run.accumulate >= 4 else None)
    found = search(run, "v5e:2x2", most=4, say=quiet)
    assert [one.accumulate for one in asked[:3]] == [1, 2, 4]
    assert found[0]["fits"] and not found[-1]["fits"]

    stand_in(monkeypatch, lambda run: None)
    assert not any(one["fits"] for one in search(run, "v5e:2x2", most=4, say=quiet))


def test_the_search_prints_its_candidates_and_how_to_choose_the_best(capsys):
    run = replace(load(), batch=16)
    flags = Namespace(
        topology=["v5e:1x1"], price=None, search=True, compile=2, json=True, quick=False, save=None
    )
    plan_by_flags(run, flags)
    printed = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [one["rank"] for one in printed] == [2, 1]
    best = printed[-1]
    assert best.keys() >= KEYS | {"mesh", "remat", "accumulate", "memory_from", "step_from"}
    assert (best["memory_from"], best["step_from"]) == ("compiler", "compiler")
    assert best["hours"] <= printed[0]["hours"]
    written = eval(f"dict({best['line']})", {"Layout": Layout})
    model = run.model.clone(**eval(f"dict({best['model_line']})"))
    chosen = replace(run, model=model, **written)
    assert (chosen.mesh, chosen.accumulate) == (Layout(1, 1, 1), best["accumulate"])
    keys = [flag.removeprefix("--").split("=") for flag in best["flags"].split()]
    assert recipe.override(run, [(key, value) for key, value in keys]) == chosen
    text = winners([{**one, "rank": n} for n, one in enumerate(reversed(printed), 1)])
    assert best["line"] in text and best["flags"] in text
    assert "compiler" in text and "line" in text and "roofline" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": 2}, "--compile is of --search"),
        ({"search": True, "compile": 0}, "--compile=0: must be at least 1"),
        ({"search": True, "quick": True}, "leave one of the two out"),
        ({"search": True, "save": "steps"}, "choose it first, without --search"),
        ({"price": -1.0}, "--price=-1.0: dollars, 0 or more"),
        ({"price": math.nan}, "--price=nan: dollars, 0 or more"),
        ({"topology": [","]}, "--topology needs a value"),
        ({"search": True, "topology": ["v5e:2x2,v5x:2x2"]}, "no chip 'v5x'"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_compiled(changes, message):
    usual = {"topology": ["v5e:1x1"], "price": None, "compile": None, "search": False}
    flags = Namespace(**{**usual, "json": False, "quick": False, "save": None, **changes})
    with pytest.raises(ValueError, match=message):
        plan_by_flags(load(), flags)


# --- real recipes ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_search_of_gpt2_small_finds_what_fits_and_is_kept():
    call = ("plan", "experiments/gpt2_small.py", "--batch=512", "--topology=v5e:4x4")
    out, err = lmjax(*call, "--search", "--compile=2", "--json")
    printed = [json.loads(line) for line in out.strip().split("\n")]
    assert len(printed) == 2 and err.count("compiling for") == 2
    best = printed[-1]
    assert best["fits"] and best["step_from"] == "compiler" and best["mesh"]["tensor"] == 1
    assert best["mfu"] > 0.3
    again, err = lmjax(*call, "--search", "--compile=2", "--json")
    assert again == out and "compiling for" not in err


@pytest.mark.slow
def test_fsdp_memory_falls_as_one_over_the_devices_by_the_compiler():
    run = load("bert_large", tiny=False)
    state, given = {}, {}
    for topology, count in (("v5e:2x2", 4), ("v5e:4x4", 16)):
        one = replace(run, phase2=None, batch=count, accumulate=1, mesh=Layout(1, count, 1))
        found = plan(one, topology, largest=False, say=quiet)
        assert found["memory_from"] == "compiler"
        state[count] = count * (found["parameters_bytes"] + found["optimizer_bytes"])
        # With its batch and the padding of its tiles.
        given[count] = state[count] + count * found["batch_and_padding_bytes"]
    stored = 12 * (run.parameters() + run.model.padding)
    assert state[4] == pytest.approx(stored, rel=0.001) and state[16] < 1.01 * stored
    assert given[16] == pytest.approx(given[4], rel=0.1)
