"""`chatglm publish`: a model folder to a repository on the Hugging Face Hub."""
