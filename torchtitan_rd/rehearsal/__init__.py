"""A run's file, small, on this machine: its whole life once, before anything is queued (docs/rehearsal.md).

shrink.py: which keys become small, and why | rows.py: rows of the run's data, or made up in its schema
stages.py: train, kill, resume, validate, export, generate, each as a user would start it
rehearse.py: these in order | verdicts.py: what is said of each
"""

from torchtitan_rd.rehearsal.rehearse import Options, Rehearsal
from torchtitan_rd.rehearsal.shrink import Change
from torchtitan_rd.rehearsal.verdicts import Line, Verdict

__all__ = ["Change", "Line", "Options", "Rehearsal", "Verdict"]
