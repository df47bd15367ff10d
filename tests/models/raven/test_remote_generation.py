"""models/raven/huggingface: `generate` with adaptive depth gives what torchtitan_rd.inference gives."""

import ast
import sys

import pytest
import torch

from tests.inference.common import loaded, prompts
from tests.models.raven.remote import export, fresh_code, load  # noqa: F401 (a fixture)
from tests.models.raven.tiny import some_tokens
from torchtitan_rd.conversion.pipeline import open_released
from torchtitan_rd.conversion.verification import transformers_logits
from torchtitan_rd.inference import CRITERIA, Drafting, ExitPolicy, Settings, generate
from torchtitan_rd.models.raven.hf import HF

transformers = pytest.importorskip("transformers")

DEPTH, NEW, SEED = 24, 8, 4
POST = {"sharp": 1.0, "block": "post"}  # converges, so that every criterion fires, but not for every token
BATCHES = {"one": (7,), "three, padded": (7, 2, 5)}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same weights here and there."""
    ours = loaded("raven", **POST)
    return ours, load(export(ours.model, tmp_path_factory.mktemp("remote") / "exported"))


def given(lengths):
    """-> prompts, and the same as a batch that is padded on the left."""
    rows = prompts(*lengths)
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return rows, {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}


def remote(model, batch, **kwargs):
    common = {"max_new_tokens": NEW, "do_sample": False, "num_steps": DEPTH, "state_seed": SEED}
    return model.generate(**batch, **{**common, "return_dict_in_generate": True, **kwargs})


def new_tokens(found, batch):
    return found.sequences[:, batch["input_ids"].shape[1] :].tolist()


def values_of(found, row):
    """What the criterion said of each token of a row, as `Answer.exit_values` has it."""
    by_token = [checks[:, row].tolist() for checks in found.exit_values]
    return [[value for value in checks if value == value] for checks in by_token]


@pytest.mark.parametrize("kv", ["full", "latest-m4-compress-s4"])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_tokens_steps_and_exit_values_are_those_of_the_package(criterion, lengths, kv, both):
    ours, model = both
    rows, batch = given(lengths)
    expected = generate(ours, rows, Settings(NEW, seed=SEED, depth=DEPTH, kv=kv, exits=ExitPolicy(criterion)))
    found = remote(model, batch, criterion=criterion, exit_threshold="auto", cache_lookup_strategy=kv)
    assert new_tokens(found, batch) == [answer.ids for answer in expected.rows]
    assert found.steps.tolist() == [answer.steps for answer in expected.rows]
    assert found.kv_bytes == expected.kv_bytes
    if criterion == "none":
        assert found.exit_values is None and (found.steps == DEPTH).all()
        return
    assert 1 < found.steps.min() < found.steps.max()
    for row, answer in enumerate(expected.rows):
        for told, known in zip(values_of(found, row), answer.exit_values, strict=True):
            assert told == pytest.approx(known, rel=1e-3, abs=1e-5)


def test_rows_take_different_depths_and_the_same_as_alone(both):
    _, model = both
    rows, batch = given((7, 2, 5))
    arguments = {"criterion": "latent-diff", "exit_threshold": 0.03, "cache_lookup_strategy": "latest-m4"}
    together = remote(model, batch, **arguments)
    assert len(set(together.steps.flatten().tolist())) > 1
    for row, prompt in enumerate(rows):
        alone = remote(model, {"input_ids": torch.tensor([prompt])}, **arguments)
        assert alone.sequences[0, len(prompt) :].tolist() == new_tokens(together, batch)[row]
        assert alone.steps[0].tolist() == together.steps[row].tolist()


OPTIONS = {
    "min_steps": ({"min_steps": 12}, {"min_steps": 12}),
    "every second": ({"check_criterion_every_n_steps": 2}, {"every": 2}),
    "a whole prompt": ({"do_not_exit_in_prefill": True}, {"in_prefill": False}),
    "threshold": ({"exit_threshold": 0.3}, {"threshold": 0.3}),
    "threshold as text": ({"exit_threshold": "0.3"}, {"threshold": 0.3}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_of_a_policy_does_what_it_does_in_the_package(option, both):
    ours, model = both
    rows, batch = given((7, 2, 5))
    theirs, policy = OPTIONS[option]
    start = {"exit_threshold": 0.03, **theirs}
    found = remote(model, batch, criterion="latent-diff", **start)
    exits = ExitPolicy("latent-diff", **{"threshold": 0.03, **policy})
    expected = generate(ours, rows, Settings(NEW, seed=SEED, depth=DEPTH, exits=exits))
    assert found.steps.tolist() == [answer.steps for answer in expected.rows]
    plain = remote(model, batch, criterion="latent-diff", exit_threshold=0.03)
    assert found.steps.tolist() != plain.steps.tolist()


def test_a_threshold_alone_takes_the_criterion_of_the_released_class(both):
    _, model = both
    _, batch = given((7,))
    alone = remote(model, batch, exit_threshold=0.02)
    named = remote(model, batch, exit_threshold=0.02, criterion="entropy-diff")
    assert alone.steps.tolist() == named.steps.tolist() and alone.steps.max() < DEPTH


@pytest.mark.parametrize("draft_steps", [2, 9])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_speculative_decoding_gives_the_tokens_of_plain_greedy_decoding(lengths, draft_steps, both):
    ours, model = both
    rows, batch = given(lengths)
    plain = model.generate(**batch, max_new_tokens=20, do_sample=False, num_steps=DEPTH, state_seed=SEED)
    found = remote(model, batch, draft_steps=draft_steps, lookahead_for_draft=3, max_new_tokens=20)
    assert torch.equal(found.sequences, plain)
    drafting = Drafting(draft_steps, 3)
    expected = generate(ours, rows, Settings(20, seed=SEED, depth=DEPTH, drafting=drafting))
    assert (found.drafted, found.accepted) == (expected.drafted, expected.accepted)


def test_a_lower_verification_threshold_accepts_every_draft(both):
    _, batch = given((7,))
    strict, loose = (
        remote(both[1], batch, draft_steps=2, max_new_tokens=20, verification_threshold=threshold)
        for threshold in (1, 1e-9)
    )
    assert strict.accepted < strict.drafted and loose.accepted == loose.drafted == 19


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_continuous_chain_starts_from_the_last_state(scale, both):
    ours, model = both
    rows, batch = given((7, 2, 5))
    found = remote(model, batch, continuous_compute=True, init_scale=scale, num_steps=3)
    expected = generate(ours, rows, Settings(NEW, seed=SEED, depth=3, continuous=True, init_scale=scale))
    assert new_tokens(found, batch) == [answer.ids for answer in expected.rows]
    anew = remote(model, batch, continuous_compute=False, init_scale=scale, num_steps=3)
    assert not torch.equal(anew.sequences, found.sequences)


@pytest.mark.parametrize("kv", ["full", "skip"])
def test_a_full_cache_alone_is_what_transformers_generates(kv, both):
    _, batch = given((7, 2, 5))
    plain = both[1].generate(**batch, max_new_tokens=NEW, do_sample=False, num_steps=5, state_seed=SEED)
    assert torch.equal(remote(both[1], batch, cache_lookup_strategy=kv, num_steps=5).sequences, plain)


def test_fewer_slots_take_less_memory(both):
    _, batch = given((7,))
    sizes = {kv: remote(both[1], batch, cache_lookup_strategy=kv).kv_bytes for kv in ("full", "compress-s4")}
    # Slots of prelude, core and coda; two core layers; 15 positions, the last of which is never written.
    slots = {"full": 2 + 2 * DEPTH, "compress-s4": 2 + 4}
    assert sizes == {kv: 2 * number * 15 * 32 * 4 for kv, number in slots.items()}


def test_rows_end_as_in_transformers_and_leave_no_trace_behind_their_end(both):
    """By an id, and by a criterion of the caller's."""
    _, model = both
    _, batch = given((7, 2, 5))
    common = {"max_new_tokens": NEW, "do_sample": False, "num_steps": 3, "state_seed": SEED}
    free = model.generate(**batch, **common)
    first = int(free[1, 7 + 2])  # what the second row says third
    plain = model.generate(**batch, **common, eos_token_id=first)
    assert (plain[1, 7 + 3 :] == 0).all()
    found = remote(model, batch, eos_token_id=first, cache_lookup_strategy="full", num_steps=3)
    drafted = remote(model, batch, eos_token_id=first, draft_steps=1, num_steps=3)
    for kind in (found, drafted):
        assert torch.equal(kind.sequences, plain)
        assert kind.steps.shape == (3, plain.shape[1] - 7)
        assert kind.steps[1].tolist() == [3] * 3 + [0] * (plain.shape[1] - 10)


@pytest.mark.parametrize("start", [{"state_seed": SEED}, {"state_seed": None, "init_scale": 0.0}], ids=str)
def test_sampling_penalties_scores_and_streams_are_those_of_transformers(start, both):
    _, model = both
    _, batch = given((7, 2, 5))
    common = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.3, "num_steps": 3}
    common |= {"output_scores": True, "output_logits": True, "num_return_sequences": 2, **start}
    results, streamed = [], []
    for extra in ({}, {"cache_lookup_strategy": "full"}):
        torch.manual_seed(0)
        results.append(remote(model, batch, **common, **extra))
    plain, found = results
    assert torch.equal(plain.sequences, found.sequences) and len(found.sequences) == 6
    for kind in ("scores", "logits"):
        torch.testing.assert_close(getattr(found, kind), getattr(plain, kind), atol=1e-4, rtol=0)

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            streamed.append(value.tolist())

        def end(self):
            streamed.append("end")

    _, one = given((7,))
    told = remote(model, one, criterion="kl", streamer=Streamer(), num_steps=3)
    assert streamed == [one["input_ids"].tolist(), *([id_] for id_ in new_tokens(told, one)[0]), "end"]


def test_without_a_seed_the_states_follow_the_global_generator(both):
    _, batch = given((7,))

    def run(seed):
        torch.manual_seed(seed)
        return remote(both[1], batch, criterion="latent-diff", state_seed=None).exit_values[0]

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_a_model_in_training_mode_and_one_in_bfloat16_generate_too(tmp_path):
    folder = export(loaded("raven").model, tmp_path / "exported")
    _, batch = given((7, 2, 5))
    training, rounded = load(folder).train(), load(folder, torch_dtype=torch.bfloat16)
    assert remote(training, batch, criterion="kl", num_steps=None).steps.max() <= 6
    for criterion in ("cosine", "kl", "none"):
        found = remote(rounded, batch, criterion=criterion)
        assert found.sequences.shape == (3, 7 + NEW) and found.steps.min() >= 1
    assert found.kv_bytes == remote(load(folder), batch, criterion="none").kv_bytes // 2


BAD = {
    "scale below 0": ({"criterion": "kl", "init_scale": -1.0}, "init_scale = -1.0 must be at least 0"),
    "no scale": ({"criterion": "kl", "init_scale": float("nan")}, "init_scale = nan must be at least 0"),
    "unknown criterion": ({"criterion": "kll"}, "exit criterion 'kll' is unknown; did you mean 'kl'?"),
    "no strategy": (
        {"cache_lookup_strategy": "lates-m4"},
        "cache_lookup_strategy: kv = 'lates-m4' is no strategy; did you mean 'latest-m4'?",
    ),
    "threshold": ({"criterion": "kl", "exit_threshold": -1}, "exit threshold -1.0 must be at least 0"),
    "text": ({"exit_threshold": "low"}, "exit_threshold = 'low' is neither a number nor 'auto'"),
    "alone": ({"min_steps": 3}, "min_steps: there is no criterion to wait for; known: entropy-diff, kl"),
    "depth": ({"criterion": "kl", "num_steps": 0}, "num_steps = 0 must be at least 1"),
    "no draft": ({"lookahead_for_draft": 4}, "lookahead_for_draft: name the iterations of a draft too"),
    "long draft": ({"draft_steps": 24}, "draft_steps = 24 must be below the depth of 24"),
    "draft and exit": ({"draft_steps": 2, "criterion": "kl"}, "draft_steps goes with no criterion"),
    "draft and draw": ({"draft_steps": 2, "do_sample": True}, "speculative decoding is greedy"),
    "draft and rule": ({"draft_steps": 2, "repetition_penalty": 2.0}, "goes with no penalty"),
    "mixed": ({"draft_steps": 2, "cache_lookup_strategy": "compress-s4"}, "mixes iterations"),
    "beams": ({"criterion": "kl", "num_beams": 2}, "criterion: beams have no common depth"),
    "no cache": ({"criterion": "kl", "use_cache": False}, "leave out use_cache=False"),
    "states": (
        {"criterion": "kl", "input_states": torch.zeros(1, 7, 32)},
        "input_states cannot be given together with criterion",
    ),
    "right padding": (
        {"criterion": "kl", "attention_mask": torch.tensor([[1] * 6 + [0]])},
        "prompts must be padded on the left",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_wrong_argument_is_one_clear_error_before_anything_is_computed(kind, both, monkeypatch):
    arguments, message = BAD[kind]
    _, batch = given((7,))
    monkeypatch.setattr(type(both[1]), "core_step", lambda *args: pytest.fail("the model was run"))
    with pytest.raises(ValueError) as error:
        remote(both[1], {}, **{**batch, **arguments})
    assert message in str(error.value)


def test_eager_attention_has_no_cache_of_slots(tmp_path):
    model = load(export(loaded("raven").model, tmp_path / "exported"), attn_implementation="eager")
    with pytest.raises(ValueError, match="criterion: attn_implementation must be 'sdpa'"):
        remote(model, given((7,))[1], criterion="kl")


@pytest.mark.parametrize("state", ["like-init", "zero"])
@torch.no_grad()
def test_the_parts_of_a_forward_give_the_forward(state, tmp_path):
    model = load(export(loaded("raven", state_init=state).model, tmp_path / "exported"))
    tokens = some_tokens()
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    for given_mask in (None, mask):
        e, block_idx = model.embed_inputs(tokens, given_mask)
        s = model.initialize_state(e, state_seed=SEED)
        expected = model(tokens, attention_mask=given_mask, num_steps=5, input_states=s)
        step = 0
        while step < 5:
            s, block_idx, step = model.iterate_one_step(
                e, s, block_idx=block_idx, attention_mask=given_mask, current_step=step
            )
        found = model.predict_from_latents(s, given_mask)
        assert torch.equal(found.logits, expected.logits) and block_idx == 0 + 5 * 2
    assert not model.initialize_state(e, scale=0.0).any()
    torch.manual_seed(0)
    first = model.initialize_state(e)
    torch.manual_seed(0)
    assert torch.equal(model.initialize_state(e), first)


def test_the_exported_files_need_no_package_and_come_from_one_place():
    files = HF.code_files()
    assert len(files) == len(HF.code) and {f"{name}.py" for name in ("stepper", "exits", "cache")} < set(
        files
    )
    for name, content in files.items():
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, name
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {name.split(".")[0] for name in names if not getattr(node, "level", 0)}
            assert roots <= sys.stdlib_module_names | {"torch", "transformers"}, name


def test_an_older_export_without_the_new_files_is_still_read(both, tmp_path):
    """The package reads it with its own code; the folder's own runs on as it did."""
    folder = export(both[0].model, tmp_path / "exported")
    names = {path.name for path in folder.glob("*.py")}
    for name in names - {"configuration_raven.py", "blocks_raven.py", "modeling_raven.py"}:
        (folder / name).unlink()
    weights = open_released(folder)
    assert transformers_logits(folder, weights).isfinite().all()
