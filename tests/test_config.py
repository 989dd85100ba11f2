"""Configuration: layers, types, unknown keys, round trip."""

from __future__ import annotations

import dataclasses
import math
import tomllib

import pytest

from ltfast import environment
from ltfast.config import FIELDS, SECTIONS, TYPES, Config, check, flatten, load_toml
from ltfast.data.augment import RECIPES as SMALL_VIEWS
from ltfast.data.large_views import RECIPES as LARGE_VIEWS
from ltfast.errors import UserError
from ltfast.kernels import coefficients
from ltfast.optim.rules import DIRECTIONS, RULES, Rule
from ltfast.recipes import (
    ALIASES,
    BASES,
    RECIPES,
    SHARPNESS_SOURCES,
    build_config,
    method_values,
    needs_groups,
    rule_of,
)
from ltfast.text import toml_of
from ltfast.unread import unread


def test_field_names_are_unique_over_sections() -> None:
    assert len(FIELDS) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values())


@pytest.mark.parametrize("dataset", RECIPES)
def test_round_trip_through_toml(dataset: str, tmp_path) -> None:
    path = tmp_path / "c.toml"
    for method in ("gkp-gsa", "ce+sam"):
        config = build_config(dataset, method, {}, {"seed": 3, "rho_max": 0.5})
        path.write_text(toml_of(config.to_dict()))
        assert Config.from_dict(load_toml(path)) == config


def test_toml_of_anything_a_config_may_hold() -> None:
    strange = "Infinity NaN \"q\" 's' \\ \n \t \x01 \x7f \u00fc \U0001f600 #="
    values = {
        "method": strange,
        "a": {
            "text": strange,
            "inf": float("inf"),
            "small": 1e-05,
            "whole": 3,
            "list": [1, 2.5],
            "texts": [strange],
            "yes": True,
        },
        "empty": {},
    }
    assert tomllib.loads(toml_of(values)) == values
    assert math.isnan(tomllib.loads(toml_of({"x": float("nan")}))["x"])


def test_later_layers_win() -> None:
    config = build_config("cifar10-lt", "bcl", {"epochs": 7, "lr": 0.3}, {"lr": 0.5})
    assert (config.optim.epochs, config.optim.lr, config.data.batch, config.loss.loss) == (7, 0.5, 256, "bcl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"epoch": 3}}, r"unknown key optim.epoch \(did you mean epochs\?\)"),
        ({"optm": {"epochs": 3}}, r"unknown section \[optm\] \(did you mean optim\?\)"),
        ({"data": {"lr": 0.1}}, r"lr belongs in \[optim\], not \[data\]"),
        ({"lr": 0.1}, r"lr belongs in \[optim\]$"),
        ({"batch": [1]}, r"batch belongs in \[data\]$"),
        ({"epoch": 3}, r"unknown key epoch \(did you mean epochs\?\)"),
        ({"data": {"batch": "x"}}, "my.toml: batch='x': needs int"),
        ({"optim": {"lr": -1}}, "my.toml: lr=-1.0: use at least 0"),
        ({"data": 3}, r"my.toml: data=3: this is the name of a section, \[data\]"),
        ({"method": 3}, "my.toml: method=3: needs the name of a method"),
    ],
)
def test_mistakes_in_a_file_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        flatten(values, "my.toml")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "ten", "epochs='ten': needs int"),
        ("epochs", 2.5, "epochs=2.5: needs int"),
        ("epochs", True, "epochs=True: needs int"),
        ("lr", True, "lr=True: needs float"),
        ("lr", None, "lr=None: needs float"),
        ("sampler", "instnce", r"choose from .* \(did you mean instance\?\)"),
        ("epoch", 1, r"unknown option 'epoch' \(did you mean epochs\?\)"),
        ("epochs", 0, "epochs=0: use at least 1"),
        ("momentum", 2.0, "momentum=2.0: use at least 0 and less than 1"),
        ("temperature", 0.0, "temperature=0.0: use more than 0"),
        ("scout", 2, "scout=2.0: use at least 0 and at most 1"),
        ("seed", 2**32, "use at least 0 and at most 4294967295"),
        ("lambda_q", math.nan, "lambda_q=nan: needs a finite number"),
        ("lr", math.inf, "lr=inf: needs a finite number"),
        ("direction", "orthogonl", r"choose from .* \(did you mean orthogonal\?\)"),
        ("device", "tpu", "device='tpu': use auto, cpu, cuda or cuda:N"),
        ("device", "cuda:x", "device='cuda:x': use"),
    ],
)
def test_bad_values_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config().with_(**{name: value})


@pytest.mark.parametrize("name", [n for n, kind in TYPES.items() if kind in (int, float, int | None, float | None)])
def test_every_number_has_a_range_that_holds_its_default(name: str) -> None:
    default = FIELDS[name][1].default
    assert default is None or check(name, default) == default
    if name != "lambda_q":  # any sign has a meaning
        with pytest.raises(UserError, match=f"{name}=-2"):
            Config().with_(**{name: -2})


def test_choices_in_two_places_agree() -> None:
    assert FIELDS["direction"][1].metadata["choices"] == DIRECTIONS == coefficients.DIRECTIONS
    assert set(FIELDS["views"][1].metadata["choices"]) == {"auto", *SMALL_VIEWS, *LARGE_VIEWS}
    for name in ("objective", "scope", "aggregate"):
        for choice in FIELDS[name][1].metadata["choices"]:
            Rule(direction="orthogonal", **{name: choice})


def test_every_method_builds() -> None:
    for name in [*BASES, *SHARPNESS_SOURCES, *ALIASES, "gkp", "balanced-softmax+sam", "ce+gsa-full+gkp"]:
        config = build_config("digits-lt", name, {}, {})
        assert (rule_of(config) is None) == (config.sharpness.sharpness == "none")
    assert set(SHARPNESS_SOURCES) == set(RULES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsa-papr", "did you mean gsa-paper"),
        ("sam+asam", "more than one sharpness rule"),
        ("ce+bcl", "more than one base loss"),
    ],
)
def test_bad_methods_are_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method_values(name)


@pytest.mark.parametrize(
    ("dataset", "figures"),
    [
        (
            "cifar10-lt",
            {"epochs": 200, "lr": 0.15, "weight_decay": 5e-4, "a_ce": 2.0, "a_scl": 0.6, "temperature": 0.1},
        ),
        ("cifar100-lt", {"epochs": 200, "lr": 0.15, "batch": 256, "warmup": 5.0, "schedule": "multistep"}),
        (
            "imagenet-lt",
            {"epochs": 90, "lr": 0.1, "weight_decay": 5e-4, "a_ce": 1.0, "a_scl": 0.35, "temperature": 0.07},
        ),
        ("inat18", {"epochs": 100, "lr": 0.2, "weight_decay": 1e-4, "a_ce": 1.0, "a_scl": 0.35, "temperature": 0.07}),
        ("places-lt", {"epochs": 30, "lr": 0.02, "model": "resnet152", "schedule": "cosine"}),
    ],
)
def test_recipes_are_the_released_codes(dataset: str, figures: dict) -> None:
    config = build_config(dataset, "bcl", {}, {})
    assert config == config.with_(**figures)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sam", (0.05, False, "all", "shared", "uniform", 1)),
        ("asam", (0.5, True, "all", "shared", "uniform", 1)),
        ("friendly-sam", (0.05, False, "all", "shared", "uniform", 1)),
        ("imbsam", (0.05, False, "all", "shared", "uniform", 1)),
        ("focal-sam", (0.05, False, "all", "shared", "uniform", 1)),
        ("cc-sam", (None, False, "classifier", "per_group", "uniform", 1)),
        ("gsa-paper", (None, True, "classifier", "per_group", "uniform", 1)),
        ("gsa-full", (None, True, "all", "shared", "uniform", 16)),
        ("gsa-exact", (None, True, "all", "shared", "uniform", 1)),
        ("gsa-release", (None, True, "all", "shared", "share", 1)),
    ],
)
def test_rules_are_those_of_their_sources(name: str, expected: tuple) -> None:
    rule = RULES[name]
    assert (rule.rho, rule.adaptive, rule.scope, rule.objective, rule.aggregate, rule.gram_every) == expected
    assert (rule.radius_C, rule.rho_min, rule.rho_max, rule.sigma, rule.lmbda) == (0.1, 2e-3, 3e-3, 1.0, 0.9)
    assert rule.gram_ema == 0.5
    assert rule.independent == (name == "cc-sam")
    assert rule.split == (name in ("imbsam", "focal-sam"))


def test_a_run_is_called_what_it_became() -> None:
    """The name is part of the run's folder and of every table."""
    for method, flags, name in (
        ("ce", {}, "ce"),
        ("ce", {"loss": "bcl"}, "bcl"),
        ("ce", {"gkp": True}, "ce+gkp"),
        ("bcl+sam", {"sharpness": "none"}, "bcl"),
        ("gkp-gsa", {"sharpness": "asam"}, "bcl+asam+gkp"),
    ):
        assert build_config("digits-lt", method, {}, flags).method == name


def test_groups_are_wanted_by_gkp_and_by_rules_of_the_bank() -> None:
    for method, wanted in (
        ("bcl+sam", False),
        ("bcl", False),
        ("ce+gkp", True),
        ("sam+gkp", True),
        ("gsa-paper", True),
    ):
        config = build_config("digits-lt", method, {}, {})
        assert needs_groups(config, rule_of(config)) == wanted


@pytest.mark.parametrize("values", [{"rho": 0.0}, {"adaptive": False}, {"rho": 0.0, "sigma": 0.0}])
def test_zero_and_no_are_values_of_an_override(values: dict) -> None:
    assert rule_of(build_config("digits-lt", "asam", {}, values)) == dataclasses.replace(RULES["asam"], **values)


def test_rule_overrides_and_impossible_rules() -> None:
    config = build_config("digits-lt", "gsa-full", {}, {"rho_max": 0.5, "direction": "none", "gram_every": 4})
    rule = rule_of(config)
    assert rule is not None
    assert (rule.rho_max, rule.direction, rule.gram_every, rule.adaptive) == (0.5, "none", 4, True)
    for method, flags in (
        ("gsa-release", {"gram_every": 8}),
        ("gsa-paper", {"direction": "friendly"}),
        ("gsa-full", {"objective": "per_group", "direction": "none"}),
        ("imbsam", {"gram_every": 4}),
        ("imbsam", {"scope": "classifier"}),
        ("sam", {"rho": -1.0}),
    ):
        with pytest.raises(UserError):
            rule_of(build_config("digits-lt", method, {}, flags))


@pytest.mark.parametrize("method", ["gsa-paper", "gsa-full", "gsa-exact", "gsa-release"])
def test_one_group_needs_no_bank(method: str) -> None:
    config = build_config("digits-lt", method, {}, {"groups": 1})
    rule = rule_of(config)
    assert rule is not None
    assert rule.groups == "one"
    assert not needs_groups(config, rule)
    assert set(unread(config, ["groups", "scout", "regroup"])) == {"scout", "regroup"}


def test_one_group_leaves_nothing_to_preserve() -> None:
    with pytest.raises(UserError, match="groups=1: GKP holds each group by the anchors of the others"):
        build_config("digits-lt", "gkp-gsa", {}, {"groups": 1})


def test_a_copy_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its repository may not have come along, or be that of another state."""
    monkeypatch.setenv("LTFAST_COMMIT", "0123abc")
    assert environment.commit() == "0123abc"
