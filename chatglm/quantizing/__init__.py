"""`chatglm quantize`: a model folder with float weights in, one with packed weights out."""
