"""Operators on int8 weights, gradients and momentum."""

from . import eager as eager  # registers the implementations
