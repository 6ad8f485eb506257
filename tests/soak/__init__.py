"""One long run under many random faults, on a box: `make soak`."""
