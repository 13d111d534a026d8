"""Models and checkpoints of other programs, in and out."""
