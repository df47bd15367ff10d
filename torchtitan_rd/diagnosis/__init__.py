"""What this environment can do: the parts of `torchtitan-rd doctor` (docs/rehearsal.md)."""
