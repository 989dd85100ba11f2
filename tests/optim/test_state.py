"""State dicts: exact resume, other optimizers' dicts, pickling, options that switch the path of the update."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ltfast.optim import CCSAM, GSA, SAM, FocalSAM, FriendlySAM, ImbSAM
from tests.optim import support
from tests.optim.support import ADAMW, BASES, COUNTS, GROUP_COUNTS, SGD

Take = Callable[[nn.Module, Any, int], None]


def grouped(kind: str) -> Take:
    return lambda model, optimizer, step: optimizer.step(support.group_closure(model, step, kind))


# name: (optimizer of a model, base and options; one step)
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Take]] = {
    "sam": (lambda m, b, o: SAM(m.parameters(), b, rho=0.2, **o), support.two_passes),
    "friendly": (lambda m, b, o: FriendlySAM(m.parameters(), b, rho=0.2, **o), support.two_passes),
    "imbsam": (lambda m, b, o: ImbSAM(m.parameters(), b, rho=0.2, **o), grouped("head-tail")),
    "focal": (lambda m, b, o: FocalSAM(m.parameters(), b, rho=0.2, **o), grouped("focal")),
    "cc-sam": (lambda m, b, o: CCSAM(support.classifier_groups(m), b, COUNTS, **o), grouped("classes")),
    "gsa": (lambda m, b, o: GSA(m.parameters(), b, GROUP_COUNTS, **o), grouped("groups")),
    "gsa-r": (lambda m, b, o: GSA(m.parameters(), b, GROUP_COUNTS, gram_every=3, **o), grouped("groups")),
    "gsa-r-marked": (
        lambda m, b, o: GSA(support.classifier_groups(m), b, GROUP_COUNTS, gram_every=3, **o),
        grouped("groups"),
    ),
    "gsa-friendly": (
        lambda m, b, o: GSA(m.parameters(), b, GROUP_COUNTS, direction="friendly", objective="per_group", **o),
        grouped("groups"),
    ),
    "gsa-classifier": (
        lambda m, b, o: GSA(support.classifier_groups(m), b, GROUP_COUNTS, scope="classifier", **o),
        grouped("groups"),
    ),
}


def started(name: str, base: str, steps: int = 4) -> tuple[nn.Module, Any]:
    make, take = OPTIMIZERS[name]
    model = support.make()
    optimizer = make(model, *BASES[base])
    for i in range(steps):
        take(model, optimizer, i)
    return model, optimizer


def continued(name: str, model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    for i in range(4, 9):
        OPTIMIZERS[name][1](model, optimizer, i)
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_from_a_state_dict_is_exact(name: str, base: str) -> None:
    model, optimizer = started(name, base)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = continued(name, model, optimizer)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = support.make(seed=7)
    other.load_state_dict(saved["model"])
    kind, options = BASES[base]
    resumed = OPTIMIZERS[name][0](other, kind, {**options, "lr": 9.0})
    resumed.load_state_dict(saved["optimizer"])
    assert same(continued(name, other, resumed), expected)
    forgetful = support.make(seed=7)
    forgetful.load_state_dict(saved["model"])
    assert not same(continued(name, forgetful, OPTIMIZERS[name][0](forgetful, kind, options)), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_go_on_alike_and_apart(name: str, how: str) -> None:
    model, optimizer = started(name, "sgd")
    copies = copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    before = [p.detach().clone() for p in model.parameters()]
    theirs = continued(name, *copies)
    assert same(before, [p.detach() for p in model.parameters()])
    assert same(continued(name, model, optimizer), theirs)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_state_dict_goes_to_torch_and_back(base: str) -> None:
    """The format is torch's: plain SGD or AdamW load it, and theirs load here."""
    kind, options = BASES[base]
    model, optimizer = started("sam", base)
    twin = support.clone(model, "mlp")
    theirs = kind(twin.parameters(), **options)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    back = support.clone(model, "mlp")
    ours = SAM(back.parameters(), kind, rho=0.2, **options)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for i in range(3):
        for m, take in ((twin, theirs.step), (back, ours.second_step)):
            m.zero_grad()
            support.loss_of(m, i).backward()
            take()
    assert support.distance(twin, back) < 1e-6  # observed 6e-8
    assert ours.param_groups[0]["rho"] == 0.2


def test_the_format_of_davda54_loads() -> None:
    """Its dict holds old_p and the options, never the base optimizer's momentum."""
    model = support.make()
    params = list(model.parameters())
    group = {"rho": 0.7, "adaptive": True, "lr": 0.123, "momentum": 0.8, "dampening": 0, "weight_decay": 0.0,
             "nesterov": False, "maximize": False, "foreach": None, "differentiable": False}  # fmt: skip
    theirs = {
        "state": {i: {"old_p": p.detach().clone()} for i, p in enumerate(params)},
        "param_groups": [{**group, "params": list(range(len(params)))}],
    }
    optimizer = SAM(model.parameters(), SGD[0], **SGD[1])
    optimizer.load_state_dict(theirs)
    assert optimizer.param_groups[0]["lr"] == 0.123
    assert optimizer.base_optimizer.param_groups[0]["rho"] == 0.7
    assert not optimizer.state
    support.two_passes(model, optimizer, 0)


def test_the_averages_of_f_sam_load() -> None:
    model = support.make()
    params = list(model.parameters())
    averages = [torch.randn_like(p) for p in params]
    optimizer = FriendlySAM(model.parameters(), SGD[0], **SGD[1])
    plain = {k: v for k, v in optimizer.state_dict().items() if k != "ltfast"}
    plain["state"] = {i: {"momentum": a, "old_p": a} for i, a in enumerate(averages)}
    optimizer.load_state_dict(plain)
    held = optimizer.state_dict()["ltfast"]["averages"]
    assert all(torch.equal(held[i][0], a) for i, a in enumerate(averages))


def test_a_dict_that_does_not_fit_changes_nothing() -> None:
    _, optimizer = started("sam", "sgd")
    before = copy.deepcopy(optimizer.state_dict())
    other = SAM(nn.Linear(2, 2).parameters(), SGD[0], **SGD[1]).state_dict()
    adamw = started("sam", "adamw")[1].state_dict()
    shaped = copy.deepcopy(before)
    shaped["state"][0]["momentum_buffer"] = torch.zeros(3)
    for bad, message in ((other, "parameters"), (adamw, "exp_avg"), (shaped, "momentum_buffer")):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(
            torch.equal(after["state"][i]["momentum_buffer"], s["momentum_buffer"]) for i, s in before["state"].items()
        )


def test_state_is_shown_under_torchs_names() -> None:
    model, optimizer = started("sam", "adamw")
    twin = support.make()
    theirs = torch.optim.AdamW(twin.parameters(), **ADAMW[1])
    support.loss_of(twin, 0).backward()
    theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert set(optimizer.state[p]) == set(theirs.state[q])
    assert set(optimizer.state_dict()) == {"state", "param_groups", "ltfast"}
    assert not SAM(support.make().parameters(), SGD[0], **SGD[1]).state_dict()["state"]


@pytest.mark.parametrize(
    ("base", "option"), [("sgd", {"maximize": True}), ("sgd", {"dampening": 0.3}), ("adamw", {"amsgrad": True})]
)
def test_options_the_kernels_lack_run_torchs_own_step(base: str, option: dict[str, Any]) -> None:
    kind, options = BASES[base]
    model, twin = support.make(), support.make()
    optimizer = SAM(model.parameters(), kind, rho=0.0, **{**options, **option})
    theirs = kind(twin.parameters(), **{**options, **option})
    for i in range(6):
        support.two_passes(model, optimizer, i)
        theirs.zero_grad()
        support.loss_of(twin, i).backward()
        theirs.step()
    assert support.distance(model, twin) < 1e-6  # observed 6e-8


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_path_may_change_in_mid_run(base: str) -> None:
    """maximize switches to torch's step and back; state, step counts and parameters carry over."""
    kind, options = BASES[base]
    model, twin = support.make(), support.make()
    optimizer = SAM(model.parameters(), kind, rho=0.0, **options)
    theirs = kind(twin.parameters(), **options)
    for i in range(9):
        for each in (optimizer, theirs):
            each.param_groups[0]["maximize"] = 3 <= i < 6
        support.two_passes(model, optimizer, i)
        theirs.zero_grad()
        support.loss_of(twin, i).backward()
        theirs.step()
        assert support.distance(model, twin) < 1e-6, i  # observed 1e-7
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in theirs.state[q].items():
            torch.testing.assert_close(optimizer.state[p][name].detach(), value, atol=1e-6, rtol=1e-5)


def test_a_model_on_flat_buffers_saves_alone() -> None:
    """safetensors refuses tensors that overlap; views of one buffer do not."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, _ = started("sam", "sgd")
    held = safetensors.load(safetensors.save({k: v.contiguous() for k, v in model.state_dict().items()}))
    assert all(torch.equal(held[k], v) for k, v in model.state_dict().items())
    assert copy.deepcopy(model)[1].weight.untyped_storage().nbytes() == model[1].weight.numel() * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_moves_between_devices(name: str) -> None:
    model, optimizer = started(name, "adamw")
    far = support.clone(model, "mlp").cuda()
    there = OPTIMIZERS[name][0](far, *ADAMW)
    there.load_state_dict(optimizer.state_dict())
    near = support.clone(model, "mlp")
    back = OPTIMIZERS[name][0](near, *ADAMW)
    back.load_state_dict(there.state_dict())
    assert same(continued(name, near, back), continued(name, model, optimizer))
