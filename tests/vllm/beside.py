"""Ravens in vLLM and in transformers, by the code that was exported with them; run by the Python of vLLM's
environment (test_serving.py).

    python beside.py '[[FOLDER, {"mean_recurrence": 4, "kv_cache": "full"}], ...]' '[[1, 2, 3], ...]' TOKENS

Prints a line of JSON for each folder with settings: the ids of each prompt's new tokens and their log
probabilities, by transformers a prompt at a time (with the iterations of each token), by vLLM a prompt at a
time, in one batch, and in the same batch again.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def by_transformers(folder: str, settings: dict, prompts: list[list[int]], count: int) -> list[dict]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    leaving = {}
    if settings.get("exit_criterion", "none") != "none":
        leaving = {"criterion": settings["exit_criterion"], "exit_threshold": settings["exit_threshold"]}
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            num_steps=settings["mean_recurrence"],
            state_seed=settings.get("state_seed", 0),
            cache_lookup_strategy=settings["kv_cache"],
            return_dict_in_generate=True,
            output_logits=True,
            **leaving,
        )
        ids = out.sequences[0, len(prompt) :].tolist()
        logprobs = [float(logits[0].log_softmax(-1)[i]) for logits, i in zip(out.logits, ids, strict=True)]
        answers.append({"ids": ids, "logprobs": logprobs, "steps": out.steps[0].tolist()})
    return answers


def by_vllm(folder: str, settings: dict, prompts: list[list[int]], count: int) -> dict[str, list[dict]]:
    import vllm

    llm = vllm.LLM(
        folder,
        dtype="float32",
        hf_overrides=settings,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_num_seqs=8,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=1)

    def answers(some):
        given = [{"prompt_token_ids": ids} for ids in some]
        outs = [request.outputs[0] for request in llm.generate(given, sampling, use_tqdm=False)]
        return [
            {
                "ids": list(out.token_ids),
                "logprobs": [at[i].logprob for at, i in zip(out.logprobs, out.token_ids, strict=True)],
            }
            for out in outs
        ]

    return {
        "singles": [answers([prompt])[0] for prompt in prompts],
        "batch": answers(prompts),
        "again": answers(prompts),
    }


def main(cases: str, prompts: str, count: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    given = [(*case, json.loads(prompts), int(count)) for case in json.loads(cases)]
    # First all of these: vLLM makes its own class known to transformers as the config of such a folder.
    known = [by_transformers(*case) for case in given]
    for case, expected in zip(given, known, strict=True):
        print(json.dumps({"transformers": expected, **by_vllm(*case)}), flush=True)
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
