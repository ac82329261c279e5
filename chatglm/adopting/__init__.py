"""`chatglm adopt`: a model folder as it was downloaded gets what it takes to be loaded today."""
