# SPDX-License-Identifier: Apache-2.0
"""GPT-1, 117 M parameters (Radford et al. 2018).

    python -m lmjax train experiments/gpt1.py --workdir=runs/gpt1 \\
        --data.corpus='files:books/*.txt' --data.tokenizer.path=gpt1_bpe/

Norms after the residual sums, positions in the token table after the 40,478 BPE rows, softmax over
all 40,990 rows, dropout 0.1 on that table, the attention and the residuals. Batch 64 × 512, Adam
with a peak of 2.5e-4, 2,000 steps of warm-up and a cosine to zero, decay 0.01 on matrices and the
table. The paper trains 100 epochs of BooksCorpus (800 M words, about 3 M steps here) to 18.4
perplexity per token. Not yet run. Differences: the tokeniser splits as the published one does
without ftfy and spaCy, and decay is multiplied by the plain rate where the original multiplies it
by the bias-corrected one.
"""

from lmjax.data import Data
from lmjax.examples.windows import Windows
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import GPT1BPE

run = Run(
    model=GPT(
        vocab=40_478,
        context=512,
        depth=12,
        width=768,
        heads=12,
        norm="post",
        one_table=True,
        dropout=0.1,
        attention_dropout=0.1,
        scale_residual_init=False,
        remat="full",
    ),
    data=Data(corpus=Builtin(), tokenizer=GPT1BPE(vocab=40_478), examples=Windows(length=512)),
    loss=next_token,
    optim=AdamW(
        peak=2.5e-4, warmup=2000, decay="cosine", floor=0.0, b2=0.999, weight_decay=0.01, clip=1.0
    ),
    batch=64,
    steps=3_000_000,
    save_every=5000,
    evaluate_every=5000,
)
tiny = replace(
    run,
    model=run.model.clone(vocab=512, context=32, depth=2, width=32, heads=2),
    data=replace(run.data, tokenizer=GPT1BPE(vocab=512), examples=Windows(length=32)),
    optim=replace(run.optim, peak=1e-3, warmup=10),
    batch=8,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
