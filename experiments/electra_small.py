# SPDX-License-Identifier: Apache-2.0
"""ELECTRA-small, 14 M parameters: which tokens did a generator replace? (Clark et al. 2020).

    python -m lmjax train experiments/electra_small.py --workdir=runs/electra_small \\
        --data.corpus='files:books_and_wiki/*.txt' --data.tokenizer.path=vocab.txt

Not yet run. The released recipe: 128 sequences of 128 a step, a million steps, BERT's Adam at 5e-4
with 10,000 steps of warm-up; the generator is a quarter as wide, and the discriminator's loss
counts 50 times. Differences: a token that is drawn twice is filled once, and a short sentence after
the first of the second segment stays there.
"""

from lmjax.data import Data
from lmjax.examples.masks import ElectraMasks
from lmjax.examples.pairs import SentencePairs
from lmjax.losses import ReplacedToken
from lmjax.models.electra import ELECTRA
from lmjax.recipe import load_beside
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import WordPiece
from lmjax.units import Units

bert = load_beside(__file__, "bert_base.py")
run = Run(
    model=ELECTRA(
        vocab=30_522,
        context=512,
        depth=12,
        width=256,
        heads=4,
        embedding_width=128,
        generator_depth=12,
        generator_width=64,
        generator_heads=1,
    ),
    data=Data(
        corpus=Builtin(),
        tokenizer=WordPiece(vocab=30_522),
        units=Units(),
        examples=SentencePairs(
            length=128, pairing="segments", short=0.05, masks=ElectraMasks(rate=0.15)
        ),
    ),
    loss=ReplacedToken(weight=50.0),
    optim=replace(bert.optim, peak=5e-4, warmup=10_000),
    batch=128,
    steps=1_000_000,
    evaluate_every=10_000,
    evaluate_windows=4096,
    save_every=5000,
)
tiny = replace(
    run,
    model=run.model.clone(
        vocab=512, context=32, depth=2, width=32, heads=2, embedding_width=16,
        generator_depth=1, generator_width=16, generator_heads=1,
    ),
    data=replace(
        run.data,
        tokenizer=WordPiece(vocab=512),
        examples=replace(run.data.examples, length=32),
    ),
    optim=replace(run.optim, peak=3e-3, warmup=2),
    batch=16,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)  # fmt: skip
