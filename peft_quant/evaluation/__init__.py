"""Loading models, reading texts and measuring perplexity."""
