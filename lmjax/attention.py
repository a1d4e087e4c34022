# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention behind one function, with the platform's best kernel.

Shapes: B batch, H heads, L queries, S keys, K head width. All kernels compute the softmax in
float32 and agree within the rounding of the compute dtype.

Over the mesh axis `sequence`, each device has the queries of its part of the row and gathers all
keys and values, for the forward pass and again for the backward one: between them each keeps its
own. Causal queries are exchanged before splash, which skips the keys that a query does not see, so
that no device's see more than another's.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmjax import sharding

Kernel = Literal["auto", "xla", "splash", "cudnn"]
_SPLASH_BLOCK = 1024
_SPLASH_MULTIPLE = 128
_SPLASH_SHORTEST = 256  # below, XLA's own is faster: the kernel's blocks are half empty
_CPU_QUERY_BLOCK = 64


def attention(
    query_BHLK: jax.Array,
    key_BHSK: jax.Array,
    value_BHSK: jax.Array,
    *,
    causal: bool,
    segments_BL: jax.Array | None = None,
    offset: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    kernel: Kernel = "auto",
) -> jax.Array:
    """softmax(Q Kᵀ / √K + mask) V, shape (B, H, L, K).

    Args:
      causal: a query sees no later key.
      segments_BL: a query sees only keys of its own segment (L = S).
      offset: position of the first query among the keys, when they come from a cache.
      dropout: rate on the attention probabilities; only the XLA kernel has it.
      kernel: "auto" takes splash on TPU, cuDNN on GPU and XLA elsewhere, where they apply.

    Raises:
      ValueError: the kernel that was asked for cannot do this.
    """
    dropout = dropout if dropout_key is not None else 0.0
    refusals = {
        "splash": _splash_refuses(query_BHLK, key_BHSK, offset, dropout),
        "cudnn": _cudnn_refuses(query_BHLK, segments_BL, offset, dropout),
    }
    if kernel == "auto":
        best = {"tpu": "splash", "gpu": "cudnn"}.get(sharding.platform(), "xla")
        if best == "splash" and query_BHLK.shape[2] < _SPLASH_SHORTEST:
            best = "xla"
        kernel = "xla" if refusals.get(best) else best  # type: ignore[assignment]
    elif refusals.get(kernel):
        raise ValueError(f"attention kernel {kernel}: {refusals[kernel]}; allowed: auto, xla")
    if kernel == "splash":  # names what it saves itself: naming it here would save it twice
        return _splash(query_BHLK, key_BHSK, value_BHSK, causal, segments_BL)
    if kernel == "cudnn":
        mixed_BHLK = _cudnn(query_BHLK, key_BHSK, value_BHSK, causal)
    else:
        if offset is None and sharding.splits(query_BHLK.shape[2]):
            key_BHSK, value_BHSK = _gathered(key_BHSK, value_BHSK)
        mixed_BHLK = _xla(
            query_BHLK, key_BHSK, value_BHSK, causal, segments_BL, offset, dropout, dropout_key
        )
    return checkpoint_name(mixed_BHLK, "attention")


def _gathered(key_BHSK: jax.Array, value_BHSK: jax.Array) -> jax.Array:
    """Keys and values (2, B, H, S, K) of all tokens on every device, sent as one."""
    rest = P(None, sharding.BATCH_AXES, sharding.TENSOR, sharding.SEQUENCE, None)
    return sharding.gather(jnp.stack([key_BHSK, value_BHSK]), rest, sharding.SEQUENCE)


def _mask(
    first: int,
    queries: int,
    keys: int,
    causal: bool,
    segments_BL: jax.Array | None,
    offset: jax.Array | None,
) -> jax.Array | None:
    """What queries first … first + queries may see of the first `keys` keys; None is everything."""
    mask = None
    if causal:
        place_L = first + jnp.arange(queries) + (0 if offset is None else offset)
        mask = (place_L[:, None] >= jnp.arange(keys)[None, :])[None, None]
    if segments_BL is not None:
        same_BLS = segments_BL[:, first : first + queries, None] == segments_BL[:, None, :keys]
        mask = same_BLS[:, None] if mask is None else mask & same_BLS[:, None]
    return mask


def _attend(query, key, value, mask, dropout, dropout_key) -> jax.Array:
    scores_BHLS = jnp.einsum("BHLK,BHSK->BHLS", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores_BHLS = jnp.where(mask, scores_BHLS, jnp.finfo(jnp.float32).min)
    probs_BHLS = jax.nn.softmax(scores_BHLS, axis=-1)
    if dropout:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout, probs_BHLS.shape)
        probs_BHLS = jnp.where(keep, probs_BHLS / (1 - dropout), 0.0)
    return jnp.einsum("BHLS,BHSK->BHLK", probs_BHLS.astype(value.dtype), value)


def _xla(query, key, value, causal, segments_BL, offset, dropout, dropout_key) -> jax.Array:
    query = query * (query.shape[-1] ** -0.5)
    length, keys = query.shape[2], key.shape[2]
    whole = functools.partial(_attend, dropout=dropout, dropout_key=dropout_key)
    mask = functools.partial(_mask, causal=causal, segments_BL=segments_BL, offset=offset)
    blockwise = causal and offset is None and not dropout and sharding.platform() == "cpu"
    blockwise = blockwise and not sharding.splits(length)
    if not blockwise or length <= _CPU_QUERY_BLOCK:
        return whole(query, key, value, mask(0, length, keys))
    # A block of queries meets only the keys up to its end: half the work of the full square.
    blocks = []
    for first in range(0, length, _CPU_QUERY_BLOCK):
        last = min(first + _CPU_QUERY_BLOCK, length)
        blocks.append(
            whole(
                query[:, :, first:last],
                key[:, :, :last],
                value[:, :, :last],
                mask(first, last - first, last),
            )
        )
    return jnp.concatenate(blocks, axis=2)


def _cudnn_refuses(query, segments_BL, offset, dropout) -> str | None:
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs 16-bit inputs, not {query.dtype}"
    if segments_BL is not None:
        return "has no segment mask"
    if sharding.splits(query.shape[2]):
        return "has no causal mask for a part of the queries (mesh.sequence)"
    return "has no cache or dropout here" if offset is not None or dropout else None


def _cudnn(query, key, value, causal) -> jax.Array:
    heads_last = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    out_BLHK = jax.nn.dot_product_attention(*heads_last, is_causal=causal, implementation="cudnn")
    return jnp.swapaxes(out_BLHK, 1, 2)


def _parts(length: int) -> int:
    """Devices that a row's queries are split over."""
    return sharding.axis_size(sharding.SEQUENCE) if sharding.splits(length) else 1


def _folds(length: int, parts: int) -> bool:
    """Whether each part has a chunk of a row from either end, for the work of causal queries."""
    return parts > 1 and length % (2 * parts * _SPLASH_MULTIPLE) == 0


def causal_share(length: int, parts: int) -> float:
    """Of queries × keys, the share that a causal kernel on TPU computes on the busiest device.

    Args:
      length: tokens of a row.
      parts: devices that its queries are split over; each has all keys.
    """
    return 0.5 if parts == 1 or _folds(length, parts) else 1 - 0.5 / parts


def _splash_refuses(query, key, offset, dropout) -> str | None:
    length = query.shape[2]
    if length != key.shape[2] or length % (_SPLASH_MULTIPLE * _parts(length)):
        each = " on each device" if _parts(length) > 1 else ""
        return f"needs equal lengths, a multiple of {_SPLASH_MULTIPLE}{each}"
    return "has no cache or dropout" if offset is not None or dropout else None


def _splash(query, key, value, causal, segments_BL) -> jax.Array:
    # Imported here: Pallas takes half a second to import and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    length, parts = query.shape[2], _parts(query.shape[2])
    folded = causal and _folds(length, parts)
    heads = query.shape[1] // sharding.axis_size(sharding.TENSOR)
    block, chunk = _splash_block(length), length // parts // (2 if folded else 1)
    block_q = min(512, _splash_block(chunk)) if chunk % 512 == 0 else _splash_block(chunk)
    kernel = splash.make_splash_mha(
        mask=_splash_mask(heads, length, causal, folded),
        head_shards=1,
        q_seq_shards=parts if causal else 1,
        # Saved by name, or rematerialisation would run the forward kernel again.
        residual_checkpoint_name="attention",
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block,
            block_kv_compute=min(block, 512) if block % 512 == 0 else block,
            block_q_dkv=block_q,
            block_kv_dkv=block,
            block_kv_dkv_compute=min(block, 512) if block % 512 == 0 else block,
            use_fused_bwd_kernel=True,
        ),
    )

    def local(kernel, query, key, value, *segments):
        ids = [splash.SegmentIds(q=q, kv=kv) for q, kv in segments]
        return jax.vmap(kernel)(query * (query.shape[-1] ** -0.5), key, value, *ids)

    segments = [] if segments_BL is None else [(segments_BL, segments_BL)]
    if parts > 1:
        return _splash_in_parts(local, kernel, causal, folded, query, key, value, *segments)
    heads_spec = P(sharding.BATCH_AXES, sharding.TENSOR, None, None)
    rows_spec = P(sharding.BATCH_AXES, None)
    mapped = sharding.map_shards(
        functools.partial(local, kernel),
        (heads_spec,) * 3 + (rows_spec,) * len(segments),
        heads_spec,
    )
    return mapped(query, key, value, *segments)


def _splash_block(length: int) -> int:
    return next(b for b in range(min(_SPLASH_BLOCK, length), 0, -128) if length % b == 0)


def _splash_mask(heads: int, length: int, causal: bool, folded: bool) -> Any:
    """Of all queries, in the order that they lie in on the devices; of one device's, if all alike.

    `folded`: each device has a chunk of the row from either end, or the first device's queries
    would see few keys and be done long before the last one's.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    one: Any
    if causal:
        one = masks.CausalMask((length, length))
        if folded:
            chunks = one.q_sequence.reshape(2 * _parts(length), -1)
            order = [chunk for pair in sharding.folds() for chunk in pair]
            one.q_sequence = chunks[np.array(order)].reshape(-1)
    else:
        one = masks.FullMask((length // _parts(length), length))
    return masks.MultiHeadMask([one] * heads)


def _splash_in_parts(
    local: Any, kernel: Any, causal: bool, folded: bool, query, key, value, *segments
) -> jax.Array:
    """`local` on each device's queries and all keys, with its rows of the kernel's mask."""
    mesh: Any = sharding.mesh()
    rows = NamedSharding(mesh, P(None, sharding.SEQUENCE))
    mask_spec = kernel.manual_sharding_spec(rows) if causal else P()
    heads_spec = P(sharding.BATCH_AXES, sharding.TENSOR, sharding.SEQUENCE, None)
    segments_spec = (sharding.TOKENS, P(sharding.BATCH_AXES, None))

    # Keys of other devices are no residuals: the backward pass gathers them again.
    @functools.partial(jax.checkpoint, policy=lambda op, *_, **__: op.name != "all_gather")
    def gathering(kernel, query, key, value, *segments):
        key, value = (sharding.gather_over(x, sharding.SEQUENCE, dim=2) for x in (key, value))
        if not folded:
            return local(kernel, query, key, value, *segments)
        segments = [(sharding.fold(q, dim=1), kv) for q, kv in segments]
        mixed = local(kernel, sharding.fold(query, dim=2), key, value, *segments)
        return sharding.unfold(mixed, dim=2)

    mapped = sharding.map_shards(
        gathering,
        (mask_spec, *(heads_spec,) * 3, *(segments_spec,) * len(segments)),
        heads_spec,
    )
    return mapped(kernel, query, key, value, *segments)
