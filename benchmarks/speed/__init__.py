"""How fast the work here is beside the public tools that do the same: `python -m benchmarks.speed`."""
