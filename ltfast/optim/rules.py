"""The sharpness-aware family as data: every method is a rule from a Gram matrix to coefficients of group gradients.

A batch is split into groups by a membership matrix m [C, G] (class c belongs to group k with weight m_ck; rows sum to 1).
With group losses L_k, shares w_k and gradients g_k, every method here perturbs by eps = s^2 * sum_j c_j g_j, and only the
coefficients c differ (docs/method.md). What is then minimised is
    sum_{k in plain} w_k L_k(theta) + sum_{k not in plain} w_k L_k(theta + eps_(k)).

| rule          | groups            | direction  | radius      | source |
|---------------|-------------------|------------|-------------|--------|
| sam, asam     | one               | joint      | fixed       | Foret et al. 2021; Kwon et al. 2021 |
| friendly-sam  | one               | friendly   | fixed       | Li et al., CVPR 2024 |
| imbsam        | head, tail        | joint tail | fixed       | Zhou et al., ICCV 2023 |
| focal-sam     | [1-t_c, t_c]      | joint t    | fixed       | Li et al., ICML 2025 |
| cc-sam        | every class       | none       | Eq. 13      | Zhou et al., CVPR 2023 |
| gsa-*         | bank groups       | orthogonal or friendly | Eq. 13 | Chen et al., CVPR 2026 |
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from numbers import Integral
from typing import Any

DIRECTIONS = ("joint", "none", "orthogonal", "projected", "friendly")


@dataclass(frozen=True)
class Rule:
    """One sharpness-aware method.

    Attributes:
        groups: "one" | "class" | "head-tail" | "focal" | "bank" (groups of the memory bank).
        direction: "joint" (the batch gradient), "none" (each group's own gradient), "orthogonal" (freed from the batch
            gradient, Eq. 12), "projected" (only that part, an ablation), "friendly" (freed from a moving average).
        objective: "shared" (one perturbation) or "per_group" (each group its own, Eq. 14).
        scope: "all" parameters or the "classifier" weight only.
        adaptive: scale by |theta| as ASAM does.
        rho: fixed radius |s^-1 eps|; None takes Eq. 13 with the three numbers below.
        radius_C, rho_min, rho_max: Eq. 13.
        sigma, lmbda: friendly direction, s (g - sigma * m) with m <- lmbda * m + (1 - lmbda) * g, as in the releases.
        aggregate: how a shared perturbation averages groups: "uniform" or by "share" of the batch.
        gram_every: 1 = exact group gradients each step (mode E); k > 1 = Gram matrix refreshed every k steps (mode R).
        gram_ema: weight of the old Gram matrix at a refresh (mode R).
        ascent_every, ascent_views, ascent_fraction: what an ascent may save at the price of exactness, off by default and
            for a shared perturbation of all parameters only: climb every k-th step and in between perturb by the last
            eps; climb on the classification term of view 1 alone (1; 0 = all views); climb on a part of the samples.
    """

    groups: str = "one"
    direction: str = "joint"
    objective: str = "shared"
    scope: str = "all"
    adaptive: bool = False
    rho: float | None = 0.05
    radius_C: float = 0.1
    rho_min: float = 2e-3
    rho_max: float = 3e-3
    sigma: float = 1.0
    lmbda: float = 0.9
    aggregate: str = "uniform"
    gram_every: int = 1
    gram_ema: float = 0.5
    ascent_every: int = 1
    ascent_views: int = 0
    ascent_fraction: float = 1.0

    def __post_init__(self) -> None:
        exact = self.objective == "per_group" or self.direction == "friendly" or self.split
        checks = (
            ("direction", self.direction in DIRECTIONS, f"one of {', '.join(DIRECTIONS)}"),
            ("objective", self.objective in ("shared", "per_group"), "shared or per_group"),
            ("scope", self.scope in ("all", "classifier"), "all or classifier"),
            (
                "objective",
                self.objective == "shared" or self.direction != "joint",
                "shared with direction joint: every group would climb along the same direction",
            ),
            ("aggregate", self.aggregate in ("uniform", "share"), "uniform or share"),
            ("rho", self.rho is None or 0 <= self.rho < inf, "None or a finite number >= 0"),
            ("radius_C", 0 <= self.radius_C < inf, "a finite number >= 0"),
            ("rho_min", 0 <= self.rho_min <= self.rho_max, "0 <= rho_min <= rho_max"),
            ("rho_max", self.rho_max < inf, "a finite number"),
            ("sigma", 0 <= self.sigma < inf, "a finite number >= 0"),
            ("lmbda", 0 <= self.lmbda <= 1, "a number in [0, 1]"),
            ("gram_every", isinstance(self.gram_every, Integral) and self.gram_every >= 1, "an integer >= 1"),
            (
                "gram_every",
                self.gram_every == 1 or not exact,
                "1 with objective per_group, direction friendly, imbsam and focal-sam: they need each group's gradient",
            ),
            ("gram_ema", 0 <= self.gram_ema < 1, "a number in [0, 1)"),
            ("ascent_every", self.ascent_every >= 1, "an integer >= 1"),
            ("ascent_views", self.ascent_views in (0, 1), "0 (all views) or 1 (the classification view)"),
            ("ascent_fraction", 0 < self.ascent_fraction <= 1, "a number in (0, 1]"),
        )
        for name, good, fix in checks:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {fix}")

    @property
    def split(self) -> bool:
        """True if group 0 is minimised at theta itself and only group 1 is perturbed (ImbSAM, Focal-SAM)."""
        return self.groups in ("head-tail", "focal")

    @property
    def independent(self) -> bool:
        """True if a group's perturbation is a matter of its own gradient alone: any number of groups can go in parts."""
        return self.direction == "none" and self.objective == "per_group"

    def rows(self, groups: int) -> int:
        """Rows that an ascent combines: a gradient for each group and, "friendly", then a moving average for each."""
        return groups * (2 if self.direction == "friendly" else 1)

    @property
    def options(self) -> dict[str, Any]:
        """What `ltfast.kernels.ascent_coefficients` asks of a rule, by its names."""
        return {
            "direction": self.direction, "objective": self.objective, "rho": self.rho, "C": self.radius_C,
            "rho_min": self.rho_min, "rho_max": self.rho_max, "sigma": self.sigma, "aggregate": self.aggregate,
        }  # fmt: skip

    @property
    def partial(self) -> bool:
        """True if the ascent sees only a part of a batch's samples or views."""
        return self.ascent_views > 0 or self.ascent_fraction < 1


RULES: dict[str, Rule] = {
    "sam": Rule(rho=0.05),
    "asam": Rule(rho=0.5, adaptive=True),
    "friendly-sam": Rule(rho=0.05, direction="friendly"),
    "imbsam": Rule(groups="head-tail", rho=0.05),
    "focal-sam": Rule(groups="focal", rho=0.05),
    "cc-sam": Rule(groups="class", direction="none", objective="per_group", scope="classifier", rho=None),
    "gsa-paper": Rule(
        groups="bank", direction="orthogonal", objective="per_group", scope="classifier", adaptive=True, rho=None
    ),
    "gsa-full": Rule(groups="bank", direction="orthogonal", scope="all", adaptive=True, rho=None, gram_every=16),
    "gsa-exact": Rule(groups="bank", direction="orthogonal", scope="all", adaptive=True, rho=None),
    "gsa-release": Rule(groups="bank", direction="friendly", scope="all", adaptive=True, rho=None, aggregate="share"),
}
