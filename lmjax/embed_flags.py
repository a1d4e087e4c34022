# SPDX-License-Identifier: Apache-2.0
"""The flags of `embed`: which of them a family of models has, and what they ask of it."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Flags that only models with a vector a word have, and how each is off.
_OF_WORDS = {"mix": "", "stateful": False, "rows": 0, "blanks": False}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What is embedded, how, and where to."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="one text")
    source.add_argument("--file", metavar="FILE", help="a text a line; blank lines are left out")
    add = parser.add_argument
    about = ".npz, .jsonl or .hdf5; default: JSON lines, printed"
    add("--to", dest="target", metavar="FILE", help=about)
    about = "0 is the embeddings, -1 or top the last (default); of ELMo also all"
    add("--layer", default="top", help=about)
    about = "mean (default), first ([CLS]), words or tokens; ELMo has words only"
    add("--pool", default="", help=about)
    add("--mix", default="", metavar="W", help="ELMo: weights of the layers, as 0.2,0.5,0.3:gamma")
    add("--blanks", action="store_true", help="ELMo: words are what stands between blanks")
    about = "ELMo: texts go on from the state that the one before left, as the original tool does"
    add("--stateful", action="store_true", help=about)
    about = (
        "ELMo, with --stateful: rows that are read side by side, text i in row i %% N (default 1)"
    )
    add("--rows", type=int, default=0, metavar="N", help=about)


def embed_by_flags(
    run: Any, workdir: Path, texts: Iterable[str], target: Path | None, flags: argparse.Namespace
) -> int:
    """Writes the vectors that the flags ask for; returns how many texts there were.

    Raises:
      ValueError: a flag that the run's model does not have; what `embed` and `embed_words` raise.
    """
    from lmjax.embed import embed
    from lmjax.word_vectors import embed_words, gives_words

    if gives_words(run.model):
        if flags.pool not in ("", "words"):
            raise ValueError(f"--pool={flags.pool}: this model has a vector a word; allowed: words")
        if flags.mix and flags.layer != "top":
            raise ValueError("--layer and --mix: one of them; a mix is of all layers")
        if flags.rows and not flags.stateful or flags.rows < 0:
            raise ValueError(f"--rows={flags.rows}: at least 1, and only with --stateful")
        rows = (flags.rows or 1) if flags.stateful else 0
        return embed_words(run, workdir, texts, target, flags.layer, flags.mix, rows, flags.blanks)
    for name, off in _OF_WORDS.items():
        if getattr(flags, name) != off:
            raise ValueError(f"--{name}: only models with a vector a word, as ELMo, have it")
    try:
        layer = -1 if flags.layer == "top" else int(flags.layer)
    except ValueError:
        raise ValueError(f"--layer={flags.layer}: a number, or top") from None
    return embed(run, workdir, texts, target, layer, flags.pool or "mean")
