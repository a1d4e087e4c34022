# SPDX-License-Identifier: Apache-2.0
"""Projected LSTMs in two directions (Sak et al. 2014), as TensorFlow's LSTMCell has them.

What the input adds to the gates is one product before the loop. Differentiating the loop would add
the gradient of the weights up inside it, once a word; here the backward loop only makes the
gradients of the gates, in place of the gates, and one product afterwards those of all weights.
Each gate has arrays of its own, which every platform's compiler fuses better than parts of one.

Shapes: B rows, X directions, L or T words, D width, H cells, G gates: input, candidate, forget,
output.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmjax import cpu, sharding

Carry = tuple[jax.Array, jax.Array]
Gates = list[jax.Array]
GATES = 4


class ProjectedLSTM(nn.Module):
    """A layer of both directions.

    Args:
      cells: cells of each direction.
      width: numbers that the cells are projected to.
      cell_clip, projection_clip: bounds of a cell and of its projection; 0 for none.
    """

    cells: int
    width: int
    cell_clip: float = 0.0
    projection_clip: float = 0.0

    @nn.compact
    def __call__(
        self, x_BXLD: jax.Array, carry: Carry, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """Hidden states (B, X, L, D) in the dtype of x; and the carry, float32, without gradient.

        Args:
          carry: cells (B, X, H) and hidden states (B, X, D) before the first word.
          lengths_B: words of a row after which its state stays what it is.
        """
        weights = self._weights(x_BXLD)
        mask_TB = None
        if lengths_B is not None:
            mask_TB = jnp.arange(x_BXLD.shape[2])[:, None] < lengths_B[None, :]
        clips = (self.cell_clip, self.projection_clip)
        hidden, ends = [], []
        for x, one in enumerate(weights):
            begin = (carry[0][:, x], carry[1][:, x])
            x_TBD = x_BXLD[:, x].swapaxes(0, 1)
            hidden_TBD, end = projected_lstm(x_TBD, one, begin, *clips, mask_TB)
            hidden.append(hidden_TBD.swapaxes(0, 1))
            ends.append(end)
        cells, last = zip(*ends, strict=True)
        hidden_BXLD = sharding.split_batch(jnp.stack(hidden, 1))
        return hidden_BXLD, (jnp.stack(cells, 1), jnp.stack(last, 1))

    def _weights(self, x_BXLD: jax.Array) -> list["Weights"]:
        directions, inputs = x_BXLD.shape[1], x_BXLD.shape[-1]
        # TensorFlow's is one matrix: rows of the input and of the recurrence, columns of all gates.
        fused = _glorot(inputs + self.width, GATES * self.cells)
        plans = {
            "input": (fused, (directions, inputs, GATES, self.cells)),
            "recurrent": (fused, (directions, self.width, GATES, self.cells)),
            "out": (_glorot(self.cells, self.width), (directions, self.cells, self.width)),
        }

        def kernel(name: str) -> jax.Array:
            init, shape = plans[name]
            found = self.param(name, lambda key: {"kernel": init(key, shape)})
            path = f"{self.name}/{name}/kernel"
            return sharding.for_compute({path: found["kernel"]}, x_BXLD.dtype)[path]

        def by_gate(x_XDGH: jax.Array) -> list[Gates]:
            x_XGDH = x_XDGH.transpose(0, 2, 1, 3)
            return [[x_XGDH[x, g] for g in range(GATES)] for x in range(directions)]

        kernels = by_gate(kernel("input")), by_gate(kernel("recurrent"))
        out_XHD = kernel("out")
        bias_XGH = self.param("bias", nn.initializers.zeros, (directions, GATES, self.cells))
        biases = [[bias_XGH[x, g] for g in range(GATES)] for x in range(directions)]
        return [Weights(*of) for of in zip(*kernels, biases, out_XHD, strict=True)]


def _glorot(rows: int, columns: int) -> nn.initializers.Initializer:
    """U(-a, a) with a² = 6 / (rows + columns), whatever the shape (Glorot & Bengio 2010)."""
    bound = math.sqrt(6 / (rows + columns))

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Weights(NamedTuple):
    """Of one direction: kernels (D, H) and biases (H) of each gate, and the projection (H, D)."""

    input: Gates
    recurrent: Gates
    bias: Gates
    out_HD: jax.Array


def projected_lstm(
    x_TBD: jax.Array,
    weights: Weights,
    carry: Carry,
    cell_clip: float,
    projection_clip: float,
    mask_TB: jax.Array | None = None,
) -> tuple[jax.Array, Carry]:
    """One direction; what it carries in and out is truncated: no gradient passes.

    Args:
      x_TBD: the input; its dtype is that of products, states and gates are float32.
      carry: cells (B, H) and hidden states (B, D), float32.
      cell_clip, projection_clip: bounds of a cell and of its projection; 0 for none.
      mask_TB: where it is False, the state stays what it was.

    Returns:
      hidden states (T, B, D) in the dtype of x, and the new carry.
    """
    clips = (cell_clip or math.inf, projection_clip or math.inf)
    carry = (jax.lax.stop_gradient(carry[0]), jax.lax.stop_gradient(carry[1]))
    result: Any = _lstm(x_TBD, weights, carry, mask_TB, clips)
    return result[0], jax.lax.stop_gradient(result[1])


class _Buffers(NamedTuple):
    """What the loops write, a word at a time.

    The gates begin as what the input adds to them, become their sums in the forward loop and the
    gradients of these in the backward one.
    """

    gates_TBH: Gates
    cell_TBH: jax.Array  # before the word
    output_TBH: jax.Array  # of the cells, before the projection
    raw_TBD: jax.Array  # projected, before the clip
    hidden_TBD: jax.Array


def _at(buffer: Any, t: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, t, 0, keepdims=False), buffer)


def _put(buffer: Any, values: Any, t: Any) -> Any:
    def put(x: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), t, 0)

    return jax.tree.map(put, buffer, values)


def _room(shape: tuple[int, ...], dtype: Any, last: str | None = None) -> jax.Array:
    """A buffer (T, B, ...) for a loop to fill; nothing is written to it before."""
    return sharding.constrain(jax.lax.empty(shape, dtype), None, sharding.BATCH_AXES, last)


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Product over one dimension of each, float32, in memory as it is on a CPU."""
    dims = (((over[0],), (over[1],)), ((), ()))
    return cpu.hold(jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32))


def _over_words(a_TBI: jax.Array, b_TBJ: jax.Array) -> jax.Array:
    """Σ a b over all words (I, J), float32."""
    # Not as a product of matrices: where devices share the rows, these two dimensions do not merge.
    dims = (((0, 1), (0, 1)), ((), ()))
    return cpu.hold(jax.lax.dot_general(a_TBI, b_TBJ, dims, preferred_element_type=jnp.float32))


def _activated(sums: Gates) -> Gates:
    """i, j, f, o of their sums (B, H); the forget gate's bias of 1 is added here, not stored."""

    def sigmoid(x: jax.Array) -> jax.Array:  # the hyperbolic tangent is cheaper than an exponential
        return 0.5 * jnp.tanh(0.5 * x) + 0.5

    i, j, f, o = (z.astype(jnp.float32) for z in sums)
    return [sigmoid(i), jnp.tanh(j), sigmoid(f + 1), sigmoid(o)]


def _clip(x: jax.Array, bound: float) -> jax.Array:
    return x if math.isinf(bound) else jnp.clip(x, -bound, bound)


def _passes(x: jax.Array, bound: float, gradient: jax.Array) -> jax.Array:
    """The gradient of `_clip`: as TensorFlow's, it passes at the bound itself."""
    return gradient if math.isinf(bound) else jnp.where(jnp.abs(x) <= bound, gradient, 0)


def _where(mask_B: jax.Array | None, x: Any, otherwise: Any) -> Any:
    """`x` in the rows of the mask."""
    if mask_B is None:
        return x
    return jax.tree.map(lambda a, b: jnp.where(mask_B[:, None], a, b), x, otherwise)


def _placed(carry: Carry) -> Carry:
    """Cells are split over `tensor`, what they are projected to is whole."""
    cell_BH = sharding.constrain(carry[0], sharding.BATCH_AXES, sharding.TENSOR)
    return cell_BH, sharding.constrain(carry[1], sharding.BATCH_AXES, None)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _lstm(x_TBD, weights, carry, mask_TB, clips):
    return _forward(x_TBD, weights, carry, mask_TB, clips)[0]


def _forward(x_TBD, weights, carry, mask_TB, clips):
    (T, B, _), (H, P), dtype = x_TBD.shape, weights.out_HD.shape, x_TBD.dtype
    x_TBD = cpu.hold(x_TBD)
    added = [x_TBD @ w_DH for w_DH in weights.input]

    def step(t: Any, state: Any) -> Any:
        (cell_BH, hidden_BD), buffers = state
        hidden = hidden_BD.astype(dtype)
        sums = [
            cpu.hold(_dot(hidden, w_DH, (1, 0)) + (_at(z_TBH, t) + bias_H[None]))
            for w_DH, z_TBH, bias_H in zip(
                weights.recurrent, buffers.gates_TBH, weights.bias, strict=True
            )
        ]
        i, j, f, o = _activated(sums)
        new_BH = _clip(f * cell_BH + i * j, clips[0])
        output_BH = cpu.hold((o * jnp.tanh(new_BH)).astype(dtype))
        raw_BD = _dot(output_BH, weights.out_HD, (1, 0))
        new = (new_BH, _clip(raw_BD, clips[1]))
        new = _where(None if mask_TB is None else _at(mask_TB, t), new, (cell_BH, hidden_BD))
        values = _Buffers(sums, cell_BH, output_BH, raw_BD, new[1])
        return new, _put(buffers, values, t)

    cells = ((T, B, H), dtype, sharding.TENSOR)
    rooms = (_room(*cells), _room(*cells), _room((T, B, P), jnp.float32), _room((T, B, P), dtype))
    buffers = _Buffers(cpu.hold(added), *rooms)
    carry = _placed(carry)
    end, buffers = jax.lax.fori_loop(0, T, step, (carry, buffers))
    return (buffers.hidden_TBD, end), (x_TBD, weights, carry, mask_TB, buffers)


def _backward(clips, saved, cotangents):
    x_TBD, weights, carry, mask_TB, buffers = saved
    T, dtype = x_TBD.shape[0], x_TBD.dtype
    gradient_TBD = cpu.hold(cotangents[0])

    def step(n: Any, state: Any) -> Any:
        (cell_grad_BH, hidden_grad_BD), gates, projected = state
        t = T - 1 - n
        mask_B = None if mask_TB is None else _at(mask_TB, t)
        total_BD = hidden_grad_BD + _at(gradient_TBD, t)
        raw_grad_BD = _passes(_at(buffers.raw_TBD, t), clips[1], total_BD)
        raw_grad_BD = cpu.hold(_where(mask_B, raw_grad_BD, jnp.zeros_like(total_BD)).astype(dtype))
        output_grad_BH = _dot(raw_grad_BD, weights.out_HD, (1, 1))
        sums = cpu.hold(_at(gates, t))
        cell_BH = _at(buffers.cell_TBH, t).astype(jnp.float32)
        through_BH, sums_grad = _gates_backward(
            sums, cell_BH, output_grad_BH, cell_grad_BH, clips[0]
        )
        sums_grad = _where(mask_B, sums_grad, [jnp.zeros_like(cell_BH)] * GATES)
        sums_grad = cpu.hold([z.astype(dtype) for z in sums_grad])
        parts = zip(sums_grad, weights.recurrent, strict=True)
        before_BD = sum(_dot(z, w_DH, (1, 1)) for z, w_DH in parts)
        before = _where(mask_B, (through_BH, before_BD), (cell_grad_BH, total_BD))
        return before, _put(gates, sums_grad, t), _put(projected, raw_grad_BD, t)

    zeros = _placed(jax.tree.map(jnp.zeros_like, carry))
    room = _room(buffers.hidden_TBD.shape, dtype)
    _, gates, projected = jax.lax.fori_loop(0, T, step, (zeros, buffers.gates_TBH, room))
    hidden_TBD = jnp.concatenate([carry[1][None].astype(dtype), buffers.hidden_TBD[:-1]])
    x_grad_TBD, weights_grad = _products(
        x_TBD, weights, hidden_TBD, gates, buffers.output_TBH, projected
    )
    return x_grad_TBD, weights_grad, zeros, None


def _gates_backward(
    sums: Gates,
    cell_BH: jax.Array,
    output_grad_BH: jax.Array,
    cell_grad_BH: jax.Array,
    cell_clip: float,
) -> tuple[jax.Array, Gates]:
    """Gradients of the cells before a word and of the gates' sums."""
    i, j, f, o = _activated(sums)
    new_BH = f * cell_BH + i * j
    tanh_BH = jnp.tanh(_clip(new_BH, cell_clip))
    grad = cell_grad_BH + output_grad_BH * o * (1 - tanh_BH * tanh_BH)
    grad = _passes(new_BH, cell_clip, grad)
    sums_grad = [
        grad * j * i * (1 - i),
        grad * i * (1 - j * j),
        grad * cell_BH * f * (1 - f),
        output_grad_BH * tanh_BH * o * (1 - o),
    ]
    return grad * f, sums_grad


def _products(x_TBD, weights, hidden_TBD, gates_grad, output_TBH, projected_grad_TBD):
    """Gradients of the input and, in one product for each gate, of the weights."""
    width, dtype = x_TBD.shape[-1], x_TBD.dtype
    gates_grad = cpu.hold(gates_grad)
    parts = zip(gates_grad, weights.input, strict=True)
    x_grad_TBD: Any = sum(_dot(z_TBH, w_DH, (2, 1)) for z_TBH, w_DH in parts)
    # A column of ones makes the gradient of the bias, for less than a sum of its own costs.
    ones_TB1 = jnp.ones((*x_TBD.shape[:2], 1), dtype)
    factor = cpu.hold(jnp.concatenate([x_TBD, hidden_TBD, ones_TB1], -1))
    fused = [_over_words(factor, z_TBH) for z_TBH in gates_grad]
    out_grad_DH = _over_words(projected_grad_TBD, output_TBH)
    weights_grad = Weights(
        [x[:width].astype(dtype) for x in fused],
        [x[width:-1].astype(dtype) for x in fused],
        [x[-1] for x in fused],
        out_grad_DH.T.astype(dtype),
    )
    return x_grad_TBD.astype(dtype), weights_grad


_lstm.defvjp(_forward, _backward)
