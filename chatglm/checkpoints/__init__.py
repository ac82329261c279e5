"""What a model folder is, and what it lacks."""
