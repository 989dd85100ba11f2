"""Configuration: layers, types, unknown keys, round trip."""

from __future__ import annotations

import dataclasses
import math
import tomllib

import pytest

from ltfast import runs
from ltfast.config import FIELDS, SECTIONS, TYPES, Config, check, flatten, load_toml
from ltfast.data.augment import RECIPES as SMALL_VIEWS
from ltfast.data.large_views import RECIPES as LARGE_VIEWS
from ltfast.errors import UserError
from ltfast.optim.rules import DIRECTIONS, RULES, Rule
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
    assert FIELDS["direction"][1].metadata["choices"] == DIRECTIONS
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


def test_a_copy_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its repository may not have come along, or be that of another state."""
    monkeypatch.setenv("LTFAST_COMMIT", "0123abc")
    assert runs.commit() == "0123abc"
