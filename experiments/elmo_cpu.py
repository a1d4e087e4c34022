# SPDX-License-Identifier: Apache-2.0
"""ELMo small for twenty minutes of a CPU: what a laptop can learn of ELMo.

    python -m lmjax train experiments/elmo_cpu.py --workdir=runs/elmo_cpu \\
        --data.corpus='files:books/*.txt' --data.held_out='war_and_peace.txt'

21 books, the King James Bible and Brown, with War and Peace and Brown's last document held out, in
20 minutes of one core (2,250 steps, 720,000 of 4.2 million words; two cores do 4,000): 4.907 nats a
word, perplexity 135.2 (forward 138.0, backward 132.4), 2.17 bits per byte; a 5-gram Kneser-Ney
model of all words: 105.0. experiments/LOG.md has the curves, beside PyTorch, and what did not work.
Differences to elmo_small.py: the 10,000 most frequent words, all of them scored, 16 streams, no
dropout, and AdamW at 4e-3: Adagrad at 0.2 wastes the first hundreds of steps.
"""

from lmjax.optim import AdamW
from lmjax.recipe import load_beside
from lmjax.run import replace
from lmjax.tokenizer import Vocabulary

small = load_beside(__file__, "elmo_small.py")
run = replace(
    small,
    model=small.model.clone(vocab=10_000, negatives=0, dropout=0.0),
    data=replace(
        small.data,
        tokenizer=Vocabulary(size=10_000, split="words"),
        test=0.0,
    ),
    optim=AdamW(peak=4e-3, warmup=100, weight_decay=0.0, clip=1.0),
    batch=16,
    steps=4000,
    log_every=10,
    evaluate_every=225,
    evaluate_windows=32,
    save_every=900,
)
tiny = load_beside(__file__, "elmo.py", tiny=True)
