"""Queries, images, the built-in task, and what is written to disk."""
