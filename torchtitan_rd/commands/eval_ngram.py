"""The loss of add-alpha smoothed n-gram counts: what a model has to beat.

torchtitan-rd eval ngram --n 3 --dataset primate
torchtitan-rd eval ngram --n 2 --dataset rodent --path rows/ --test-path held_out.parquet --test-split train
torchtitan-rd eval ngram --n 2 --dataset pydoc-train --test-dataset pydoc-validation

Counts are of the train split, the loss is that of the test split.
"""

import argparse
import math
from collections.abc import Iterable, Iterator

import numpy as np
from tabulate import tabulate

from torchtitan_rd.commands.arguments import at_least_1, check_outputs, refuse
from torchtitan_rd.commands.eval_loss import write_json
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.data import (
    DataSet,
    DatasetKeys,
    Tokenizer,
    build_encoder,
    dataset_vocab_size,
    get_dataset,
    load_tokenizer,
    shared_data,
)
from torchtitan_rd.data.sources import open_source
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.ngram import NGram


def main(kind: str, arguments: list[str]) -> int:
    chosen = _parser().parse_args(arguments)
    check_outputs(chosen, "output")
    test_dataset = chosen.test_dataset or chosen.dataset
    same = test_dataset == chosen.dataset and chosen.test_path in (None, chosen.path)
    if same and chosen.test_split == chosen.split:
        raise ConfigError(
            "--test-split: the loss would be that of the data that was counted; name another split"
        )
    test_path = chosen.test_path or (chosen.path if test_dataset == chosen.dataset else None)
    train, test = _keys(chosen, chosen.dataset, chosen.path), _keys(chosen, test_dataset, test_path)

    counted_set = DataSet(train, get_dataset(train, split=chosen.split))
    scored_set = DataSet(test, get_dataset(test, split=chosen.test_split))
    if shared := shared_data(counted_set, chosen.split, scored_set, chosen.test_split):
        raise ConfigError(
            f"--test-split {chosen.test_split}: {shared} would be counted and then scored: name other data "
            "with --test-dataset, --test-path or --test-split"
        )

    on_text = counted_set.row.needs_tokenizer or scored_set.row.needs_tokenizer
    if not on_text:
        refuse(chosen, ("tokenizer",), "on data that is no text")
    tokenizer = load_tokenizer(chosen.tokenizer or "bytes") if on_text else None
    vocab_size = chosen.vocab_size or dataset_vocab_size(train, tokenizer)

    def samples(keys: DatasetKeys, split: str) -> Iterable[np.ndarray]:
        """Up to --max-tokens."""
        return _first(_samples(keys, split, tokenizer, vocab_size, chosen.seed), chosen.max_tokens)

    model = NGram(chosen.n, vocab_size, chosen.alpha)
    counted = model.count(samples(train, chosen.split))
    score = model.score(samples(test, chosen.test_split))

    nats = score.nats / score.tokens
    result = {
        **{name: getattr(chosen, name) for name in ("n", "alpha", "dataset", "source_dataset")},
        "vocab_size": vocab_size,
        "counted": counted,
        "tokens": score.tokens,
        "nats_per_token": nats,
        "bits_per_token": nats / math.log(2),
        "perplexity": math.exp(nats),
    }

    print(tabulate([result.values()], headers=list(result), floatfmt=".6g"))
    write_json(result, chosen.output)
    return 0


def _keys(chosen: argparse.Namespace, dataset: str, path: str | None) -> DatasetKeys:
    return DatasetKeys(
        dataset=dataset, dataset_path=path, column=chosen.column, source_dataset=chosen.source_dataset
    )


def _samples(
    keys: DatasetKeys, split: str, tokenizer: Tokenizer | None, vocab_size: int, seed: int
) -> Iterator[np.ndarray]:
    """The ids of each sample. Raises ConfigError for packed rows."""
    row = get_dataset(keys, split=split)
    if row.kind not in ("spikes", "text"):
        raise ConfigError(
            f"--dataset {keys.dataset}: n-grams are counted in spikes and text, not in {row.kind}"
        )
    encoder = build_encoder(keys, row.kind, tokenizer, vocab_size)
    source, _ = open_source(keys, row, encoder, seed, split)
    for index in range(len(source)):
        yield source.tokens(index)


def _first(samples: Iterable[np.ndarray], most: int | None) -> Iterable[np.ndarray]:
    """Samples until there are `most` tokens, the last one cut; None: all."""
    for sample in samples:
        yield sample if most is None else sample[:most]
        if most is not None:
            most -= len(sample)
            if most <= 0:
                return


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("eval ngram", __doc__)
    add = parser.add_argument
    add("--n", type=int, default=1, help="tokens of an n-gram (default 1)")
    add("--alpha", type=float, default=1.0, help="added to each count (default 1)")

    add("--dataset", required=True, help="a row of the table of data sets")
    add("--path", help="where to read it instead")
    add("--split", default="train", help="that is counted (default train)")
    add("--test-dataset", help="default: --dataset")
    add("--test-path", help="default: --path")
    add("--test-split", default="test", help="that is scored (default test)")
    add("--source-dataset", help="only rows whose column source_dataset holds this")

    add("--column", help="that is read; default: the data set's")
    add("--tokenizer", help="of text (default bytes)")
    add("--vocab-size", type=at_least_1, help="default: 256 for spikes, the tokenizer's for text")
    add("--max-tokens", type=at_least_1, help="of each split, the first ones")
    add("--seed", type=int, default=0, help="of data that is made here")
    add("--output", help="write the result there as JSON")
    return parser
