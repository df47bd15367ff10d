"""From raw text to rows that can be trained on: tokenizer, staging, packed rows, their order.

Each step writes one folder with a manifest and goes on where it was killed; see docs/preparation.md.
"""
