"""Shows what rows of files mean to a training, by the command `chatglm data`."""
