"""What keeps a run from hanging, from failing in circles and from training on damage.

docs/reliability.md tells of each.
"""
