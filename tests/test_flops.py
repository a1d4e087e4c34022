# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs, by which utilisation is told, beside XLA's count of the step's matrix products."""

import dataclasses
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from jax.interpreters import partial_eval

from lmjax import cpu, recipe
from lmjax.models import electra
from lmjax.peaks import FLOPS, peak_flops
from lmjax.run import Run
from lmjax.step import abstract_state, make_train_step
from lmjax.train import Recorder

PRODUCTS = ("dot_general", "conv_general_dilated")


def inner(equation: Any) -> Iterator[Any]:
    """The programs inside an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            program = getattr(part, "jaxpr", part)
            if hasattr(program, "eqns"):
                yield program


def counted_by_xla(equation: Any) -> float:
    """XLA's FLOPs of one product, compiled for itself: nothing but the product is in them."""
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
    alone = jax.jit(lambda *inputs: equation.primitive.bind(*inputs, **equation.params))
    return alone.lower(*shapes).cost_analysis()["flops"]


def product_flops(program: Any) -> float:
    """Of all products of a traced program; those in loops as often as the loop runs."""
    total = 0.0
    for equation in program.eqns:
        if equation.primitive.name in PRODUCTS:
            total += counted_by_xla(equation)
            continue
        parts = [product_flops(part) for part in inner(equation)]
        assert equation.primitive.name not in ("while", "cond") or not any(parts), equation
        total += equation.params.get("length", 1) * sum(parts)
    return total


def per_token(run: Run) -> float:
    """What the train step multiplies for a token, without recomputation and dead code."""
    maker, rows = run.makers()[0], 2
    state = abstract_state(run.model, run.optimiser(), rows)
    step = make_train_step(run.model, run.loss, run.optimiser(), run.schedule(), run.seed)
    shapes = {name: ((rows, *shape), dtype) for name, (shape, dtype) in maker.arrays().items()}
    slots = maker.length * 15 // 100  # as many as the formula scores
    batch = {
        name: jax.ShapeDtypeStruct((rows, slots) if name.endswith("_BP") else shape, dtype)
        for name, (shape, dtype) in shapes.items()
    }
    traced = jax.make_jaxpr(step)(state, batch).jaxpr
    live, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return product_flops(live) / (rows * maker.length)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2_small", {"attention_dropout": 0.1}),  # without it, a CPU leaves half of them out
        ("bert_base", {}),
        # With one layer, what is not in the layers is more than the tolerance.
        ("bert_base", {"depth": 1}),
        ("albert_base", {"depth": 1}),
        ("electra_small", {"depth": 1, "generator_depth": 1}),
        ("elmo", {"distinct": 0.0}),
        ("elmo_zh", {}),
    ],
)
def test_model_flops_are_those_of_the_products(name, changes, monkeypatch):
    monkeypatch.setattr(cpu, "alone", lambda: False)  # convolutions as such, for XLA to count
    monkeypatch.setattr(electra, "draw", lambda at, *_: jnp.zeros(at.shape[:2], jnp.int32))
    run = recipe.load(str(ROOT / "experiments" / f"{name}.py"))
    examples = run.data.examples
    if hasattr(examples, "masks"):
        examples = dataclasses.replace(examples, length=100)  # 15 of them are scored
    if hasattr(run.model, "remat"):
        changes = {**changes, "remat": "none"}
    run = dataclasses.replace(
        run, model=run.model.clone(**changes), batch=2, ramp=None, phase2=None,
        data=dataclasses.replace(run.data, examples=examples),
    )  # fmt: skip
    wanted = run.model.flops_per_token(run.data.examples.length)
    assert per_token(run) == pytest.approx(wanted, rel=0.005)


# --- utilisation ----------------------------------------------------------------------------------


def devices(*kinds: str) -> list[Any]:
    return [SimpleNamespace(device_kind=kind) for kind in kinds]


def test_peaks_are_found_by_the_names_of_devices():
    assert peak_flops(devices("TPU v5 lite", "TPU v5 lite")) == 2 * 197e12
    assert peak_flops(devices("TPU v5")) == 459e12
    assert peak_flops(devices("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(devices("NVIDIA H100 PCIe")) == 756e12
    assert peak_flops(devices("TPU v50")) is None
    assert peak_flops(devices("TPU v4", "cpu")) is None
    assert peak_flops(jax.devices()) is None


def test_utilisation_is_recorded_where_the_peak_is_known(tmp_path, monkeypatch):
    run = recipe.load(str(ROOT / "experiments" / "bert_base.py"), tiny=True)
    monkeypatch.setitem(FLOPS, "cpu", 1e9)
    log = Recorder(run, tmp_path, 0)
    log.step(run.steps, {"loss": np.float32(1)})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text("utf-8"))
    length = run.makers()[-1].length  # of the last phase
    flops = run.model.flops_per_token(length) * line["tokens_per_second"]
    assert length != run.makers()[0].length
    assert line["mfu"] == pytest.approx(flops / (len(jax.devices()) * 1e9))
