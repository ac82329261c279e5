"""What a model is worth: perplexity, multiple-choice tests, and the texts of its answers."""
