"""Llama 3 (the Neural Pile line) and its small Chinchilla-sized cousins (CLM, `aixsim`)."""

from torchtitan_rd.models.llama.config import AIXSIM_FLAVORS, LLAMA3_FLAVORS, count_flops
from torchtitan_rd.models.llama.hf import HF
from torchtitan_rd.models.llama.model import Llama, inits
from torchtitan_rd.models.llama.plan import wrap_plan
from torchtitan_rd.models.llama.steps import LlamaSteps
from torchtitan_rd.models.spec import ModelSpec

LLAMA3 = ModelSpec("llama3", LLAMA3_FLAVORS, Llama, inits, wrap_plan, count_flops, HF, steps=LlamaSteps)
AIXSIM = ModelSpec("aixsim", AIXSIM_FLAVORS, Llama, inits, wrap_plan, count_flops, HF, steps=LlamaSteps)
