"""The pass over one FX graph: matching (``find_blocks``), legality, policy, patterns (``implementations``), emitter, verifier.

``pipeline.MoeLowering`` is the entry. What each stage promises the next one stands in ``docs/architecture.md``.
Importing this package imports none of them.
"""
