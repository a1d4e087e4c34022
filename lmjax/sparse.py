# SPDX-License-Identifier: Apache-2.0
"""Row-sparse steps: of a table with many rows, only those that a step touches are read and written.

A softmax over 800,000 words that scores 8,192 of them a step has a gradient of zeros in all other
rows; to form it, clip it and run an optimiser over it would cost more than the model does. Instead
the rows that are touched are taken out of the parameters and of the optimiser's state, the step is
made on these small tables, and they are put back, in place where the state is donated. For an
optimiser whose zero gradients change nothing (Adagrad) this is exact; moments of untouched rows
(Adam) rest until they are touched again.

Shapes: V rows of the table, R touched rows, D width.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax

from lmjax import sharding
from lmjax.layers import Batch


@dataclass(frozen=True)
class Drawn:
    """What a model draws for a step.

    Args:
      batch: arrays for the model beside those of the batch, alike for all rows.
      tables: regex on the paths of the parameters that are taken apart by rows.
      rows_R: rows that the step touches, ascending and distinct; those beyond the table pad.
    """

    batch: Batch
    tables: str
    rows_R: jax.Array


def draw(model: Any, batch: Batch, key: jax.Array) -> Drawn | None:
    """The model's draws for this step; None if its steps are dense."""
    return model.draw(batch, key) if hasattr(model, "draw") else None


def take(tree: Any, drawn: Drawn | None) -> Any:
    """`tree` with the touched rows (R, D) of its tables in place of these."""

    def rows(x_VD: jax.Array, drawn: Drawn) -> jax.Array:
        taken_RD = x_VD.at[drawn.rows_R].get(
            mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
        )
        return sharding.constrain(taken_RD, *sharding.spec("embedding", (0, 0))[: x_VD.ndim])

    return _at_tables(lambda x: rows(x, drawn), tree, drawn=drawn) if drawn else tree


def put(tree: Any, changed: Any, drawn: Drawn | None) -> Any:
    """`changed`, with the tables of `tree` in which the touched rows are those of `changed`."""
    if drawn is None:
        return changed

    def whole(changed_RD: jax.Array, x_VD: jax.Array) -> jax.Array:
        return x_VD.at[drawn.rows_R].set(
            changed_RD, mode="drop", indices_are_sorted=True, unique_indices=True
        )

    return _at_tables(whole, changed, tree, drawn=drawn)


def _at_tables(function: Any, tree: Any, *rest: Any, drawn: Drawn) -> Any:
    def visit(path: Any, x: Any, *others: Any) -> Any:
        is_table = re.search(drawn.tables, sharding.path_of(path))
        return function(x, *others) if is_table else x

    return jax.tree_util.tree_map_with_path(visit, tree, *rest)
