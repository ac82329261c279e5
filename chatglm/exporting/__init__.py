"""`chatglm export-tokenizer`: the vocabulary as programs of other kinds read it."""
