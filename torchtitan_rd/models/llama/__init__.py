"""Llama 3 (the Neural Pile line) and its small Chinchilla-sized cousins (CLM, `aixsim`)."""

import dataclasses

from torchtitan_rd.model_spec import ModelSpec
from torchtitan_rd.models.llama.hf import HF
from torchtitan_rd.models.llama.init import inits
from torchtitan_rd.models.llama.model import Llama
from torchtitan_rd.models.llama.plan import tensor_plan, wrap_plan
from torchtitan_rd.models.llama.shape import AIXSIM_FLAVORS, ARITHMETIC, LLAMA3_FLAVORS, count_flops
from torchtitan_rd.models.llama.steps import LlamaSteps

LLAMA3 = ModelSpec(
    name="llama3",
    flavors=LLAMA3_FLAVORS,
    arithmetic=ARITHMETIC,
    build=Llama,
    inits=inits,
    wrap_plan=wrap_plan,
    tensor_plan=tensor_plan,
    flops=count_flops,
    hf=HF,
    steps=LlamaSteps,
    derived=("freqs_cis",),  # complex64; torchtitan 0.1 saves its rotary table with the weights
)
AIXSIM = dataclasses.replace(LLAMA3, name="aixsim", flavors=AIXSIM_FLAVORS)
