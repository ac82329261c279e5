"""Owns what people type: keys and values, in a file and on the command line, and what they mean."""
