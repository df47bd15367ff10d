"""One thing that was looked at."""

import enum
from typing import NamedTuple


class Mark(enum.Enum):
    """What is found: it is good, it is not to be had here, or it stands in the way of training."""

    GOOD = "ok"
    ABSENT = "--"
    WRONG = "!!"


class Finding(NamedTuple):
    """remedy: what to do, a command where there is one; empty if nothing is to be done."""

    mark: Mark
    what: str
    found: str
    remedy: str = ""
