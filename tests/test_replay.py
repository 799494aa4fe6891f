"""`Replay`: operations of a trace are found again in other runs of a model, and hooks stand in for them."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structprune
from structprune.errors import PlanError, TraceError
from structprune.ops import op_of
from structprune.tracing.opaque import OPAQUE
from structprune.tracing.replay import Replay
from structprune.tracing.shadow import shadow_of
from structprune.tracing.trace import trace


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


class Net(nn.Module):
    """Blocks of one class, one of them called twice, and a loss if there are labels."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.drop, self.head = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x, labels=None):
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        x = self.head(self.drop(self.norm(x))) * 2
        return x if labels is None else (F.relu(F.cross_entropy(x, labels)) * 3).sum()


def traced(model, *inputs):
    return trace(model, inputs, op_of)


def numbers(found, name, module=None):
    """Numbers of the operations of this name, in the order in which they run."""
    return [n for n, key in found.keys.items() if key.name == name and module in (None, key.module)]


def seen(found, wanted, model, *inputs, run=None, **options):
    """What a forward showed at the operations asked for: their numbers and the results."""
    shown = []

    def look(operation):
        result = operation()
        shown.append((operation.node.meta["index"], result))
        return result

    with Replay(found, dict.fromkeys(wanted, look), **options).over(model):
        (run or model)(*inputs)
    return shown


def test_keys_tell_all_operations_apart_and_count_calls_of_a_module_that_is_used_again():
    found = traced(Net(), torch.randn(1, 6))
    assert len(set(found.keys.values())) == len(found.keys)
    relus = [found.keys[n] for n in numbers(found, "relu")]
    assert [(key.module, key.call) for key in relus] == [("blocks.0", 0), ("blocks.1", 0), ("blocks.0", 1)]
    linears = [found.keys[n].held for n in numbers(found, "linear", "blocks.0.first")]
    assert linears == [("blocks.0.first.weight", "blocks.0.first.bias")] * 2


@pytest.mark.parametrize("batch", [1, 7])
def test_operations_are_found_on_another_batch_size_and_in_training_mode(batch):
    model = Net()
    found = traced(model, torch.randn(3, 6))
    model.train(batch > 1)
    shown = seen(found, found.keys, model, torch.randn(batch, 6))
    assert [number for number, _ in shown] == list(found.keys)
    assert all(result.shape[0] == batch for _, result in shown)


def test_a_loss_inside_and_around_shifts_nothing():
    model = Net().eval()
    found, x = traced(model, torch.randn(1, 6)), torch.randn(4, 6)
    (mul,) = numbers(found, "mul")
    (relu, *_) = numbers(found, "relu")
    plain = seen(found, [relu], model, x)
    labelled = seen(found, [relu], model, x, torch.tensor([0, 1, 2, 0]))
    around = seen(found, [relu, mul], model, x, run=lambda x: F.relu(model(x) * 2).mul(3).sum())
    assert torch.equal(plain[0][1], labelled[0][1])
    assert torch.equal(around[1][1], model(x))
    with pytest.raises(TraceError, match=r"runs mul in the model another number of times than the 1 of"):
        seen(found, [mul], model, x, torch.tensor([0, 1, 2, 0]))  # which of the two it is cannot be told


def test_copies_and_pruned_copies_are_followed():
    model = Net().eval()
    x = torch.randn(4, 6)
    found = traced(model, x)
    slim = structprune.prune(model, x, ratio=0.5, round_to=1)
    wrapped = nn.Sequential(nn.Identity(), slim)
    relus = numbers(found, "relu")
    assert [n for n, _ in seen(found, relus, copy.deepcopy(model), x)] == relus
    assert [r.shape[1] for _, r in seen(found, relus, slim, x)] == [3, 3, 3]
    assert [n for n, _ in seen(found, found.keys, slim, x, run=wrapped, whole=True)] == list(found.keys)


def test_a_hook_exchanges_arguments_and_results_and_leaves_out_the_work():
    model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.randn(5, 2)
    found = traced(model, x)
    first, _, last = found.keys

    def ones(operation):
        return torch.ones(5, 3)

    def doubled(operation):
        operation.args = (operation.args[0] * 2, *operation.args[1:])
        return operation() + 1

    with Replay(found, {first: ones, last: doubled}).over(model):
        output = model(x)
    assert torch.allclose(output, F.linear(torch.full((5, 3), 2.0), model[2].weight, model[2].bias) + 1)
    with Replay(found, {"relu": lambda _: torch.zeros(5, 3)}).over(model):
        assert torch.equal(model(x), model[2].bias.expand(5, 1))
    assert torch.equal(model(x), model[2](model[0](x).relu()))  # nothing stays behind


def test_operations_inside_functions_that_are_opened():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    found = traced(model, x, x.clone(), x.clone())  # three tensors, so that the projections are apart
    inside = [n for n, key in found.keys.items() if key.name in ("linear", "matmul", "bmm", "baddbmm", "softmax")]
    assert len(inside) >= 3
    shown = seen(found, inside, model, *(torch.randn(3, 4, 8) for _ in range(3)))
    assert [number for number, _ in shown] == inside


class Loop(nn.Module):
    """A cell, and a product with a weight that is held here, as often as there are positions."""

    def __init__(self):
        super().__init__()
        self.cell, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = F.linear(torch.tanh(self.cell(h) + x[:, t]), self.weight)
        return self.head(h)


@pytest.mark.parametrize("length", [2, 4])
@pytest.mark.parametrize("where", ["cell", "", "head"])
def test_a_loop_of_another_length_is_told_where_it_matters(length, where):
    model = Loop()
    found = traced(model, torch.randn(1, 3, 4))
    wanted = numbers(found, "linear", where)
    if where == "head":  # what is not asked for may differ
        assert len(seen(found, wanted, model, torch.randn(2, length, 4))) == 1
        return
    with pytest.raises(PlanError, match=r"did not come to linear in|than the 3 of the example"):
        seen(found, wanted, model, torch.randn(2, length, 4), error=PlanError)
    with pytest.raises(TraceError, match=r"did not come to|than the 3 of the example"):  # the last could be the second
        seen(found, wanted[1:2], model, torch.randn(2, length, 4))


def test_operations_need_not_be_there_where_that_is_said():
    model = Loop()
    found = traced(model, torch.randn(1, 3, 4))
    wanted = numbers(found, "linear", "cell")
    assert len(seen(found, wanted, model, torch.randn(2, 2, 4), required=False)) == 2


class Branch(nn.Module):
    def forward(self, x):
        return F.gelu(x) if len(x) > 2 else F.relu(x)


def test_a_whole_run_must_do_what_the_trace_did():
    model = Branch()
    found = traced(model, torch.randn(1, 3))
    assert len(seen(found, found.keys, model, torch.randn(2, 3), whole=True)) == 1
    with pytest.raises(TraceError, match="A batch runs gelu where the trace of the original has relu"):
        seen(found, (), model, torch.randn(3, 3), whole=True)


def test_an_operation_that_the_model_does_not_run_is_refused():
    found = traced(Branch(), torch.randn(1, 3))
    with pytest.raises(TraceError, match="cannot be found in another run"):
        Replay(found, {found.inputs[0].meta["index"]: lambda operation: operation()})


class Handed(nn.Module):
    """A weight that an operation hands on as it is: from there on it is that operation's result."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight.contiguous().to(x.dtype))


def test_a_tensor_of_the_model_that_an_operation_returns_is_a_result():
    model = Handed()
    found = traced(model, torch.randn(1, 3))
    assert [found.keys[n].held for n in numbers(found, "linear")] == [("weight",), ()]
    assert len(seen(found, found.keys, model, torch.randn(2, 3))) == len(found.keys)


class Kernel(nn.Module):
    """Stands for a module whose forward cannot be looked into."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x.mul(self.weight).mul(2).relu()


@pytest.fixture
def kernel():
    structprune.register_module_rule(Kernel)(lambda node, *args, **kwargs: None)
    yield
    del OPAQUE[Kernel]


@pytest.mark.usefixtures("kernel")
def test_an_opaque_module_is_one_operation_in_any_thread():
    model, x = nn.Sequential(nn.Linear(4, 4), Kernel(), Kernel()), torch.randn(3, 4)
    model[1].register_forward_hook(lambda module, args, output: output * 3)
    found = traced(model, x)
    kernels = [n for n, key in found.keys.items() if key.held[:1] in (("1.weight",), ("2.weight",))]
    assert [found.keys[n].module for n in kernels] == ["1", "2"]
    assert [n for n, _ in seen(found, found.keys, model, x, whole=True)] == list(found.keys)
    in_turns(model, found, kernels, [x] * 3)
    assert "forward" not in model[1].__dict__


def in_turns(model, found, wanted, batches):
    """Runs batches in threads that wait for each other at each operation; each must see its own, in order."""
    meet, results = threading.Barrier(len(batches)), {}

    def forward(number):
        shown = []

        def wait(operation):
            meet.wait(timeout=30)
            shown.append(operation.node.meta["index"])
            return operation()

        shadow = shadow_of(model, lambda _, tensor: tensor, tracked=False).model
        with torch.no_grad(), Replay(found, dict.fromkeys(wanted, wait), whole=True).over(shadow):
            results[number] = shadow(batches[number]), shown

    threads = [threading.Thread(target=forward, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, batch in enumerate(batches):
        output, shown = results[number]
        assert shown == list(wanted)
        assert torch.allclose(output, model(batch))


def test_forwards_in_several_threads_and_inside_of_each_other():
    call = nn.Module.__call__
    model = Net().eval()
    found = traced(model, torch.randn(1, 6))
    batches = [torch.randn(size, 6) for size in (1, 2, 5)]
    in_turns(model, found, numbers(found, "relu"), batches)

    def another(operation):
        inner = [n for n, _ in seen(found, found.keys, model, batches[1], whole=True)]
        assert inner == list(found.keys)
        model(batches[2])  # not followed by anybody
        return operation()

    with Replay(found, dict.fromkeys(numbers(found, "relu"), another), whole=True).over(model):
        output = model(batches[0])
    assert torch.equal(output, model(batches[0]))
    assert nn.Module.__call__ is call
    assert all(module._compiled_call_impl is None for module in model.modules())
