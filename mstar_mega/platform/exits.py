"""How a job ends: exit codes that a launcher or a batch script can tell apart, and leaving in good order."""

USER_ERROR = 2
"""A mistake that the user can mend: starting again without a change will not help."""
CONTINUED = 75
"""To be continued: the job was asked to stop and saved its state; the same command goes on."""
INTERRUPTED = 130
"""After Ctrl-C, as shells give it."""
BROKEN_PIPE = 141
"""What read the output has ended (``| head``), as shells give it."""


class Stopped(Exception):
    """The job was asked to stop; what is finished is saved, and every rank raises this (``stopping.py``)."""
