"""Initialization of LREC adapters from the float model."""
