"""MoE layers that stay in a graph as others wrote them, for the report: ``find_foreign``, by the names of operators
(``foreign_operators``) or by what torch's own compute (``foreign_aten``). Layers that are raised: ``raise_foreign``.
"""
