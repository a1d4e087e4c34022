# SPDX-License-Identifier: Apache-2.0
"""What XLA's CPU backend has to be told; benchmarks/RESULTS.md has what each of these is worth.

Left alone, it fuses the sums of the residual stream into every reader, so that each layer adds up
all earlier ones again, element by element and across the rows; and glibc gives a step's memory back
to the kernel, which returns it as fresh pages in the next step.
"""

import ctypes
import platform
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lmjax import sharding

# glibc's malloc.h: mallopt(parameter, value).
_MALLOC = {"trim_threshold": (-1, -1), "mmap_max": (-4, 0), "arena_max": (-8, 1)}


def alone() -> bool:
    """Whether the program is compiled for one CPU device."""
    return sharding.platform() == "cpu" and sharding.axis_size(*sharding.AXES) == 1


def compiler_options() -> dict[str, str] | None:
    """Options for `jax.jit`: optimization barriers last until after fusion; elsewhere they do."""
    # The pass that removes barriers is the last but fusion on a CPU; its code generator needs it
    # not.
    barriers = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return barriers if sharding.platform() == "cpu" else None


def after(batch: Any, hidden: jax.Array) -> Any:
    """`batch`, arrays (B, ...), on several CPU devices not before `hidden` (B, ...).

    XLA's CPU executor starts what does not depend on each other in any order. Where that is a sum
    over the batch and a loop with collectives, some devices begin with one and some with the
    other, and wait for each other until the process is ended. A barrier would not outlast the
    compiler, so they depend on each other by a number a row that is 0 (where it is finite).
    """
    if sharding.platform() != "cpu" or sharding.axis_size(*sharding.AXES) == 1:
        return batch
    zero_B = 0 * jax.lax.stop_gradient(hidden.reshape(hidden.shape[0], -1)[:, 0])

    def late(x: jax.Array) -> jax.Array:
        return x + jnp.expand_dims(zero_B.astype(x.dtype), tuple(range(1, x.ndim)))

    return jax.tree.map(late, batch)


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for the next step to take; where it is not glibc, nothing.

    The process then holds its peak until it ends. To be called before JAX starts its threads, which
    choose where they allocate when they begin.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _MALLOC.values():
            ctypes.CDLL(None).mallopt(parameter, value)


def hold(x: Any) -> Any:
    """`x`, computed once and in memory, whoever reads it, on one CPU device."""
    return jax.lax.optimization_barrier(x) if alone() else x


@jax.custom_vjp
def product(x_ND: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """x W, whose gradients read operands that lie in memory as the matrix product wants them."""
    return jax.lax.optimization_barrier(x_ND @ kernel_DF)


def _product_forward(x_ND: jax.Array, kernel_DF: jax.Array) -> Any:
    return product(x_ND, kernel_DF), (x_ND, kernel_DF)


def _product_backward(saved: Any, gradient_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_ND, kernel_DF, gradient_NF = jax.lax.optimization_barrier((*saved, gradient_NF))
    x_grad_ND = jnp.einsum("NF,DF->ND", gradient_NF, kernel_DF)
    # The narrower operand is the one to transpose, and then the result; XLA would undo that.
    if x_ND.shape[1] <= gradient_NF.shape[1]:
        kernel_grad_DF = jnp.einsum("ND,NF->DF", x_ND, gradient_NF)
    else:
        kernel_grad_FD = jnp.einsum("NF,ND->FD", gradient_NF, x_ND)
        kernel_grad_DF = jax.lax.optimization_barrier(kernel_grad_FD).T
    return jax.lax.optimization_barrier(x_grad_ND), kernel_grad_DF


product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_BLD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> Any:
    """Layer norm whose backward pass finds its input and statistics in memory, nothing else."""
    return layer_norm_forward(x_BLD, scale_D, bias_D, epsilon)[0]


def layer_norm_forward(
    x_BLD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float
) -> tuple[jax.Array, Any]:
    """The plain formula, good for any platform, and what `layer_norm` saves of it."""
    mean_BL1 = x_BLD.mean(-1, keepdims=True)
    variance_BL1 = jnp.square(x_BLD - mean_BL1).mean(-1, keepdims=True)
    statistics = (mean_BL1, jax.lax.rsqrt(variance_BL1 + epsilon))
    mean_BL1, rate_BL1 = statistics = hold(statistics)
    y_BLD = (x_BLD - mean_BL1) * (rate_BL1 * scale_D[None, None]) + bias_D[None, None]
    return y_BLD, (x_BLD, statistics, scale_D)


def _layer_norm_backward(epsilon: float, saved: Any, gradient_BLD: jax.Array):
    x_BLD, (mean_BL1, rate_BL1), scale_D = saved
    gradient_BLD = jax.lax.optimization_barrier(gradient_BLD)
    unit_BLD = (x_BLD - mean_BL1) * rate_BL1
    scaled_BLD = gradient_BLD * scale_D[None, None]
    means = (scaled_BLD.mean(-1, keepdims=True), (scaled_BLD * unit_BLD).mean(-1, keepdims=True))
    shift_BL1, slope_BL1 = jax.lax.optimization_barrier(means)
    x_grad_BLD = rate_BL1 * (scaled_BLD - shift_BL1 - unit_BLD * slope_BL1)
    return x_grad_BLD, (gradient_BLD * unit_BLD).sum((0, 1)), gradient_BLD.sum((0, 1))


layer_norm.defvjp(layer_norm_forward, _layer_norm_backward)
