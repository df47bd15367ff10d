"""The stages of a rehearsal in order: what needs no process first, then the life of the small run."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.data import DATASETS, build_encoder, get_dataset, is_hub_name
from torchtitan_rd.diagnosis.disk import check_writable
from torchtitan_rd.errors import TorchtitanRDError
from torchtitan_rd.inference.loading import open_weights
from torchtitan_rd.job import Environment
from torchtitan_rd.rehearsal.rows import Wanted, make_up_chat_tokenizer, make_up_rows, sample_rows
from torchtitan_rd.rehearsal.shrink import Change, Small, rehearsed, small_ranks
from torchtitan_rd.rehearsal.stages import Life
from torchtitan_rd.rehearsal.verdicts import Line, NoGo, NotTried, Verdict
from torchtitan_rd.run_plan import fewest_ranks, reads_hub_tokenizer, resolve
from torchtitan_rd.validation import validation_keys

TRAINING, VALIDATION = "training", "validation"

NEEDS = {
    "config": (),
    "plan": ("config",),
    "folder": ("config",),
    "weights": ("config",),
    "data": ("plan",),
    "shrink": ("plan", "folder", "weights", "data"),
    "train": ("shrink",),
    "kill": ("train",),
    "resume": ("kill",),
    "validate": ("resume",),
    "export": ("resume",),
    "generate": ("export",),
}
"""The stages in order, and those that each one needs: one mistake does not hide the next."""


@dataclass(frozen=True)
class Options:
    """arguments: the file and the overrides of the run. ranks: that it is to run on; None: the fewest that
    its degrees allow. folder: an empty one for all that is written. limit: seconds of one stage.
    hub_answers: asks whether the hub can be reached; called if data or a tokenizer lies there.
    """

    arguments: list[str]
    environment: Environment
    ranks: int | None
    folder: Path
    limit: float
    hub_answers: Callable[[], bool]


class Rehearsal:
    """made_up: what the run will need and the rehearsal had to invent. changes: every key that was altered,
    once the stage `shrink` is done.
    """

    def __init__(self, options: Options):
        self.options = options
        self.made_up: list[str] = []
        self.changes: list[Change] = []
        self.paths: dict[str, Path] = {}
        self.is_offline = False
        self.life: Life | None = None

    def lines(self) -> Iterator[Line]:
        """A line for each stage, as it ends."""
        standing: dict[str, str] = {}  # stage -> the one that stands in its way
        for name, needed in NEEDS.items():
            cause = next((standing[one] for one in needed if one in standing), None)
            if cause is not None:
                standing[name] = cause
                yield Line(Verdict.NOT_TRIED, name, 0.0, f"{cause} stands in the way")
                continue
            line = self._tried(name)
            if line.verdict is Verdict.NO_GO:
                standing[name] = name
            yield line

    def _tried(self, name: str) -> Line:
        stage = getattr(self.life or self, name)
        begun = time.perf_counter()
        try:
            verdict, text = Verdict.GO, stage()
        except (TorchtitanRDError, NoGo) as error:
            verdict, text = Verdict.NO_GO, str(error)
        except NotTried as reason:
            verdict, text = Verdict.NOT_TRIED, str(reason)
        return Line(verdict, name, time.perf_counter() - begun, text)

    def config(self) -> str:
        """The file with its overrides; what it leaves to the command line is made up."""
        environment = self.options.environment
        loaded = load(self.options.arguments, environment)
        self.ranks = self.options.ranks or fewest_ranks(loaded.config.parallelism)
        # A file of Huginn's means something else on other ranks.
        loaded = load(self.options.arguments, replace(environment, rank=0, world_size=self.ranks))
        self.asked = loaded.config
        self.completed = self._completed(loaded.config)
        return "\n".join([f"{len(loaded.origins)} keys are set", *loaded.warnings])

    def _completed(self, config: JobConfig) -> JobConfig:
        """With rows and a chat tokenizer in place of those that the file leaves open."""
        training, model = config.training, config.model
        row = DATASETS.get(training.dataset)
        if row and not (training.mixture or row.hub or row.samples or training.dataset_path):
            self.made_up.append("training.dataset_path")
            rows = self.options.folder / "made_up"
            for split in {"train", config.validation.split}:
                make_up_rows(Wanted(training, row, split, training.seq_len, model.vocab_size or 256), rows)
            # Files of their own for each row of a large batch cannot be made up.
            new = {"dataset_path": str(rows), "lane_per_file": False}
            config = config.model_copy(update={TRAINING: training.model_copy(update=new)})

        names = [source.dataset for source in training.mixture] or [training.dataset]
        has_chat = any(name in DATASETS and DATASETS[name].kind == "chat" for name in names)
        if has_chat and model.tokenizer_path == "bytes":
            self.made_up.append("model.tokenizer_path")
            folder = self.options.folder / "tokenizer"
            make_up_chat_tokenizer(folder)
            model = model.model_copy(update={"tokenizer_path": str(folder)})
            config = config.model_copy(update={"model": model})
        return config

    def plan(self) -> str:
        """Every contradiction of the run, on its own number of ranks and at its own size."""
        self.is_offline = lies_on_hub(self.completed) and not self.options.hub_answers()
        environment = replace(self.options.environment, rank=0, world_size=self.ranks)
        self.planned = plan = resolve(self.completed, environment)
        return (
            f"{self.ranks} ranks, {plan.dims.replicate} x {plan.dims.shard}; "
            f"{plan.spec.name} {self.asked.model.flavor}, {plan.count_parameters():,} parameters, "
            f"vocabulary {plan.shape.vocab_size}; {plan.tokens_per_step:,} tokens a step"
        )

    def folder(self) -> str:
        """job.dump_folder, or the folder in which it would be made, takes a file."""
        return check_writable(Path(self.asked.job.dump_folder), "job.dump_folder")

    def weights(self) -> str:
        """checkpoint.initial_load_path holds weights of this family."""
        path = self.asked.checkpoint.initial_load_path
        if path is None:
            return "none are given: the run starts from its seed, or from step-0 of its folder"
        found = open_weights(Path(path), model=self.asked.model.name)
        return f"{path} holds a {found.spec.name}; whether each tensor fits is asked when the run starts"

    def data(self) -> str:
        """The first rows of every data set, judged as training judges them; or made-up ones."""
        config, plan = self.completed, self.planned
        wanted = [(one.name or TRAINING, one.keys, one.row, "train") for one in plan.sets]
        if config.validation.enable:
            keys = validation_keys(config.validation, config.training, plan.batch.data_degree)
            row = get_dataset(keys, VALIDATION, config.validation.split)
            wanted.append((VALIDATION, keys, row, config.validation.split))

        said = []
        for name, keys, row, split in wanted:
            what = f"{name}: {keys.dataset}"
            if row.samples:
                said.append(f"{what} is made here")
                continue
            want = Wanted(keys, row, split, self._small().seq_len, plan.vocab_size)
            said.append(f"{what} ({split}): {self._sample(name, want)}")
        return "\n".join(said)

    def _sample(self, name: str, want: Wanted) -> str:
        """Puts rows where the rehearsal reads them, and says whose they are."""
        folder, keys, plan = self.options.folder / "rows" / name, want.keys, self.planned
        encoder = build_encoder(keys, want.row.kind, plan.tokenizer, plan.vocab_size)
        why_not = sample_rows(want, encoder, folder, reaches_hub=not self.is_offline)
        self.paths[name] = folder
        if why_not is not None:
            make_up_rows(want, folder)
            self.made_up.append(f"rows of {keys.dataset} ({want.split})")
            reason = "the hub does not answer here, and its cache has none" if self.is_offline else why_not
            return f"rows are made up in its schema: {reason}"
        if keys.dataset_path != self.asked.training.dataset_path and "training.dataset_path" in self.made_up:
            return "rows are made up in its schema: the file leaves training.dataset_path to the command line"
        return "its first rows are good"

    def shrink(self) -> str:
        """The small config, which must be without contradictions on both of its numbers of ranks."""
        small = self._small()
        config, self.changes = rehearsed(small)
        ranks, environment = small.ranks, replace(self.options.environment, rank=0)
        plan = resolve(config, replace(environment, world_size=ranks.total))
        other = config.parallelism.model_copy(update=dict(ranks.resumed))
        other_config = config.model_copy(update={"parallelism": other})
        resolve(other_config, replace(environment, world_size=ranks.resumed_total))

        file = self.options.folder / "rehearsal.toml"
        config.write(file)
        kinds = {one.row.kind for one in plan.sets}
        self.life = Life(
            config=config,
            file=file,
            folder=self.options.folder,
            ranks=ranks,
            kind="spikes" if "spikes" in kinds else "text" if plan.tokenizer else "packed",
            limit=self.options.limit,
            has_rows=bool(self.paths),
            is_offline=self.is_offline,
        )
        other_ranks = "" if config.training.stream else f" and {ranks.resumed_total}"
        return (
            f"{plan.count_parameters():,} parameters on {ranks.total}{other_ranks} ranks; "
            f"{len(self.changes)} keys are altered"
        )

    def _small(self) -> Small:
        ranks = small_ranks(self.planned, self.completed.parallelism.model_dump())
        return Small(self.asked, self.completed, self.planned, ranks, self.options.folder, self.paths)


def lies_on_hub(config: JobConfig) -> bool:
    """Whether a run reads data or a tokenizer of the hub, or of its cache."""
    training, validation = config.training, config.validation
    named = [(source.dataset, source.dataset_path) for source in training.mixture]
    named = named or [(training.dataset, training.dataset_path)]
    if validation.enable:
        path = validation.dataset_path or training.dataset_path
        named.append((validation.dataset or training.dataset, path))
    on_hub = any(
        is_hub_name(path) if path else name in DATASETS and DATASETS[name].hub is not None
        for name, path in named
    )
    return on_hub or reads_hub_tokenizer(config)
