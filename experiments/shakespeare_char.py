# SPDX-License-Identifier: Apache-2.0
"""A character-level GPT on Shakespeare: nanoGPT's recipe for a CPU (Karpathy 2022).

    python -m lmjax train experiments/shakespeare_char.py --workdir=runs/shakespeare \\
        --data.corpus=files:input.txt

Wants tinyshakespeare (1,115,394 characters) as `input.txt`; any text file will do. The first 90 %
of the characters train and the rest validates: 1,003,854 / 111,540. 4 layers, 4 heads, width 128,
context 64, batch 12, 2,000 steps, no dropout. nanoGPT reports a validation loss of 1.88 nats per
character; here 1.890, in 80 s on 2 CPU cores (benchmarks/RESULTS.md). Differences: windows tile the
text, at another offset and in another order each epoch, instead of being drawn with replacement,
and the table has one more row, for characters that training has not seen.
"""

from lmjax.data import Data
from lmjax.examples.windows import Windows
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.run import Run, replace
from lmjax.text import Builtin, Files
from lmjax.tokenizer import Characters

run = Run(
    model=GPT(vocab=128, context=64, depth=4, width=128, heads=4),
    data=Data(
        corpus=Files("input.txt", document="file"),
        tokenizer=Characters(),
        examples=Windows(length=64),
        validation=0.1,
        test=0.0,
        split="tail",
    ),
    loss=next_token,
    optim=AdamW(peak=1e-3, warmup=100, floor=0.1, b2=0.99, weight_decay=0.1),
    batch=12,
    steps=2000,
    seed=1337,
    evaluate_every=250,
    evaluate_windows=240,
    save_every=500,
)
tiny = replace(
    run,
    model=GPT(vocab=2048, context=32, depth=2, width=32, heads=2),
    data=replace(run.data, corpus=Builtin(), examples=Windows(length=32)),
    batch=8,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
