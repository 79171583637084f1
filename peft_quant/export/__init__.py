"""Exports: merged checkpoints, LoRA adapters, int8 models in other formats, and model cards."""
