"""Rewards: is the answer right, what is a step, which responses are trained on, what do many responses vote for."""
