"""Does alignment matter? Students under true maps, random maps and none; see `python -m benchmarks.alignment`."""
