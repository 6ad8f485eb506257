"""Chapter 4: fully sharded data parallelism."""
