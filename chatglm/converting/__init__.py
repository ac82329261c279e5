"""`chatglm quantize`, `chatglm merge`: a model folder in, another model folder out."""
