"""One run of the pass over one graph (``graph_run``).

Beside it: the range of T that the graph accepts (``bounds``), its routings (``routes``), layers that others wrote (``foreign``),
the blocks' reports (``block_reports``), the log and reasons (``messages``), and which graphs inside of it are run too
(``subgraphs``).
"""
