"""Ravens in vLLM: slow, and only where VLLM_PYTHON names a Python that has vLLM and the plugin
(docs/serving.md).

Compared with transformers' remote code of the same folders, in float32. vLLM's attention on CPUs wants heads
of 32 features.
"""

import json
import os
import re
import subprocess
import time
import urllib.request

import pytest
import torch

from tests.launch import free_port
from tests.models.raven.remote import export
from tests.models.raven.tiny import RETROFITTED, tiny_raven
from tests.vllm.test_plugin import ROOT
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files

HERE = ROOT / "tests" / "vllm"
PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM"),
]

WIDE = {"dim": 128, "n_heads": 4, "ffn_dim": 192, "vocab_size": 258, "max_seq_len": 256}
SHAPES = {
    "sandwich": WIDE,
    "biased groups": {
        **WIDE,
        "tie_word_embeddings": False,
        "n_kv_heads": 2,
        "clip_qkv": 0.5,
        "qk_norm": True,
    },
    "post": {**WIDE, "block": "post", "qk_bias": False, "n_kv_heads": 2, "state_init": "unit"},
    "retrofit": {**WIDE, **RETROFITTED, "head_dim": 64},
}
SHARED = "latest-m4-compress-s2"
LEAVING = {"mean_recurrence": 20, "exit_criterion": "latent-diff", "exit_threshold": 0.1}
CASES = {
    "4 iterations": ("sandwich", {"mean_recurrence": 4, "kv_cache": "full"}),
    "9 iterations, shared": ("sandwich", {"mean_recurrence": 9, "kv_cache": SHARED}),
    "biased groups": ("biased groups", {"mean_recurrence": 4, "kv_cache": "full"}),
    "biased groups, shared": ("biased groups", {"mean_recurrence": 7, "kv_cache": SHARED}),
    "post, another seed": ("post", {"mean_recurrence": 4, "kv_cache": "compress-s4", "state_seed": 7}),
    "retrofit": ("retrofit", {"mean_recurrence": 4, "kv_cache": "full"}),
    "retrofit, shared": ("retrofit", {"mean_recurrence": 7, "kv_cache": SHARED}),
    "leaving, shared": ("sandwich", {**LEAVING, "kv_cache": SHARED}),
    "leaving, newest": ("sandwich", {**LEAVING, "kv_cache": "latest-m4"}),
    "leaving, newest of eight": ("sandwich", {**LEAVING, "kv_cache": "latest-m4-compress-s16"}),
}
PROMPTS = [[5, 9, 200, 77], list(range(1, 21)), [250], list(range(100, 109))]
NEW = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, fields in SHAPES.items():
        place = tmp_path_factory.mktemp("made") / name.replace(" ", "_")
        made[name] = export(tiny_raven(**fields), place)
        for file, content in tokenizer_files("bytes").files.items():
            (place / file).write_bytes(content)
    return made


def run(script, *arguments, **more):
    """By the Python of vLLM -> lines of JSON."""
    done = subprocess.run(
        [PYTHON, script, *arguments], capture_output=True, text=True, env=environment(), timeout=1500, **more
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def environment():
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    """Case -> transformers, singles, batch, again -> one answer a prompt."""
    cases = [(str(folders[shape]), settings) for shape, settings in CASES.values()]
    given = json.dumps(cases), json.dumps(PROMPTS), str(NEW)
    return dict(zip(CASES, run(HERE / "beside.py", *given), strict=True))


def assert_alike(answers, expected):
    for one, other in zip(answers, expected, strict=True):
        assert len(one["ids"]) == NEW and one["ids"] == other["ids"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_and_their_probabilities_equal_those_of_the_exported_code(case, answers):
    assert_alike(answers[case]["singles"], answers[case]["transformers"])


@pytest.mark.parametrize("case", [case for case in CASES if "leaving" not in case])
def test_a_batch_of_different_lengths_equals_singles_and_repeats(case, answers):
    """Where the whole step leaves at once, it does not."""
    assert_alike(answers[case]["batch"], answers[case]["singles"])
    assert_alike(answers[case]["again"], answers[case]["batch"])


def test_the_cases_tell_iterations_strategies_and_seeds_apart(answers):
    """Else equal answers would say nothing."""
    said = [json.dumps([one["ids"] for one in answers[case]["transformers"]]) for case in CASES]
    assert len(set(said)) == len(said)
    for case in CASES:
        steps = {step for one in answers[case]["transformers"] for step in one["steps"]}
        assert (len(steps) > 3 and max(steps) <= 20) if "leaving" in case else len(steps) == 1


def test_the_server_answers_over_http(folders, answers, tmp_path):
    _, settings = CASES["9 iterations, shared"]
    port, log = free_port(), tmp_path / "log"
    flags = f"--depth {settings['mean_recurrence']} --kv {settings['kv_cache']} --dtype float32"
    sizes = f"--max-model-len 128 --kv-cache-memory-bytes {2**28}"
    place = f"--host 127.0.0.1 --port {port} --served-model-name raven"
    flags = f"{flags} {sizes} {place}"
    command = ["bash", ROOT / "serve_raven.sh", folders["sandwich"], *flags.split()]
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=environment()) as server,
    ):
        try:
            wait_for(server, port, log)
            asked = {"model": "raven", "prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0}
            asked |= {"ignore_eos": True, "return_token_ids": True}
            (choice,) = post(port, "/v1/completions", asked)["choices"]
            assert choice["token_ids"] == answers["9 iterations, shared"]["transformers"][0]["ids"]
            text = post(port, "/v1/completions", {"model": "raven", "prompt": "The module", "max_tokens": 8})
            assert text["usage"]["prompt_tokens"] >= len("The module")
        finally:
            server.terminate()
            server.wait(60)


def wait_for(server, port, log):
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(2)
    raise AssertionError(log.read_text()[-3000:])


def post(port, path, asked):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


REFUSED = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
for folder, overrides, more in json.loads(sys.argv[1]):
    try:
        given = EngineArgs(folder, dtype="float32", hf_overrides=overrides, max_model_len=64, **more)
        given.create_engine_config()
        print("{}")
    except Exception as error:
        print(json.dumps({"said": str(error)}))
"""


def test_vllm_says_in_the_first_process_what_cannot_be_served(folders, tmp_path):
    folder = str(folders["sandwich"])
    asked = [
        ({"mean_recurrence": 0}, {}, "mean_recurrence = 0 must be a number of iterations from 1"),
        ({"kv_cache": "latest"}, {}, "kv_cache = 'latest' is no strategy that is served"),
        ({"kv_cahce": "full"}, {}, "a raven has no field 'kv_cahce'; did you mean 'kv_cache'"),
        ({"exit_criterion": "latent-diff"}, {}, "use kv_cache = 'latest-m4' with exit_criterion"),
        ({"exit_criterion": "latent-diff", "kv_cache": "latest-m4"}, {}, "add --enforce-eager"),
        ({}, {"tensor_parallel_size": 3}, "tensor.parallel.size = 3 does not divide|divisible by tensor"),
    ]
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    answers = run(script, json.dumps([(folder, *case[:2]) for case in asked]))
    for (_, _, expected), answer in zip(asked, answers, strict=True):
        assert re.search(expected, answer.get("said", "")), answer


def test_lm_eval_through_vllm_equals_lm_eval_through_transformers(folders, tmp_path):
    words = ["The module", "A class", "An object of", "This function returns", "Values that", "If the list"]
    rows = [
        {"question": word, "choices": [" is a name", " 1234"], "label": n % 2} for n, word in enumerate(words)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    common["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    choice = {"task": "choice", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    choice |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    rolling = {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
    rolling |= {"doc_to_target": "{{question}}", "metric_list": [{"metric": "bits_per_byte"}]}
    for task in (choice, rolling):  # JSON is YAML
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))

    given = str(folders["sandwich"]), str(tmp_path), "4", "choice", "rolling"
    (said,) = run(HERE / "harness_beside.py", *given)
    theirs, ours = said["through_transformers"], said["through_vllm"]
    for task in ("choice", "rolling"):
        numbers = [torch.tensor(numbers_of(by[task]), dtype=torch.float64) for by in (theirs, ours)]
        assert len(numbers[0]) >= len(rows)
        torch.testing.assert_close(numbers[1], numbers[0], atol=1e-3, rtol=0)
    assert ours["metrics"]["choice"]["acc,none"] == theirs["metrics"]["choice"]["acc,none"]
    assert ours["metrics"]["rolling"]["bits_per_byte,none"] == pytest.approx(
        theirs["metrics"]["rolling"]["bits_per_byte,none"], abs=1e-3
    )


def numbers_of(said):
    """The numbers in nested lists, in order; truth values are as numbers."""
    if isinstance(said, list):
        return [number for part in said for number in numbers_of(part)]
    return [{"True": 1.0, "False": 0.0}[said] if said in ("True", "False") else float(said)]
