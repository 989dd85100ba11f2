"""One step of every kind against the equations written out per group, and its cost in FLOPs."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ltfast.data.base import Batch
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.losses import balanced_supcon, membership_for
from ltfast.models import LongTailModel, create_encoder
from ltfast.objective import Forward, Objective
from ltfast.optim.engine import EXACT, STALE
from ltfast.optim.rules import RULES, Rule
from ltfast.plan import flops_ratio
from ltfast.step import TrainStep, means
from ltfast.update import Update

COUNTS = torch.tensor([200, 90, 40, 12, 5])
GROUPS = torch.tensor([0, 0, 1, 2, 2])
LR, ALPHA = 0.1, 0.85
# Observed 3e-7 (one fp32 step, forward and backward twice); the wrong-by-one-term oracles below differ by 1e-3 and more.
TOLERANCE = 5e-6


def make(
    kind: str = "bcl", model: str = "resnet8", width: int = 4, seed: int = 0
) -> tuple[LongTailModel, Objective, Batch]:
    torch.manual_seed(seed)
    encoder, dim = create_encoder(model, 1, width=width)
    net = LongTailModel(encoder, dim, len(COUNTS), projection=(16, 8) if kind == "bcl" else None)
    views = tuple(torch.randn(20, 1, 8, 8) for _ in range(3 if kind == "bcl" else 1))
    labels = torch.tensor([0] * 8 + [1] * 5 + [2] * 4 + [3] * 2 + [4])
    return net, Objective(kind, COUNTS, 1.0, 0.35, 0.1), Batch(views, labels, torch.arange(20))


def take_step(
    net: LongTailModel, objective: Objective, batch: Batch, rule: Rule | None, kind: str = "groups", steps: int = 1
) -> TrainStep:
    """Run `steps` fused steps on `net` in place."""
    flat = FlatParameters(net.parameters())
    update = Update(flat, momentum=0.9, weight_decay=1e-3)
    update.lr.fill_(LR)
    update.alpha.fill_(ALPHA)
    membership = None if rule is None else membership_for(kind, COUNTS, GROUPS)
    step = TrainStep(net, objective, flat, FlatBuffers(net), update, rule, membership)
    net.train()
    for _ in range(steps):
        step(batch)
    return step


# -- the slow twin: one group at a time, one parameter at a time, no Gram matrix -----------------------------------------


def group_loss_list(
    net: LongTailModel, objective: Objective, batch: Batch, member: Tensor, weight: Tensor | None = None
) -> list[Tensor]:
    b = batch.labels.numel()
    features = net.features(torch.cat(batch.views))
    z = net.project(features[b:]) if objective.kind == "bcl" else None
    per_sample = objective(net, features, z, batch.labels, weight)
    return [(per_sample * member[:, k]).sum() / member[:, k].sum().clamp_min(1e-9) for k in range(member.shape[1])]


def flat_of(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).double()


def naive_epsilons(rule: Rule, grads: list[Tensor], theta: Tensor, w: Tensor, n: Tensor) -> list[Tensor]:
    """eps_k by Eqs. 12, 13, 15 with explicit projections in float64."""
    s = theta.abs() if rule.adaptive else torch.ones_like(theta)
    u = [s * g for g in grads]
    total = sum(w[k] * u[k] for k in range(len(u)))
    d, eps = theta.numel(), []
    for k, u_k in enumerate(u):
        if rule.direction == "orthogonal":
            u_k = u_k - (u_k @ total) / (total @ total) * total
        elif rule.direction == "projected":
            u_k = (u_k @ total) / (total @ total) * total
        elif rule.direction == "joint":
            u_k = total
        if rule.rho is None:
            rho = (
                rule.radius_C
                * (theta.norm() / (2 * u_k.norm())).sqrt()
                * d**-0.25
                * (max(float(n[k]), 2.0) - 1) ** -0.25
            )
            length = d**0.5 * min(max(float(rho), rule.rho_min), rule.rho_max)
        else:
            length = rule.rho
        eps.append(length * s * u_k / u_k.norm() if w[k] > 0 else torch.zeros_like(theta))
    return eps


def naive_step(
    net: LongTailModel, objective: Objective, batch: Batch, rule: Rule | None, member_CG: Tensor, *, forget: str = ""
) -> None:
    """One step in place on `net`; `forget` leaves a term out, to show that the comparison would notice."""
    params = list(net.parameters())
    member = member_CG[batch.labels]
    w = (member.sum(0) / len(member)).double()
    n = (member_CG.T @ COUNTS.float()).double()
    theta = flat_of([p.detach() for p in params])
    stats = None

    def gradient(loss: Tensor) -> Tensor:
        return flat_of(list(torch.autograd.grad(loss, params)))

    def assign(vector: Tensor) -> None:
        start = 0
        with torch.no_grad():
            for p in params:
                p.copy_(vector[start : start + p.numel()].view_as(p))
                start += p.numel()

    if rule is None:
        final = gradient(
            sum(w[k].float() * loss for k, loss in enumerate(group_loss_list(net, objective, batch, member)))
        )
    else:
        losses = group_loss_list(net, objective, batch, member)
        stats = {k: v.clone() for k, v in net.named_buffers()}
        grads = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
        grads = [
            flat_of([torch.zeros_like(p) if g is None else g for g, p in zip(gs, params, strict=True)]) for gs in grads
        ]
        if rule.split:
            tail = naive_epsilons(rule, [grads[1]], theta, torch.ones(1).double(), n[1:])[0]
            assign(theta + tail)
            final = w[1] * gradient(group_loss_list(net, objective, batch, member)[1])
            final = final + (0 if forget == "head" else w[0] * grads[0])
        else:
            eps = naive_epsilons(rule, grads, theta, w, n)
            if rule.objective == "shared":
                present = [k for k in range(len(w)) if w[k] > 0]
                a = {k: (w[k] if rule.aggregate == "share" else 1 / len(present)) for k in present}
                if rule.direction == "joint":
                    a = {0: 1.0}
                eps = [sum(a[k] * eps[k] for k in a)] * len(w)
            if forget == "ascent":
                eps = [torch.zeros_like(e) for e in eps]
            final = torch.zeros_like(theta)
            for k in range(len(w)):
                assign(theta + eps[k])
                if w[k] > 0:
                    final += w[k] * gradient(group_loss_list(net, objective, batch, member)[k])
    final = (
        1.0 if forget == "alpha" else ALPHA
    ) * final + 1e-3 * theta  # weight decay; momentum starts at the gradient
    assign(theta - LR * final)
    if stats is not None:
        for name, buffer in net.named_buffers():
            buffer.copy_(stats[name])


def difference(a: LongTailModel, b: LongTailModel) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


SHARED = [
    (None, "single"),
    (RULES["sam"], "single"),
    (RULES["asam"], "single"),
    (RULES["imbsam"], "head-tail"),
    (RULES["focal-sam"], "focal"),
    (RULES["gsa-exact"], "groups"),
    (Rule(groups="bank", direction="none", rho=0.05), "groups"),
    (Rule(groups="bank", direction="projected", rho=None, adaptive=True, aggregate="share"), "groups"),
    (Rule(groups="bank", direction="orthogonal", rho=None, adaptive=True, objective="per_group"), "groups"),
]


@pytest.mark.parametrize(
    ("rule", "kind"),
    SHARED,
    ids=lambda x: x if isinstance(x, str) else (x.groups + "-" + x.direction if x else "plain"),
)
@pytest.mark.parametrize("base", ["bcl", "ce"])
def test_step_equals_its_slow_twin(rule: Rule | None, kind: str, base: str) -> None:
    net, objective, batch = make(base)
    twin, wrong = copy.deepcopy(net), copy.deepcopy(net)
    member = membership_for(kind, COUNTS, GROUPS)
    take_step(net, objective, batch, rule, kind)
    twin.train()
    naive_step(twin, objective, batch, rule, member)
    assert difference(net, twin) < TOLERANCE
    wrong.train()
    naive_step(
        wrong, objective, batch, rule, member, forget="alpha" if rule is None else "head" if rule.split else "ascent"
    )
    assert difference(net, wrong) > 20 * TOLERANCE


@pytest.mark.parametrize("name", ["gsa-paper", "cc-sam"])
def test_classifier_scope_equals_its_slow_twin(name: str) -> None:
    """The encoder runs once; the twin evaluates every perturbed classifier through the whole network."""
    net, objective, batch = make("bcl")
    twin = copy.deepcopy(net)
    kind = "classes" if name == "cc-sam" else "groups"
    member_CG, rule = membership_for(kind, COUNTS, GROUPS), RULES[name]
    take_step(net, objective, batch, rule, kind)

    twin.train()
    member = member_CG[batch.labels]
    w, n = (member.sum(0) / len(member)).double(), (member_CG.T @ COUNTS.float()).double()
    weight = twin.classifier.weight
    grads = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0].double().reshape(-1)
        for loss in group_loss_list(twin, objective, batch, member)
    ]
    eps = naive_epsilons(rule, grads, weight.detach().double().reshape(-1), w, n)
    total = sum(
        w[k].float() * group_loss_list(twin, objective, batch, member, weight + e.float().view_as(weight))[k]
        for k, e in enumerate(eps)
    )
    total.backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= LR * (ALPHA * p.grad + 1e-3 * p)
    assert difference(net, twin) < TOLERANCE


def test_the_base_loss_is_its_equation() -> None:
    """a_ce CE + a_scl BalSCL, each number its own: a step's twins take the loss as it comes."""
    net, _, batch = make("bcl")
    net.eval()
    prior = (COUNTS / COUNTS.sum()).log()
    objective = Objective("bcl", COUNTS, 2.0, 0.6, 0.2, tau=1.5)
    with torch.no_grad():
        features = net.features(torch.cat(batch.views))
        z = net.project(features[20:])
        ce = F.cross_entropy(net.logits(features[:20]) + 1.5 * prior, batch.labels, reduction="none")
        contrast = balanced_supcon(z, net.centers(), batch.labels, 0.2)
        found = objective(net, features, z, batch.labels)
        torch.testing.assert_close(found, 2 * ce + 0.6 * contrast, rtol=1e-5, atol=1e-5)  # observed 0
        one = torch.ones(5, 1)  # the same weight where an ascent sees view 1 alone; without bcl there is none
        (view,), _ = Forward(net, objective).first_view(batch.views[0], batch.labels, one)
        torch.testing.assert_close(view, 2 * ce.mean(), rtol=1e-5, atol=1e-5)
        softmax = Objective("balanced-softmax", COUNTS, 2.0, 0.6, 0.2, tau=1.5)
        (view,), _ = Forward(net, softmax).first_view(batch.views[0], batch.labels, one)
        torch.testing.assert_close(view, ce.mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(softmax(net, features[:20], None, batch.labels), ce, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "kind"),
    [*SHARED, (RULES["gsa-full"], "groups"), (RULES["gsa-paper"], "groups"), (RULES["cc-sam"], "classes")],
    ids=lambda x: x if isinstance(x, str) else (x.scope + "-" + x.direction if x else "plain"),
)
def test_a_step_reports_what_is_at_theta_and_the_norm_of_its_gradient(rule: Rule | None, kind: str) -> None:
    net, objective, batch = make("bcl")
    step = take_step(net, objective, batch, rule, kind, steps=0)
    for i in range(2):  # mode R: a step of either kind
        twin, theta = copy.deepcopy(net), step.flat.data.double()
        result = step(batch)
        with torch.no_grad():
            features = twin.features(torch.cat(batch.views))
            loss = objective(twin, features, twin.project(features[20:]), batch.labels).mean()
        assert float(result["loss"]) == pytest.approx(float(loss), rel=1e-5)  # observed 1e-7
        assert step.features is not None
        torch.testing.assert_close(step.features, features[:20], rtol=1e-5, atol=1e-5)
        assert float(result["good"]) == 1
        if i == 0:  # without momentum yet
            gradient = ((theta - step.flat.data.double()) / LR - 1e-3 * theta) / ALPHA
            assert float(result["grad_norm"]) == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_an_ascent_is_logged_as_means_over_the_groups_that_are_there() -> None:
    stats = {
        "radius": torch.tensor([0.2, 0.4, 0.0, 0.6]), "clipped": torch.tensor([1.0, -1.0, 0.0, 0.0]),
        "fallback": torch.tensor([0.0, 0.0, 0.0, 1.0]), "length_sq": torch.tensor(0.25), "ok": torch.tensor(1.0),
    }  # fmt: skip
    found = {name: round(float(value), 6) for name, value in means(stats).items()}
    assert found == {"radius": 0.4, "clipped": 0.666667, "fallback": 0.333333, "length_sq": 0.25, "ok": 1.0}
    assert float(means({name: torch.zeros_like(value) for name, value in stats.items()})["clipped"]) == 0
    assert means({}) == {}


def test_classes_in_parts_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """CC-SAM on more classes than one Gram matrix takes."""
    nets, found = [], []
    for rows in (64, 2):
        monkeypatch.setattr("ltfast.step.MAX_ROWS", rows)
        net, objective, batch = make("bcl")
        step = take_step(net, objective, batch, RULES["cc-sam"], "classes")
        nets.append(net)
        found.append(step.ascent_stats)
    assert difference(*nets) < 1e-6  # observed 1.8e-7: BLAS adds a larger Gram matrix up in another order
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_batchnorm_statistics_move_once() -> None:
    moved = {}
    for rule in (None, RULES["sam"], RULES["gsa-exact"], RULES["gsa-paper"]):
        net, objective, batch = make("bcl")
        take_step(net, objective, batch, rule, "single" if rule is None or rule.groups == "one" else "groups")
        moved[rule] = {k: v.clone() for k, v in net.named_buffers() if "running" in k or "tracked" in k}
    plain = moved.pop(None)
    for stats in moved.values():
        for name, value in plain.items():
            torch.testing.assert_close(stats[name], value, msg=name)


def test_mode_r_refresh_is_exact_and_reuse_keeps_the_intended_norm() -> None:
    rule = RULES["gsa-full"]
    nets = []
    for r in (rule, RULES["gsa-exact"]):
        net, objective, batch = make("bcl")
        take_step(net, objective, batch, r)
        nets.append(net)
    assert difference(*nets) < TOLERANCE  # step 0 refreshes: it is the exact step

    net, objective, batch = make("bcl")
    step = take_step(net, objective, batch, rule)
    engine = step.engine
    assert engine is not None
    found = step.losses(torch.cat(batch.views), batch.labels)
    rows = step._known_rows(STALE, found, batch.labels)
    assert rows is not None
    assert step._known_rows(EXACT, found, batch.labels) is None
    for k, loss in enumerate(found.losses):  # one pass of the head knows what a backward pass a group would find
        (exact,) = torch.autograd.grad(loss, net.classifier.weight, retain_graph=True)
        torch.testing.assert_close(rows[k], exact, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(rows[k - 1], exact, rtol=0.1)
    assert engine.last is not None
    fresh = engine.last.gram(engine.last.put_rows(rows), adaptive=True)
    coef, intended, _ = engine.stale_coefficients(found.shares, fresh)
    engine.ascend(found.losses, found.shares, STALE, rows)
    s = engine.kept.abs()
    moved = ((engine.flat.data - engine.kept) / s.clamp_min(1e-12))[s > 1e-6].double().norm()
    assert float(moved) == pytest.approx(float(intended), rel=1e-3)
    assert coef.shape == (3,)


def test_mode_r_leaves_out_the_classifier_where_its_centres_cost_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltfast.step.CENTRES_MAX", 2)
    for base, known in (("bcl", False), ("balanced-softmax", True)):
        net, objective, batch = make(base)
        step = take_step(net, objective, batch, RULES["gsa-full"])
        assert step.engine is not None
        assert (step.engine.last is not None) == known
        step(batch)
        assert float(step.update.skipped) == 0


def test_absent_group_and_non_finite_loss() -> None:
    net, objective, batch = make("bcl")
    before = copy.deepcopy(net)
    only_head = Batch(batch.views, torch.zeros_like(batch.labels), batch.index)
    take_step(net, objective, only_head, RULES["gsa-exact"])
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert difference(net, before) > 0

    net, objective, batch = make("bcl")
    before = copy.deepcopy(net)
    bad = Batch((batch.views[0] * float("nan"), *batch.views[1:]), batch.labels, batch.index)
    step = take_step(net, objective, bad, RULES["gsa-exact"])
    assert float(step.update.skipped) == 1
    assert difference(net, before) == 0
    old = dict(before.named_buffers())
    assert all(torch.equal(b, old[name]) for name, b in net.named_buffers() if "running" in name)


@pytest.mark.parametrize("length", [0.5, 8.0])
def test_the_loss_gradient_is_clipped_before_alpha(length: float) -> None:
    flat = FlatParameters(make("ce")[0].parameters())
    update = Update(flat, momentum=0.0, clip=2.0)
    update.lr.fill_(LR)
    update.alpha.fill_(ALPHA)
    before, grad = flat.data.clone(), torch.nn.functional.normalize(torch.randn_like(flat.data), dim=0)
    assert float(update(length * grad, None, torch.zeros(()))) == pytest.approx(length)
    torch.testing.assert_close(before - flat.data, LR * ALPHA * min(length, 2.0) * grad, rtol=1e-4, atol=1e-6)


def test_perturbation_is_undone_bit_for_bit() -> None:
    net, objective, batch = make("bcl")
    step = take_step(net, objective, batch, RULES["gsa-exact"])
    engine, before = step.engine, step.flat.data.clone()
    assert engine is not None
    for _ in range(20):
        losses, shares, *_ = step.losses(torch.cat(batch.views), batch.labels)
        engine.ascend(losses, shares)
        assert not torch.equal(step.flat.data, before)
        assert torch.equal(engine.kept, before)  # what the update reads
        step.flat.data.copy_(engine.kept)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("gsa-paper", 1.0, 1.05),
        ("sam", 2.0, 2.01),
        ("gsa-exact", 3.95, 4.01),
        ("gsa-full", 1.99, 2.3),
        ("imbsam", 2.6, 2.7),
        ("focal-sam", 2.6, 2.7),
        ("gsa-exact,per_group", 6.95, 7.01),
    ],
)
def test_flops_of_a_step_relative_to_sgd(name: str, low: float, high: float) -> None:
    """Counted by torch on a ResNet-20; G = 4 gives the table of docs/method.md: E (1 + 2G)/3 + 1 = 4, classifier scope about 1."""
    groups4 = torch.tensor([0, 1, 2, 3, 3])
    method, _, objective_kind = name.partition(",")
    rule = dataclasses.replace(RULES[method], objective=objective_kind or RULES[method].objective)
    kind = {"one": "single", "bank": "groups"}.get(rule.groups, rule.groups)
    flops = {}
    for key in (None, rule):
        net, objective, batch = make("bcl", "resnet20", 16)
        flat = FlatParameters(net.parameters())
        member = None if key is None else membership_for(kind, COUNTS, groups4)
        step = TrainStep(net, objective, flat, FlatBuffers(net), Update(flat), key, member)
        step(batch)  # mode R: the refresh
        with FlopCounterMode(display=False) as counter:
            step(batch)
        flops[key] = counter.get_total_flops()
    ratio = flops[rule] / flops[None]
    assert low <= ratio <= high
    n_groups = {"one": 1, "bank": 4, "head-tail": 2, "focal": 2}[rule.groups]
    if rule.gram_every == 1:
        assert ratio == pytest.approx(flops_ratio(rule, n_groups), rel=0.02)
