"""`chatglm bench`: how fast a model of the user's own is on the user's machine."""
