"""Trains what a TOML or YAML file describes, on one rank or on those that torchrun starts.

torchtitan-rd pretrain --config configs/tutorial-60M.yaml
STREAM_HF_DATA=1 torchrun --nproc_per_node=2 -m torchtitan_rd pretrain --config configs/tutorial-60M.yaml \\
    --metrics_args.enable_wandb false

`train` under the name and with the flag of the CLM tutorial: --config X is --job.config_file X. Further
--section.key value (or --section_args.key value) override the file. docs/commands.md describes it.
"""

from torchtitan_rd import train
from torchtitan_rd.errors import ConfigError

FLAG, KEY = "--config", "--job.config_file"


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    renamed = [
        KEY + argument.removeprefix(FLAG) if argument.partition("=")[0] == FLAG else argument
        for argument in arguments
    ]
    files = [argument for argument in renamed if argument.partition("=")[0] == KEY]
    if len(files) != 1:
        raise ConfigError(f"pretrain needs one file: {FLAG} X.toml, or {KEY} X.toml; {len(files)} were named")
    return train.main(renamed)
