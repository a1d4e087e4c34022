# SPDX-License-Identifier: Apache-2.0
"""GPT-3 Small, 125 M parameters (Brown et al. 2020, table 2.1 and appendix B).

    python -m lmjax train experiments/gpt3_small.py --workdir=runs/gpt3_small \\
        --data.corpus='files:corpus/*.jsonl.gz' --mesh.fsdp=8

300 B tokens in windows of 2,048 that run across documents; half a million tokens a step after a
ramp from 32 k over the first 4 B tokens; the rate rises over 375 M tokens and falls by a cosine to
10 % at 260 B. Not yet run. Differences: all layers attend densely (the paper alternates with
banded sparse layers, whose pattern it does not give), the corpus is yours, and the ramp goes up in
16 equal stairs of 32 k tokens, since every batch size is compiled once.
"""

from lmjax.batches import Ramp
from lmjax.data import Data
from lmjax.examples.windows import Windows
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import ByteBPE

run = Run(
    model=GPT(vocab=50_257, context=2048, depth=12, width=768, heads=12, remat="full"),
    data=Data(
        corpus=Builtin(),
        tokenizer=ByteBPE(vocab=50_257),
        examples=Windows(length=2048),
    ),
    loss=next_token,
    optim=AdamW(
        peak=6e-4,
        warmup=375e6,
        decay="cosine",
        floor=0.1,
        decay_until=260e9,
        unit="tokens",
        b1=0.9,
        b2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        clip=1.0,
    ),
    batch=256,
    ramp=Ramp(start=16, increment=16, tokens=4e9),
    steps=591_584,
    save_every=2000,
    evaluate_every=2000,
)
tiny = replace(
    run,
    model=GPT(vocab=512, context=32, depth=2, width=32, heads=2, remat="full"),
    data=replace(run.data, tokenizer=ByteBPE(vocab=512), examples=Windows(length=32)),
    optim=replace(run.optim, warmup=1000, decay_until=4500),
    batch=16,
    ramp=Ramp(start=8, increment=8, tokens=2000),
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
