"""Operators on int8 weights, gradients and momentum (QFT)."""
