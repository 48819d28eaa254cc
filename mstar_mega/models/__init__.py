"""The LMM: vision tower, connector, megatron GPT, and the PRM head."""
