"""What a training will take, in memory and time, before anything of it is loaded."""
