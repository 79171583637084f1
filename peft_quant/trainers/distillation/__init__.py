"""Distillation of the float model into an LREC adapter."""
