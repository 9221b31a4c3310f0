"""What things cost on a machine, as data: figures of each SoC, laws with their errors, and rows that were measured.

``machines``  peak figures of a SoC: memory, rates by dtype, links by tier.
``laws``      how much slower than its peak a kind of work is, and what it costs to start; ``Rates`` has all of one deployment.
``rows``      measured rows: published ones (``data/published.toml``) and a user's (CSV).
``fit``       a law from rows. ``benchmarks/fit_costs.py`` fits the published ones and writes ``data/fitted.toml``.

Nothing here knows of graphs: ``passes/costs/price.py`` counts what an implementation would do and asks for its price.
All arithmetic is +, -, *, / on Python floats in one order, and on ints: the same on every rank, whatever its machine.
"""
