"""The commands that answer people: today `chat`, in a terminal or a pipe."""
