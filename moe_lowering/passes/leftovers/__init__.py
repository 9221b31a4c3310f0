"""MoE layers that stay in a graph as others wrote them, for the report: ``find_foreign``, by the names of operators
(``foreign_operators``) or by what torch's own compute (``foreign_aten``, ``gathered_weights``).

Layers that are raised: ``raise_foreign``.
"""
