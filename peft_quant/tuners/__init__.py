"""Fine-tuning methods, in PEFT's own shape: a configuration, a layer and a model each."""
