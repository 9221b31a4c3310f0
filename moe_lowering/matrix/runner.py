"""Runs cells of the matrix on real ranks, and compares each with what it must be.

    table = runner.run(Axes(eps=(1, 2)))
    table.problems()  # [] when every cell is what it must be

Each legal cell is lowered as asked (a fall-back is a failure), run on gloo ranks with the simulator's kernels, and compared
with ``reference``; each illegal one must be refused with its code and leave the graph as it was. One process pool serves all
cells of a world size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from moe_lowering.matrix import ranks as rank_jobs
from moe_lowering.matrix.cells import DTYPE, EXPERTS, SCENARIOS, Cell
from moe_lowering.matrix.expected import refusals
from moe_lowering.matrix.forms import FORMS
from moe_lowering.matrix.ranks import CellOutcome, Change
from moe_lowering.matrix.reference import FLOORS, expected, expected_counts, signal_to_noise
from moe_lowering.matrix.table import EVERYTHING, Axes, CellResult, Table
from moe_lowering.testing.forking import fork_from_imports
from moe_lowering.testing.ranks import RankError, Ranks

COLLECTIVE_TIMEOUT = 60.0  # seconds that a rank waits for one that failed
MOST_RESTARTS = 5  # of a pool, for the cells of one weight format and TP size


class Pool:
    """One world size's ranks, started when they are needed and replaced after a cell that broke them.

    Args:
        size: number of ranks.
        collective_timeout: seconds that a rank waits for one that failed.
    """

    def __init__(self, size: int, collective_timeout: float = COLLECTIVE_TIMEOUT) -> None:
        self.size = size
        self.restarts = 0
        self._timeout = collective_timeout
        self._ranks: Ranks | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks; the next use starts new ones."""
        if self._ranks is not None:
            self._ranks.close()
        self._ranks = None

    def replace(self) -> None:
        """The ranks are out of step or gone."""
        self.restarts += 1
        self.close()

    def outcomes(self, cells: Sequence[Cell], change: Change | None) -> list[list[CellOutcome]]:
        """By rank; shorter lists than ``cells`` when a cell broke the ranks."""
        if self._ranks is None:
            fork_from_imports()
            self._ranks = Ranks(
                self.size, setup=rank_jobs.setup, collective_timeout=self._timeout, start_method="forkserver"
            )
        first = cells[0]
        requests = [(cell.form, cell.scenario, cell.weights_are) for cell in cells]
        axes = first.quantisation, first.tp, first.unpermute_operator
        return self._ranks.run(rank_jobs.run, axes, requests, change)


def run(
    axes: Axes = EVERYTHING,
    progress: Callable[[str], None] = lambda message: None,
    change: Change | None = None,
    pools: Mapping[int, Pool] | None = None,
) -> Table:
    """Run the cells of ``axes``.

    Args:
        progress: told what is being run.
        change: breaks something on purpose, on every rank: a module-level function that changes what a rank is given.
        pools: by EP size, to use and to leave open; made and closed here when None.
    """
    results: list[CellResult] = []
    count = sum(len(axes.cells(ep, tp, quant)) for ep in axes.eps for quant in axes.quantisations for tp in axes.tps)
    for ep in axes.eps:
        pool = Pool(ep) if pools is None else pools[ep]
        try:
            for quantisation, tp in itertools.product(axes.quantisations, axes.tps):
                cells = axes.cells(ep, tp, quantisation)
                last = len(results) + len(cells)
                progress(f"EP {ep}, TP {tp}, {quantisation}: cells {len(results) + 1} to {last} of {count}")
                results += _run(pool, cells, change)
        finally:
            if pools is None:
                pool.close()
    return Table(axes, tuple(results))


def _run(pool: Pool, cells: list[Cell], change: Change | None) -> list[CellResult]:
    """Results of cells of one world size, TP size and weight format."""
    results: list[CellResult] = []
    most = pool.restarts + MOST_RESTARTS
    while len(results) < len(cells):
        rest = cells[len(results) :]
        if pool.restarts >= most:
            return results + [CellResult(cell, problems=["not run: too many cells broke their ranks"]) for cell in rest]
        try:
            by_rank = pool.outcomes(rest, change)
        except RankError as error:
            pool.replace()
            return results + [CellResult(cell, problems=[f"not run, ranks failed: {error}"]) for cell in rest]
        done = min(len(outcomes) for outcomes in by_rank)
        results += [_judge(cell, [outcomes[at] for outcomes in by_rank]) for at, cell in enumerate(rest[:done])]
        if any(outcomes[done - 1].broke for outcomes in by_rank):
            pool.replace()
    return results


def _judge(cell: Cell, outcomes: list[CellOutcome]) -> CellResult:
    """Compare one cell's outcome with what the cell must be."""
    first = outcomes[0]
    result = CellResult(cell, first.codes, first.reason)
    for rank, outcome in enumerate(outcomes):
        result.problems += [f"rank {rank}: {problem}" for problem in outcome.problems]
    if len({(outcome.comm, outcome.form, outcome.codes) for outcome in outcomes}) > 1:
        result.problems.append(f"ranks decide differently: {[(o.comm, o.form, o.codes) for o in outcomes]}")
    expected = refusals(cell)
    if first.comm is None:
        result.problems += _refusal_problems(expected, first)
        return result
    if expected:
        result.problems.append(f"is legal, and must be refused with {', '.join(expected)}")
    form = FORMS[cell.form]
    if (first.comm, first.form) != (form.comm, form.form):
        result.problems.append(f"lowered to {first.comm} as {first.form}, asked for {form.comm} as {form.form}")
    if all(outcome.y is not None for outcome in outcomes):
        result.snr, problems = _compare(cell, outcomes)
        result.problems += problems
    elif not result.problems:
        result.problems.append("a rank has no result")
    return result


def _refusal_problems(expected: Iterable[str], outcome: CellOutcome) -> list[str]:
    if not expected:
        return [f"must be legal, and is refused: {outcome.reason}"]
    missing = [code for code in expected if code not in outcome.codes]
    return [f"must be refused with {', '.join(missing)}, and is: {outcome.reason}"] if missing else []


def _compare(cell: Cell, outcomes: list[CellOutcome]) -> tuple[float, list[str]]:
    """The worst signal-to-noise ratio over ranks, and what is wrong with the results."""
    problems: list[str] = []
    scenario, groups = SCENARIOS[cell.scenario], cell.ep // cell.tp
    counts = expected_counts(scenario, groups).view(cell.ep, EXPERTS // cell.ep)
    worst = math.inf
    for rank, outcome in enumerate(outcomes):
        y, group = outcome.y, rank // cell.tp
        assert y is not None
        reference = expected(cell.quantisation, scenario, group, groups)
        if y.dtype != DTYPE or y.shape != reference.shape:
            problems.append(f"rank {rank}: y is {y.dtype} {list(y.shape)}, not {DTYPE} {list(reference.shape)}")
        worst = min(worst, signal_to_noise(y, reference))
        first = outcomes[group * cell.tp].y
        if first is None or not torch.equal(y, first):
            problems.append(f"rank {rank}: y is not bit by bit that of the first rank of its TP group")
        if scenario.counts and not (outcome.counts is not None and torch.equal(outcome.counts, counts[rank])):
            problems.append(f"rank {rank}: counts are {outcome.counts}, not {counts[rank].tolist()}")
    floor = FLOORS[cell.quantisation]
    if worst < floor:
        problems.append(f"signal-to-noise ratio {worst:.1f} dB, under the floor of {floor:g} dB")
    return worst, problems
