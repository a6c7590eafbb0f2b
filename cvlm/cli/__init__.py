"""The command line: the composition root, which nobody imports."""
