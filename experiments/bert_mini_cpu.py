# SPDX-License-Identifier: Apache-2.0
"""BERT-mini (Turc et al. 2019) for twenty minutes of a CPU: what a laptop can learn of BERT.

    python -m lmjax train experiments/bert_mini_cpu.py --workdir=runs/bert_mini_cpu \\
        --data.corpus='files:books/*.txt' --data.held_out='war_and_peace.txt'

21 books, the King James Bible and Brown, with War and Peace and Brown's last document held out, in
20 minutes of one core (1,800 steps; two cores do 3,400): masked tokens 6.23 nats and 12.8 % right
(word frequencies: 6.77 nats, 5.3 %), next sentences 72 %. experiments/LOG.md has the curves, beside
transformers, and what did not work. Differences to bert_mini.py: 8,192 word
pieces learnt from the text, sequences of 128 only, 16 a step, no dropout, and Adam with bias
correction at 1e-3: without it the first hundred updates are several times larger, and at this rate
the model falls back to word frequencies and stays there.
"""

from lmjax.examples.masks import BertMasks
from lmjax.examples.pairs import SentencePairs
from lmjax.recipe import load_beside
from lmjax.run import replace
from lmjax.tokenizer import WordPiece

mini = load_beside(__file__, "bert_mini.py")
run = replace(
    mini,
    model=mini.model.clone(vocab=8192, dropout=0.0, attention_dropout=0.0),
    data=replace(
        mini.data,
        tokenizer=WordPiece(vocab=8192),
        examples=SentencePairs(length=128, masks=BertMasks(predictions=20)),
        test=0.0,
    ),
    phase2=None,
    optim=replace(mini.optim, peak=1e-3, warmup=150, b2=0.98, bias_correction=True),
    batch=16,
    steps=3400,
    evaluate_every=150,
    evaluate_windows=256,
    save_every=500,
)
tiny = replace(load_beside(__file__, "bert_base.py", tiny=True), phase2=None)
