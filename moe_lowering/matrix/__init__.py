"""The matrix: every implementation on real ranks, with every weight format, against a dense reference, as one table.

- ``forms`` (without torch) and ``cells``: the axes, and the data of every cell.
- ``table``: which cells a run has, and its results.
- ``expected``: which cells must be refused, and with which code; written from the rules' sources.
- ``reference``: what a cell must give, in float64, with no code of what is checked.
- ``runner`` starts ranks, which do what ``ranks`` says, and judges what came of it.

docs/matrix.md says what the cells are and why the floors are where they are.
"""
