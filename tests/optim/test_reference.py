"""Fifty steps beside the slow twins of ltfast.optim.reference: parameters and optimizer state, fp32 and bf16 autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from ltfast.optim import CCSAM, GSA, SAM, FocalSAM, FriendlySAM, ImbSAM
from ltfast.optim import reference as ref
from tests.optim import support
from tests.optim.support import ADAMW, COUNTS, GROUP_COUNTS, SGD

STEPS = 50
RHO = 0.5
STRONG = {"C": 3.0, "rho_min": 5e-3, "rho_max": 4e-2}  # some radii inside the bounds, perturbations that show
# Largest |difference| after 50 steps: observed up to 5e-7 in fp32 (8e-7 of the state) and 5e-3 (9e-3) in bf16, where an
# activation may round the other way; a twin wrong by one term is off by more than REJECTED.
TOLERANCE = {"fp32": 5e-6, "bf16": 2e-2}
REJECTED = 2e-4

Step = Callable[[nn.Module, Any, int, str], None]


def ours_two_pass(model: nn.Module, optimizer: Any, step: int, precision: str) -> None:
    support.two_passes(model, optimizer, step, precision)


def ours_grouped(kind: str) -> Step:
    def take(model: nn.Module, optimizer: Any, step: int, precision: str) -> None:
        optimizer.step(support.group_closure(model, step, kind, precision))

    return take


def twin_of(function: Callable[..., None], kind: str | None = None, scope: str = "all", **options: Any) -> Step:
    """The twin's step; `averages` live on the base optimizer."""

    def take(model: nn.Module, base: Any, step: int, precision: str) -> None:
        params = list(model.parameters()) if scope == "all" else list(support.last_layer(model).parameters())
        own = dict(options)
        if function is ref.friendly_sam_step or function is ref.gsa_step:
            own["averages"] = base.__dict__.setdefault("averages", {})
        if kind is None:
            function(base, params, lambda: support.loss_of(model, step, precision), **own)
        else:
            function(base, params, support.group_closure(model, step, kind, precision), **own)

    return take


GSA_OPTIONS = {"counts": GROUP_COUNTS, **STRONG}
FREE = {"C": 0.3, "rho_min": 1e-5, "rho_max": 1.0}  # every radius inside the bounds, so that it tells the counts
CC_OPTIONS = {"counts": COUNTS.tolist(), "direction": "none", "objective": "per_group", "adaptive": False, **FREE}


def all_parameters(model: nn.Module) -> Any:
    return model.parameters()


# name: (optimizer from (params, base, kwargs), which params, our step, the twin, twins wrong by one term)
CASES: dict[str, tuple[Callable[..., Any], Callable[[nn.Module], Any], Step, Step, list[Step]]] = {
    "sam": (
        lambda p, b, k: SAM(p, b, rho=RHO, **k), all_parameters, ours_two_pass,
        twin_of(ref.sam_step, rho=RHO),
        [twin_of(ref.sam_step, rho=0.0), twin_of(ref.sam_step, rho=RHO, adaptive=True)],
    ),
    "asam": (
        lambda p, b, k: SAM(p, b, rho=4 * RHO, adaptive=True, **k), all_parameters, ours_two_pass,
        twin_of(ref.sam_step, rho=4 * RHO, adaptive=True),
        [twin_of(ref.sam_step, rho=0.0), twin_of(ref.sam_step, rho=4 * RHO)],
    ),
    "friendly-sam": (
        lambda p, b, k: FriendlySAM(p, b, rho=RHO, sigma=0.8, lmbda=0.7, **k), all_parameters, ours_two_pass,
        twin_of(ref.friendly_sam_step, rho=RHO, sigma=0.8, lmbda=0.7),
        [twin_of(ref.friendly_sam_step, rho=RHO, sigma=0.0, lmbda=0.7), twin_of(ref.friendly_sam_step, rho=0.0)],
    ),
    "imbsam": (
        lambda p, b, k: ImbSAM(p, b, rho=2 * RHO, **k), all_parameters, ours_grouped("head-tail"),
        twin_of(ref.split_step, "head-tail", rho=2 * RHO),
        [twin_of(ref.split_step, "head-tail", rho=0.0), twin_of(ref.split_step, "head-tail", rho=2 * RHO, adaptive=True)],
    ),
    "focal-sam": (
        lambda p, b, k: FocalSAM(p, b, rho=2 * RHO, adaptive=True, **k), all_parameters, ours_grouped("focal"),
        twin_of(ref.split_step, "focal", rho=2 * RHO, adaptive=True),
        [twin_of(ref.split_step, "focal", rho=0.0), twin_of(ref.split_step, "focal", rho=2 * RHO)],
    ),
    "cc-sam": (
        lambda p, b, k: CCSAM(p, b, COUNTS, **FREE, **k), support.classifier_groups, ours_grouped("classes"),
        twin_of(ref.gsa_step, "classes", "classifier", **CC_OPTIONS),
        [twin_of(ref.gsa_step, "classes", "classifier", **{**CC_OPTIONS, "counts": [7.0] * 5})],
    ),
    "gsa": (
        lambda p, b, k: GSA(p, b, GROUP_COUNTS, **STRONG, **k), all_parameters, ours_grouped("groups"),
        twin_of(ref.gsa_step, "groups", **GSA_OPTIONS),
        [
            twin_of(ref.gsa_step, "groups", direction="none", **GSA_OPTIONS),
            twin_of(ref.gsa_step, "groups", adaptive=False, **GSA_OPTIONS),
        ],
    ),
    "gsa-friendly": (
        lambda p, b, k: GSA(p, b, GROUP_COUNTS, direction="friendly", aggregate="share", sigma=0.8, **STRONG, **k),
        all_parameters, ours_grouped("groups"),
        twin_of(ref.gsa_step, "groups", direction="friendly", aggregate="share", sigma=0.8, **GSA_OPTIONS),
        [twin_of(ref.gsa_step, "groups", direction="none", aggregate="share", **GSA_OPTIONS)],
    ),
    "gsa-per-group": (
        lambda p, b, k: GSA(p, b, GROUP_COUNTS, objective="per_group", **STRONG, **k),
        all_parameters, ours_grouped("groups"),
        twin_of(ref.gsa_step, "groups", objective="per_group", **GSA_OPTIONS),
        [twin_of(ref.gsa_step, "groups", objective="shared", **GSA_OPTIONS)],
    ),
    "gsa-classifier": (
        lambda p, b, k: GSA(p, b, GROUP_COUNTS, scope="classifier", objective="per_group", **STRONG, **k),
        support.classifier_groups, ours_grouped("groups"),
        twin_of(ref.gsa_step, "groups", "classifier", objective="per_group", **GSA_OPTIONS),
        [twin_of(ref.gsa_step, "groups", objective="per_group", **GSA_OPTIONS)],
    ),
}  # fmt: skip


def run(
    name: str, step: Step, optimizer: Callable[[nn.Module], Any], precision: str, steps: int = STEPS
) -> tuple[nn.Module, Any]:
    model = support.make(name)
    held = optimizer(model)
    for i in range(steps):
        step(model, held, i % 7, precision)
    return model, held


def state_distance(model: nn.Module, ours: Any, twin_model: nn.Module, base: Any) -> float:
    """Largest difference of momentum or moments."""
    worst = 0.0
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert set(ours.state[p]) == set(base.state[q])
        for key, value in base.state[q].items():
            worst = max(worst, float((ours.state[p][key] - value).abs().max()))
    return worst


def side_by_side() -> list[Any]:
    """Every optimizer, network and precision; the transformer and most of bf16 are slow and run on request."""
    cases = []
    for case in CASES:
        for name in ("mlp", "conv", "vit"):
            for precision in ("fp32", "bf16"):
                quick = (name != "vit" and precision == "fp32") or (case in ("sam", "gsa") and name != "conv")
                marks = () if quick else pytest.mark.slow
                cases.append(pytest.param(case, name, precision, marks=marks))
    return cases


@pytest.mark.parametrize(("case", "name", "precision"), side_by_side())
def test_fifty_steps_beside_the_twin(case: str, name: str, precision: str) -> None:
    make, which, step, twin, _ = CASES[case]
    base, options = ADAMW if name == "vit" else SGD
    model, ours = run(name, step, lambda m: make(which(m), base, options), precision)
    # fused: on a CPU ours ends in the same code, and a last bit apart is enough for a ReLU to switch within fifty steps
    twin_model, theirs = run(name, twin, lambda m: base(m.parameters(), fused=True, **options), precision)
    assert support.distance(model, twin_model) < TOLERANCE[precision]
    assert state_distance(model, ours, twin_model, theirs) < TOLERANCE[precision]
    assert support.distance(model, support.make(name)) > 0.05
    assert float(ours.skipped) == 0


@pytest.mark.parametrize("case", CASES)
def test_a_twin_wrong_by_one_term_is_rejected(case: str) -> None:
    make, which, step, _, wrong = CASES[case]
    model, _ = run("mlp", step, lambda m: make(which(m), SGD[0], SGD[1]), "fp32")
    for twin in wrong:
        twin_model, _ = run("mlp", twin, lambda m: SGD[0](m.parameters(), **SGD[1]), "fp32")
        assert support.distance(model, twin_model) > REJECTED


def length(params: list[Any]) -> float:
    own = [p.detach() for p in params]
    return ref.dot(own, own) ** 0.5


def gram_of(losses: Any, params: list[Any]) -> list[list[float]]:
    s = ref.scale_of(params, True)
    u = [ref.times(s, ref.gradient(loss, params)) for loss in losses]
    return [[ref.dot(a, b) for b in u] for a in u]


def stale_twin(rescale: bool, marked: bool = False, damp: bool = True) -> Step:
    """Mode R, gram_every = 4: exact at refreshes, remembered Gram matrix (EMA .5) in between; `marked`: of all but the
    last layer, whose own is made in every step."""
    held: dict[str, Any] = {"memory": None, "steps": 0}

    def take(model: nn.Module, base: Any, step: int, precision: str) -> None:
        params, closure = list(model.parameters()), support.group_closure(model, step, "groups", precision)
        last = list(support.last_layer(model).parameters()) if marked else []
        rest = [p for p in params if not any(p is q for q in last)]
        held["steps"] += 1
        losses, shares = closure()
        if (held["steps"] - 1) % 4 == 0:
            held["memory"] = ref.gsa_remember(held["memory"], gram_of(losses, rest), 0.5)
            held["theta"] = length(params)
            ref.gsa_step(base, params, closure, averages={}, **GSA_OPTIONS)
            return
        d, memory = sum(p.numel() for p in params), held["memory"]
        matrix = memory
        if marked:
            matrix = [
                [a + b for a, b in zip(*rows, strict=True)] for rows in zip(memory, gram_of(losses, last), strict=True)
            ]
        c, intended = ref.gsa_stale_coefficients(
            matrix, held["theta"], shares.tolist(), GROUP_COUNTS, d, *STRONG.values()
        )
        g = range(len(c))
        expected = sum(c[i] * memory[i][j] * c[j] for i in g for j in g) ** 0.5 if damp else 1e9
        held["theta"] = length(params)  # Eq. 13 takes |theta| as of the last ascent
        ref.gsa_stale_step(base, params, closure, c, intended if rescale else 1.3 * intended, fresh=last, rest=expected)

    return take


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_mode_r_with_a_marked_classifier_beside_its_twin(name: str) -> None:
    model, _ = run(
        name, ours_grouped("groups"),
        lambda m: GSA(support.classifier_groups(m), SGD[0], GROUP_COUNTS, gram_every=4, **STRONG, **SGD[1]), "fp32",
    )  # fmt: skip
    twins = {
        how: run(name, stale_twin(**options), lambda m: SGD[0](m.parameters(), **SGD[1]), "fp32")[0]
        for how, options in {
            "right": {"rescale": True, "marked": True},
            "unmarked": {"rescale": True},
            "undamped": {"rescale": True, "marked": True, "damp": False},
        }.items()
    }
    assert support.distance(model, twins.pop("right")) < TOLERANCE["fp32"]
    for how, twin in twins.items():
        assert support.distance(model, twin) > 4 * TOLERANCE["fp32"], how  # observed 5e-5 (undamped) and more


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_mode_r_beside_its_twin(name: str) -> None:
    model, ours = run(
        name, ours_grouped("groups"), lambda m: GSA(m.parameters(), SGD[0], GROUP_COUNTS, gram_every=4, **STRONG, **SGD[1]),
        "fp32",
    )  # fmt: skip
    twin, _ = run(name, stale_twin(True), lambda m: SGD[0](m.parameters(), **SGD[1]), "fp32")
    wrong, _ = run(name, stale_twin(False), lambda m: SGD[0](m.parameters(), **SGD[1]), "fp32")
    assert support.distance(model, twin) < TOLERANCE["fp32"]
    assert support.distance(model, wrong) > REJECTED
    assert int(ours.ascent.refresh[1]) == 12
