# SPDX-License-Identifier: Apache-2.0
"""ELMo small, 13.6 M parameters and its softmax: 1,024 cells of which 128 numbers go on.

    python -m lmjax train experiments/elmo_small.py --workdir=runs/elmo_small \\
        --data.corpus='files:1b_words/*.txt' --data.tokenizer.split=blanks \\
        --data.tokenizer.path=vocab.txt

The smallest of the weights that were released: one highway layer instead of two. The rest is
elmo.py. Not yet run at this size.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

elmo = load_beside(__file__, "elmo.py")
run = replace(elmo, model=elmo.model.clone(cells=1024, width=128, highways=1))
tiny = load_beside(__file__, "elmo.py", tiny=True)
