# SPDX-License-Identifier: Apache-2.0
"""BERT-base, 110 M parameters: masked tokens and next sentences (Devlin et al. 2018).

    python -m lmjax train experiments/bert_base.py --workdir=runs/bert_base \\
        --data.corpus='files:books_and_wiki/*.txt' --data.tokenizer.path=vocab.txt

Not yet run at this size. The paper's recipe: 256 sequences a step, 90 % of a million steps at
length 128 and the rest at 512, Adam without bias correction at 1e-4, 10,000 steps of warm-up, then
linearly to 0, decay 0.01 except on norms and biases, clip 1. Pairs and masks as
create_pretraining_data makes them: 10 passes over the text that are then repeated. GELU by the tanh
formula, as Google's code has had it since 2019; the published weights were trained with
`--model.activation=gelu_erf`. The text may have a sentence a line and a blank line between
documents (`--data.corpus.document=block`), or be prose, which is split into sentences.
"""

from lmjax.data import Data
from lmjax.examples.masks import BertMasks
from lmjax.examples.pairs import SentencePairs
from lmjax.losses import masked_token_and_pair
from lmjax.models.bert import BERT
from lmjax.optim import AdamW
from lmjax.run import Phase, Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import WordPiece
from lmjax.units import Units

run = Run(
    model=BERT(
        vocab=30_522,
        context=512,
        depth=12,
        width=768,
        heads=12,
        activation="gelu_tanh",
        epsilon=1e-12,
    ),
    data=Data(
        corpus=Builtin(),
        tokenizer=WordPiece(vocab=30_522),
        units=Units(),
        examples=SentencePairs(length=128, static=True, masks=BertMasks(predictions=20)),
    ),
    phase2=Phase(
        share=0.1,
        examples=SentencePairs(length=512, static=True, masks=BertMasks(predictions=77)),
    ),
    loss=masked_token_and_pair,
    optim=AdamW(
        peak=1e-4,
        warmup=10_000,
        decay="linear",
        floor=0.0,
        count="before",
        decay_from="start",
        b1=0.9,
        b2=0.999,
        epsilon=1e-6,
        bias_correction=False,
        weight_decay=0.01,
        clip=1.0,
    ),
    batch=256,
    steps=1_000_000,
    evaluate_every=10_000,
    evaluate_windows=4096,
    save_every=5000,
)
tiny = replace(
    run,
    model=run.model.clone(vocab=512, context=64, depth=2, width=32, heads=2),
    data=replace(
        run.data,
        tokenizer=WordPiece(vocab=512),
        examples=replace(run.data.examples, length=32, masks=BertMasks(predictions=5)),
    ),
    phase2=replace(
        run.phase2, examples=SentencePairs(length=64, static=True, masks=BertMasks(predictions=10))
    ),
    optim=replace(run.optim, peak=3e-3, warmup=2),
    batch=16,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
