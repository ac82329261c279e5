"""`chatglm check`: what a folder is, whether it is whole, and what is odd about it."""
