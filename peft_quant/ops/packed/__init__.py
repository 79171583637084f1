"""Operators on GPTQ-packed weights."""

from . import eager as eager  # registers the implementations
