"""Our models in lm-evaluation-harness (the optional extra `lm-eval`):
a checkpoint is evaluated where it lies.

    lm_eval model name: torchtitan_rd
    arguments: pretrained=STEP_OR_RUN_OR_HF_FOLDER,depth=8,exit=kl,exit_threshold=0.001,kv=latest-m4,...

`torchtitan-rd eval lm-eval ...` is lm_eval's own command line with this model known to it.

Texts are encoded as lm_eval's own `hf` model encodes them with the tokenizer that an export has. Logits of a
continuation come from one forward of the whole text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.exits import ExitPolicy
from torchtitan_rd.inference.generation import Settings, generate, padded_left
from torchtitan_rd.inference.loading import Loaded, load_model, transformers_tokenizer
from torchtitan_rd.inference.policy_file import read_policy
from torchtitan_rd.inference.sampling import Sampling
from torchtitan_rd.inference.stepper import Stepper, think

try:
    import lm_eval.models  # noqa: F401  (its own models are registered only while there are no others)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise ConfigError("this needs lm_eval: pip install 'torchtitan_rd[lm-eval]'") from None

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@register_model("torchtitan_rd")
class TorchtitanRD(TemplateLM):
    """pretrained: a step folder, the folder of a run, or an exported folder.
    tokenizer, device: as for `generate`.

    Of recurrent models: depth (None: the mean in training); exit, exit_threshold, exit_policy (a file),
    min_steps, kv: how a forward may end early. A text that is scored leaves as a whole: one number of
    iterations for all of it. max_length: tokens at most; longer texts lose their beginning, never the
    continuation that is scored. Raises ConfigError, CheckpointError.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        depth: int | None = None,
        exit: str | None = None,
        exit_threshold: float | None = None,
        exit_policy: str | None = None,
        min_steps: int | None = None,
        kv: str = "full",
        seed: int = 0,
        init_scale: float = 1.0,
    ):
        super().__init__()

        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype} is none of {', '.join(_DTYPES)}")

        given = {"exit": exit, "exit_threshold": exit_threshold, "min_steps": min_steps}
        for name, value in given.items():
            if value is not None and exit_policy is not None:
                raise ConfigError(f"{name}: exit_policy says it already; leave out one of them")
            if value is not None and exit is None:
                raise ConfigError(f"{name}={value} waits for no criterion: name one with exit=")

        self._device = torch.device(device or "cpu")
        self.loaded: Loaded = load_model(
            pretrained, tokenizer_path=tokenizer, dtype=_DTYPES[dtype], device=self._device
        )
        known = self.loaded.tokenizer
        if known is None:
            raise ConfigError(f"{pretrained} has no tokenizer: name one with tokenizer=")
        self._eos_id, self._bos_id = known.eos_id, known.bos_id

        self.pretrained = pretrained
        self.policy = None
        if exit is not None:
            self.policy = ExitPolicy(exit, exit_threshold, 1 if min_steps is None else min_steps)
        if exit_policy is not None:
            self.policy, kv = read_policy(Path(exit_policy), kv)
        self.depth = depth
        self.kv = kv
        self.seed = seed
        self.init_scale = init_scale
        self.add_bos_token, self.max_gen_toks = add_bos_token, max_gen_toks

        context = self.loaded.shape.max_seq_len
        self.max_length = context if max_length is None else int(max_length)

        if not 1 < self.max_length <= context:
            raise ConfigError(
                f"max_length={max_length} must be between 2 and the model's context of {context}"
            )
        # `auto` would try sizes until memory is exhausted: one text at a time is what always fits.
        self.batch_size = int(batch_size) if batch_size and not str(batch_size).startswith("auto") else 1
        self._settings(1).check(self.loaded, [])
        self.tokenizer = transformers_tokenizer(pretrained, tokenizer)

    @property
    def eot_token_id(self) -> int:
        eos = self._eos_id
        if eos is None and not self.loaded.source.eos_ids:
            raise ConfigError(f"the tokenizer of {self.pretrained} has no end of text")
        return self.loaded.source.eos_ids[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.eot_token_id if self._bos_id is None else self._bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.source.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What lm_eval notes beside the results."""
        return str(self.tokenizer.chat_template or "")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of {self.pretrained} has no chat template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As lm_eval's `hf` does it: what stands in front is the tokenizer's choice,
        or add_bos_token's; never two.
        """
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            special = False
        return self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The whole text, in windows that are scored once each and see as much as fits before them."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Any]:
        """requests: ((context, continuation), ids, ids) -> (summed log-probability,
        whether greedy gives it) each.
        """
        for names, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: it must have 1 to "
                    f"max_length={self.max_length}: {names[1][:60]!r}"
                )

        results: list[Any] = [None] * len(requests)
        by_length = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        for start in range(0, len(by_length), self.batch_size):
            numbers = by_length[start : start + self.batch_size]
            texts = [[*requests[n][1], *requests[n][2]][-self.max_length - 1 :] for n in numbers]
            for number, text, logits in zip(
                numbers, texts, self._logits([t[:-1] for t in texts]), strict=True
            ):
                names, _, continuation = requests[number]
                wanted = torch.tensor(text[-len(continuation) :], device=logits.device)
                log_p = logits[-len(wanted) :].log_softmax(-1)
                nats = log_p.gather(-1, wanted[:, None]).sum().item()
                results[number] = (nats, bool((log_p.argmax(-1) == wanted).all()))
                if names[0] or names[1]:
                    self.cache_hook.add_partial("loglikelihood", names, results[number])
        return results

    def _logits(self, texts: Sequence[list[int]]) -> list[torch.Tensor]:
        """-> (S, V) of each text, padded on the left to the longest."""
        tokens, real = padded_left(texts, self._device)
        longest = tokens.shape[1]
        stepper = Stepper(
            self.loaded.spec,
            self.loaded.model,
            batch=len(texts),
            positions=longest,
            depth=self.depth,
            strategy=self.kv,
            seed=self.seed,
            scale=self.init_scale,
        )
        thought = think(stepper, tokens, real=real, policy=self.policy)
        logits = stepper.predict(thought.state, keep=longest)
        return [row[longest - len(text) :] for row, text in zip(logits, texts, strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        results: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        for numbers in groups.values():
            settings = self._generation(dict(requests[numbers[0]].args[1]))
            for start in range(0, len(numbers), self.batch_size):
                part = numbers[start : start + self.batch_size]
                room = self.max_length - settings.max_new_tokens
                if room < 1:
                    raise ConfigError(
                        f"max_gen_toks = {settings.max_new_tokens} leaves no room in "
                        f"max_length={self.max_length}"
                    )
                prompts = [self.tok_encode(requests[n].args[0])[-room:] for n in part]
                report = generate(self.loaded, prompts, settings, numbers=part)
                for number, answer in zip(part, report.rows, strict=True):
                    results[number] = answer.text or ""
                    self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
        return results

    def _generation(self, given: dict[str, Any]) -> Settings:
        """lm_eval's gen_kwargs, with the names of transformers' generate.
        Raises ConfigError for unknown ones.
        """
        until = given.pop("until", None) or []
        stop = (until,) if isinstance(until, str) else tuple(until)
        most = given.pop("max_gen_toks", None) or given.pop("max_new_tokens", None) or self.max_gen_toks
        temperature = float(given.pop("temperature", 0.0) or 0.0)
        do_sample = given.pop("do_sample", None)
        if do_sample is False:
            temperature = 0.0
        if do_sample and not temperature:
            raise ConfigError("gen_kwargs: do_sample=True needs a temperature above 0")
        sampling = Sampling(
            temperature,
            given.pop("top_k", None),
            given.pop("top_p", None),
            given.pop("min_p", None),
            float(given.pop("repetition_penalty", 1.0)),
        )
        depth = given.pop("num_steps", self.depth)
        if given:
            raise ConfigError(f"gen_kwargs: {', '.join(given)} mean nothing here")
        return self._settings(int(most), sampling, tuple(text for text in stop if text), depth)

    def _settings(
        self,
        most: int,
        sampling: Sampling | None = None,
        stop: tuple[str, ...] = (),
        depth: int | None = None,
    ) -> Settings:
        return Settings(
            max_new_tokens=most,
            sampling=sampling or Sampling(0.0),
            seed=self.seed,
            stop=stop,
            depth=self.depth if depth is None else depth,
            kv=self.kv,
            exits=self.policy,
            init_scale=self.init_scale,
        )

    def get_model_info(self) -> dict[str, Any]:
        count = sum(parameter.numel() for parameter in self.loaded.model.parameters())
        return {
            "model_num_parameters": count,
            "model_source": str(self.loaded.source.folder),
            "depth": self.depth,
        }
