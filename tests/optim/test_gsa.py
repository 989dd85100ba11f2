"""Optimizers with group losses: modes, scopes, micro-batches, absent groups, anchors, cost and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltfast.kernels import counting
from ltfast.losses import cross_entropy, group_losses
from ltfast.optim import CCSAM, GSA, FocalSAM, ImbSAM
from tests.optim import support
from tests.optim.support import COUNTS, GROUP_COUNTS, SGD, bits, same_bits

RADIUS = {"C": 3.0, "rho_min": 5e-3, "rho_max": 4e-2}


def gsa(model: nn.Module, **options: Any) -> GSA:
    params = support.classifier_groups(model) if options.get("scope") == "classifier" else model.parameters()
    return GSA(params, SGD[0], GROUP_COUNTS, **{**RADIUS, **SGD[1], **options})


# -- scope "classifier" --------------------------------------------------------------------------------------------------------

CLASSIFIER: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "gsa shared": (lambda m: gsa(m, scope="classifier"), "groups"),
    "gsa per group": (lambda m: gsa(m, scope="classifier", objective="per_group"), "groups"),
    "cc-sam": (lambda m: CCSAM(support.classifier_groups(m), SGD[0], COUNTS, **RADIUS, **SGD[1]), "classes"),
}


@pytest.mark.parametrize("name", CLASSIFIER)
def test_a_head_gives_the_same_step_with_the_encoder_run_once(name: str) -> None:
    make, kind = CLASSIFIER[name]
    whole, split = support.make("conv"), support.make("conv")
    a, b = make(whole).bind(whole), make(split)
    encoder, head = split[:-1], split[-1]
    calls = support.counted(encoder)
    for i in range(5):
        a.step(support.group_closure(whole, i, kind))
        x, y = support.batch(i)
        b.step(
            lambda x=x: encoder(x),
            head=lambda features, y=y: group_losses(cross_entropy(head(features), y), support.table(kind)[y]),
        )
    assert support.distance(whole, split) < 1e-6  # observed 3e-8
    assert calls() == 5
    assert int(split[1].num_batches_tracked) == 5
    for p, q in zip(whole.buffers(), split.buffers(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_features_for_a_head_come_as_a_tuple_or_a_list_of_tensors() -> None:
    models = [support.make("conv") for _ in range(2)]
    x, y = support.batch(0)
    for model, kind in zip(models, (tuple, list), strict=True):
        gsa(model, scope="classifier").step(
            lambda model=model, kind=kind: kind([model[:-1](x)]),
            head=lambda z, model=model: group_losses(cross_entropy(model[-1](z), y), support.table("groups")[y]),
        )
    assert support.distance(*models) == 0
    before = bits(models[0])
    with pytest.raises(ValueError, match="closure returned features of type str; head takes a tensor or a tuple of"):
        gsa(models[0], scope="classifier").step(lambda: ["z"], head=lambda z: z)
    assert all(torch.equal(p, q) for p, q in zip(before, bits(models[0]), strict=True))


@pytest.mark.parametrize("objective", ["shared", "per_group"])
def test_only_the_classifier_moves_up(objective: str) -> None:
    model = support.make()
    optimizer = gsa(model, scope="classifier", objective=objective)
    closure, seen = support.group_closure(model, 0), []

    def watched() -> tuple[Tensor, Tensor]:
        seen.append(bits(model))
        return closure()

    optimizer.step(watched)
    theta, *climbed = seen
    assert len(climbed) == (1 if objective == "shared" else 3)
    for point in climbed:
        assert all(torch.equal(p, q) for p, q in zip(theta[:2], point[:2], strict=True))
        assert not any(torch.equal(p, q) for p, q in zip(theta[2:], point[2:], strict=True))
    assert optimizer.ascent.n_elements == 17 * 5 + 5


# -- gradient accumulation -----------------------------------------------------------------------------------------------------

ACCUMULATED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "gsa": (gsa, "groups"),
    "gsa per group": (lambda m: gsa(m, objective="per_group"), "groups"),
    "gsa friendly": (lambda m: gsa(m, direction="friendly", aggregate="share"), "groups"),
    "gsa classifier": (lambda m: gsa(m, scope="classifier"), "groups"),
    "imbsam": (lambda m: ImbSAM(m.parameters(), SGD[0], rho=0.3, **SGD[1]), "head-tail"),
    "focal-sam": (lambda m: FocalSAM(m.parameters(), SGD[0], rho=0.3, **SGD[1]), "focal"),
}


@pytest.mark.parametrize("cut", [15, 22])
@pytest.mark.parametrize("name", ACCUMULATED)
def test_micro_batches_add_up_to_the_whole_batch(name: str, cut: int) -> None:
    """Parts of different composition: one lacks a group altogether; unequal ones say by their shares what they weigh."""
    make, kind = ACCUMULATED[name]
    whole, parted = support.make(), support.make()
    a, b = make(whole), make(parted)

    def closure(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Callable[[], tuple[Tensor, Tensor]]:
        def evaluate() -> tuple[Tensor, Tensor]:
            losses, shares = group_losses(cross_entropy(model(x), y), support.table(kind)[y])
            return losses, shares * weight

        return evaluate

    for i in range(5):
        x, y = support.batch(i)
        order = y.argsort()
        x, y = x[order], y[order]
        first = a.step(closure(whole, x, y))
        parts = zip(x.tensor_split([cut]), y.tensor_split([cut]), strict=True)
        second = b.step([closure(parted, u, v, 2 * len(v) / len(y)) for u, v in parts])
        torch.testing.assert_close(first, second)
    assert support.distance(whole, parted) < 1e-6  # observed 6e-8
    assert support.distance(whole, support.make()) > 5e-3


def test_micro_batches_in_mode_r() -> None:
    """Equal halves have equal shares, and then mode R is exact, too."""
    whole, halves = support.make(), support.make()
    a, b = gsa(whole, gram_every=3), gsa(halves, gram_every=3)
    for i in range(7):
        closure = support.group_closure(whole, i)
        a.step(closure)
        half = support.group_closure(halves, i)
        b.step([half, half])
    assert support.distance(whole, halves) < 1e-6  # observed 6e-8


# -- mode R ----------------------------------------------------------------------------------------------------------------------


def test_mode_r_costs_one_backward_and_logs_its_cosine() -> None:
    model = support.make()
    optimizer = gsa(model, gram_every=4)
    forwards = support.counted(model)
    for i in range(9):
        optimizer.step(support.group_closure(model, i, size=300))
    assert forwards() == 18
    total, count, least = optimizer.ascent.refresh.tolist()
    assert count == 2  # refreshed at steps 0, 4 and 8; nothing to compare with at 0
    assert -1 <= least <= total / count <= 1 + 1e-9
    assert total / count > 0.5  # .73 here, on batches of 300
    assert optimizer.blocks[0].flat.grads.shape[0] == 1


def test_mode_r_has_the_intended_norm() -> None:
    model = support.make()
    optimizer = gsa(model, gram_every=4)
    for i in range(6):
        theta = optimizer.blocks[0].flat.data.clone()
        watched, seen = support.watched_closure(optimizer, support.group_closure(model, i))
        optimizer.step(watched)
        eps = seen[-1] - theta
        scaled = torch.where(theta != 0, eps / theta, 0.0).double().norm()
        torch.testing.assert_close(scaled.float(), optimizer.stats["length_sq"].sqrt(), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("every", [1, 3])
def test_absent_groups_contribute_nothing(every: int) -> None:
    model = support.make()
    optimizer = gsa(model, gram_every=every)
    for i in range(10):
        optimizer.step(support.group_closure(model, i, missing=(None, 2, 3)[i % 3]))
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert float(optimizer.skipped) == 0


def test_a_group_that_comes_late_enters_the_memory_then() -> None:
    model = support.make()
    optimizer = gsa(model, gram_every=2)
    optimizer.step(support.group_closure(model, 0, missing=2))  # class 2 is group 1
    assert float(optimizer.ascent.memory[1].abs().sum()) == 0
    optimizer.step(support.group_closure(model, 1))
    optimizer.step(support.group_closure(model, 2))
    assert float(optimizer.ascent.memory[1, 1]) > 0


# -- ImbSAM, edge cases -----------------------------------------------------------------------------------------------------------


def test_a_batch_without_tail_is_a_plain_step() -> None:
    model, twin = support.make(), support.make()
    optimizer = ImbSAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    base = SGD[0](twin.parameters(), **SGD[1])
    for i in range(3):
        x, y = support.batch(i)
        y = y % 3  # classes with 200, 90 and 40 images
        optimizer.step(lambda x=x, y=y: group_losses(cross_entropy(model(x), y), support.table("head-tail")[y]))
        base.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        base.step()
    assert support.distance(model, twin) < 1e-6  # observed 3e-8
    assert float(optimizer.skipped) == 0


def test_an_all_zero_gradient_is_a_plain_step() -> None:
    model, plain = support.make(), support.make()
    optimizer, twin = gsa(model), SGD[0](plain.parameters(), **SGD[1])
    closure = support.group_closure(model, 0)

    def flat() -> tuple[Tensor, Tensor]:
        losses, shares = closure()
        return losses * 0, shares

    optimizer.step(flat)
    for p in plain.parameters():
        p.grad = torch.zeros_like(p)
    twin.step()  # weight decay
    assert support.distance(model, plain) < 1e-7
    assert float(optimizer.skipped) == 0


def test_cc_sam_skips_a_step_of_which_one_class_alone_has_no_finite_gradient() -> None:
    model = support.make()
    optimizer = CCSAM(support.classifier_groups(model), SGD[0], COUNTS, **RADIUS, **SGD[1])
    before, closure = bits(model), support.group_closure(model, 0, "classes")

    def broken() -> tuple[Tensor, Tensor]:
        losses, shares = closure()
        first = losses[0] * 1.0
        first.register_hook(lambda upstream: torch.where(upstream != 0, torch.nan, 0.0))
        return torch.stack([first, *losses[1:]]), shares

    optimizer.step(broken)
    assert float(optimizer.skipped) == 1
    assert same_bits(model, before)


def test_one_group_is_plain_sam() -> None:
    model, twin = support.make(), support.make()
    options = {"rho_min": 0.0, "rho_max": 1.0, "adaptive": False, **SGD[1]}
    one = GSA(model.parameters(), SGD[0], [347], **options)
    joint = GSA(twin.parameters(), SGD[0], [347], direction="joint", **options)
    for i in range(3):
        one.step(support.group_closure(model, i, "single"))
        joint.step(support.group_closure(twin, i, "single"))
    assert support.distance(model, twin) < 1e-6  # observed 3e-8


# -- the update --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_an_anchor_acts_at_theta_and_beside_the_gradient(base: str) -> None:
    kind, options = support.BASES[base]
    model, twin = support.make(), support.make()
    torch.manual_seed(4)
    weights = [torch.rand_like(p) for p in model.parameters()]
    targets = [torch.randn_like(p) for p in model.parameters()]
    weights[1] = targets[1] = None
    optimizer = GSA(model.parameters(), kind, GROUP_COUNTS, **options)
    optimizer.set_anchor(weights, targets, strength=0.3, alpha=0.8)
    other = GSA(twin.parameters(), kind, GROUP_COUNTS, **options)

    def add() -> None:
        for p, a, t in zip(twin.parameters(), weights, targets, strict=True):
            own = optimizer_theta[p]
            p.grad.mul_(0.8)
            if a is not None:
                p.grad.add_(a * (own - t), alpha=0.3)

    for i in range(4):
        optimizer_theta = {p: p.detach().clone() for p in twin.parameters()}
        optimizer.step(support.group_closure(model, i))
        other.step(support.group_closure(twin, i), on_gradient=add)
    assert support.distance(model, twin) < 2e-6  # observed 2e-7
    optimizer.set_anchor(None)
    assert optimizer.blocks[0].anchor is None
    with pytest.raises(ValueError, match="weights"):
        optimizer.set_anchor(weights[:2], targets)
    with pytest.raises(ValueError, match="targets"):
        optimizer.set_anchor(weights, [torch.zeros(3)] * 4)


def test_the_final_gradient_is_in_p_grad() -> None:
    model = support.make()
    optimizer = gsa(model)
    seen: list[Tensor] = []
    optimizer.step(
        support.group_closure(model, 0), on_gradient=lambda: seen.extend(p.grad.clone() for p in model.parameters())
    )
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), seen, strict=True))


def test_statistics_move_once_when_the_model_is_bound() -> None:
    for every, options in ((1, {}), (4, {}), (1, {"objective": "per_group"})):
        model = support.make("conv")
        optimizer = gsa(model, gram_every=every, **options).bind(model)
        for i in range(3):
            optimizer.step(support.group_closure(model, i))
        assert int(model[1].num_batches_tracked) == 3


def test_groups_may_change_and_options_be_scheduled() -> None:
    model = support.make()
    optimizer = gsa(model)
    optimizer.step(support.group_closure(model, 0))
    optimizer.set_groups(COUNTS)
    optimizer.step(support.group_closure(model, 1, "classes"))
    assert optimizer.stats["radius"].shape == (5,)
    optimizer.param_groups[0]["rho_max"] = 6e-3
    optimizer.step(support.group_closure(model, 2, "classes"))
    assert float(optimizer.stats["length_sq"]) <= sum(p.numel() for p in model.parameters()) * 6e-3**2
    optimizer.param_groups[0]["rho_max"] = 0.0
    with pytest.raises(ValueError, match="rho_m"):
        optimizer.step(support.group_closure(model, 2, "classes"))


@pytest.mark.parametrize("name", ["C", "rho_min", "rho_max"])
def test_param_groups_of_another_radius_are_refused(name: str) -> None:
    """One ascent has one radius: that of the first group must not win in silence."""
    model = support.make()
    optimizer = GSA(support.classifier_groups(model), SGD[0], GROUP_COUNTS, **{**RADIUS, **SGD[1]})
    optimizer.step(support.group_closure(model, 0))
    before = bits(model)
    optimizer.param_groups[1][name] *= 1.01
    with pytest.raises(ValueError, match=f"{name} differs between the param groups"):
        optimizer.step(support.group_closure(model, 1))
    assert same_bits(model, before)


def test_a_group_added_later_climbs_too() -> None:
    model, twin = support.make(), support.make()
    head = list(model[-1].parameters())
    optimizer, whole = GSA(model[:-1].parameters(), SGD[0], GROUP_COUNTS, **SGD[1]), gsa(twin, **{"C": 0.1})
    whole.param_groups[0].update(rho_min=2e-3, rho_max=3e-3)
    optimizer.add_param_group({"params": head})
    for i in range(4):
        optimizer.step(support.group_closure(model, i))
        whole.step(support.group_closure(twin, i))
    assert support.distance(model, twin) < 1e-6  # observed 3e-8


# -- cost --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "anchor", "kernels", "passes"),
    [({}, False, 4, 17), ({}, True, 4, 19), ({"gram_every": 99}, False, 4, 11), ({"gram_every": 99}, True, 4, 13)],
)
def test_counted_cost_of_four_groups(options: dict[str, Any], anchor: bool, kernels: int, passes: float) -> None:
    params = nn.ParameterList([torch.full((3 + i % 5,), 0.1 * i + 1) for i in range(161)])
    optimizer = GSA(params, SGD[0], [200, 90, 40, 17], **SGD[1], **options)
    if anchor:
        optimizer.set_anchor([torch.ones_like(p) for p in params], [p.detach() for p in params], 0.1)
    factors = torch.arange(1.0, 5.0)

    def closure() -> tuple[Tensor, Tensor]:
        return sum(p.sin().sum() for p in params) * factors, torch.full((4,), 0.25)

    for _ in range(3):
        with counting() as cost:
            optimizer.step(closure)
    assert cost.kernels == kernels
    assert cost.passes == passes
    block = optimizer.blocks[0]
    extra = block.flat.grads.shape[0] - 1 + 1  # rows beyond the gradient itself, and the kept theta
    assert extra == (1 if options else 4)
    assert block.flat.rows.gathered == 3 * len(params)  # the final gradient, once a step; group gradients land in place


# -- arguments -----------------------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    model = support.make()
    for name, make in {
        "counts": lambda: GSA(model.parameters(), SGD[0], [[1, 2]], **SGD[1]),
        "counts ": lambda: GSA(model.parameters(), SGD[0], [-1.0, 2], **SGD[1]),
        "direction": lambda: gsa(model, direction="up"),
        "objective": lambda: gsa(model, objective="both"),
        "scope": lambda: GSA(model.parameters(), SGD[0], [1, 2], scope="classifier", **SGD[1]),
        "aggregate": lambda: gsa(model, aggregate="max"),
        "gram_every": lambda: gsa(model, gram_every=0),
        "gram_every ": lambda: gsa(model, gram_every=4, objective="per_group"),
        "gram_every  ": lambda: gsa(model, gram_every=4, direction="friendly"),
        "rho_min": lambda: gsa(model, rho_min=1.0, rho_max=0.5),
        "rho": lambda: ImbSAM(model.parameters(), SGD[0], rho=-1.0, **SGD[1]),
        "closure": lambda: gsa(model).step(),
        "head": lambda: gsa(model).step(support.group_closure(model, 0), head=lambda f: f),
    }.items():
        with pytest.raises(ValueError, match=name.strip()):
            make()


def test_averages_begin_with_the_first_step_that_is_taken() -> None:
    """A closure that fails at a perturbed point has moved no average, so the next step's gradient begins it, whole."""
    made = []
    for fails in (False, True):
        model = support.make()
        optimizer = gsa(model, direction="friendly", objective="per_group")
        closure, calls = support.group_closure(model, 0), []

        def broken(closure=closure, calls=calls) -> tuple[Tensor, Tensor]:
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("no")
            return closure()

        if fails:
            with pytest.raises(RuntimeError, match="no"):
                optimizer.step(broken)
            assert not optimizer.ascent.seen.any()
        optimizer.step(closure)
        optimizer.step(support.group_closure(model, 1))
        assert optimizer.ascent.seen.all()
        made.append(bits(model))
    assert all(torch.equal(p, q) for p, q in zip(*made, strict=True))


@pytest.mark.parametrize(
    "result", [torch.zeros(3), (torch.zeros(2), torch.zeros(2)), (torch.zeros(3), torch.ones(3)), (1.0, 2.0)]
)
def test_a_wrong_closure_changes_nothing(result: Any) -> None:
    model = support.make()
    optimizer = gsa(model)
    optimizer.step(support.group_closure(model, 0))
    before = bits(model)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: result)
    good, calls = support.group_closure(model, 1), []

    def failing() -> Any:
        calls.append(None)
        return good() if len(calls) == 1 else result

    with pytest.raises(ValueError, match="closure"):
        optimizer.step(failing)
    assert same_bits(model, before)


@pytest.mark.parametrize(("losses", "shares", "which"), [(2, 2, "losses"), (2, 3, "losses"), (3, 2, "shares")])
def test_a_closure_of_another_number_of_groups_is_named(losses: int, shares: int, which: str) -> None:
    model = support.make()
    optimizer, closure, before = gsa(model), support.group_closure(model, 0), bits(model)

    def shorter() -> Any:
        found = closure()
        return found[0][:losses], found[1][:shares]

    with pytest.raises(ValueError, match=rf"{which} must be a tensor of shape \(3,\), not \(2,\)"):
        optimizer.step(shorter)
    assert same_bits(model, before)
