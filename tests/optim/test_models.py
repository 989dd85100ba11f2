"""Networks as people build them: compiled, channels_last, tied, on the GPU inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ltfast.optim import GSA, SAM, FriendlySAM, frozen_statistics
from tests.optim import support
from tests.optim.support import GROUP_COUNTS, SGD

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("kind", ["sam", "gsa"])
def test_a_compiled_model_is_compiled_once(kind: str) -> None:
    """Neither the perturbation nor frozen statistics change anything that a guard looks at."""
    torch._dynamo.reset()
    model, twin = support.make("conv"), support.make("conv")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for net, raw in ((compiled, model), (twin, twin)):
        if kind == "sam":
            optimizer = SAM(net.parameters(), SGD[0], rho=0.2, **SGD[1]).bind(net)
        else:
            optimizer = GSA(net.parameters(), SGD[0], GROUP_COUNTS, gram_every=2, **SGD[1]).bind(net)
        for i in range(5):
            if kind == "sam":
                optimizer.step(lambda i=i, net=net: support.loss_of(net, i).backward())
            else:
                optimizer.step(support.group_closure(net, i))
        assert int(raw[1].num_batches_tracked) == 5
    assert counter.frame_count == 1
    assert support.distance(model, twin) < 1e-6  # observed 3e-8
    torch._dynamo.reset()


def test_channels_last_stays() -> None:
    model, twin = support.make("conv").to(memory_format=torch.channels_last), support.make("conv")
    for net in (model, twin):
        optimizer = SAM(net.parameters(), SGD[0], rho=0.2, adaptive=True, **SGD[1])
        for i in range(5):
            support.two_passes(net, optimizer, i)
        assert optimizer.gathered == 5 * 2 * len(list(net.parameters()))
    weight = model[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert weight.grad is None or weight.grad.stride() == weight.stride()
    assert optimizer.blocks[0].flat.numel == sum(p.numel() for p in twin.parameters())
    assert support.distance(model, twin) < 1e-5  # observed 1e-7: another order of summation in the convolutions


def test_weights_of_a_strided_view_keep_their_values() -> None:
    """A parameter whose memory has gaps becomes contiguous; its values stay."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 8)[:, ::2])
    before = p.detach().clone()
    optimizer = SAM([p], torch.optim.SGD, rho=0.1, lr=0.1)
    assert torch.equal(p, before)
    p.pow(2).sum().backward()
    optimizer.first_step(zero_grad=True)
    p.pow(2).sum().backward()
    optimizer.second_step()
    assert not torch.equal(p, before)


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.embedding(x)))

    torch.manual_seed(0)
    model = Tied()
    optimizer = FriendlySAM(model.parameters(), SGD[0], rho=0.1, **SGD[1])
    assert optimizer.blocks[0].flat.numel == 36
    for _ in range(3):
        for take in (optimizer.first_step, optimizer.second_step):
            model(torch.arange(9)).pow(2).mean().backward()
            take(zero_grad=True)
    assert model.out.weight is model.embedding.weight


@pytest.mark.gpu
@GPU
def test_a_whole_sam_step_in_a_cuda_graph() -> None:
    model, twin = support.make("conv").cuda(), support.make("conv").cuda()
    x, y = (t.cuda() for t in support.batch())
    rate = torch.tensor(0.05, device="cuda")

    def step(net: nn.Module, optimizer: SAM) -> None:
        for take in (optimizer.first_step, optimizer.second_step):
            with frozen_statistics(net):
                nn.functional.cross_entropy(net(x), y).backward()
            take(zero_grad=True)

    optimizers = [SAM(m.parameters(), torch.optim.SGD, rho=0.1, lr=rate, momentum=0.9) for m in (model, twin)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizers[0])
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        step(twin, optimizers[1])
    torch.cuda.synchronize()
    assert support.distance(model, twin) < 1e-4


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("every", [1, 4])
def test_no_step_waits_for_the_device(every: int) -> None:
    model = support.make("conv").cuda()
    x, y = (t.cuda() for t in support.batch())
    table = support.table("groups").cuda()
    optimizer = GSA(model.parameters(), SGD[0], torch.tensor(GROUP_COUNTS), gram_every=every, **SGD[1]).bind(model)
    from ltfast.losses import cross_entropy, group_losses

    try:
        for i in range(6):
            if i == 2:
                torch.cuda.set_sync_debug_mode("error")
            optimizer.step(lambda: group_losses(cross_entropy(model(x), y), table[y]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(optimizer.skipped) == 0


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_may_move_after_its_optimizer_was_made(steps: int) -> None:
    """Accelerate's prepare(model, optimizer) moves it; state moves along."""
    model, twin = support.make(), support.make()
    optimizer, other = (FriendlySAM(m.parameters(), SGD[0], rho=0.2, **SGD[1]) for m in (model, twin))
    for i in range(steps):
        support.two_passes(model, optimizer, i)
    model.cuda()
    for i in range(steps, 4):
        for take in (optimizer.first_step, optimizer.second_step):
            x, y = (t.cuda() for t in support.batch(i))
            nn.functional.cross_entropy(model(x), y).backward()
            take(zero_grad=True)
    for i in range(4):
        support.two_passes(twin, other, i)
    assert support.distance(model.cpu(), twin) < 1e-5
