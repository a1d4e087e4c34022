# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: who they are, by the environment or by three settings.

Before JAX connects them they call the roll, because JAX ends a process that waits in vain without a
word on who was missing.
"""

import glob
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lmjax.roll import SETTINGS, TIMEOUT, Place, call_the_roll, is_local
from lmjax.watch import SILENCE, Sentinel

_PORT = 8476
FLAGS = ("--coordinator", "--processes", "--process")  # the settings as flags, in their order
_HEARTBEAT = 30  # seconds of silence after which a process is taken for dead, and all end


def join(
    env: Mapping[str, str] = os.environ, flags: Sequence[str | None] = (None, None, None)
) -> None:
    """Makes this process one of its run's, if there are several; waits for the others.

    Found by themselves: Slurm, Open MPI, TPU pods of GKE and of Compute Engine. Elsewhere the three
    settings LMJAX_COORDINATOR (HOST:PORT of process 0), LMJAX_PROCESSES and LMJAX_PROCESS (for an
    indexed Job of Kubernetes, its index). LMJAX_JOIN_SECONDS is how long to wait (default 300).

    Args:
      flags: the three settings, None where they were not given; they win over the environment.

    Raises:
      ValueError: a setting that cannot be, by the name that it was given; or as `call_the_roll`.
    """
    import jax

    given = {name: flag for name, flag in zip(SETTINGS, flags, strict=True) if flag is not None}
    env = {**env, **given}
    seconds = _seconds(env)
    try:
        place = _by_settings(env) if given else found(env)
    except ValueError as error:
        raise ValueError(_as_typed(str(error), given)) from None
    if place is None:
        if _on_tpu_vm(env):  # Google's metadata knows the other hosts; JAX asks it
            jax.distributed.initialize(
                initialization_timeout=max(1, int(seconds)), heartbeat_timeout_seconds=_HEARTBEAT
            )
        return
    if place.count == 1:
        return
    call_the_roll(place, seconds)
    if env.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _address[:] = [place.address]
    jax.distributed.initialize(
        place.address, place.count, place.index,
        initialization_timeout=max(1, int(seconds)), heartbeat_timeout_seconds=_HEARTBEAT,
        # JAX's own choice is every interface.
        coordinator_bind_address=place.address if is_local(place.address) else None,
    )  # fmt: skip


def _as_typed(message: str, given: Mapping[str, str]) -> str:
    """A message with the flags that were typed in place of the settings that they stand for."""
    for setting, flag in zip(SETTINGS, FLAGS, strict=True):
        if setting in given:
            message = message.replace(f"{setting}=", f"{flag}=")
    return message


_sentinels: list[Sentinel] = []  # of this process, while it is one of several


def watch() -> None:
    """From here to `leave`, the end of one process ends all, with a line that names it.

    It ends the others at once where the process is killed, and after about ten seconds where it
    stands still or its host is silent.
    """
    import jax

    if jax.process_count() == 1 or _sentinels:
        return
    index, count, call = jax.process_index(), jax.process_count(), None
    if index == 0:
        host = _reachable()
        mine = Sentinel(0, count, host if is_local(f"{host}:") else "")
        _sentinels.append(mine)
        call = [socket.gethostname(), host, mine.port, mine.token]
    name, host, port, token = of_first(call)
    if index:
        _sentinels.append(Sentinel(index, count, f"{name} {host} {port}", token))


def leave() -> None:
    """This process ends as it should: no reason for the others to end."""
    while _sentinels:
        _sentinels.pop().leave()


def wait_for_news() -> None:
    """What fails between processes may do so because one is gone: then this one ends here, after
    the line that names it. Otherwise it returns, after some seconds.
    """
    if _sentinels:
        time.sleep(SILENCE + 5)


def _reachable() -> str:
    """Where the others find this process, which is the first."""
    if _address:
        return _address[0].rpartition(":")[0].strip("[]")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]


_address: list[str] = []  # of the coordinator, if we were told


def is_first() -> bool:
    """Whether this process speaks and writes for the run."""
    import jax

    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process of the run has come here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def of_first(value: Any) -> Any:
    """What the first process holds, on all of them; of JSON's types."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(mine))))
    padded = np.resize(mine, size)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def gathered(text: str) -> list[str]:
    """What each process says, in their order, on all of them."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: len(mine)] = mine
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


class Agreement:
    """A yes of any process that all of them learn of at the same call, without waiting for it.

    Each call starts to ask and answers with what was asked at the call before. One process alone
    answers at once.
    """

    def __init__(self) -> None:
        self._late: Any = None

    def __call__(self, mine: bool) -> bool:
        import jax

        if jax.process_count() == 1:
            return mine
        late, self._late = self._late, _any(mine)
        with jax.transfer_guard("allow"):
            return late is not None and bool(late)


def _any(mine: bool) -> Any:
    """A replicated flag: whether any process says yes; computed on the devices."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("all",))
    spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("all",), ()))
    with jax.transfer_guard("allow"):
        flags = jax.make_array_from_callback(
            (mesh.size,), spread, lambda index: np.full(1, mine, np.int32)
        )
        return _largest(whole)(flags)


@cache
def _largest(placed: Any) -> Any:
    import jax

    return jax.jit(lambda flags: flags.max(), out_shardings=placed)


def found(env: Mapping[str, str]) -> Place | None:
    """This process's place by the environment; None where it says nothing."""
    if any(name in env for name in SETTINGS[:2]):
        return _by_settings(env)
    if all(f"SLURM_{name}" in env for name in ("STEP_NODELIST", "NTASKS", "PROCID", "JOB_ID")):
        port = 61440 + _number(env, "SLURM_JOB_ID") % 4096
        address = f"{_first_node(env['SLURM_STEP_NODELIST'])}:{port}"
        return Place(address, _number(env, "SLURM_NTASKS"), _number(env, "SLURM_PROCID"))
    if "OMPI_COMM_WORLD_SIZE" in env:
        return _by_open_mpi(env)
    hosts = env.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1 and "TPU_WORKER_ID" in env:
        return Place(f"{hosts[0]}:{_PORT}", len(hosts), _number(env, "TPU_WORKER_ID"))
    return None


def _by_settings(env: Mapping[str, str]) -> Place:
    index = "LMJAX_PROCESS" if "LMJAX_PROCESS" in env else "JOB_COMPLETION_INDEX"
    missing = [name for name in (*SETTINGS[:2], index) if name not in env]
    if missing:
        names = ", ".join("LMJAX_PROCESS" if n == "JOB_COMPLETION_INDEX" else n for n in missing)
        flags = ", ".join(FLAGS)
        raise ValueError(
            f"{names} must be set as well: {', '.join(SETTINGS)} go together, and so do {flags},"
            " which are the same"
        )
    return Place(env["LMJAX_COORDINATOR"], _number(env, "LMJAX_PROCESSES"), _number(env, index))


def _by_open_mpi(env: Mapping[str, str]) -> Place:
    count = _number(env, "OMPI_COMM_WORLD_SIZE")
    uri = env.get("OMPI_MCA_orte_hnp_uri", "") or env.get("PMIX_SERVER_URI2", "")
    host = re.search(r"tcp://([0-9.]+)", uri)
    if host is None and count > 1:
        raise ValueError(
            f"Open MPI started {count} processes, but does not say where process 0 is; pass"
            f" -x {SETTINGS[0]}=HOST:PORT -x {SETTINGS[1]}={count} and set {SETTINGS[2]}"
        )
    address = f"{host[1] if host else 'localhost'}:{61440 + _digits(uri) % 4096}"
    return Place(address, count, _number(env, "OMPI_COMM_WORLD_RANK"))


def _digits(text: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(text.split(";")[0]))


def _first_node(nodes: str) -> str:
    """node001 of node[001-015],host2."""
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if not first:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r}: no node in it")
    return first[1] + (first[2] or "")


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise ValueError(f"{name}={env.get(name)!r}: a whole number is needed") from None


def _seconds(env: Mapping[str, str]) -> float:
    try:
        seconds = float(env.get(TIMEOUT, "300"))
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{TIMEOUT}={env[TIMEOUT]!r}: seconds above 0")
    return seconds


def _on_tpu_vm(env: Mapping[str, str]) -> bool:
    """Whether this is a host of Compute Engine with TPUs that are to be used."""
    if env.get("JAX_PLATFORMS", "") not in ("", "tpu"):
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
