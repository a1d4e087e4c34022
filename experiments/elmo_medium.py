# SPDX-License-Identifier: Apache-2.0
"""ELMo medium, 28.0 M parameters and its softmax: 2,048 cells of which 256 numbers go on.

    python -m lmjax train experiments/elmo_medium.py --workdir=runs/elmo_medium \\
        --data.corpus='files:1b_words/*.txt' --data.tokenizer.split=blanks \\
        --data.tokenizer.path=vocab.txt

The middle one of the weights that were released: one highway layer instead of two. The rest is
elmo.py. Not yet run at this size.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

elmo = load_beside(__file__, "elmo.py")
run = replace(elmo, model=elmo.model.clone(cells=2048, width=256, highways=1))
tiny = load_beside(__file__, "elmo.py", tiny=True)
