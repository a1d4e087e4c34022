# SPDX-License-Identifier: Apache-2.0
"""A small GPT on the documentation of the running Python: the whole road in minutes.

    make demo
    python -m lmjax train experiments/demo.py --workdir=runs/demo

SentencePiece BPE of 2,048 pieces, 3 layers of width 128, 128-token windows.
"""

from lmjax.data import Data
from lmjax.examples.windows import Windows
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import SentencePiece

run = Run(
    model=GPT(vocab=2048, context=128, depth=3, width=128, heads=4),
    data=Data(
        corpus=Builtin(),
        tokenizer=SentencePiece(vocab=2048),
        examples=Windows(length=128),
    ),
    loss=next_token,
    optim=AdamW(peak=2e-3, warmup=50),
    batch=16,
    steps=1200,
    evaluate_every=200,
    evaluate_windows=128,
    save_every=400,
)
tiny = replace(
    run,
    model=GPT(vocab=512, context=32, depth=2, width=32, heads=2),
    data=replace(run.data, tokenizer=SentencePiece(vocab=512), examples=Windows(length=32)),
    batch=8,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
