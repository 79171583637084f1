"""Fine-tuning methods, structured like PEFT's: each has a configuration, a layer and a model."""
