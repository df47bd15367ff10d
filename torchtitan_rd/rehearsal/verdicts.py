"""What a rehearsal says of each of its stages."""

import enum
from dataclasses import dataclass


class Verdict(enum.Enum):
    GO = "go"
    NO_GO = "NO-GO"
    NOT_TRIED = "--"


@dataclass(frozen=True)
class Line:
    """seconds: that the stage took. text: what was found, or what is wrong; several lines if need be."""

    verdict: Verdict
    stage: str
    seconds: float
    text: str


class NoGo(Exception):
    """A stage has found that the run would not do."""


class NotTried(Exception):
    """A stage has nothing to do for this run, or cannot do it here; says why."""
