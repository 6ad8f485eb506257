"""Chapter 5: DeepSpeed and Megatron-Core, in the same loop as everything else."""
