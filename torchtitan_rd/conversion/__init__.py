"""Weights between torch.distributed.checkpoint (DCP) folders, Hugging Face folders,
Meta's and Huginn's own files.
"""
