# SPDX-License-Identifier: Apache-2.0
"""RoBERTa-base, 125 M parameters: masked tokens alone, drawn anew each time (Liu et al. 2019).

    python -m lmjax train experiments/roberta_base.py --workdir=runs/roberta_base \\
        --data.corpus='files:text/*.jsonl.gz' --data.tokenizer.path=roberta/

Not yet run. fairseq's recipe: FULL-SENTENCES of 512, dynamic masks, 2,048 sequences a step for
125,000 steps, Adam (0.9, 0.98, 1e-6) at 5e-4 with 10,000 steps of warm-up, then linearly to 0,
decay 0.01 on every parameter, no clipping. Differences: sentences are those of our splitter, and
our Adam adds epsilon after the bias correction. One row of sentence types, always the same, is kept
as Hugging Face keeps it.
"""

from lmjax.data import Data
from lmjax.examples.full_sentences import FullSentences
from lmjax.losses import masked_token
from lmjax.models.bert import BERT
from lmjax.optim import AdamW
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import ByteBPE
from lmjax.units import Units

run = Run(
    model=BERT(
        vocab=50_265,
        context=512,
        depth=12,
        width=768,
        heads=12,
        activation="gelu_erf",
        epsilon=1e-5,
        types=1,
        position_offset=2,
        truncated_init=False,
        pooler=False,
        pair=False,
    ),
    data=Data(
        corpus=Builtin(),
        tokenizer=ByteBPE(vocab=50_265, controls="roberta"),
        units=Units(),
        examples=FullSentences(length=512),
    ),
    loss=masked_token,
    optim=AdamW(
        peak=5e-4,
        warmup=10_000,
        decay="linear",
        floor=0.0,
        b1=0.9,
        b2=0.98,
        epsilon=1e-6,
        weight_decay=0.01,
        decay_parameters="",
        clip=None,
    ),
    batch=2048,
    accumulate=8,
    steps=125_000,
    evaluate_every=1000,
    evaluate_windows=4096,
    save_every=1000,
)
tiny = replace(
    run,
    model=run.model.clone(vocab=512, context=32, depth=2, width=32, heads=2),
    data=replace(
        run.data,
        tokenizer=ByteBPE(vocab=512, controls="roberta"),
        examples=FullSentences(length=32),
    ),
    optim=replace(run.optim, peak=3e-3, warmup=2),
    batch=16,
    accumulate=2,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
