"""Recipes that build something with the project, each from public data to a measured result."""
