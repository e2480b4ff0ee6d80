"""What a process that was forked from one with torch in it must do first."""

from __future__ import annotations


def take_new_threads() -> None:
    """Must come before anything else that may compute with torch.

    torch gives up the thread pool of the process that it was forked from at the first call that sets a number of threads, and every new
    thread makes such a call: two at once can find no pool between them, which ends the run with "Invalid thread pool!".
    """
    import torch

    torch.set_num_threads(1)
