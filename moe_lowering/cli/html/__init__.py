"""The pages that ``--html`` writes: each is one file, without scripts, and loads nothing from the network.

- ``page``: HTML elements with their text escaped, and the document around them.
- ``parts``: tables that several pages have.
- ``graph_drawing``, ``choice_drawing``: pictures, as SVG.
- ``lower_page``, ``explain_page``: the page of each command.
"""
