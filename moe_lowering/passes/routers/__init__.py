"""Routers that a model wrote with its own operators (docs/routers.md).

- ``values``: records of what a node of a router holds. ``meaning``, with ``rules`` and ``group_rules``: makes them,
  node by node.
- ``prove_router``: whether they are what ``route`` computes. ``match_router``: finds the routers of a graph.
- ``rewrite_router``: replaces one. ``lower_router``: what the run of the pass calls. ``reports``: the records of the
  report.
"""
