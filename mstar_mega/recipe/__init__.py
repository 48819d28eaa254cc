"""The loop, and one file per stage of it."""
