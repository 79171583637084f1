"""Initialization of LREC adapters from the float model."""

from .initialize import InitializationReport, LayerInitialization, initialize_lrec_weights


__all__ = ["InitializationReport", "LayerInitialization", "initialize_lrec_weights"]
