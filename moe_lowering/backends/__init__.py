"""How a compiler gets the pass: ``npugraph_ex`` and ``torchair`` (GE mode) for NPUs, ``aot`` for CPU.

``cache_key`` makes what compile caches hash; the ``ge_*`` modules are what GE mode needs beyond the pass.
"""
