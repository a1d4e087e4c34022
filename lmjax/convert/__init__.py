# SPDX-License-Identifier: Apache-2.0
"""Weights in and out of the formats of other libraries."""
