# SPDX-License-Identifier: Apache-2.0
"""The convolutions over characters for a CPU: only the places that words reach, block by block.

Most of a word's 50 places are padding, where a filter gives the same again and again. Words are
sorted by length and go through in chunks, each in as many blocks of places as its longest word
needs. All filters are one product with a kernel that is as wide as the widest.

Shapes: N words, K words of a chunk, C characters, Q places of a block, W characters of the widest
filter, E numbers of a character, F filters of all widths, V letters.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

WORDS = 64  # of a chunk
PLACES = 4  # of a block


def strongest(table_VE: jax.Array, kernels: list[jax.Array], characters_NC: jax.Array) -> jax.Array:
    """The most that each filter (w, E, f) gives anywhere in each word (N, F)."""
    widest = max(len(kernel) for kernel in kernels)
    kernel_WEF = jnp.concatenate(
        [jnp.pad(k, ((0, widest - len(k)), (0, 0), (0, 0))) for k in kernels], -1
    )
    widths = tuple((len(k), k.shape[-1]) for k in kernels)
    return _strongest(table_VE, kernel_WEF.reshape(-1, kernel_WEF.shape[-1]), characters_NC, widths)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _strongest(table_VE, kernel_KF, characters_NC, widths):
    return _forward(table_VE, kernel_KF, characters_NC, widths)[0]


def _forward(table_VE, kernel_KF, characters_NC, widths):
    order_N, chunks, ends = _chunks(characters_NC, widths)
    limit_F = _limits(characters_NC.shape[1], widths)
    width = max(w for w, _ in widths)
    filters = kernel_KF.shape[1]

    def chunk(_: None, inputs: Any) -> Any:
        characters_CK, blocks = inputs
        letters_CKE = table_VE[characters_CK]

        def block(b: Any, best: Any) -> Any:
            patches = _patches(letters_CKE, b * PLACES, width)
            given = jax.lax.optimization_barrier(patches @ kernel_KF)
            given_QKF = given.reshape(PLACES, -1, filters)
            top_KF, place_KF = best
            for q in range(PLACES):
                place = b * PLACES + q
                here_KF = given_QKF[q]
                better = (here_KF > top_KF) | (here_KF != here_KF)  # NaN stays
                better &= (place < limit_F)[None]
                top_KF = jnp.where(better, here_KF, top_KF)
                place_KF = jnp.where(better, place.astype(jnp.int16), place_KF)
            return top_KF, place_KF

        shape = (WORDS, filters)
        best = (jnp.full(shape, -jnp.inf, table_VE.dtype), jnp.zeros(shape, jnp.int16))
        return None, jax.lax.fori_loop(0, blocks, block, best)

    _, (top, place) = jax.lax.scan(chunk, None, (chunks, ends))
    top_NF = top.reshape(-1, filters)
    back_N = jnp.argsort(order_N)[: len(characters_NC)]
    return top_NF[back_N], (table_VE, kernel_KF, chunks, ends, order_N, place)


def _backward(widths, saved, gradient_NF):
    table_VE, kernel_KF, chunks, ends, order_N, place = saved
    filters, width = kernel_KF.shape[1], max(w for w, _ in widths)
    missing = len(chunks) * WORDS - len(gradient_NF)
    gradient_NF = jnp.pad(gradient_NF, ((0, missing), (0, 0)))[order_N]
    gradient = gradient_NF.reshape(-1, WORDS, filters)

    def chunk(grads: Any, inputs: Any) -> Any:
        characters_CK, blocks, gradient_KF, place_KF = inputs
        letters_CKE = table_VE[characters_CK]

        def block(b: Any, grads: Any) -> Any:
            kernel_grad_KF, letters_grad_CKE = grads
            patches = _patches(letters_CKE, b * PLACES, width)
            places_Q = (b * PLACES + jnp.arange(PLACES)).astype(jnp.int16)
            here_QKF = place_KF[None] == places_Q[:, None, None]
            given = jnp.where(here_QKF, gradient_KF[None], 0).reshape(-1, filters)
            given = jax.lax.optimization_barrier(given)
            kernel_grad_KF += jnp.einsum("MK,MF->KF", patches, given)
            patches_grad = jnp.einsum("MF,KF->MK", given, kernel_KF)
            patches_grad = jax.lax.optimization_barrier(patches_grad)
            added = _add_patches(letters_grad_CKE, patches_grad, b * PLACES, width)
            return kernel_grad_KF, added

        kernel_grad_KF, table_grad_VE = grads
        zeros = jnp.zeros_like(letters_CKE)
        kernel_grad_KF, letters_grad_CKE = jax.lax.fori_loop(
            0, blocks, block, (kernel_grad_KF, zeros)
        )
        table_grad_VE = table_grad_VE.at[characters_CK].add(letters_grad_CKE)
        return (kernel_grad_KF, table_grad_VE), None

    zeros = (jnp.zeros_like(kernel_KF), jnp.zeros_like(table_VE))
    (kernel_grad_KF, table_grad_VE), _ = jax.lax.scan(chunk, zeros, (chunks, ends, gradient, place))
    return table_grad_VE, kernel_grad_KF, None


_strongest.defvjp(_forward, _backward)


def _chunks(characters_NC: jax.Array, widths: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Order of the words by length, padded to whole chunks; their characters (chunks, C', K); and
    how many blocks each chunk needs."""
    words, letters = characters_NC.shape
    missing = -words % WORDS
    characters_NC = jnp.pad(characters_NC.astype(jnp.int32), ((0, missing), (0, 0)))
    # From where on a word is its last character alone, which is padding in all but full words.
    other_NC = characters_NC != characters_NC[:, -1:]
    length_N = jnp.max(jnp.where(other_NC, jnp.arange(1, letters + 1)[None], 0), -1)
    order_N = jnp.argsort(length_N)
    length = length_N[order_N].reshape(-1, WORDS)
    places = letters - min(w for w, _ in widths) + 1
    # One place more, where a filter sees padding alone.
    ends = (jnp.minimum(length.max(-1) + 1, places) + PLACES - 1) // PLACES
    room = max(w for w, _ in widths) - 1 + PLACES
    padded_NC = jnp.pad(characters_NC[order_N], ((0, 0), (0, room)))
    chunks = padded_NC.reshape(-1, WORDS, letters + room).swapaxes(1, 2)
    return order_N, chunks, ends


def _limits(letters: int, widths: Any) -> jax.Array:
    """How many places each filter has."""
    return jnp.concatenate([jnp.full(count, letters - w + 1) for w, count in widths])


def _patches(letters_CKE: jax.Array, first: Any, width: int) -> jax.Array:
    """The characters at each place of a block side by side (Q * K, W * E)."""
    window = jax.lax.dynamic_slice_in_dim(letters_CKE, first, PLACES + width - 1)
    patches = jnp.concatenate([window[w : w + PLACES] for w in range(width)], -1)
    return jax.lax.optimization_barrier(patches.reshape(-1, patches.shape[-1]))


def _add_patches(letters_CKE: jax.Array, patches: jax.Array, first: Any, width: int) -> jax.Array:
    """Adds what `_patches` would have taken."""
    _, words, embedding = letters_CKE.shape
    parts = patches.reshape(PLACES, words, width, embedding)
    size = PLACES + width - 1
    window = jax.lax.dynamic_slice_in_dim(letters_CKE, first, size)
    for w in range(width):
        window += jnp.pad(parts[:, :, w], ((w, size - PLACES - w), (0, 0), (0, 0)))
    return jax.lax.dynamic_update_slice_in_dim(letters_CKE, window, first, 0)
