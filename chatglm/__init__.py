"""The commands and the loader around a ChatGLM model folder; the model itself lives in its files.

Owns the command line (`chatglm chat`) and `load_model`. Knows nothing about layers, masks or token
ids: it reaches the model through transformers' `Auto*` classes, as every user does.
"""

__version__ = "0.1.0"
