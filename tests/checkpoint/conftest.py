"""Fixtures of the checkpoint tests."""

import logging

import pytest

from torchtitan_rd.log import logger


@pytest.fixture
def log_lines():
    """The messages that the package logs, whatever handlers other tests installed."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
