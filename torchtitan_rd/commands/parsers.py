"""How the parser of every command begins. Imports nothing that is slow: `--help` waits for it."""

import argparse
from typing import Any


def parser_of(command: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """That of `torchtitan-rd COMMAND`, which explains itself with its module's text. options: of argparse."""
    return argparse.ArgumentParser(
        prog=f"torchtitan-rd {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
