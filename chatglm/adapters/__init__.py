"""Adapters and the models that they belong to: what they know of their base, and how they act."""
