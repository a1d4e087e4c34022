# SPDX-License-Identifier: Apache-2.0
"""ELMo of Chinese characters: each is a word, from one table that is the softmax's as well.

    python -m lmjax train experiments/elmo_zh.py --workdir=runs/elmo_zh \\
        --data.corpus='files:zh/*.txt'

The size of elmo_medium.py. A Chinese character has nothing to spell, so words come from a table
instead of the character network, as the original's models without one; its vocabulary is small
enough to score all of it. Text that is already cut into words, with blanks between them, is read
with `--data.tokenizer.split=blanks`. Not yet run at this size.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace
from lmjax.tokenizer import Vocabulary

elmo = load_beside(__file__, "elmo.py")
small = load_beside(__file__, "elmo.py", tiny=True)
words = {"input": "words", "tied": True, "negatives": 0}
run = replace(
    elmo,
    model=elmo.model.clone(vocab=12_288, cells=2048, width=256, **words),
    data=replace(
        elmo.data,
        tokenizer=Vocabulary(size=12_288, split="chinese"),
        examples=replace(elmo.data.examples, characters=0),
    ),
)
tiny = replace(
    small,
    model=small.model.clone(**words),
    data=replace(
        small.data,
        tokenizer=Vocabulary(size=512, split="chinese"),
        examples=replace(small.data.examples, characters=0),
    ),
)
