# SPDX-License-Identifier: Apache-2.0
"""ERNIE 1.0, 100 M parameters: whole words, phrases and entities are masked (Sun et al. 2019).

    python -m lmjax train experiments/ernie_base.py --workdir=runs/ernie_base \\
        --data.corpus='files:zh/*.txt' --data.tokenizer.path=vocab.txt --data.units.words=jieba

Not yet run at this size. Baidu's code: characters as tokens, words masked by the draws of their
first character, Adam at 1e-4 with 5,000 steps of warm-up and BERT's decay, decay 0.01 except on
norms and biases, clip 1, 8,192 tokens a device at length 512, a million steps; the label 1 is a
true next sentence. Words come from jieba; `--data.units.entities=names.txt` adds a dictionary, and
`--data.examples.masks.characters=1 --data.examples.masks.entities=1` beside `words` the paper's
other two stages. Baidu's own instances (ids;sentences;positions;words;label) are read with
examples/instances.py and the tokenizer PretokenizedERNIE. Difference: a word is masked by a draw
for each example, where the code draws once a file and pass.
"""

from lmjax.data import Data
from lmjax.examples.masks import ErnieMasks
from lmjax.examples.pairs import SentencePairs
from lmjax.losses import masked_token_and_pair
from lmjax.models.bert import BERT
from lmjax.recipe import load_beside
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import WordPiece
from lmjax.units import Units

bert = load_beside(__file__, "bert_base.py")
run = Run(
    model=BERT(
        vocab=18_000,
        context=513,
        depth=12,
        width=768,
        heads=12,
        activation="relu",
        epsilon=1e-5,
    ),
    data=Data(
        corpus=Builtin(),
        tokenizer=WordPiece(vocab=18_000),
        units=Units(),
        examples=SentencePairs(length=512, positive=1, masks=ErnieMasks()),
    ),
    loss=masked_token_and_pair,
    optim=replace(bert.optim, peak=1e-4, warmup=5000, bias_correction=True, epsilon=1e-8),
    batch=256,
    accumulate=2,
    steps=1_000_000,
    evaluate_every=10_000,
    evaluate_windows=4096,
    save_every=5000,
)
tiny = replace(
    run,
    model=run.model.clone(vocab=512, context=32, depth=2, width=32, heads=2),
    data=replace(
        run.data,
        tokenizer=WordPiece(vocab=512),
        examples=replace(run.data.examples, length=32),
    ),
    optim=replace(run.optim, peak=3e-3, warmup=2),
    batch=16,
    accumulate=1,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
