"""Runs as one HTML page of charts, which needs no network.

torchtitan-rd report outputs/debug
torchtitan-rd report outputs/a outputs/b --output a_and_b.html --picture generated/raster.png

Each RUN is the folder of a run (job.dump_folder); several are overlaid,
and what differs in their configs is listed.
"""

from pathlib import Path

from torchtitan_rd.commands.arguments import check_outputs
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.metrics.read import read_run
from torchtitan_rd.metrics.report import page
from torchtitan_rd.whole_file import whole_file


def main(arguments: list[str]) -> int:
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default: report.html")
    parser.add_argument(
        "--picture", type=Path, action="append", default=[], help="a PNG to show, such as a raster"
    )
    chosen = parser.parse_args(arguments)
    check_outputs(chosen, "output")
    text = page([read_run(folder) for folder in chosen.runs], chosen.picture)
    with whole_file(chosen.output, "--output") as part:
        part.write_text(text, encoding="utf-8")
    print(f"{chosen.output} ({len(text) / 1024:.0f} KiB)")
    return 0
