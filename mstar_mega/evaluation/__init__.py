"""Evaluation: accuracy and exploration measures over judged groups."""
