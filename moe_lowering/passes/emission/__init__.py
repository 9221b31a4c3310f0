"""Making nodes with their fake values: ``emitter`` for a first block, ``tapes`` for those that are equal to it (``wiring``)."""
