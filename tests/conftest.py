# SPDX-License-Identifier: Apache-2.0
"""Makes JAX strict and gives every test eight CPU devices."""

import os
import tempfile
from pathlib import Path

from commands import COMPILE_FASTER

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {COMPILE_FASTER}"
# More threads than the one per device: XLA may start independent collectives of a step in another
# order on each device, which then wait for each other for ever; this makes that rarer.
os.environ.setdefault("PJRT_NPROC", "64")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Most of the suite's time is compilation; tests and the commands they start share this cache.
_cache = Path(tempfile.gettempdir()) / f"lmjax-test-cache-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
