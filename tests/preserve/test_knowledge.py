"""The anchor of a network against its definition, one image at a time."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.flat import FlatParameters
from ltfast.models import LongTailModel
from ltfast.preserve.bank import MemoryBank
from ltfast.preserve.fisher import sample_indices
from ltfast.preserve.knowledge import agree_on_statistics, collapse_knowledge

GROUPS = torch.tensor([0, 1, 1, 1])
SIZES = torch.tensor([1.0, 3.0], dtype=torch.float64)
PRIOR = torch.tensor([0.6, 0.2, 0.15, 0.05]).log()
LABELS = torch.arange(40) % 4
BATCH, BUDGET, SEED = 7, 9, 3


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Pictures:
    """What the collapse asks of a source: labels, and plain views of the images it names."""

    train_labels = LABELS
    eval_batch = BATCH

    def __init__(self) -> None:
        self.images = torch.randn(40, 1, 6, 6) + 0.5 * LABELS[:, None, None, None]

    def evaluate(self, split: str, indices: Tensor, batch: int = BATCH) -> Iterator[Batch]:
        assert split == "train"
        for part in indices.split(batch):
            yield Batch((self.images[part],), LABELS[part], part)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits + PRIOR, labels, reduction="none")


@pytest.fixture
def run() -> SimpleNamespace:
    """A network in training, and a bank in which group 1 has entries of two epochs."""
    torch.manual_seed(0)
    model = LongTailModel(Encoder(), 5, 4, scale=4.0)
    nn.init.normal_(model.encoder[1].running_mean)
    flat = FlatParameters(model.parameters())
    span = flat.span(model.encoder.parameters())
    bank = MemoryBank(4, span.stop - span.start)
    for epoch, quality in enumerate([[2.0, 2, 0, 0], [1.0, 1, 1, 1]]):
        theta = flat.data[span]
        bank.update(torch.tensor(quality), theta + 0.3 * (theta != 0) * torch.randn_like(theta), epoch)
    return SimpleNamespace(model=model, flat=flat, span=span, bank=bank, source=Pictures())


def fisher_at(run: SimpleNamespace, theta: Tensor, chosen: Tensor, calibration: Tensor, fisher: str) -> Tensor:
    """Mean squares over the images `chosen`, BatchNorm on the mean of its statistics over batches of `calibration`, as
    equal as they go: nine images at seven a batch are five and four."""
    encoder = run.model.encoder
    run.flat.data[run.span] = theta
    with torch.no_grad():
        maps = [encoder[0](run.source.images[part]) for part in calibration.split(5)]
    encoder[1].running_mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    encoder[1].running_var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    run.model.eval()
    params = list(encoder.parameters())
    total = torch.zeros_like(theta, dtype=torch.float64)
    for part in chosen.split(1 if fisher == "per-sample" else BATCH):
        mean = loss(run.model(run.source.images[part]), LABELS[part]).mean()
        grads = dict(zip(params, torch.autograd.grad(mean, params), strict=True))
        total += len(part) * run.flat.flatten([grads.get(p) for p in run.flat.params])[run.span].double().square()
    return total / len(chosen)


@pytest.mark.parametrize("fisher", ["per-sample", "batch"])
def test_the_anchor_of_a_network_is_its_definition(run: SimpleNamespace, fisher: str) -> None:
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    theta = run.flat.data[run.span].clone()
    anchor = collapse_knowledge(
        run.model, run.flat, run.source, run.bank, GROUPS, SIZES, loss,
        fisher=fisher, budget=BUDGET, seed=SEED,
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.model.training

    stars = run.bank.group_means(GROUPS, 2)
    calibration = sample_indices(torch.zeros(4, dtype=torch.int64), LABELS, 0, BUDGET, SEED)
    fishers = [
        fisher_at(run, stars[j], sample_indices(GROUPS, LABELS, j, BUDGET, SEED), calibration, fisher) for j in (0, 1)
    ]
    weight = fishers[0] / 1 + fishers[1] / 3
    target = torch.where(weight > 0, (fishers[0] * stars[0] + fishers[1] / 3 * stars[1]) / weight, 0.0)
    scale = weight.max()
    assert len(anchor.weight) == run.span.stop - run.span.start
    # Observed: 2e-7 of the largest weight, 6e-8 in the targets.
    torch.testing.assert_close(anchor.weight.double() / scale, weight / scale, rtol=2e-5, atol=1e-6)
    held = weight > 1e-3 * scale
    torch.testing.assert_close(anchor.target[held].double(), target[held], rtol=1e-4, atol=1e-5)
    here = fisher_at(run, theta, sample_indices(GROUPS, LABELS, 0, BUDGET, SEED), calibration, fisher)
    assert (here - fishers[0]).abs().max() > 0.05 * fishers[0].max()  # at the network's own weights it is another


class OneOfTwo(Ranks):
    """Rank 0 of two; `mean_` meets, call by call, what the other rank would send."""

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__(world=2)
        object.__setattr__(self, "others", iter(others))

    def mean_(self, tensor: Tensor) -> Tensor:
        return tensor.add_(next(self.others)).div_(2)


def test_statistics_of_two_equal_shares_are_those_of_all_images() -> None:
    torch.manual_seed(2)
    shares = torch.randn(2, 50, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([[[0.0, 3, -1]], [[1.0, -2, 4]]])
    means, variances = shares.mean(1), shares.var(1, correction=0)
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    norm = network[0]
    norm.running_mean.copy_(means[0])
    norm.running_var.copy_(variances[0])
    middle = means.mean(0)
    agree_on_statistics(network, OneOfTwo([means[1], variances[1] + (means[1] - middle).square()]))
    everything = shares.flatten(0, 1)
    torch.testing.assert_close(norm.running_mean, everything.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, everything.var(0, correction=0), rtol=1e-5, atol=1e-6)
    assert (norm.running_var - variances.mean(0)).abs().min() > 0.2  # the means are apart
    agree_on_statistics(network, Ranks())
    torch.testing.assert_close(norm.running_mean, everything.mean(0), rtol=1e-5, atol=1e-6)
