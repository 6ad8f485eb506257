"""Chapter 1: one device, the baseline that every technique is compared with."""
