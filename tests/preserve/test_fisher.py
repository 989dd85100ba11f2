"""Fisher against gradients taken one sample (or batch) at a time with plain autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from ltfast.models import LongTailModel, create_encoder
from ltfast.preserve import fisher
from ltfast.preserve.fisher import (
    fisher_sums,
    reestimate_batchnorm,
    sample_indices,
    swapped_parameters,
)
from tests.preserve.support import fisher_diagonal


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.bn2 = nn.BatchNorm2d(6, momentum=0.3)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu_(self.bn(self.conv(x)))
        x = self.bn2(self.grouped(x)).relu().mean((2, 3))
        return self.classifier(self.dropout(x))


PRIOR = torch.tensor([0.5, 0.3, 0.1, 0.07, 0.03]).log()


def adjusted(logits, labels):
    return F.cross_entropy(logits + PRIOR, labels, reduction="none")


def setup(seed=0, n=23, **kw):
    torch.manual_seed(seed)
    net = Net(**kw)
    for bn in (net.bn, net.bn2):
        nn.init.normal_(bn.weight, 1.0, 0.2)
        nn.init.normal_(bn.bias, 0.0, 0.2)
        bn.running_mean.normal_(0, 0.3)
        bn.running_var.uniform_(0.5, 2.0)
    images, labels = torch.randn(n, 3, 8, 8), torch.randint(5, (n,))
    names = [k for k, _ in net.named_parameters() if not k.startswith("classifier")]
    return net, names, images, labels


def split(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


def explicit(net, names, batches, each="sample"):
    """The definition: an autograd call for each sample (or batch), squares in float64."""
    net.eval()
    params = [dict(net.named_parameters())[k] for k in names]
    total, seen = 0.0, 0
    for x, y in batches:
        pieces = zip(x.split(1), y.split(1), strict=True) if each == "sample" else [(x, y)]
        for xi, yi in pieces:
            grads = torch.autograd.grad(adjusted(net(xi), yi).mean(), params)
            total = total + len(yi) * torch.cat([g.flatten() for g in grads]).double().square()
            seen += len(yi)
    return total / seen


@pytest.mark.parametrize("chunk", [None, 1, 4, 64])
def test_per_sample(chunk):
    net, names, images, labels = setup()
    batches = split(images, labels, 9)
    expected = explicit(net, names, batches)
    got = fisher_diagonal(net, names, batches, adjusted, chunk=chunk)
    assert got.dtype == torch.float32
    scale = expected.mean().item()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=2e-5, atol=1e-6)  # observed 3e-6
    for wrong in (torch.zeros_like(expected), explicit(net, names, batches, "batch")):
        assert ((got.double() - wrong).abs() / scale).max() > 0.1


def test_where_memory_is_short_fewer_samples_are_differentiated_together(monkeypatch):
    net, names, images, labels = setup()
    batches, sizes, real = split(images, labels, 9), [], fisher._vmapped_squares
    expected, n = fisher_sums(net, names, batches, adjusted)

    def short(limit):
        def make(*args):
            squares = real(*args)

            def limited(params, x, y):
                sizes.append(len(y))
                if len(y) > limit:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return squares(params, x, y)

            return limited

        return make

    monkeypatch.setattr(fisher, "_vmapped_squares", short(3))
    found, m = fisher_sums(net, names, batches, adjusted)
    assert m == n
    assert sizes == [9, 4, *[2] * 4, 1, *[2] * 4, 1, *[2] * 2, 1], "the first two found no room"
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(fisher, "_vmapped_squares", short(0))
    with pytest.raises(torch.OutOfMemoryError):
        fisher_sums(net, names, batches, adjusted)


def test_batch_mode_squares_the_mean_and_is_far_smaller():
    net, names, images, labels = setup(n=192)
    batches = split(images, labels, 64)
    expected = explicit(net, names, batches, "batch")
    got = fisher_diagonal(net, names, batches, adjusted, mode="batch")
    scale = expected.mean().item()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=1e-4, atol=1e-5)
    per_sample = fisher_diagonal(net, names, batches, adjusted)
    assert got.mean() < 0.3 * per_sample.mean()
    one = fisher_diagonal(net, names, split(images, labels, 1), adjusted, mode="batch")
    torch.testing.assert_close(one, per_sample, rtol=1e-4, atol=1e-7)


def test_batches_of_unequal_size_are_weighted_by_size():
    net, names, images, labels = setup(n=5)
    batches = split(images, labels, 4)  # 4 and 1
    expected = explicit(net, names, batches, "batch")
    got = fisher_diagonal(net, names, batches, adjusted, mode="batch")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def residual():
    encoder, dim = create_encoder("resnet8", 3)
    return LongTailModel(encoder, dim, 5, projection=None).to(memory_format=torch.channels_last)


def attention():
    return VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)


@pytest.mark.parametrize("make", [residual, attention])
def test_networks_in_use(make):
    """Channels-last convolutions with in-place activations; attention and layer norm."""
    torch.manual_seed(1)
    net = make()
    names = [k for k, _ in net.named_parameters() if not k.startswith(("classifier", "heads"))]
    images, labels = torch.randn(6, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.arange(6) % 5
    for p in net.parameters():  # torchvision starts some at zero, which would hide gradients
        p.data.add_(0.05 * torch.randn_like(p))
    expected = explicit(net, names, split(images, labels, 3))
    got = fisher_diagonal(net, names, split(images, labels, 3), adjusted, chunk=2)
    scale = expected.square().mean().sqrt()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=1e-3, atol=1e-4)
    assert (expected / scale).max() > 1
    singly = fisher_diagonal(net, names, split(images, labels, 1), adjusted, mode="batch")
    torch.testing.assert_close(singly.double() / scale, expected / scale, rtol=1e-3, atol=1e-4)


def test_ranks_of_unequal_share_add_up():
    net, names, images, labels = setup(n=7)
    parts = [fisher_sums(net, names, split(images[a:b], labels[a:b], 3), adjusted) for a, b in [(0, 5), (5, 7), (7, 7)]]
    assert [n for _, n in parts] == [5, 2, 0]
    assert not parts[2][0].any()
    whole = fisher_diagonal(net, names, split(images, labels, 7), adjusted)
    torch.testing.assert_close((sum(s for s, _ in parts) / 7).float(), whole, rtol=1e-5, atol=1e-7)


def test_flatten_order_and_padding():
    net, names, images, labels = setup()

    def padded(tensors):
        flat = torch.zeros(1000, dtype=torch.float64)
        flat[500 : 500 + tensors["conv.weight"].numel()] = tensors["conv.weight"].flatten()
        return flat

    got = fisher_diagonal(net, names, split(images, labels, 23), adjusted, flatten=padded)
    plain = fisher_diagonal(net, names, split(images, labels, 23), adjusted)
    assert torch.equal(got[500:608], plain[:108])
    assert not got[:500].any()
    assert plain[:108].min() > 0


def test_model_is_left_as_it_was():
    net, names, images, labels = setup(dropout=0.5)
    net.train()
    net.bn2.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    first = fisher_diagonal(net, names, split(images, labels, 9), adjusted)
    assert torch.equal(first, fisher_diagonal(net, names, split(images, labels, 9), adjusted))  # no dropout
    assert not first.requires_grad
    assert net.training
    assert net.dropout.training
    assert not net.bn2.training
    assert torch.equal(net.conv.weight.grad, torch.ones_like(net.conv.weight))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_reestimated_statistics_are_the_average_over_batches_then_restored():
    net, _, images, _ = setup(dropout=0.5)
    net.train()
    net.bn2.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batches = images.split(8)
    with reestimate_batchnorm(net, batches):
        maps = [net.conv(b).detach() for b in batches]
        mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
        var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
        torch.testing.assert_close(net.bn.running_mean, mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(net.bn.running_var, var, rtol=1e-4, atol=1e-6)
        assert (net.bn.running_mean - before["bn.running_mean"]).abs().max() > 0.05
        assert net.training
        assert not net.bn2.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (net.bn.momentum, net.bn2.momentum) == (0.1, 0.3)


def test_everything_is_restored_after_an_error():
    net, _, images, _ = setup()
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    before, statistics = flat.clone(), net.bn.running_mean.clone()

    def broken():
        with swapped_parameters(flat, torch.zeros_like(flat)), reestimate_batchnorm(net, [images]):
            assert not flat.any()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        broken()
    assert torch.equal(flat, before)
    assert torch.equal(net.bn.running_mean, statistics)
    assert net.bn.momentum == 0.1
    with pytest.raises(ValueError, match="at least one batch"), reestimate_batchnorm(net, []):
        pass
    assert torch.equal(net.bn.running_mean, statistics)


def test_swapped_parameters_reach_the_model_through_views():
    net, names, images, labels = setup()
    params = [dict(net.named_parameters())[k] for k in names]
    flat = nn.utils.parameters_to_vector(params).detach()
    start = 0
    for p in params:
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    star = flat + 0.1 * torch.randn_like(flat)
    here = fisher_diagonal(net, names, split(images, labels, 9), adjusted)
    with swapped_parameters(flat, star), reestimate_batchnorm(net, [images]):
        there = fisher_diagonal(net, names, split(images, labels, 9), adjusted)
        expected = explicit(net, names, split(images, labels, 9))
    torch.testing.assert_close(there.double(), expected, rtol=1e-4, atol=1e-6)
    assert (there - here).abs().max() > 0.1 * here.mean()
    assert torch.equal(here, fisher_diagonal(net, names, split(images, labels, 9), adjusted))


def test_sample_indices():
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 0, 3])
    group_of_class = torch.tensor([0, 1, 1, 0])
    whole = sample_indices(group_of_class, labels, 0, None)
    assert whole.tolist() == [0, 3, 6, 7, 8, 9]
    few = sample_indices(group_of_class, labels, 0, 3, seed=1)
    assert len(few) == 3
    assert set(few.tolist()) <= set(whole.tolist())
    assert few.tolist() == sorted(few.tolist())
    assert torch.equal(few, sample_indices(group_of_class, labels, 0, 3, seed=1))
    draws = {tuple(sample_indices(group_of_class, labels, 0, 3, seed=s).tolist()) for s in range(20)}
    assert len(draws) > 5
    assert sample_indices(group_of_class, labels, 0, 6).tolist() == whole.tolist()
    with pytest.raises(ValueError, match="budget"):
        sample_indices(group_of_class, labels, 0, 0)


def test_bad_arguments():
    net, names, images, labels = setup()
    with pytest.raises(ValueError, match="mode must be"):
        fisher_diagonal(net, names, [], adjusted, mode="exact")
    with pytest.raises(ValueError, match="'nothing'"):
        fisher_diagonal(net, ["nothing"], split(images, labels, 9), adjusted)
    with pytest.raises(ValueError, match="at least one parameter"):
        fisher_diagonal(net, [], split(images, labels, 9), adjusted)
    with pytest.raises(ValueError, match="shape of flat"), swapped_parameters(torch.zeros(3), torch.zeros(4)):
        pass
