# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite: the update is skipped and counted; batches are left out for good."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import DEMO, ROOT, lmjax, tiny, write_text
from test_hosts import start_two
from test_step import Linear, two_losses

from lmjax import recipe
from lmjax.batches import Plan, Ramp, Share, host_batches, spans
from lmjax.layers import Outputs
from lmjax.metrics import read_metrics
from lmjax.optim import AdamW
from lmjax.sparse import Drawn
from lmjax.step import State, make_train_step
from lmjax.steps import all_steps
from lmjax.workdir import refuse_skipping_the_past

# --- the step -------------------------------------------------------------------------------------


class Carrying(Linear):
    """A product that also hands on what it read, and a table of which rows 1 and 3 are touched."""

    def draw(self, batch, key):
        return Drawn({}, "table", jnp.array([1, 3]))

    def apply(self, variables, batch, train=False, rngs=None, carry=None):
        params = variables["params"]
        hidden = batch["x"] * params["w"] + params["table"].sum() + 0 * carry["h"]
        return Outputs(hidden, None, cache={"h": batch["x"]})  # type: ignore[arg-type]


def batch_of(x: float) -> dict[str, np.ndarray]:
    whole = np.ones((8, 3), np.float32)
    return {"x": whole * x, "y": whole, "a": whole, "b": whole}


def begin(optimiser) -> State:
    params = {"w": jnp.float32(0.5), "table": jnp.arange(10.0).reshape(5, 2)}
    return State(jnp.int32(0), params, optimiser.init(params), {"h": jnp.zeros((8, 3))})


OPTIMISERS = {
    "adamw": AdamW(peak=0.1, warmup=1).transform(
        AdamW(peak=0.1, warmup=1).schedule(9, lambda s: s)
    ),
    "adagrad": optax.adagrad(0.1),
    "lamb": optax.lamb(0.1),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_without_a_finite_number_changes_nothing_but_the_count(name, accumulate):
    optimiser = OPTIMISERS[name]
    make = partial(make_train_step, Carrying(), two_losses, optimiser, lambda s: 0.1)
    step = jax.jit(make(0, accumulate))
    state, metrics = step(begin(optimiser), batch_of(1.0))
    assert metrics["skipped"] == 0 and float(state.params["w"]) != 0.5
    for x in (np.nan, np.inf, 1e20):  # the last one: a finite loss would be, its square is not
        after, metrics = step(state, batch_of(x))
        assert metrics["skipped"] == 1 and int(after.step) == int(state.step) + 1
        for old, new in zip(jax.tree.leaves(state)[1:], jax.tree.leaves(after)[1:], strict=True):
            np.testing.assert_array_equal(old, new)
    good, metrics = step(after, batch_of(2.0))
    assert metrics["skipped"] == 0 and float(good.params["w"]) != float(state.params["w"])
    np.testing.assert_array_equal(good.carry["h"], 2.0)


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is():
    def root(outputs, batch):
        return {"loss": (jnp.sqrt(jnp.abs(outputs.hidden_BLD)).sum(), batch["a"].sum())}

    step = jax.jit(make_train_step(Linear(), root, optax.sgd(0.1), lambda s: 0.1, 0))
    params = {"w": jnp.float32(0.5)}
    state = State(jnp.int32(0), params, optax.sgd(0.1).init(params))
    after, metrics = step(state, batch_of(0.0))  # the slope of a root at 0
    assert metrics["loss"] == 0 and not np.isfinite(metrics["gradient_norm"])
    assert metrics["skipped"] == 1 and after.params["w"] == 0.5


# --- the batches ----------------------------------------------------------------------------------


def seen(plan: Plan, steps: int, hosts: int = 1) -> list[list[int]]:
    """Examples of each step, as the hosts make them."""

    def make(examples: np.ndarray) -> dict[str, np.ndarray]:
        return {"i": examples}

    parts = [
        list(host_batches((make, make), plan, 0, steps, Share((h,), hosts))) for h in range(hosts)
    ]
    return [[int(i) for part in parts for i in part[s]["i"]] for s in range(steps)]


@pytest.mark.parametrize("hosts", [1, 2])
def test_skipped_batches_are_seen_by_no_step_and_the_others_by_one(hosts):
    plan = Plan(4, 8, skip=((6, 7), (2, 4)))
    whole = seen(Plan(4, 8), 9)
    assert seen(plan, 6, hosts) == [whole[n] for n in (0, 1, 4, 5, 7, 8)]
    assert [plan.batches_of(s) for s in (0, 2, 5)] == [(0, 1), (4, 5), (8, 9)]


def test_skipping_holds_through_a_ramp_and_a_second_phase():
    def plan(**skip) -> Plan:
        return Plan(6, 1, Ramp(2, 2, 8), (8, 4, 1), **skip)  # 2, 2, 4, then 6 until step 8, then 4

    usual, skipping = plan(), plan(skip=((1, 3), (9, 10)))
    assert [s.size for s in usual.stages] == [2, 4, 6, 4]
    left_out = [i for n in (1, 2) for i in usual.indices(n)]
    first = [i for s in range(8) for i in skipping.indices(s)]
    assert first == [i for i in range(first[-1] + 1) if i not in left_out]
    assert [len(skipping.indices(s)) for s in range(10)] == [
        len(usual.indices(s)) for s in range(10)
    ]
    second = [i for s in range(8, 11) for i in skipping.indices(s)]
    assert second == [0, 1, 2, 3, *range(8, 16)]
    with pytest.raises(ValueError, match="skip_batches=8:10: the second phase begins with batch 9"):
        plan(skip=((7, 9),))


def test_spans_are_typed_and_recorded_and_come_back():
    run = recipe.load(str(ROOT / DEMO), tiny=True)
    typed = recipe.override(run, [("skip_batches", "12:14,3:4")])
    assert typed.skip_batches == ((12, 14), (3, 4))
    recorded = json.loads(json.dumps(recipe.to_json(typed)))
    assert recipe.from_json(run, recorded).skip_batches == typed.skip_batches
    assert spans(str(recorded["skip_batches"])) == typed.skip_batches  # as `describe` prints it
    assert spans("[]") == () == run.skip_batches
    for text in ("3", "a:b", "3:4:5", "3:"):
        with pytest.raises(ValueError, match=f"--skip_batches={text}: spans FIRST:END"):
            recipe.override(run, [("skip_batches", text)])
    for text, message in (
        ("4:4", "4:4: a span"),
        ("0:2", "0:2: a span"),
        ("1:3,2:5", "2:5 overlaps"),
        ("1:2147483648", "1:2147483648: END must be below 2"),
        ("1:2,3:99999999999999999999", "3:99999999999999999999: END must be below 2"),
    ):
        with pytest.raises(ValueError, match=f"skip_batches={message}"):
            recipe.override(run, [("skip_batches", text)])


def test_what_was_seen_cannot_be_skipped_any_more(tmp_path):
    run = recipe.load(str(ROOT / DEMO), tiny=True)
    old = recipe.override(run, [("skip_batches", "3:5")])
    (tmp_path / "recipe.json").write_text(json.dumps({"run": recipe.to_json(old)}))
    for text in ("3:5", "3:5,13:15", "3:5,20:30"):
        refuse_skipping_the_past(recipe.override(run, [("skip_batches", text)]), tmp_path, 10)
    for text in ("", "3:6", "3:5,12:13"):
        with pytest.raises(ValueError, match="at step 10 and has seen the batches up to 12"):
            refuse_skipping_the_past(recipe.override(run, [("skip_batches", text)]), tmp_path, 10)


# --- a run ----------------------------------------------------------------------------------------

# A recipe whose loss is NaN while it reads batches 6 to 8: as if the data were the cause.
EXPERIMENT = """
import jax.numpy as jnp
from dataclasses import dataclass
from lmjax import recipe
from lmjax.examples.windows import Windows
from lmjax.losses import next_token
from lmjax.run import replace

@dataclass(frozen=True)
class Bad(Windows):
    def train(self, split, seed, examples):
        batch = super().train(split, seed, examples)
        batch["weights_BL"][(examples >= 5 * 8) & (examples < 8 * 8)] = float("nan")
        return batch

run = recipe.load({demo!r})
tiny = recipe.load({demo!r}, tiny=True)
tiny = replace(tiny, data=replace(tiny.data, examples=Bad(tiny.data.examples.length)))
"""


def test_a_run_stops_names_the_documents_and_goes_on_without_them(tmp_path):
    text, workdir, file = write_text(tmp_path), tmp_path / "run", tmp_path / "bad.py"
    file.write_text(EXPERIMENT.format(demo=str(ROOT / DEMO)))

    def command(*keys: str) -> tuple[str, ...]:
        given = list(tiny(workdir, text, "--steps=8", "--save_every=4", "--log_every=100", *keys))
        return ("train", str(file), *given[2:])

    out, err = lmjax(*command("--max_skipped=3"), code=2)
    assert "saved step 4" in out and "saved step 8" not in out
    assert "step 6: loss nan" in out and out.count(": the update is skipped") == 3
    assert "3 updates in a row were skipped, steps 6 to 8" in err
    assert "the newest good step is 4" in err and "--skip_batches=6:9 --allow=skip_batches" in err
    steps = [line["step"] for line in read_metrics(workdir) if line["skipped"]]
    assert steps == [6, 7, 8]
    batches = json.loads((workdir / "skipped-8.json").read_text())
    assert [b["step"] for b in batches] == [6, 7, 8] and batches[0]["batches"] == [6, 7]
    named = {d["document"] for row in batches[0]["rows"] for d in row["documents"]}
    assert named and all(name.startswith("text.txt:") for name in named)

    shown, _ = lmjax("batch", str(file), "--tiny", f"--workdir={workdir}", "6", "--json")
    assert json.loads(shown) == batches[0]

    # What follows a skipped update is no step to go on from, and retires none that is.
    out, err = lmjax(*command("--max_skipped=3", "--save_every=1"), code=2)
    assert "step 6 is not saved: its update was skipped" in out and "saved step 6" not in out
    assert "the newest good step is 5" in err and all_steps(workdir) == [4, 5]

    keys = ("--skip_batches=6:9", "--allow=skip_batches")
    out, _ = lmjax(*command(*keys))
    assert "resumed at step 5" in out and "is skipped" not in out
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines][-1] == 8 and np.isfinite(lines[-1]["loss"])


@pytest.mark.slow
def test_two_processes_stop_together_and_check_their_hardware(tmp_path):
    text, workdir, file = write_text(tmp_path), tmp_path / "run", tmp_path / "bad.py"
    file.write_text(EXPERIMENT.format(demo=str(ROOT / DEMO)))
    keys = ("--steps=8", "--save_every=4", "--max_skipped=3", "--check_every=3")
    processes = start_two("train", str(file), *tiny(workdir, text, *keys)[2:])
    out, rest = (process.communicate(timeout=250)[0] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], (out, rest)
    assert out.count(": computed twice, equal on 4 devices") == 2 and "saved step 4" in out
    for said in (out, rest):
        assert "3 updates in a row were skipped, steps 6 to 8" in said
    assert "the update is skipped" not in rest and (workdir / "skipped-8.json").is_file()
