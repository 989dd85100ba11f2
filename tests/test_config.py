"""Configuration: layers, types, unknown keys, round trip."""

from __future__ import annotations

import dataclasses
import math
import tomllib

import pytest

from ltfast.config import FIELDS, SECTIONS, Config, flatten, load_toml
from ltfast.errors import UserError
from ltfast.optim.rules import RULES
from ltfast.recipes import ALIASES, BASES, RECIPES, SHARPNESS_SOURCES, build_config, method_values, rule_of
from ltfast.runs import toml_of


def test_field_names_are_unique_over_sections() -> None:
    assert len(FIELDS) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values())


@pytest.mark.parametrize("dataset", RECIPES)
def test_round_trip_through_toml(dataset: str, tmp_path) -> None:
    config = build_config(dataset, "gkp-gsa", {}, {"seed": 3, "rho_max": 0.5})
    path = tmp_path / "c.toml"
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
        ("sampler", "instnce", r"choose from .* \(did you mean instance\?\)"),
        ("epoch", 1, r"unknown option 'epoch' \(did you mean epochs\?\)"),
    ],
)
def test_bad_values_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config().with_(**{name: value})


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


def test_rule_overrides_and_impossible_rules() -> None:
    config = build_config("digits-lt", "gsa-full", {}, {"rho_max": 0.5, "direction": "none", "gram_every": 4})
    rule = rule_of(config)
    assert rule is not None
    assert (rule.rho_max, rule.direction, rule.gram_every, rule.adaptive) == (0.5, "none", 4, True)
    for method, flags in (
        ("gsa-release", {"gram_every": 8}),
        ("gsa-paper", {"direction": "friendly"}),
        ("imbsam", {"scope": "classifier"}),
        ("sam", {"rho": -1.0}),
    ):
        with pytest.raises(UserError):
            rule_of(build_config("digits-lt", method, {}, flags))
