"""`torchtitan-rd generate` and `generate-spikes`, as a user calls them."""

import io
import json
import re
import shlex
import subprocess
from argparse import Namespace

import numpy as np
import pytest
import torch

from tests.conversion.common import ROOT, tiny, weights_of
from tests.ranks import run_on_ranks
from torchtitan_rd.__main__ import main
from torchtitan_rd.commands.arguments import device_of
from torchtitan_rd.commands.generate_spikes import _parser as spikes_parser
from torchtitan_rd.conversion.dcp import write_dcp
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files
from torchtitan_rd.job import Environment

BYTES = {"vocab_size": 258, "max_seq_len": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """-> name -> step folder."""
    root, places = tmp_path_factory.mktemp("models"), {}
    for name, family, fields in (
        ("llama", "llama3", BYTES),
        ("raven", "raven", BYTES),
        ("bare", "llama3", {"max_seq_len": 64}),
        ("spikes", "llama3", {"vocab_size": 256, "max_seq_len": 8192}),
    ):
        places[name] = root / name / "step-1"
        places[name].mkdir(parents=True)
        files = tokenizer_files("bytes").files if fields is BYTES else {}
        write_dcp(weights_of(tiny(family, **fields), family, files=files), places[name], "step-1")
    return places


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_text_comes_to_stdout_and_figures_to_stderr(models, capsys):
    status, out, err = call(
        capsys, "generate", models["llama"], "--prompt", "ab", "--max-new-tokens", 9, "--ignore-eos"
    )
    assert status == 0 and out.endswith("\n") and len(out) > 1
    assert "9 tokens in" in err and "KV cache" in err


def test_every_token_is_told_with_its_iterations_as_json(models, capsys):
    arguments = [
        "generate",
        models["raven"],
        "--prompt",
        "ab",
        "--prompt",
        "c",
        "--max-new-tokens",
        5,
        "--json",
    ]
    arguments += [
        "--depth",
        6,
        "--exit",
        "kl",
        "--exit-threshold",
        "0.01",
        "--kv",
        "latest-m4",
        "--ignore-eos",
    ]
    _, out, _ = call(capsys, *arguments)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt_ids"] for line in lines] == [[256, 97, 98], [256, 99]]
    assert all(len(line["ids"]) == len(line["steps"]) == len(line["exit_values"]) == 5 for line in lines)
    assert all(
        1 <= n <= 6 and len(v) == n
        for line in lines
        for n, v in zip(line["steps"], line["exit_values"], strict=True)
    )


def test_depths_stand_side_by_side(models, capsys):
    common = ["generate", models["raven"], "--prompt", "ab", "--max-new-tokens", 4, "--ignore-eos"]
    _, out, err = call(capsys, *common, "--depths", "1,3")
    assert (
        "depth 1" in out.splitlines()[0]
        and "depth 3" in out.splitlines()[0]
        and err.count("iterations a token") == 2
    )


def test_an_exit_policy_comes_from_a_file(models, capsys, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('criterion = "latent-diff"\nthreshold = 1e9\nmin_steps = 2\nkv = "latest-m4"\n')
    common = ["generate", models["raven"], "--prompt", "ab", "--max-new-tokens", 4, "--json", "--ignore-eos"]
    _, out, _ = call(capsys, *common, "--exit-policy", policy)
    assert json.loads(out)["steps"] == [2] * 4
    policy.write_text("criterion = 3")
    assert call(capsys, *common, "--exit-policy", policy)[::2] == (
        1,
        f"ConfigError: {policy}: criterion = 3 must be a str\n",
    )


def test_lines_are_answered_until_the_end_of_the_input(models, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n\ncd\n"))
    arguments = ["--interactive", "--max-new-tokens", 4, "--ignore-eos", "--temperature", 0]
    status, _, err = call(capsys, "generate", models["llama"], *arguments)
    assert status == 0 and err.count("4 tokens in") == 2


def on_a_rank(rank: int, world_size: int, arguments: list[str]) -> tuple[int, str]:
    import contextlib

    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(arguments)
    return status, out.getvalue()


def test_two_ranks_print_what_one_prints(models, capsys):
    prompts = [part for letter in "abc" for part in ("--prompt", letter)]
    arguments = [
        "generate",
        str(models["raven"]),
        *prompts,
        "--max-new-tokens",
        "6",
        "--json",
        "--temperature",
        "1",
    ]
    _, alone, _ = call(capsys, *arguments)

    def rows(text):
        return [(line["ids"], line["text"]) for line in map(json.loads, text.splitlines())]

    (status, first), (_, second) = run_on_ranks(2, on_a_rank, arguments)
    assert status == 0 and second == "" and rows(first) == rows(alone) and len(rows(alone)) == 3


@pytest.mark.parametrize("model", ["llama", "bare"])
def test_two_ranks_print_the_answer_to_a_single_prompt(models, capsys, model):
    prompt = ["--prompt", "ab"] if model == "llama" else ["--prompt-ids", "3 9 4"]
    arguments = ["generate", str(models[model]), *prompt, "--max-new-tokens", "6", "--ignore-eos"]
    _, alone, _ = call(capsys, *arguments)
    (_, first), (_, second) = run_on_ranks(2, on_a_rank, arguments)
    assert first == alone and len(alone) > 5 and second == ""


def test_a_conversation_is_one_rank_s(models):
    arguments = ["generate", str(models["llama"]), "--interactive"]
    assert [status for status, _ in run_on_ranks(2, on_a_rank, arguments)] == [1, 1]


def test_cuda_is_the_gpu_of_the_rank(monkeypatch):
    """With its number, which a process group asks for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environment = Environment(rank=6, local_rank=2, world_size=8, local_world_size=4, log_level="WARNING")
    for given, expected in (("cuda", "cuda:2"), (None, "cuda:2"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert str(device_of(Namespace(device=given), environment)) == expected


def test_the_seconds_are_those_of_all_batches(models, capsys, monkeypatch):
    """Of two batches, each a second long by this clock."""
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    prompts = ["--prompt", "a", "--prompt", "b"]
    arguments = ["generate", models["llama"], *prompts, "--batch-size", 1, "--max-new-tokens", 3]
    _, _, err = call(capsys, *arguments, "--ignore-eos")
    assert "6 tokens in 5.0 s" in err, "two readings a batch, and one at the beginning and at the end"


def chat_tokenizer(folder):
    """Of bytes, with a template."""
    for name, content in tokenizer_files("bytes").files.items():
        (folder / name).write_bytes(content)
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_chat_takes_the_template_of_the_given_tokenizer_and_reads_it_once(
    models, capsys, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer

    read, original = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *args, **kw: (read.append(args), original(*args, **kw))[1]
    )
    arguments = ["generate", models["llama"], "--chat", "--tokenizer", chat_tokenizer(tmp_path)]
    arguments += ["--prompt", "hi", "--prompt", "yo", "--system", "s", "--max-new-tokens", 3, "--json"]
    status, out, _ = call(capsys, *arguments)
    prompts = [bytes(json.loads(line)["prompt_ids"]).decode() for line in out.splitlines()]
    assert status == 0 and prompts == ["s:s;u:hi;", "s:s;u:yo;"] and len(read) == 1


def test_a_conversation_is_remembered(models, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nyo\n"))
    seen = []
    monkeypatch.setattr(
        "torchtitan_rd.commands.generate.encode_chat",
        lambda tokenizer, messages: (seen.append([m["role"] for m in messages]), [97])[1],
    )
    arguments = ["--interactive", "--chat", "--tokenizer", chat_tokenizer(tmp_path), "--system", "s"]
    assert call(capsys, "generate", models["llama"], *arguments, "--max-new-tokens", 3)[0] == 0
    assert seen == [["system", "user"], ["system", "user", "assistant", "user"]]


def test_a_policy_and_the_command_line_may_not_name_two_strategies(models, capsys, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('criterion = "kl"\nkv = "latest-m4"\n')
    common = ["generate", models["raven"], "--prompt", "ab", "--max-new-tokens", 2, "--exit-policy", policy]
    assert call(capsys, *common, "--kv", "latest-m4")[0] == 0
    status, _, err = call(capsys, *common, "--kv", "full")
    assert status == 1 and "names kv = 'latest-m4': leave out --kv" in err
    policy.write_text('criterion = "kl"\n')
    assert call(capsys, *common, "--kv", "skip")[0] == 0


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("llama", ["--max-new-tokens", "70"], "more than the model's context of 64: shorten one of them"),
        ("raven", ["--exit", "entropy"], "exit criterion 'entropy' is unknown; did you mean 'entropy-diff'?"),
        ("raven", ["--kv", "latest"], "kv = 'latest' is no strategy; did you mean 'latest-m4'?"),
        ("raven", ["--depth", "0"], "depth = 0 must be at least 1"),
        ("raven", ["--depths", "4,x"], "--depths 4,x: whole numbers"),
        ("missing", [], "does not exist: name a step-N folder"),
        ("llama", ["--model", "raven"], "holds a llama3; use --model llama3"),
        ("bare", [], "has no tokenizer: name one with --tokenizer, or give ids with --prompt-ids"),
        ("llama", ["--temperature", "-1"], "temperature = -1.0 must be 0 (the most likely token)"),
        ("bare", ["--prompt-ids", "3 99"], "prompt 0 has the id 99, but the model's vocabulary is 0..60"),
        ("bare", ["--prompt-ids", "3 x"], "ids are whole numbers"),
        ("llama", ["--depth", "4"], "depth = 4: a llama3 has no recurrence"),
        ("llama", ["--exit", "kl"], "exit criterion: a llama3 has no recurrence"),
        ("llama", ["--chat"], "has no chat template"),
        ("raven", ["--draft-steps", "9"], "draft_steps = 9 must be below the depth of 6"),
        ("raven", ["--draft-steps", "2", "--temperature", "1"], "temperature 0"),
        ("raven", ["--exit-threshold", "0"], "--exit-threshold has no effect without --exit"),
        ("raven", ["--full-depth-prompt"], "--full-depth-prompt has no effect without --exit"),
        ("raven", ["--lookahead", "4"], "--lookahead has no effect without --draft-steps"),
        ("llama", ["--system", "be brief"], "--system has no effect without --chat"),
        ("raven", ["--depth", "4", "--depths", "1,2"], "--depth and --depths: give one of them"),
        ("raven", ["--exit", "none", "--min-steps", "2"], "--min-steps has no effect without --exit"),
        ("llama", ["--temperature", "0", "--top-k", "4"], "--top-k has no effect with temperature 0"),
        ("raven", ["--draft-steps", "2", "--min-p", "0.1"], "--min-p has no effect with temperature 0"),
        ("llama", ["--interactive"], "--prompt has no effect with --interactive"),
        ("llama", ["--init-scale", "0"], "init_scale: a llama3 has no recurrence; leave it out"),
        ("llama", ["--revision", "main"], "which is no repository on the hub"),
        ("llama", ["--device", "gpu"], "--device gpu: it is cpu or cuda"),
        ("llama", ["--device", "cuda"], "--device cuda: there is no GPU here"),
        ("llama", ["--chat", "--prompt-ids", "3"], "--prompt-ids are taken as they are: leave out --chat"),
    ],
)
def test_a_mistake_is_one_line(models, capsys, model, arguments, message, tmp_path):
    place = models.get(model, tmp_path / "missing")
    prompt = [] if "--prompt-ids" in arguments else ["--prompt", "ab"]
    status, out, err = call(capsys, "generate", place, *prompt, *arguments)
    assert status == 1 and out == "" and message in err and err.count("\n") == 1


def test_prompts_that_are_no_utf_8_are_one_line(models, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"abc\xff")
    status, out, err = call(capsys, "generate", models["llama"], "--prompts-file", tmp_path / "prompts.txt")
    assert status == 1 and out == "" and "is no UTF-8 (byte 3): convert it" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [["--prompts-file", "f"], ["--prompt-ids", "3"], ["--depths", "1,2"], ["--json"], ["--batch-size", "1"]],
)
def test_what_a_conversation_cannot_use_is_refused(models, capsys, flags):
    status, _, err = call(capsys, "generate", models["llama"], "--interactive", *flags)
    assert status == 1 and f"{flags[0]} has no effect with --interactive" in err and err.count("\n") == 1


def test_spikes_are_continued_bin_by_bin(models, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = [
        "generate-spikes",
        models["spikes"],
        "--dataset",
        "synthetic",
        "--data-idx",
        3,
        "--split",
        "train",
    ]
    status, out, _ = call(capsys, *arguments, "--ctx-t", 2, "--gen-t", 3, "--out", tmp_path, "--raster")
    path = tmp_path / "synthetic-train-sample-3-2-3.npz"
    assert status == 0 and out.splitlines() == [str(path), str(path.with_suffix(".png"))]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found = np.load(path)
    width = int(found["n_neurons"]) + 1
    assert (
        len(found["prompt"]) == 2 * width and len(found["gen"]) == 3 * width and len(found["gt"]) == 5 * width
    )
    assert np.array_equal(found["gt"][: 2 * width], found["prompt"])
    starts = found["gen"].reshape(3, width) == 255
    assert starts[:, 0].all() and not starts[:, 1:].any() and len(np.unique(found["gen"])) > 20
    again = call(capsys, *arguments, "--ctx-t", 2, "--gen-t", 3, "--out", tmp_path / "b", "--seed", 1)
    assert again[0] == 0 and not np.array_equal(np.load(tmp_path / "b" / path.name)["gen"], found["gen"])


def test_recordings_from_nothing_begin_with_a_tenth_of_the_neurons(models, capsys, tmp_path):
    arguments = [
        "generate-spikes",
        models["spikes"],
        "--unconditional",
        "--n-neurons",
        40,
        "--gen-t",
        2,
        "--batch-size",
        2,
    ]
    assert call(capsys, *arguments, "--out", tmp_path)[0] == 0
    first, second = (np.load(tmp_path / f"unconditional-sample-40-2-{i}.npz") for i in (0, 1))
    assert first["prompt"][0] == 255 and (first["prompt"][1:] == 1).sum() == 4 and len(first["gt"]) == 0
    assert np.array_equal(first["prompt"], second["prompt"]) and not np.array_equal(
        first["gen"], second["gen"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "rodents"], "--dataset rodents is no data set of spikes; did you mean 'rodent'?"),
        (["--dataset", "synthetic", "--data-idx", "-1"], "--data-idx -1: synthetic has the rows 0 to"),
        (["--dataset", "synthetic", "--ctx-t", "5000"], "--ctx-t 5000: row 0 of synthetic has"),
        (["--unconditional", "--gen-t", "500"], "more than the model's context of 8192"),
        (["--unconditional", "--ctx-t", "3"], "--ctx-t has no effect with --unconditional"),
        (["--dataset", "synthetic", "--n-neurons", "3"], "--n-neurons has no effect without --unconditional"),
        (["--unconditional", "--seed", "-1"], "--seed -1 must be at least 0"),
        (["--unconditional", "--out", __file__], "is no folder to write to: File exists"),
    ],
)
def test_a_mistake_about_recordings_is_one_line(models, capsys, arguments, message):
    status, _, err = call(capsys, "generate-spikes", models["spikes"], *arguments)
    assert status == 1 and message in err and err.count("\n") == 1


def test_a_full_disk_leaves_no_part_of_a_recording(models, capsys, tmp_path, monkeypatch):
    def full(part, **arrays):
        part.write_bytes(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    arguments = ["--unconditional", "--n-neurons", "4", "--gen-t", "1", "--out", tmp_path]
    status, _, err = call(capsys, "generate-spikes", models["spikes"], *arguments)
    assert status == 1 and "cannot be written: No space left on device" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_the_arguments_is_told_before_the_model_is_read(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments, message in (
        (["--raster"], "--raster needs matplotlib: pip install 'torchtitan_rd[plots]'"),
        (["--temperature", "0", "--top-k", "3"], "--top-k has no effect with temperature 0"),
    ):
        status, _, err = call(capsys, "generate-spikes", "missing", *arguments)
        assert status == 1 and message in err and "missing" not in err


@pytest.mark.parametrize("flag", ["--ctx-t", "--gen-t", "--n-neurons", "--batch-size"])
def test_numbers_of_recordings_below_one_are_named(models, capsys, flag):
    with pytest.raises(SystemExit) as ended:
        main(["generate-spikes", str(models["spikes"]), flag, "0"])
    assert ended.value.code == 2 and f"argument {flag}: 0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(ROOT.glob("generate_*.sh")), ids=lambda path: path.name)
def test_every_script_calls_the_command_with_arguments_that_it_has(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    (line,) = re.findall(
        r"^python -m torchtitan_rd generate-spikes (.*)$", script.read_text(), flags=re.MULTILINE
    )
    words = shlex.split(line)
    assert words[-1] == "$@" and words[0] == "$CHECKPOINT"
    chosen = spikes_parser().parse_args(words[:-1])
    assert chosen.dataset == script.name.split("_")[1] and chosen.split == "test" and chosen.raster
