"""Generation and recurrent inference (docs/inference.md). Models are known through ModelSpec alone.

from torchtitan_rd.inference import Settings, encode_prompt, generate, load_model
"""

from torchtitan_rd.inference.exits import CRITERIA, ExitPolicy
from torchtitan_rd.inference.generation import Answer, Report, Settings, generate
from torchtitan_rd.inference.loading import Loaded, load_model, transformers_tokenizer
from torchtitan_rd.inference.sampling import Sampling
from torchtitan_rd.inference.sharing import Sharing
from torchtitan_rd.inference.speculative import Drafting
from torchtitan_rd.inference.stepper import Stepper, Thought, think
from torchtitan_rd.inference.text import encode_chat, encode_prompt

__all__ = [
    "CRITERIA",
    "Answer",
    "Drafting",
    "ExitPolicy",
    "Loaded",
    "Report",
    "Sampling",
    "Settings",
    "Sharing",
    "Stepper",
    "Thought",
    "encode_chat",
    "encode_prompt",
    "generate",
    "load_model",
    "think",
    "transformers_tokenizer",
]
