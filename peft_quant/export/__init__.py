"""What leaves the library: merged checkpoints, LoRA adapters, int8 models in other formats, and model cards."""
