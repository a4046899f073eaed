# SPDX-License-Identifier: Apache-2.0
"""Packed ternary matrices and the kernels that multiply by them.

Words: codes are int8 in {-1, 0, 1}; a scale is the float that multiplies
codes; packed is bytes. M tokens, K inputs, N outputs.
"""
