# SPDX-License-Identifier: Apache-2.0
"""ELMo, 93.6 M parameters and a softmax over 793,471 words (Peters et al. 2018).

    python -m lmjax train experiments/elmo.py --workdir=runs/elmo \\
        --data.corpus='files:1b_words/*.txt' --data.tokenizer.split=blanks \\
        --data.tokenizer.path=vocab.txt

Not yet run at this size. The original's recipe: three GPUs of 128 streams each, 20 words a step,
10 epochs of the 1B Word benchmark, 8,192 negatives for each direction, Adagrad at 0.2 from an
accumulator of 1, the loss times 20 clipped at a norm of 10. Two things are different: both
directions read the same sentences (`--data.examples.backward=own` is the original's), because a
word is then spelt once for both, which halves the work of the character network; and raw text is
cut into words here, where the original reads text that is (`--data.tokenizer.split=blanks`).
"""

from lmjax.data import Data
from lmjax.examples.streams import Streams
from lmjax.losses import bidirectional
from lmjax.models.elmo import ELMo
from lmjax.optim import Adagrad
from lmjax.run import Run, replace
from lmjax.text import Builtin
from lmjax.tokenizer import Vocabulary

run = Run(
    model=ELMo(vocab=793_471),
    data=Data(
        corpus=Builtin(),
        tokenizer=Vocabulary(size=793_471, split="words"),
        examples=Streams(length=20, backward="same"),
    ),
    loss=bidirectional,
    optim=Adagrad(peak=0.2, accumulator=1.0, gradient_scale=20.0, clip=10.0),
    batch=384,
    steps=1_000_840,
    log_every=100,
    evaluate_every=20_000,
    evaluate_windows=1024,
    save_every=5000,
)
tiny = replace(
    run,
    model=run.model.clone(
        vocab=512, cells=32, width=16, embedding=4, filters=((1, 4), (2, 8), (3, 16)), negatives=64
    ),
    data=replace(
        run.data,
        tokenizer=Vocabulary(size=512, split="words"),
        examples=replace(run.data.examples, length=10, held_out_length=100),
    ),
    batch=8,
    steps=20,
    log_every=1,
    evaluate_every=10,
    evaluate_windows=16,
    save_every=10,
)
