# SPDX-License-Identifier: Apache-2.0
"""GPT-2 small, 124 M parameters (Radford et al. 2019).

    python -m lmjax train experiments/gpt2_small.py --workdir=runs/gpt2_small \\
        --data.corpus='files:webtext/*.jsonl.gz' --data.tokenizer.path=gpt2_bpe/

One v5e-8: 10 windows a chip and microbatch, 6 microbatches a step. Not yet run.
The paper names the sizes, WebText (40 GB, not published), batch 512 × 1,024 and a rate tuned per
size, but no schedule and no number of steps. Those are the common open recipe's: AdamW at 6e-4,
2,000 steps of warm-up, a cosine to 6e-5 at step 600,000, b2 0.95, decay 0.1 on matrices and tables,
clip 1, batch 480 (491,520 tokens a step). Windows run across documents. Other differences:
positions start at 0.02, where the release has 0.01, and there is no dropout.
"""

from lmjax.data import Data
from lmjax.examples.windows import Windows
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import ByteBPE

run = Run(
    model=GPT(vocab=50_257, context=1024, depth=12, width=768, heads=12, remat="full"),
    data=Data(
        corpus=Builtin(),
        tokenizer=ByteBPE(vocab=50_257),
        examples=Windows(length=1024),
    ),
    loss=next_token,
    optim=AdamW(
        peak=6e-4,
        warmup=2000,
        decay="cosine",
        floor=0.1,
        b1=0.9,
        b2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        clip=1.0,
    ),
    batch=480,
    accumulate=6,
    steps=600_000,
    save_every=2000,
    evaluate_every=2000,
)
tiny = replace(
    run,
    model=run.model.clone(vocab=512, context=32, depth=2, width=32, heads=2),
    data=replace(run.data, tokenizer=ByteBPE(vocab=512), examples=Windows(length=32)),
    optim=replace(run.optim, peak=2e-3, warmup=10),
    batch=16,
    accumulate=2,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
