"""Mutated files of every kind that comes from outside, and what may happen to them: see ``run.py``."""
