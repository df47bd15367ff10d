"""Strategies of the cache against a dictionary of every key ever made, and exits of single sequences."""

import time

import pytest
import torch
import torch.nn.functional as F

from tests.inference.common import loaded, prompts
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import CRITERIA, ExitPolicy, Settings, Sharing, Stepper, generate, think
from torchtitan_rd.inference.cache import KVCache
from torchtitan_rd.inference.sharing import NAMES
from torchtitan_rd.models.attention import KeyValues

CORE = 2  # layers in the recurrence of the tiny model
DEPTH = 12
STRATEGIES = (
    *("full", "skip", "latest-m4", "available-m4", "always-last-m4"),
    *("compress-s2", "compress-s4", "compress-r1", "compress-r2", "compress-r4", "compress-anchor"),
    *("latest-m4-compress-s4", "latest-m4-compress-r1", "latest-m4-compress-r4", "latest-m4-compress-anchor"),
)


class Remembered(KeyValues):
    """One application of a layer (`before`, (iteration, layer) or `after`), in a memory that keeps all of one
    sequence: (slot, position) -> (key, value). Written from the words of the strategies, position by
    position."""

    def __init__(self, memory: dict, strategy: str, place: tuple, positions: range):
        self.memory, self.strategy, self.place, self.positions = memory, strategy, place, positions

    def slot(self) -> tuple:
        kind, number, layer = self.place
        if kind != "core":
            return (kind, layer)
        i = number * CORE + layer
        *_, rule = self.strategy.split("compress-")
        if "compress" not in self.strategy:
            return ("core", i)
        if rule == "anchor":
            return ("core", i if number < 8 else 8 * CORE + i % CORE)
        return ("core", i % int(rule[1:]) if rule[0] == "s" else i // int(rule[1:]))

    def found(self, position: int) -> tuple | None:
        """The key and value that this position shows here."""
        mine = self.slot()
        if mine[0] != "core":
            return self.memory[mine, position]
        period = CORE
        if "compress-r" in self.strategy:
            period = max(CORE // int(self.strategy.split("compress-r")[1]), 1)
        same = [
            slot
            for slot, p in self.memory
            if p == position and slot[0] == "core" and (slot[1] - mine[1]) % period == 0
        ]
        if self.strategy.startswith("always-last"):
            return self.memory[max(same), position]
        if self.strategy.startswith(("latest", "available")):
            return self.memory[max(slot for slot in same if slot <= mine), position]
        return self.memory.get((mine, position))

    def attend(self, q, k, v):
        out = []
        for i, position in enumerate(self.positions):
            self.memory[self.slot(), position] = (k[:, :, i], v[:, :, i])
        for i, position in enumerate(self.positions):
            kept = [entry for p in range(position + 1) if (entry := self.found(p)) is not None]
            keys, values = (torch.stack(part, dim=2) for part in zip(*kept, strict=True))
            out.append(F.scaled_dot_product_attention(q[:, :, i : i + 1], keys, values, enable_gqa=True))
        return torch.cat(out, dim=2)


def remembered_forward(model, memory, strategy, ids, start, depth):
    """-> logits of the last position, by the model's own blocks."""
    steps = model.spec.steps(model.model)
    positions = range(start, start + len(ids))
    rotary = steps.rotary(start + len(ids))[start:]

    def caches(kind, count, number=0):
        return [Remembered(memory, strategy, (kind, number, layer), positions) for layer in range(count)]

    e = steps.embed(torch.tensor([ids]), rotary, caches("before", steps.layout.before))
    s = torch.stack([steps.first_state(0, position, 1.0) for position in positions])[None]
    for step in range(depth):
        s = steps.iterate(s, e, rotary, caches("core", CORE, step))
    return steps.predict(s, rotary, caches("after", steps.layout.after), 1)[:, -1]


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_a_strategy_reads_what_its_words_say_when_positions_have_different_depths(strategy, monkeypatch):
    model = loaded("raven")
    prompt, new = prompts(5, 6)
    depths = [3, DEPTH, 1, 7, DEPTH, 2, 9]  # of the prompt, then of each new token
    policy = ExitPolicy("latent-diff")
    monkeypatch.setattr(
        ExitPolicy, "leaves", lambda self, values: torch.full_like(values, next(left), dtype=torch.bool)
    )
    stepper = Stepper(model.spec, model.model, batch=1, positions=11, depth=DEPTH, strategy=strategy)
    memory, start = {}, 0
    for ids, depth in zip([prompt, *([id_] for id_ in new)], depths, strict=True):
        left = iter([step == depth for step in range(1, DEPTH + 1)])
        found = think(stepper, torch.tensor([ids]), policy=policy)
        assert found.steps.tolist() == [depth]
        expected = remembered_forward(model, memory, strategy, ids, start, depth)
        torch.testing.assert_close(found.logits, expected, atol=2e-4, rtol=1e-4)
        start += len(ids)


def test_strategies_that_differ_think_differently():
    """Else the comparison above could not tell them apart."""
    model = loaded("raven")
    exits = ExitPolicy("latent-diff", threshold=0.5)

    def values(kv):
        report = generate(model, prompts(5, 8), Settings(max_new_tokens=10, depth=DEPTH, kv=kv, exits=exits))
        assert len(set(report.rows[0].steps)) > 2
        return str([answer.exit_values for answer in report.rows])

    kinds = (
        "full",
        "latest-m4",
        "always-last-m4",
        "latest-m4-compress-s4",
        "latest-m4-compress-anchor",
        "compress-r4",
    )
    assert len({values(kv) for kv in kinds}) == len(kinds)
    assert values("skip") == values("full") and values("available-m4") == values("latest-m4")


@pytest.mark.parametrize(
    ("strategy", "slots"),
    [
        *(
            ("full", 24),
            ("skip", 24),
            ("latest-m4", 24),
            ("always-last-m4", 2),
            ("compress-s2", 2),
            ("compress-s4", 4),
        ),
        *(("compress-r2", 12), ("compress-r8", 3), ("compress-anchor", 18), ("latest-m4-compress-s16", 16)),
    ],
)
def test_the_cache_has_the_bytes_of_its_slots(strategy, slots):
    model = loaded("raven", n_kv_heads=2, qk_bias=False)
    stepper = Stepper(model.spec, model.model, batch=3, positions=10, depth=DEPTH, strategy=strategy)
    assert stepper.cache.nbytes == 2 * (1 + slots + 1) * 3 * 10 * 2 * 8 * 4  # slots, B, T, H_kv, D, float32
    report = generate(model, prompts(4, 4, 4), Settings(max_new_tokens=6, depth=DEPTH, kv=strategy))
    assert report.kv_bytes == stepper.cache.nbytes


def test_the_cache_of_a_llama_has_the_bytes_of_its_layers():
    model = loaded("llama3")
    assert Stepper(model.spec, model.model, batch=2, positions=7).cache.nbytes == 2 * 2 * 2 * 7 * 2 * 8 * 4


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "none"])
def test_a_threshold_of_nothing_is_full_depth_and_of_infinity_is_one_step(criterion):
    model, given = loaded("raven"), prompts(5, 2, 7)

    def run(**options):
        return generate(model, given, Settings(max_new_tokens=6, **{"depth": 7, **options})).rows

    never, always = (0.0, float("inf"))
    if criterion == "argmax-stability":  # which leaves at and above its threshold
        never, always = always, never
    full, one = run(), run(depth=1)
    assert [answer.ids for answer in full] != [answer.ids for answer in one]
    found = run(exits=ExitPolicy(criterion, never))
    assert [(answer.ids, answer.steps) for answer in found] == [(answer.ids, [7] * 6) for answer in full]
    assert [len(values) for values in found[0].exit_values] == [7] * 6
    found = run(exits=ExitPolicy(criterion, always))
    assert [(answer.ids, answer.steps) for answer in found] == [(answer.ids, [1] * 6) for answer in one]


@pytest.mark.parametrize(
    "kv", ["full", "latest-m4", "always-last-m4", "compress-s4", "latest-m4-compress-r4"]
)
@pytest.mark.parametrize("criterion", ["entropy-diff", "argmax-stability", "latent-diff", "cosine"])
def test_a_sequence_in_a_batch_leaves_and_goes_on_as_it_does_alone(criterion, kv):
    model, given = loaded("raven"), prompts(9, 1, 5, 7)
    threshold = {"entropy-diff": 0.01, "argmax-stability": 2, "latent-diff": 0.5, "cosine": 0.2}[criterion]
    settings = Settings(max_new_tokens=8, depth=14, kv=kv, exits=ExitPolicy(criterion, threshold))
    together = generate(model, given, settings).rows
    alone = [generate(model, [prompt], settings).rows[0] for prompt in given]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert [answer.steps for answer in together] == [answer.steps for answer in alone]
    assert len({answer.steps[1] for answer in together}) > 1  # neighbours of different depths


def test_iterations_that_a_policy_demands_are_made_and_those_between_checks_too():
    model, given = loaded("raven"), prompts(5)
    common = {"max_new_tokens": 4, "depth": 9}
    (late,) = generate(model, given, Settings(**common, exits=ExitPolicy("kl", 99.0, min_steps=4))).rows
    assert late.steps == [4] * 4 and [len(values) for values in late.exit_values] == [4] * 4
    (seldom,) = generate(model, given, Settings(**common, exits=ExitPolicy("kl", 99.0, every=3))).rows
    assert seldom.steps == [3] * 4 and [len(values) for values in seldom.exit_values] == [1] * 4
    (prompt,) = generate(
        model, given, Settings(**common, exits=ExitPolicy("kl", 99.0, in_prefill=False))
    ).rows
    assert prompt.steps == [9, 1, 1, 1] and prompt.exit_values[0] == []


@torch.no_grad()
def test_the_values_of_every_criterion_are_those_of_its_formula():
    """From the states and logits of a forward without a cache, in float64."""
    model, (ids,) = loaded("raven"), prompts(6)
    depth, vocab = 8, model.shape.vocab_size
    steps, tokens = model.spec.steps(model.model), torch.tensor([ids])
    layers, states = model.model.transformer, []
    handle = layers.recurrence.iteration.register_forward_hook(
        lambda module, args, out: states.append(out[0].double())
    )
    first = torch.stack([steps.first_state(0, position, 1.0) for position in range(6)])
    common = {
        "initial_state": first[None],
        "early_read_outs": range(1, depth),
        "read_out": lambda x: x[0, -1].double(),
    }
    logits = model.model(tokens, num_steps=(depth, 0), **common)
    handle.remove()
    states = [first.double(), *states]

    entropy, p_kl, p_min, argmax, stable, expected = (
        100.0,
        [1 / vocab] * vocab,
        [1 / vocab] * vocab,
        -1,
        0,
        {},
    )
    for name in CRITERIA:
        expected[name] = []
    for t in range(depth):
        p = logits[t].softmax(-1)
        before, entropy = entropy, -sum(float(x) * float(torch.log(x + 1e-10)) for x in p)
        expected["entropy-diff"].append(abs(entropy - before))
        expected["kl"].append(sum(float(q * torch.log(q / x)) for q, x in zip(p_kl, p, strict=True)))
        cut = torch.tensor([float(x) if x >= 0.1 * p.max() else 1 / vocab for x in p], dtype=torch.float64)
        cut /= cut.sum()
        expected["minp-kl"].append(sum(float(q * torch.log(q / x)) for q, x in zip(p_min, cut, strict=True)))
        stable = stable + 1 if int(p.argmax()) == argmax else 0
        p_kl, p_min, argmax = p, cut, int(p.argmax())
        expected["argmax-stability"].append(stable)
        now, last = states[t + 1], states[t]
        relative = [float((a - b).norm() / a.norm()) for a, b in zip(now, last, strict=True)]
        expected["latent-diff"].append(sum(relative) / len(relative))
        turned = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(now, last, strict=True)]
        expected["cosine"].append(sum(turned) / len(turned))
    for name in set(CRITERIA) - {"none"}:
        never = float("inf") if name == "argmax-stability" else 0.0
        settings = Settings(max_new_tokens=1, depth=depth, exits=ExitPolicy(name, never))
        (answer,) = generate(model, [ids], settings).rows
        assert answer.exit_values[0] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_default_thresholds():
    defaults = {"entropy-diff": 1e-3, "kl": 1e-3, "minp-kl": 1e-5, "argmax-stability": 5, "latent-diff": 0.03}
    assert {name: CRITERIA[name].threshold for name in defaults} == defaults and CRITERIA[
        "cosine"
    ].threshold == 1e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latest", "did you mean 'latest-m4'"),
        ("compress-s3", "multiple of the model's 4 core layers"),
        ("compress-r3", "must divide the model's 4"),
        ("compress-s0", "at least 1"),
        ("full-", "is no strategy"),
        ("compress-", "is no strategy"),
        ("fullcompress-s4", "is no strategy"),
        ("latest-m4-compress", "is no strategy"),
        ("always-last-m4-compress-s4", "nothing is left to compress"),
        ("", "is no strategy"),
    ],
)
def test_a_wrong_strategy_is_refused_with_the_nearest_name(name, message):
    with pytest.raises(ConfigError, match=message):
        Sharing(name, core=4, depth=8)


def test_the_slots_that_are_counted_are_those_that_are_written():
    for name in (*NAMES, "compress-s6", "compress-r1", "compress-r6", "latest-m4-compress-r8"):
        for core in (1, 2):
            sharing = Sharing(name, core, 12)
            for steps in range(13):
                written = {sharing.slot(step, layer) for step in range(steps) for layer in range(core)}
                assert written == set(range(sharing.written(steps))), (name, core, steps)


def test_a_depth_beyond_the_memory_is_refused_at_once():
    begun = time.perf_counter()
    with pytest.raises(ConfigError, match=r"the cache needs .*a smaller depth"):
        generate(loaded("raven"), prompts(3), Settings(max_new_tokens=3, depth=10**10))
    assert time.perf_counter() - begun < 5  # it took minutes to count the slots of 1e8 iterations one by one


def test_a_cache_beyond_the_memory_is_refused_with_its_size():
    model = loaded("raven")
    with pytest.raises(ConfigError, match=r"the cache needs 3670016\.0 GiB \(14 slots.*compress-s4"):
        KVCache(model.spec.steps(model.model).layout, Sharing("full", 2, 6), 1, 2**40, torch.device("cpu"))
