"""lm_eval on a raven through transformers and through vLLM; run by the Python of vLLM's environment
(test_serving.py).

    python harness_beside.py FOLDER TASKS_FOLDER ITERATIONS TASK ...

Prints one line of JSON: through which -> task -> [what the model said of each row].
"""

import importlib.metadata
import json
import os
import sys
from functools import partial
from unittest import mock

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def through_transformers(folder: str, iterations: int):
    """With a state_seed, which lm_eval has no argument for."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    model.forward = partial(model.forward, num_steps=iterations, state_seed=0)
    return HFLM(pretrained=model, tokenizer=folder, batch_size=1)


def through_vllm(folder: str, iterations: int):
    return harness().VLLM(
        folder,
        dtype="float32",
        max_model_len=128,
        batch_size="auto",
        max_num_seqs=8,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        hf_overrides={"mean_recurrence": iterations},
    )


def harness():
    """lm_eval's module, which asks for the version of a package "vllm": that for CPUs has another name, by
    which vLLM itself knows it.
    """
    import vllm.platforms

    assert vllm.platforms.current_platform.device_type  # looked up here, before the name is changed
    plain = importlib.metadata.version

    def version(name: str) -> str:
        return vllm.__version__ if name == "vllm" else plain(name)

    with mock.patch("importlib.metadata.version", version):
        from lm_eval.models import vllm_causallms
    vllm_causallms.version = version
    return vllm_causallms


def main(folder: str, tasks: str, iterations: str, *names: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    said = {}
    for model in (through_transformers, through_vllm):
        results = simple_evaluate(
            model(folder, int(iterations)),
            tasks=list(names),
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
            bootstrap_iters=0,
        )
        samples = results["samples"]
        said[model.__name__] = {name: [row["filtered_resps"] for row in samples[name]] for name in names}
        said[model.__name__] |= {"metrics": {name: results["results"][name] for name in names}}
    print(json.dumps(said, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
