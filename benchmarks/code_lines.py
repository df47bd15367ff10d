"""The lines of code of the package, a folder a row: without blank lines, comments and docstrings.

python benchmarks/code_lines.py [folder of another checkout's package]
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "torchtitan_rd"
LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING),
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """Lines that hold a token of code. A string that stands alone is a docstring, of an attribute too."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main(package: Path) -> None:
    rooms: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        rooms[path.relative_to(package).parts[0]] += code_lines(path.read_text(encoding="utf-8"))
    for room, lines in sorted(rooms.items()):
        print(f"{lines:6d}  {room}")
    print(f"{rooms.total():6d}  all")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
