"""Captured operators with other arguments at each replay: groups of tasks, external events (vllm-ascend's attention)."""

import pytest
import torch

from moe_lowering import simulator
from moe_lowering.simulator import SimulatorError
from moe_lowering.simulator.device import ReplayError, tape_of

pytestmark = pytest.mark.filterwarnings("ignore")
simulator.enable_device("A3")


class Captured:
    """y = gather(x, index) * 10, where the gather is a group that each replay waits for."""

    def __init__(self):
        self.x, self.y = torch.arange(4.0, device="npu"), torch.zeros(2, device="npu")
        self.index, self.other = (torch.tensor(i, device="npu") for i in ([0, 1], [3, 2]))
        self.event, self.stream = torch.npu.ExternalEvent(), torch.npu.Stream()
        self.graph = torch.npu.NPUGraph()
        with torch.npu.graph(self.graph):
            stream = torch.npu.current_stream()
            self.event.wait(stream)
            self.event.reset(stream)
            torch.npu.graph_task_group_begin(stream)
            self.launch(self.index)
            self.handle = torch.npu.graph_task_group_end(stream)
            self.y.mul_(10)

    def launch(self, index):
        torch.index_select(self.x, 0, index, out=self.y)

    def update(self, launch):
        with torch.npu.stream(self.stream):
            torch.npu.graph_task_update_begin(self.stream, self.handle)
            launch()
            torch.npu.graph_task_update_end(self.stream)
            self.event.record(self.stream)


def test_a_replay_waits_for_the_update_of_its_step():
    case = Captured()
    assert tape_of(case.graph).operators[0] == "wait for an external event"
    for index, expected in ((case.other, [30.0, 20.0]), (case.index, [0.0, 10.0]), (case.other, [30.0, 20.0])):
        before = case.y.tolist()
        case.graph.replay()
        with torch.npu.stream(case.stream):
            assert case.y.tolist() == before  # it waits
        case.update(lambda index=index: case.launch(index))
        assert case.y.tolist() == expected


def test_what_is_launched_behind_a_waiting_graph_is_refused():
    case = Captured()
    case.graph.replay()
    with pytest.raises(SimulatorError, match=r"aten::add.* launched behind a graph .* record it first"):
        case.y + 1
    with pytest.raises(SimulatorError, match="a graph is replayed behind another: entry 0 of that one waits"):
        case.graph.replay()
    case.update(lambda: case.launch(case.other))
    assert (case.y + 1).tolist() == [31.0, 21.0]


def test_an_update_launches_the_same_operators():
    case = Captured()
    case.graph.replay()
    with torch.npu.stream(case.stream):
        torch.npu.graph_task_update_begin(case.stream, case.handle)
        with pytest.raises(SimulatorError, match=r"aten::mul.* which has aten::index_select.out here"):
            case.y.mul_(2)
        with pytest.raises(RuntimeError, match="launched fewer operators than the group has"):
            torch.npu.graph_task_update_end(case.stream)
        with pytest.raises(RuntimeError, match="launched fewer operators"):
            torch.npu.graph_task_update_end(case.stream)
    case.update(lambda: case.launch(case.index))
    assert case.y.tolist() == [0.0, 10.0]


def test_a_group_is_its_own_when_an_older_graph_is_gone():
    first, second = Captured(), Captured()
    first.graph.reset()
    Captured()  # its group must not take the place of the second one's
    second.graph.replay()
    second.update(lambda: second.launch(second.other))
    assert second.y.tolist() == [30.0, 20.0]


def test_a_group_outside_of_a_capture_is_refused():
    stream = torch.npu.current_stream()
    with pytest.raises(RuntimeError, match="begins outside of a capture"):
        torch.npu.graph_task_group_begin(stream)
    with pytest.raises(RuntimeError, match="waits for an external event that nothing recorded"):
        torch.npu.ExternalEvent().wait(stream)


def test_what_fails_after_the_event_comes_out_of_it():
    case = Captured()
    case.index.fill_(9)
    case.graph.replay()
    with pytest.raises(ReplayError, match="index_select"):
        case.update(lambda: case.launch(case.index))
