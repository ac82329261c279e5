"""The stages of `chatglm train` that run on a trainer of transformers or trl, a module for each."""
