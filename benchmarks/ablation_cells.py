"""What the ablation compares: sweeps of cells, each a method with one thing changed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

RHO = (2e-3, 3e-3)  # the paper's clip of Eq. 13
RELEASE = "release"  # in the place of a method: the released training function
# Of cells that do not say: what comes after scouting has 60 % of the run to act; GKP has the paper's strength; the classifier
# begins at random, from published weights too.
USUAL = {"scout": 0.4, "gkp_lambda": 10.0, "imprint": "off"}
IMPRINTED = ",imprint=on"  # in the name of a cell whose classifier begins at mean features


class Cell(NamedTuple):
    """One configuration: a method and the settings that it overrides."""

    method: str
    settings: dict[str, Any]


def radius(factor: float) -> dict[str, Any]:
    """Both clips of Eq. 13 times `factor`; almost every radius lies on one of them."""
    return {"rho_min": RHO[0] * factor, "rho_max": RHO[1] * factor}


def settings_of(method: str, name: str, values: Iterable[Any]) -> dict[str, Cell]:
    """A cell for each value of one setting."""
    return {f"{method},{name}={value}": Cell(method, {name: value}) for value in values}


def directions(factor: float) -> dict[str, Cell]:
    """Directions of a shared perturbation of all parameters, all exact: friendly cannot reuse a Gram matrix."""
    return {
        f"gsa-exact,direction={name},radius=x{factor:g}": Cell("gsa-exact", {"direction": name, **radius(factor)})
        for name in ("orthogonal", "friendly", "none", "projected", "joint")
    }


def scopes(factor: float) -> dict[str, Cell]:
    """Scope and objective at one radius."""
    return {
        f"gsa-exact,scope={scope},objective={objective},radius=x{factor:g}": Cell(
            "gsa-exact", {"scope": scope, "objective": objective, **radius(factor)}
        )
        for scope in ("classifier", "all")
        for objective in ("shared", "per_group")
    }


def last_fifth(base: str) -> dict[str, Cell]:
    """The paper's epochs by a base loss alone, and with what acts after .8 of them."""
    late = {"epochs": 200, "scout": 0.8}
    prefix = "" if base == "bcl" else f"{base}+"
    return {
        f"{base},epochs=200": Cell(base, {"epochs": 200}),
        **{
            f"{prefix}{parts},epochs=200,scout=0.8": Cell(f"{prefix}{parts}", late)
            for parts in ("gkp-gsa", "gsa-full", "gkp", "gsa-paper+gkp")
        },
    }


PUBLISHED = {
    name: Cell(name, {})
    for name in (
        "balanced-softmax",
        *(
            f"balanced-softmax+{rule}"
            for rule in ("sam", "asam", "friendly-sam", "imbsam", "focal-sam", "cc-sam", "gsa-paper", "gsa-full")
        ),
    )
}
# Sweeps, most telling first, each compared with its baseline's runs (`baseline_of`). Cells that are one configuration under two
# names (`same`) are run once.
SWEEPS: dict[str, dict[str, Cell]] = {
    "baseline": {"bcl": Cell("bcl", {})},
    "sam": settings_of("bcl+sam", "rho", (0.02, 0.05, 0.1, 0.2)),
    "asam": settings_of("bcl+asam", "rho", (0.5, 1.0, 2.0, 4.0)),  # GSA is adaptive, too
    "radius-full": {f"gsa-full,radius=x{k}": Cell("gsa-full", radius(k)) for k in (1, 3, 10, 30)},
    "radius-paper": {f"gsa-paper,radius=x{k}": Cell("gsa-paper", radius(k)) for k in (1, 3, 10, 30)},
    "gkp": {f"gsa-full+gkp,radius=x{k}": Cell("gsa-full+gkp", radius(k)) for k in (1, 3)},
    "short": {
        f"{method},epochs={epochs}": Cell(method, {"epochs": epochs})
        for epochs in (12, 24)
        for method in ("bcl", "gkp", "gkp-gsa")
    },
    "direction": {
        **{
            f"gsa-full,direction={name},radius=x3": Cell("gsa-full", {"direction": name, **radius(3)})
            for name in ("orthogonal", "joint", "none", "projected")
        },
        **directions(1),
        **directions(3),
    },
    "lambda": {f"gkp,gkp_lambda={k}": Cell("gkp", {"gkp_lambda": float(k)}) for k in (1, 10, 100)},
    "scope": {**scopes(1), **scopes(3)},
    "gram": settings_of("gsa-full", "gram_every", (1, 4, 16, 64)),
    "groups": settings_of("gsa-full", "groups", (2, 4, 8)),
    "scout": settings_of("gkp", "scout", (0.2, 0.4, 0.6, 0.8)),
    "regroup": settings_of("gkp", "regroup", (0, 6, 12)),
    "alpha": {
        f"gkp,alpha={a}->{b}": Cell("gkp", {"alpha_start": a, "alpha_end": b})
        for a, b in ((0.9, 0.8), (0.99, 0.99), (0.5, 0.5))
    },
    "three-views": {
        "bcl": Cell("bcl", {}),
        **{f"gkp-gsa,scout={share}": Cell("gkp-gsa", {"scout": share}) for share in (0.8, 0.4)},
        "gkp-gsa,scout=0.8,gkp_lambda=0.1": Cell("gkp-gsa", {"scout": 0.8, "gkp_lambda": 0.1}),
    },
    "one-view": {
        **{
            f"balanced-softmax{m}": Cell(f"balanced-softmax{m}", {})
            for m in ("", "+gkp", "+gsa-full", "+gkp-gsa", "+sam")
        },
        "balanced-softmax+gkp,regroup=4": Cell("balanced-softmax+gkp", {"regroup": 4}),
        "balanced-softmax+gkp,gkp_lambda=1": Cell("balanced-softmax+gkp", {"gkp_lambda": 1.0}),
        "balanced-softmax+gkp,scout=0.8": Cell("balanced-softmax+gkp", {"scout": 0.8}),
        "balanced-softmax+gkp-gsa,scout=0.8": Cell("balanced-softmax+gkp-gsa", {"scout": 0.8}),
        **{
            f"balanced-softmax+gkp-gsa,scout=0.8,gkp_lambda={value}": Cell(
                "balanced-softmax+gkp-gsa", {"scout": 0.8, "gkp_lambda": value}
            )
            for value in (1.0, 0.1)
        },
        "balanced-softmax+asam,rho=2": Cell("balanced-softmax+asam", {"rho": 2.0}),
        "ce": Cell("ce", {}),
    },
    "published": {  # every published rule at its default, and the reading of GSA that gains most on digits-lt
        **PUBLISHED,
        "balanced-softmax+gsa-exact,objective=per_group": Cell(
            "balanced-softmax+gsa-exact", {"objective": "per_group"}
        ),
    },
    "fine-tuning": {  # the same from weights trained on other classes, with more radii and the presets of all parts
        **PUBLISHED,
        "ce": Cell("ce", {}),
        **settings_of("balanced-softmax+sam", "rho", (0.1, 0.2)),
        **settings_of("balanced-softmax+asam", "rho", (1.0, 2.0)),
        **{f"balanced-softmax+gsa-full,radius=x{k}": Cell("balanced-softmax+gsa-full", radius(k)) for k in (3, 10)},
        "balanced-softmax+gsa-paper,radius=x10": Cell("balanced-softmax+gsa-paper", radius(10)),
        **{  # from the second epoch on, in groups by frequency
            f"balanced-softmax+gsa-full,scout=0.0,radius=x{k}": Cell(
                "balanced-softmax+gsa-full", {"scout": 0.0, **radius(k)}
            )
            for k in (1, 3)
        },
        **{
            f"balanced-softmax+{gsa},scout=0.0": Cell(f"balanced-softmax+{gsa}", {"scout": 0.0})
            for gsa in ("gsa-paper", "gsa-exact")
        },
        **{  # at ASAM's radius; direction none: each group's whole gradient, so that small groups count as much as large ones
            f"balanced-softmax+{gsa},scout=0.0,direction={direction},rho=0.5": Cell(
                f"balanced-softmax+{gsa}", {"scout": 0.0, "direction": direction, "rho": 0.5}
            )
            for gsa, direction in (("gsa-full", "none"), ("gsa-full", "orthogonal"), ("gsa-exact", "none"))
        },
        "balanced-softmax+gsa-exact,scout=0.0,objective=per_group": Cell(
            "balanced-softmax+gsa-exact", {"scout": 0.0, "objective": "per_group"}
        ),
        # What plain descent does with the time that SAM takes, and what the learning rate does to both.
        "balanced-softmax,twice the epochs": Cell("balanced-softmax", {"epochs": 80}),
        **settings_of("balanced-softmax", "lr", (0.005, 0.01, 0.05)),
        **settings_of("balanced-softmax+sam", "lr", (0.05,)),
        **settings_of("balanced-softmax+asam", "lr", (0.005, 0.05)),
        "balanced-softmax+gkp": Cell("balanced-softmax+gkp", {}),
        **{
            f"balanced-softmax+{parts},scout=0.8,gkp_lambda=0.05": Cell(
                f"balanced-softmax+{parts}", {"scout": 0.8, "gkp_lambda": 0.05}
            )
            for parts in ("gsa-paper+gkp", "gkp-gsa")
        },
    },
    "published-weights": {  # of the rules that gain there, on other pictures from published weights
        name: Cell(name.partition(",")[0], {"scout": 0.0} if "," in name else {})
        for name in ("balanced-softmax", "balanced-softmax+asam", "balanced-softmax+gsa-full,scout=0.0", "ce")
    },
    "imprinting": {  # a classifier that begins at the mean features of its classes, beside one that begins at random
        f"{method}{IMPRINTED * on}{f',{name}={value}' if name else ''}": Cell(
            method, {**({name: value} if name else {}), **({"imprint": "on"} if on else {})}
        )
        for method, name, value in (
            ("balanced-softmax", "", 0),
            ("balanced-softmax+asam", "", 0),
            ("balanced-softmax", "epochs", 40),
            ("balanced-softmax", "lr", 0.005),
            ("balanced-softmax+asam", "lr", 0.005),
        )
        for on in (False, True)
    },
    "from-scratch": {name: Cell(name, {}) for name in ("balanced-softmax", "balanced-softmax+asam")},
    "long": {  # five times the epochs of the others on small pictures: does what a rule costs or gains depend on them?
        **{
            f"{method},epochs=200{share}": Cell(method, {"epochs": 200} | ({"scout": 0.8} if share else {}))
            for method, share in (
                ("balanced-softmax", ""),
                ("balanced-softmax+gkp", ",scout=0.8"),
                ("balanced-softmax+gkp-gsa", ",scout=0.8"),
                ("balanced-softmax+sam", ""),
                ("balanced-softmax+gkp", ""),
            )
        },
        **{
            f"balanced-softmax+gkp,epochs=200,scout=0.8,{name}={value}": Cell(
                "balanced-softmax+gkp", {"epochs": 200, "scout": 0.8, name: value}
            )
            for name, value in (("gkp_lambda", 1.0), ("gkp_lambda", 0.1), ("gkp_normalise", "samples"))
        },
        # GSA by itself: after .4, and from the second epoch on (groups by frequency)
        "balanced-softmax+gsa-full,epochs=200": Cell("balanced-softmax+gsa-full", {"epochs": 200}),
        "balanced-softmax+gsa-full,epochs=200,scout=0.0": Cell(
            "balanced-softmax+gsa-full", {"epochs": 200, "scout": 0.0}
        ),
    },
    # What acts after scouting; all go on from one state, the baseline too, so a seed costs little more than one run.
    "last-fifth": last_fifth("balanced-softmax"),
    "last-fifth-three-views": last_fifth("bcl"),
    "last-fifth-weaker": {  # the default's two parts with a weaker GKP
        "balanced-softmax,epochs=200": Cell("balanced-softmax", {"epochs": 200}),
        **{
            f"balanced-softmax+gkp-gsa,epochs=200,scout=0.8,{name}={value}": Cell(
                "balanced-softmax+gkp-gsa", {"epochs": 200, "scout": 0.8, name: value}
            )
            for name, value in (("gkp_normalise", "samples"), ("gkp_lambda", 1.0), ("gkp_lambda", 0.1))
        },
    },
    "scope-of-gsa": {  # GSA of all parameters or of the classifier alone, which costs half as much, with the default's GKP
        "balanced-softmax,epochs=200": Cell("balanced-softmax", {"epochs": 200}),
        **{
            f"balanced-softmax+{gsa}{gkp},epochs=200,scout=0.8{weak}": Cell(
                f"balanced-softmax+{gsa}{gkp}", {"epochs": 200, "scout": 0.8, **({"gkp_lambda": 0.1} if gkp else {})}
            )
            for gkp, weak in (("+gkp", ",gkp_lambda=0.1"), ("", ""))
            for gsa in ("gsa-paper", "gsa-full")
        },
    },
    "begin": {  # GKP where a multistep schedule lowers the learning rate, .8 of the epochs, and ten epochs later
        "balanced-softmax,epochs=200": Cell("balanced-softmax", {"epochs": 200}),
        **{
            f"balanced-softmax+gkp,epochs=200,scout={share}": Cell(
                "balanced-softmax+gkp", {"epochs": 200, "scout": share}
            )
            for share in (0.8, 0.85)
        },
    },
    "long-three-views": {
        "bcl,epochs=200": Cell("bcl", {"epochs": 200}),
        "gkp-gsa,epochs=200,scout=0.8": Cell("gkp-gsa", {"epochs": 200, "scout": 0.8}),
    },
    # The authors' released training function (peer_training.py), and the preset that takes the same steps.
    "release": {
        "bcl": Cell("bcl", {}),
        "gsa-release,groups=1": Cell("gsa-release", {"groups": 1}),
        "release": Cell(RELEASE, {}),
    },
    "long-release": {
        "bcl,epochs=200": Cell("bcl", {"epochs": 200}),
        "gsa-release,groups=1,epochs=200": Cell("gsa-release", {"groups": 1, "epochs": 200}),
        "release,epochs=200": Cell(RELEASE, {"epochs": 200}),
    },
    "recipe": {  # what the speedrun's recipe may gain from
        "balanced-softmax,tta=flip": Cell("balanced-softmax", {"tta": "flip"}),
        "balanced-softmax,weight_decay=0.002": Cell("balanced-softmax", {"weight_decay": 2e-3}),
        **{
            f"balanced-softmax,batch={size},lr={lr}": Cell("balanced-softmax", {"batch": size, "lr": lr})
            for size, lr in ((128, 0.2), (32, 0.05))
        },
    },
    # The speedrun's recipe on the whole long tail, one thing changed at a time; "half the epochs" is what a rule of twice the work
    # gets in the same time.
    "speedrun": {
        "balanced-softmax": Cell("balanced-softmax", {}),
        "balanced-softmax,views=crop": Cell("balanced-softmax", {"views": "crop"}),
        **settings_of("balanced-softmax", "weight_decay", (0.002, 0.001)),
        "balanced-softmax+asam,half the epochs": Cell("balanced-softmax+asam", {"epochs": 30}),
        "balanced-softmax,batch=64,lr=0.05": Cell("balanced-softmax", {"batch": 64, "lr": 0.05}),
        "balanced-softmax,batch=256,lr=0.2": Cell("balanced-softmax", {"batch": 256, "lr": 0.2}),
        "balanced-softmax,model=resnet20-w32": Cell("balanced-softmax", {"model": "resnet20-w32"}),
        "balanced-softmax,twice as many epochs": Cell("balanced-softmax", {"epochs": 120}),
    },
    "ascent": {
        name: Cell("gsa-full", settings)
        for name, settings in {
            "gsa-full,ascent_every=2": {"ascent_every": 2},
            "gsa-full,ascent_views=1": {"ascent_views": 1},
            "gsa-full,ascent_fraction=0.5": {"ascent_fraction": 0.5},
        }.items()
    },
}


# Sweeps that belong to one study, and that no other one runs.
OWN = {
    "fine-tuning": "cifar10-finetuned",
    "from-scratch": "cifar10-five",
    "speedrun": "speedrun-half",
    "published-weights": "plankton",
    "imprinting": "plankton",
}


def sweeps_of(study: str) -> list[str]:
    """The sweeps that a study runs if none is named."""
    own = study in OWN.values()
    return [sweep for sweep in SWEEPS if (OWN.get(sweep) == study if own else sweep not in OWN)]


def baseline_of(name: str) -> str:
    """The cell that a cell is compared with: BCL of as many epochs, or balanced softmax beside other one-view losses."""
    one_view = name.partition("+")[0].partition(",")[0] in ("ce", "balanced-softmax")
    _, own, epochs = name.partition(",epochs=")
    return ("balanced-softmax" if one_view else "bcl") + own + epochs.partition(",")[0]


@cache
def same(name: str) -> str:
    """The first cell of all sweeps with the same resolved configuration as cell `name`."""
    cells = {n: cell for sweep in SWEEPS.values() for n, cell in sweep.items()}
    return next(n for n, cell in cells.items() if resolved(cell) == resolved(cells[name]))


def resolved(cell: Cell) -> dict[str, Any]:
    """What a cell comes to: its configuration without its name, and its sharpness rule with the overrides in it; what it sets of
    the descent by itself, since studies have values of their own for what it leaves."""
    from ltfast.recipes import build_config, rule_of

    if cell.method == RELEASE:
        return {"released": True, **cell.settings}
    config = build_config("digits-lt", cell.method, {}, {**USUAL, **cell.settings})
    descent = {name: value for name, value in cell.settings.items() if name in config.to_dict()["optim"]}
    return {**config.to_dict(), "method": None, "sharpness": rule_of(config), "descent": descent}
