"""`chatglm train`: fine-tuning and alignment; what its wings share lies here."""
