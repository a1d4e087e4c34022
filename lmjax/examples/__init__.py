# SPDX-License-Identifier: Apache-2.0
"""Example makers: token ids to fixed-length numpy examples, one file per objective; no jax."""
