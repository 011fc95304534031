"""What a run will cost before it starts: seconds and memory by phase, and the best use of a number of GPUs. Needs no GPU."""
