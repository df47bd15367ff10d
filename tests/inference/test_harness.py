"""lm_eval on a checkpoint and on its export: the same numbers. Offline: tasks and data are files here."""

import json
from pathlib import Path

import pytest
import yaml

from tests.inference.runs import train
from torchtitan_rd.__main__ import main
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import to_hf, with_tokenizer
from torchtitan_rd.errors import ConfigError

pytest.importorskip("lm_eval")

TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[0]}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words = ["The module", "A class", "An object of", "This function returns", "Values that", "If the list"]
    rows = [
        {"question": word, "choices": [" is a name", " 1234"], "label": n % 2} for n, word in enumerate(words)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, fields in TASKS.items():
        common = {"task": name, "dataset_path": "json", "test_split": "test"}
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **data, **fields}))
    return folder


@pytest.fixture(scope="module", params=["llama3", "raven"])
def trained(request, tmp_path_factory):
    """-> family, step folder, export."""
    folder = tmp_path_factory.mktemp(request.param)
    replaced = (
        {} if request.param == "raven" else {"n_heads = 2\n": "n_heads = 2\nn_kv_heads = 2\nn_layers = 2\n"}
    )
    train(folder, request.param, "debug-demo" if request.param == "raven" else "debug", **replaced)
    step = folder / "dump" / "checkpoint" / "step-6"
    to_hf(with_tokenizer(open_dcp(step)), folder / "exported", verify=False)
    return request.param, step, folder / "exported"


def evaluate(model: str, arguments: dict, tasks: Path, names=tuple(TASKS), **options) -> dict:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from torchtitan_rd.inference import harness  # noqa: F401  (makes the model known)

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(names),
        task_manager=manager,
        bootstrap_iters=0,
        device="cpu",
        **options,
    )
    return {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()} | {
        f"{task} result": row for task, row in found["results"].items()
    }


def scores(found: dict) -> list[float]:
    """All log-likelihoods."""
    choices = [float(nats) for sample in found["local_choice"] for ((nats, _),) in sample]
    return choices + [float(value[0][0]) for value in found["local_rolling"]]


@pytest.mark.parametrize("trained", ["llama3"], indirect=True)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_checkpoint_has_the_numbers_of_its_export(trained, tasks, batch_size):
    _, step, exported = trained
    ours = evaluate("torchtitan_rd", {"pretrained": str(step)}, tasks, batch_size=batch_size)
    theirs = evaluate("hf", {"pretrained": str(exported), "dtype": "float32"}, tasks, batch_size=1)
    assert scores(ours) == pytest.approx(scores(theirs), rel=1e-4)
    assert ours["local_generation"] == theirs["local_generation"]
    assert ours["local_choice result"]["acc,none"] == theirs["local_choice result"]["acc,none"]


@pytest.mark.parametrize("trained", ["raven"], indirect=True)
@pytest.mark.parametrize("depth", [2, 6])
def test_a_recurrent_checkpoint_has_the_numbers_of_its_export_at_two_depths(trained, tasks, depth):
    """From a first state of zeros on both sides: each draws its own noise otherwise."""
    _, step, exported = trained
    ours = evaluate("torchtitan_rd", {"pretrained": str(step), "depth": depth, "init_scale": 0.0}, tasks)
    arguments = {"pretrained": str(exported), "dtype": "float32", "trust_remote_code": True}
    theirs = evaluate("hf", {**arguments, "mean_recurrence": depth, "state_init": "zero"}, tasks)
    assert scores(ours) == pytest.approx(scores(theirs), rel=1e-4)


@pytest.mark.parametrize("trained", ["raven"], indirect=True)
def test_an_exit_policy_changes_the_numbers_up_to_those_of_full_depth(trained, tasks):
    _, step, _ = trained
    arguments = {"pretrained": str(step), "depth": 6, "init_scale": 0.0}
    names = ("local_choice", "local_rolling")
    full, early, never = (
        scores(evaluate("torchtitan_rd", {**arguments, **exits}, tasks, names))
        for exits in (
            {},
            {"exit": "latent-diff", "exit_threshold": 1e9},
            {"exit": "latent-diff", "exit_threshold": 0.0},
        )
    )
    one = scores(evaluate("torchtitan_rd", {**arguments, "depth": 1}, tasks, names))
    assert never == pytest.approx(full, rel=1e-5) and early == pytest.approx(one, rel=1e-5)
    assert early != pytest.approx(full, rel=1e-4)


@pytest.mark.parametrize("trained", ["llama3"], indirect=True)
def test_the_commands_print_the_table_of_lm_eval(trained, tasks, tmp_path, capsys):
    _, step, exported = trained
    arguments = [
        "--tasks",
        "['local_choice']",
        "--include_path",
        str(tasks),
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    assert (
        main(["eval", "hf-lm-eval", str(exported), *arguments, "--limit", "4", "--save_dir", str(tmp_path)])
        == 0
    )
    assert "local_choice" in capsys.readouterr().out
    assert "acc,none" in yaml.safe_load((tmp_path / "results.yaml").read_text())["results"]["local_choice"]
    assert main(["eval", "hf-lm-eval", str(exported), "--tasks", "nothing_like_it"]) == 1
    assert "--tasks: lm_eval knows no nothing_like_it" in capsys.readouterr().err
    command = ["eval", "lm-eval", "run", "--model", "torchtitan_rd", "--model_args", f"pretrained={step}"]
    assert main([*command, "--tasks", "local_choice", "--include_path", str(tasks), "--device", "cpu"]) == 0
    assert "local_choice" in capsys.readouterr().out


@pytest.mark.parametrize("trained", ["llama3"], indirect=True)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": 4}, "a llama3 has no recurrence"),
        ({"dtype": "float8"}, "dtype=float8 is none of"),
        ({"max_length": 1 << 30}, "max_length=1073741824 must be between 2"),
        ({"exit": "kll"}, "did you mean 'kl'?"),
        ({"tokenizer": "none"}, "has no tokenizer"),
    ],
)
def test_bad_model_arguments_are_named(trained, given, message):
    from torchtitan_rd.inference.harness import TorchtitanRD

    with pytest.raises(ConfigError, match=message):
        TorchtitanRD(str(trained[1]), **given)
