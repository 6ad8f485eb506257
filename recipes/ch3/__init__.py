"""Chapter 3: data parallelism."""
