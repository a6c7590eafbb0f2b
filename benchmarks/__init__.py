"""Tasks, official metrics, the runner and the statistics that say what a result shows."""
