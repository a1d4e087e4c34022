# SPDX-License-Identifier: Apache-2.0
"""ALBERT-base, 12 M parameters: shared layers, sentence order (Lan et al. 2019).

    python -m lmjax train experiments/albert_base.py --workdir=runs/albert_base \\
        --data.corpus='files:books_and_wiki/*.txt' --data.tokenizer.path=30k-clean.model

Not yet run. The paper's recipe: 4,096 sequences of 512 a step, 125,000 steps, LAMB at 1.76e-3 with
3,125 steps of warm-up, spans of up to three words masked, 20 predictions at most, segments in order
or swapped; 40 passes over the text with masks of their own.
"""

from lmjax.data import Data
from lmjax.examples.masks import BertMasks
from lmjax.examples.pairs import SentencePairs
from lmjax.losses import masked_token_and_pair
from lmjax.models.albert import ALBERT
from lmjax.optim import LAMB
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import SentencePiece
from lmjax.units import Units

run = Run(
    model=ALBERT(vocab=30_000, context=512, depth=12, width=768, heads=12, embedding_width=128),
    data=Data(
        corpus=Builtin(),
        tokenizer=SentencePiece(vocab=30_000, model_type="unigram", controls="albert"),
        units=Units(),
        examples=SentencePairs(
            length=512,
            pairing="order",
            duplicates=40,
            static=True,
            masks=BertMasks(predictions=20, ngram=3),
        ),
    ),
    loss=masked_token_and_pair,
    optim=LAMB(
        peak=1.76e-3,
        warmup=3125,
        decay="linear",
        floor=0.0,
        count="before",
        decay_from="start",
    ),
    batch=4096,
    accumulate=8,
    steps=125_000,
    evaluate_every=1000,
    evaluate_windows=4096,
    save_every=1000,
)
tiny = replace(
    run,
    model=run.model.clone(vocab=512, context=32, depth=2, width=32, heads=2, embedding_width=16),
    data=replace(
        run.data,
        tokenizer=SentencePiece(vocab=512, model_type="unigram", controls="albert"),
        examples=replace(run.data.examples, length=32, masks=BertMasks(predictions=5, ngram=3)),
    ),
    optim=replace(run.optim, peak=2e-2, warmup=2),
    batch=16,
    accumulate=2,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
