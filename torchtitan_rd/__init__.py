"""Pretraining of depth-recurrent transformers and long-context Llama models with plain PyTorch."""

__version__ = "0.1.0"
