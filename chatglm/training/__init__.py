"""`chatglm train`: fine-tuning and alignment, one module for each stage."""
