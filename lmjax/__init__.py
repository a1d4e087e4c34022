# SPDX-License-Identifier: Apache-2.0
"""lmjax: pretraining of classic language models on TPUs, in JAX."""

__version__ = "0.1.0"
