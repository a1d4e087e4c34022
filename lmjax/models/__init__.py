# SPDX-License-Identifier: Apache-2.0
"""One model family a file; none imports another."""
