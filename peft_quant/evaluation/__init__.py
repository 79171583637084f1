"""Models, texts and perplexity."""
