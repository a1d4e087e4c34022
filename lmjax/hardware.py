# SPDX-License-Identifier: Apache-2.0
"""Silent faults of hardware: replicas that should be equal, and a step that is computed twice.

A chip that now and then computes or keeps a wrong bit raises no error; its parameters go apart from
those of the other replicas, or a step gives another result the second time (Hochschild et al. 2021,
"Cores that don't count").
"""

from typing import Any

import jax
import jax.numpy as jnp

from lmjax.fingerprint import shards
from lmjax.layers import Batch
from lmjax.step import State, TrainStep

_NAMED = 5


def checked_step(step: TrainStep, state: State, batch: Batch, done: int) -> tuple[State, Any]:
    """The state and metrics after `step`, computed twice from the same state and compared.

    Needs room for a second state, and the time of two steps and three fingerprints. `done` is the
    number of the step.

    Raises:
      ValueError: a device holds or computes other bits than it should; names it.
    """
    odd = shards(state).odd_replicas()
    if odd:
        raise _fault(f"before step {done:,}, replicas of {odd[0][0]} differ", odd)
    twin = jax.tree.map(jnp.copy, state)
    first = shards(step(twin, batch)[0])
    state, metrics = step(state, batch)
    second = shards(state)
    odd = first.differences(second)
    if odd:
        raise _fault(f"step {done:,} computed twice gives two values of {odd[0][0]}", odd)
    odd = second.odd_replicas()
    if odd:
        raise _fault(f"after step {done:,}, replicas of {odd[0][0]} differ", odd)
    print(f"step {done:,}: computed twice, equal on {jax.device_count()} devices")
    return state, metrics


def devices_of(odd: list[tuple[str, Any]]) -> str:
    """Where to look: the devices of (path, device) pairs."""
    devices = list(dict.fromkeys(device for _, device in odd))
    named = ", ".join(f"{d} of process {d.process_index}" for d in devices[:_NAMED])
    more = f" and {len(devices) - _NAMED} more" if len(devices) > _NAMED else ""
    return f"look at {named}{more}"


def _fault(what: str, odd: list[tuple[str, Any]]) -> ValueError:
    return ValueError(
        f"{what}: {devices_of(odd)}. The step is not saved; start again without the device, from a"
        " checkpoint before it"
    )
