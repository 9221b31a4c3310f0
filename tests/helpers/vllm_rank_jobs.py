"""What runs on the ranks of ``test_vllm_agreement``: a runner as vllm-ascend's, whose load the plugin watches, then a forward."""

import contextlib
import logging
import threading
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from moe_lowering.agreement_rounds import group_session
from moe_lowering.integrations import vllm, vllm_agreement

SETTINGS = {None: None, "on": {}, "off": {"enable": False}}


class Runner:
    loaded = False

    def load_model(self):
        Runner.loaded = True

    def _sync_metadata_across_dp(self, num_tokens, allow_dp_padding=False):
        """As vllm-ascend's: every rank's number, the largest where padding is asked for."""
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int32)
        counts[dist.get_rank()] = num_tokens
        dist.all_reduce(counts)
        return counts.amax().expand_as(counts) if allow_dp_padding else counts


def load(rank, by_rank):
    """What a rank took over; (its error or its tokens after padding, its log)."""
    asked, taken = by_rank[rank]
    vllm._taken.clear()
    vllm._taken.update(taken)
    vllm._engine = SimpleNamespace(additional_config={"moe_lowering": SETTINGS[asked]})
    module = SimpleNamespace(NPUModelRunner=type("NPUModelRunner", (Runner,), {}))
    vllm._watch_runner(module)
    runner = module.NPUModelRunner()
    with logged() as seen:
        try:
            with mock.patch.object(vllm, "ep_group_name", lambda: dist.group.WORLD.group_name):
                runner.load_model()
        except vllm_agreement.AgreementError as error:
            return str(error), seen
    assert Runner.loaded
    return seen or runner._sync_metadata_across_dp(num_tokens=3 + rank).tolist(), seen


@contextlib.contextmanager
def logged():
    """What the comparison logs, until its threads have ended."""
    seen, handler = [], logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    vllm_agreement.log.addHandler(handler)
    try:
        yield seen
    finally:
        for thread in threading.enumerate():
            if thread.name.startswith("moe_lowering: "):
                thread.join(30)
        vllm_agreement.log.removeHandler(handler)


def late(rank, mine, seconds):
    """Rank 1 comes when rank 0 has waited for so long; what each says."""
    with waiting(seconds):
        if rank == 0:
            answer = load(rank, [mine])
            dist.barrier()
            return answer
        dist.barrier()
        return load(rank, [mine] * 2)


def late_with_nothing(rank, why, seconds):
    """The same of ranks that took no layer over; (whether a rank went on before it had an answer, its log)."""
    with waiting(seconds), logged() as seen:
        if rank == 1:
            dist.barrier()
        thread = vllm_agreement.compare_layers(dist.group.WORLD.group_name, why, True)
        went_on = thread.is_alive()
        thread.join(30)
        if rank == 0:
            dist.barrier()
    return went_on, seen


def waiting(seconds):
    """Collectives of the group would wait so long."""

    def meeting(name):
        session, members, _ = group_session(name)
        return session, members, seconds

    return mock.patch.object(vllm_agreement, "group_session", meeting)
