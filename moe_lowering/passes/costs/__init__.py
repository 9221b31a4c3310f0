"""What an implementation would cost for a block.

Its nodes are emitted into a graph that nobody compiles (``tally``), what they do is counted (``work``, with ``exact_kernels`` for
AllToAll by exact splits) and priced (``price``). ``count_blocks`` does so for reports, ``cost_model`` is what a user's own
function is asked about.

On device meta: ``operator_results`` and ``aten_results`` say what operators give where nothing else can be asked.
"""
