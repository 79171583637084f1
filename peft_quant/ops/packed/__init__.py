"""Operators on GPTQ-packed weights."""
