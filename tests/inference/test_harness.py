"""lm_eval on a checkpoint and on its export: the same numbers. Offline: tasks and data are files here."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.inference.runs import train
from torchtitan_rd.__main__ import main
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import to_hf, with_tokenizer
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files
from torchtitan_rd.errors import ConfigError

lm_eval = pytest.importorskip("lm_eval.tasks") and pytest.importorskip("lm_eval")

from torchtitan_rd.inference import harness  # noqa: E402  (it makes the model known to lm_eval)

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
        common = {"task": name, "dataset_path": "json", "test_split": "test", "fewshot_split": "test"}
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **data, **fields}))
    return folder


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    """The thousands of tasks that lm_eval brings take half a minute to list."""
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


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

    manager = TaskManager(include_path=str(tasks))
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


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chatting(trained, tmp_path_factory):
    """-> step folder, a tokenizer with a chat template, and the export that has it."""
    family, step, _ = trained
    assert family == "raven"
    folder = tmp_path_factory.mktemp("chat")
    files = tokenizer_files("bytes").files
    config = json.loads(files["tokenizer_config.json"])
    files = {**files, "tokenizer_config.json": json.dumps({**config, "chat_template": CHAT}).encode()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    to_hf(with_tokenizer(open_dcp(step), str(folder)), folder / "exported", verify=False)
    return step, folder, folder / "exported"


@pytest.mark.parametrize("trained", ["raven"], indirect=True)
@pytest.mark.parametrize("depth", [2, 6])
def test_the_lines_of_huginns_readme_give_the_same_on_a_checkpoint_and_its_export(
    depth, chatting, tasks, tmp_path
):
    """As a command line. With top_k=1 sampling has one outcome, whoever draws."""
    step, tokenizer, exported = chatting
    sides = {
        "torchtitan_rd": f"pretrained={step},depth={depth},init_scale=0.0,tokenizer={tokenizer}",
        "hf": f"pretrained={exported},dtype=float32,trust_remote_code=True,state_init=zero,"
        f"mean_recurrence={depth}",
    }
    found = {}
    for model, arguments in sides.items():
        command = ["eval", "lm-eval", "run", "--model", model, "--model_args", arguments]
        command += ["--tasks", "local_generation,local_choice", "--include_path", str(tasks), "--device=cpu"]
        command += ["--apply_chat_template=True", "--fewshot_as_multiturn", "--num_fewshot=1"]
        command += ["--system_instruction=Be brief.", "--batch_size=auto"]
        command += [f"--gen_kwargs=do_sample=True,temperature=0.7,top_k=1,num_steps={depth}"]
        command += ["--max_batch_size=2", "--log_samples", "--output_path", str(tmp_path / model)]
        assert main(command) == 0
        found[model] = {
            name: [json.loads(line) for line in next((tmp_path / model).rglob(f"samples_{name}_*")).open()]
            for name in ("local_generation", "local_choice")
        }

    ours, theirs = found["torchtitan_rd"], found["hf"]
    prompt = ours["local_generation"][1]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("<|system|>Be brief.") and prompt.endswith("<|assistant|>")
    assert prompt.count("<|user|>") == 2
    for name, rows in ours.items():
        for row, other in zip(rows, theirs[name], strict=True):
            assert row["arguments"] == other["arguments"]
            if name == "local_generation":
                assert row["resps"] == other["resps"]
            else:
                nats = [[float(answer[0]) for (answer,) in side["resps"]] for side in (row, other)]
                assert nats[0] == pytest.approx(nats[1], rel=1e-4)


@pytest.mark.parametrize("trained", ["raven"], indirect=True)
def test_generated_text_depends_on_the_arguments_of_generation(trained):
    """num_steps, and the temperature with the seed."""
    model = harness.TorchtitanRD(str(trained[1]), init_scale=0.0, batch_size="auto", max_gen_toks=24)

    def said(seed=0, **kwargs):
        model.seed = seed
        requests = [SimpleNamespace(args=(text, kwargs)) for text in ("The module", "A class of")]
        return model.generate_until(requests)

    assert said(num_steps=1) != said(num_steps=6) == said()
    drawn = said(do_sample=True, temperature=1.0)
    assert drawn == said(do_sample=True, temperature=1.0) != said(1, do_sample=True, temperature=1.0)
    assert said(do_sample=False, temperature=1.0) == said()
    for wrong, message in (
        ({"do_sample": True}, "needs a temperature above 0"),
        ({"beams": 2}, "beams mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            said(**wrong)
    with pytest.raises(ConfigError, match="has no chat template"):
        model.apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("trained", ["raven"], indirect=True)
def test_the_exported_code_takes_its_arguments_from_gen_kwargs(trained, tasks):
    arguments = {"pretrained": str(trained[2]), "dtype": "float32", "trust_remote_code": True}

    def said(**kwargs):
        text = {"until": ["\n\n"], "max_gen_toks": 12, "init_scale": 0.0, **kwargs}
        return evaluate("hf", arguments, tasks, ["local_generation"], gen_kwargs=text)["local_generation"]

    one = said(num_steps=1)
    assert said(criterion="latent-diff", exit_threshold=1e9) == one != said(num_steps=6)


@pytest.mark.parametrize("trained", ["llama3"], indirect=True)
def test_a_text_loses_its_beginning_and_never_what_is_scored(trained):
    model = harness.TorchtitanRD(str(trained[1]), max_length=8)
    context, continuation = [*range(65, 85)], [97, 98, 99]
    ((nats, _),) = model._loglikelihood_tokens([(("a", "b"), context, continuation)])
    ((cut, _),) = model._loglikelihood_tokens([(("a", "b"), context[-6:], continuation)])
    ((whole, _),) = model._loglikelihood_tokens([(("a", "b"), [70], [*range(65, 73)])])
    assert nats == cut and whole < 0
    for wrong in ([], [*range(65, 74)]):
        with pytest.raises(ConfigError, match=f"a continuation of {len(wrong)} tokens cannot be scored"):
            model._loglikelihood_tokens([(("a", "text"), [70], wrong)])


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
        ({"exit_threshold": 0.1}, "exit_threshold=0.1 waits for no criterion: name one with exit="),
        ({"min_steps": 3}, "min_steps=3 waits for no criterion"),
        ({"exit": "kl", "exit_policy": "p.toml"}, "exit: exit_policy says it already"),
        ({"min_steps": 3, "exit_policy": "p.toml"}, "min_steps: exit_policy says it already"),
    ],
)
def test_bad_model_arguments_are_named(trained, given, message):
    with pytest.raises(ConfigError, match=message):
        harness.TorchtitanRD(str(trained[1]), **given)
