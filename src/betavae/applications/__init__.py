"""Applications of a trained VAE.

Each can be deleted, with its scripts and tests, without touching the others.
"""
