# SPDX-License-Identifier: Apache-2.0
"""What a device computes a second at its peak, by the name that JAX gives it."""

from collections.abc import Sequence
from typing import Any

# bfloat16, dense, of one JAX device: a chip, or one of tpu7x's halves. TPUs by Google's
# documentation, GPUs by NVIDIA's data sheets without sparsity.
FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOPs a second of all devices together; None where a kind is not in the table, as on CPUs.

    A kind is found by the longest name that it begins with: "NVIDIA H100 80GB HBM3" is an H100.
    """
    total = 0.0
    for device in devices:
        names = [name for name in FLOPS if f"{device.device_kind} ".startswith(f"{name} ")]
        if not names:
            return None
        total += FLOPS[max(names, key=len)]
    return total
