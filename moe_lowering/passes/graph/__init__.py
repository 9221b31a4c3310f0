"""What the pass needs of FX graphs whatever they compute: reading them, and editing them so that edits can be taken back.

Nothing in here knows of MoE layers: these modules import none of the other parts of ``passes``.
"""
