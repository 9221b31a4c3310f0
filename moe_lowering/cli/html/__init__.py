"""Pages of ``--html``: one file each, which needs no network and no script.

- ``page``: elements, escaped, and the page around them.
- ``graph_drawing``, ``choice_drawing``: the pictures, as SVG.
- ``lower_page``, ``explain_page``: what a command found.
"""
