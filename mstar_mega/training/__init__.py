"""The optimizer step through megatron's schedules, and checkpoints."""
