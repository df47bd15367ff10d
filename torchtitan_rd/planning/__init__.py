"""What a run takes, before it is queued: traced on one CPU, without numbers (docs/planning.md)."""
