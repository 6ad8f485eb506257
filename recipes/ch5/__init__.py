"""Chapter 5: DeepSpeed and Megatron-Core through the same loop."""
