# SPDX-License-Identifier: Apache-2.0
"""What a TPU would do with a recipe, from the TPU compiler, on a machine without a TPU."""
