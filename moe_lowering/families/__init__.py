"""Families of MoE models that the installed transformers has: which there are, and what becomes of a small model of each."""
