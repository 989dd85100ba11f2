"""What users do that no protocol asks for: none of it may lose weights, steps or gradients in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.amp import GradScaler

from ltfast.kernels import adamw_step, blocks, gram_partials, sgd_step
from ltfast.losses import group_losses
from ltfast.optim import CCSAM, GSA, SAM, ImbSAM

SGD = torch.optim.SGD


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(20, 6), torch.arange(20) % 5


def halves(y: Tensor) -> Tensor:
    """[B, 2]: head and tail."""
    return torch.stack((y < 2, y >= 2), 1).to(torch.float32)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def plain_closure(model: nn.Module, factor: float = 1.0, scaler: GradScaler | None = None) -> Callable[[], Tensor]:
    x, y = batch()

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y) * factor
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return closure


def test_tools_that_drop_shared_weights_keep_all_of_them(tmp_path: Any) -> None:
    model = net()
    SAM(model.parameters(), SGD, lr=0.1)
    save_model(model, str(tmp_path / "m.safetensors"))  # raises, or leaves out, what shares a storage
    held = load_file(tmp_path / "m.safetensors")
    assert set(held) == set(model.state_dict())
    assert all(torch.equal(held[name], value) for name, value in model.state_dict().items())
    torch.save(model[0].bias, tmp_path / "bias.pt")
    assert (tmp_path / "bias.pt").stat().st_size < 4000  # not the whole buffer


def test_channels_last_and_empty_parameters_have_storages_of_their_own() -> None:
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = nn.ModuleList([conv, nn.ParameterList([torch.zeros(0, 4)])])
    before = [p.detach().clone() for p in model.parameters()]
    SAM(model.parameters(), SGD, lr=0.1)
    after = list(model.parameters())
    assert after[0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    pointers = [p.untyped_storage().data_ptr() for p in after if p.numel()]
    assert len(set(pointers)) == len(pointers)


def test_nobody_writes_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the threads' results: whoever restores the arrays next must be the last to write."""
    before, release = torch.get_num_threads(), threading.Event()
    torch.set_num_threads(2)
    array = torch.zeros(600_000)

    def work(parts: Any) -> None:
        for (part,) in parts:
            release.wait(5)
            part.fill_(1.0)

    def interrupted(*_: Any, **__: Any) -> None:
        release.set()
        raise KeyboardInterrupt

    try:
        monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
        pool = blocks._pool
        monkeypatch.setattr(blocks, "_workers", lambda _: pool[1] if pool else blocks.ThreadPoolExecutor(2))
        with pytest.raises(KeyboardInterrupt):
            blocks.in_blocks(work, array)
    finally:
        torch.set_num_threads(before)
    array.zero_()
    threading.Event().wait(0.2)
    assert (array == 0).all()


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.RMSprop, SGD, torch.optim.AdamW])
def test_a_bad_first_gradient_is_skipped_whatever_the_base(base: Any) -> None:
    model, x_y = net(), batch()
    optimizer = SAM(model.parameters(), base, lr=0.01)
    before = weights(model)
    for take in (optimizer.first_step, optimizer.second_step):
        (F.cross_entropy(model(x_y[0]), x_y[1]) * float("nan")).backward()
        take(zero_grad=True)
    assert float(optimizer.skipped) == 1
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("kind", ["sam", "imbsam"])
def test_one_autocast_block_around_both_passes_sees_the_perturbed_weights(kind: str) -> None:
    def update(rho: float) -> Tensor:
        model = net()
        if kind == "sam":
            optimizer: Any = SAM(model.parameters(), SGD, rho=rho, lr=0.1)
            closure: Any = plain_closure(model)
        else:
            optimizer = ImbSAM(model.parameters(), SGD, rho=rho, lr=0.1)
            x, y = batch()
            closure = lambda: group_losses(F.cross_entropy(model(x), y, reduction="none"), halves(y))  # noqa: E731
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step(closure)
        return weights(model)

    assert not torch.equal(update(1.0), update(0.0))


def test_restoring_inside_an_autocast_block_brings_back_what_the_model_computes() -> None:
    model = net()
    optimizer = SAM(model.parameters(), SGD, rho=1.0, lr=0.1)
    x, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        plain_closure(model)()
        optimizer.first_step()
        assert not torch.equal(model(x), before)
        optimizer.restore()
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(("base", "options"), [(SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
@pytest.mark.parametrize("order", ["bss", "sbs", "bbsb"])
def test_plain_steps_of_the_base_optimizer_share_its_state(base: Any, options: dict[str, Any], order: str) -> None:
    """b: base_optimizer.step(), a warm-up without ascent; s: a SAM step with rho 0, which is the same step."""

    def run(steps: str) -> Tensor:
        model = net()
        optimizer = SAM(model.parameters(), base, rho=0.0, lr=0.05, **options)
        for step in steps:
            if step == "s":
                optimizer.step(plain_closure(model))
            else:
                plain_closure(model)()
                optimizer.base_optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    torch.testing.assert_close(run(order), run("s" * len(order)), rtol=0, atol=1e-6)


def broken(model: nn.Module, closure: Callable[[], Tensor], at: int) -> Callable[[], Tensor]:
    calls = iter(range(10))

    def run() -> Tensor:
        loss = closure()
        if next(calls) == at:
            raise RuntimeError("out of memory")
        return loss

    return run


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("how", ["plain", "scaler=", "scaler.step"])
def test_a_closure_that_raises_leaves_no_trace(how: str, at: int) -> None:
    def run(fail: bool) -> Tensor:
        model, scaler = net(), None if how == "plain" else GradScaler("cpu", init_scale=1024.0)
        optimizer = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
        closure = plain_closure(model, scaler=scaler)

        def step(closure: Callable[[], Tensor]) -> None:
            if how == "plain":
                optimizer.step(closure)
            elif how == "scaler=":
                optimizer.step(closure, scaler=scaler)
                scaler.update()
            else:
                plain_closure(model, scaler=scaler)()
                scaler.step(optimizer, closure)
                scaler.update()

        if fail:
            before = weights(model)
            # with gradients there already, the closure is called once
            with pytest.raises(RuntimeError, match="out of memory"):
                step(broken(model, closure, 0 if how == "scaler.step" else at))
            assert torch.equal(weights(model), before)
            if how == "scaler.step":
                scaler._per_optimizer_states.clear()  # as scaler.update() would
        step(closure)
        return weights(model)

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=1e-7)


def test_scaler_step_without_a_first_pass_says_what_is_missing() -> None:
    model, scaler = net(), GradScaler("cpu", init_scale=8.0)
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    closure = plain_closure(model, scaler=scaler)
    closure()
    scaler.step(optimizer, closure)
    scaler.update()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"optimizer.step\(closure, scaler=scaler\)"):
        scaler.step(optimizer, closure)
    before = weights(model)
    optimizer.step(plain_closure(model))  # as if nobody had asked
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_is_not_the_models(dtype: torch.dtype) -> None:
    model, want = net(), net()
    x, y = batch()
    member = halves(y)
    torch.set_default_dtype(dtype)
    try:
        optimizer = GSA(model.parameters(), torch.optim.AdamW, [90, 10], lr=0.01)
        twin = GSA(want.parameters(), torch.optim.AdamW, [90, 10], lr=0.01)
        for net_, opt, own in ((model, optimizer, dtype), (want, twin, torch.float32)):
            torch.set_default_dtype(own)
            for _ in range(3):
                opt.step(lambda net_=net_: group_losses(F.cross_entropy(net_(x), y, reduction="none"), member))
        theta, m, v = torch.ones(4, dtype=torch.float32), *torch.zeros(2, 4, dtype=torch.float32)
        torch.set_default_dtype(dtype)
        adamw_step(theta, theta.clone(), m, v, 257, 0.1, (0.9, 0.999), 0.0, 0.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(weights(model), weights(want), rtol=0, atol=1e-6)
    root = ((1 - 0.999) / (1 - 0.999**257)) ** 0.5
    torch.testing.assert_close(theta, torch.full((4,), 1 - 0.1 * 0.1 / (1 - 0.9**257) / root), rtol=1e-5, atol=0)


def test_inference_mode_holds_in_every_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            theta, grad = torch.ones(300_000), torch.ones(300_000)
            sgd_step(theta, grad, None, 0.5)
            assert float(gram_partials(grad[None])[0].sum()) == 300_000
    finally:
        torch.set_num_threads(before)
    assert float(theta.sum()) == 150_000


@pytest.mark.parametrize("options", [{"gram_every": 4}, {"scope": "classifier"}])
def test_a_frozen_classifier_only_has_no_part_in_the_ascent(options: dict[str, Any]) -> None:
    model = net()
    x, y = batch()
    model[2].requires_grad_(False)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "classifier": True}]
    optimizer = GSA(groups, SGD, [90, 10], lr=0.1, **options)
    before = weights(model)
    for _ in range(3):
        optimizer.step(lambda: group_losses(F.cross_entropy(model(x), y, reduction="none"), halves(y)))
    frozen = model[2].weight.numel() + model[2].bias.numel()
    assert torch.equal(weights(model)[-frozen:], before[-frozen:])
    if options.get("scope") != "classifier":  # nothing to climb by: the step is skipped and counted
        assert not torch.equal(weights(model), before)


def test_options_that_only_another_optimizer_understands_are_left_to_it() -> None:
    model = net()
    optimizer = SAM(model.parameters(), torch.optim.Adafactor, lr=0.01)  # eps is a pair there
    before = weights(model)
    optimizer.step(plain_closure(model))
    assert not torch.equal(weights(model), before)
    with pytest.raises(ValueError, match=r"rho is 0\.05"):
        SAM(net().parameters(), SGD, rho="0.05", lr=0.1)  # type: ignore[arg-type]


def test_second_step_with_gradients_that_are_still_scaled_is_refused() -> None:
    model, scaler = net(), GradScaler("cpu", init_scale=1024.0)
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    before, closure = weights(model), plain_closure(model, scaler=scaler)
    closure()
    optimizer.first_step(zero_grad=True, scaler=scaler)
    closure()
    with pytest.raises(ValueError, match=r"call scaler.step\(optimizer\)"):
        optimizer.second_step()
    assert torch.equal(weights(model), before)
    optimizer.zero_grad()
    closure()
    optimizer.first_step(zero_grad=True, scaler=scaler)  # the scaler has forgotten the step that was broken off
    closure()
    scaler.unscale_(optimizer)
    optimizer.second_step(zero_grad=True)
    assert 0 < float((weights(model) - before).norm()) < 1
    plain_closure(model)()
    optimizer.second_step()  # a plain step needs no scaler
    off = GradScaler("cpu", enabled=False)
    optimizer.first_step(scaler=off)
    optimizer.second_step()


@pytest.mark.parametrize("kind", [SAM, ImbSAM])
def test_a_refused_scaler_step_leaves_no_scale_behind(kind: Any) -> None:
    def update(refused: bool) -> Tensor:
        model, scaler = net(), GradScaler("cpu", init_scale=1024.0)
        optimizer = kind(model.parameters(), SGD, lr=0.1)
        if refused:
            plain_closure(model, scaler=scaler)()
            with pytest.raises(ValueError, match="closure is None"):
                scaler.step(optimizer)
            optimizer.zero_grad()
        plain_closure(model)()
        optimizer._descend()
        return weights(model)

    assert torch.equal(update(True), update(False))


@pytest.mark.parametrize(
    ("base", "bad", "named"),
    [
        (torch.optim.AdamW, {"betas": (0.9, 1.5)}, "betas"),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        (SGD, {"dampening": float("nan")}, "dampening"),
    ],
)
def test_an_option_of_a_later_group_is_refused_before_the_first_is_written(base: Any, bad: Any, named: str) -> None:
    model = net()
    before, address = weights(model), model[0].weight.data_ptr()  # type: ignore[index]
    first, second = ({"params": layer.parameters()} for layer in (model[0], model[2]))  # type: ignore[index]
    with pytest.raises(ValueError, match=named):
        SAM([{**first}, {**second, **bad}], base, lr=0.1)
    assert model[0].weight.data_ptr() == address  # type: ignore[index]
    optimizer = SAM([{"params": model[0].parameters()}, {"params": model[2].parameters()}], base, lr=0.1)  # type: ignore[index]
    plain_closure(model)()
    optimizer.first_step()
    optimizer.param_groups[1].update(bad)
    with pytest.raises(ValueError, match=named):
        optimizer.second_step()
    assert torch.equal(weights(model), before)
    optimizer.param_groups[1].update(dict(optimizer.base_optimizer.defaults))
    with pytest.raises(ValueError, match=named):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], **bad})
    assert len(optimizer.param_groups) == len(optimizer.blocks) + 1


def test_a_base_optimizer_that_needs_a_closure_is_refused() -> None:
    model = net()
    address = model[0].weight.data_ptr()  # type: ignore[index]
    with pytest.raises(ValueError, match="LBFGS"):
        SAM(model.parameters(), torch.optim.LBFGS, lr=0.1)
    assert model[0].weight.data_ptr() == address  # type: ignore[index]


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("gram_every", {"gram_every": 1.5}),
        ("sigma", {"direction": "friendly", "sigma": -1.0}),
        ("sigma", {"sigma": float("inf")}),
        ("lmbda", {"direction": "friendly", "lmbda": 1.5}),
        ("radius_C", {"C": float("inf")}),
        ("rho_max", {"rho_max": float("inf")}),
        ("counts", {"counts": [1.0, float("nan")]}),
        ("counts", {"counts": [1.0, float("inf")]}),
        ("counts has 65", {"counts": [1] * 65}),
        ("counts has 33", {"counts": [1] * 33, "direction": "friendly"}),
    ],
)
def test_bad_options_of_gsa_are_refused_at_once(named: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=named):
        GSA(net().parameters(), SGD, **{"counts": [9, 1], "lr": 0.1, **options})


def test_more_classes_than_rows_are_fine_for_cc_sam_and_not_for_new_groups() -> None:
    CCSAM(net().parameters(), SGD, [1] * 200, scope="all", lr=0.1)
    optimizer = GSA(net().parameters(), SGD, [9, 1], lr=0.1)
    with pytest.raises(ValueError, match="counts has 65"):
        optimizer.set_groups([1] * 65)


def test_closures_that_hold_nothing_are_named() -> None:
    with pytest.raises(ValueError, match="closure is an empty list"):
        ImbSAM(net().parameters(), SGD, lr=0.1).step([])
    model, (x, y) = net(), batch()
    optimizer = CCSAM(model.parameters(), SGD, [1] * 5, scope="all", lr=0.1)
    for share in (0.0, float("nan")):
        with pytest.raises(ValueError, match="no batch share is above 0"):
            optimizer.step(lambda share=share: (F.cross_entropy(model(x), y).repeat(5), torch.full((5,), share)))


@pytest.mark.parametrize(
    "absent", [lambda loss, rare: loss[rare].mean(), lambda loss, rare: (loss * rare).sum() / rare.sum()]
)
def test_the_nan_loss_of_an_absent_group_never_reaches_the_weights(absent: Any) -> None:
    """The first is NaN without a gradient; the gradient of the second is NaN, which only skipping can keep out."""
    model, (x, y) = net(), batch()
    optimizer = ImbSAM(model.parameters(), SGD, lr=0.1)

    def closure() -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(model(x), y, reduction="none")
        return torch.stack((loss.mean(), absent(loss, y > 9))), torch.tensor([1.0, 0.0])

    before = weights(model)
    optimizer.step(closure)
    assert torch.isfinite(weights(model)).all()
    assert torch.equal(weights(model), before) == bool(optimizer.skipped)


@pytest.mark.parametrize("options", [{}, {"gram_every": 4}, {"objective": "per_group"}])
def test_a_grouped_step_under_no_grad_is_the_same_step(options: dict[str, Any]) -> None:
    def update(grad: bool) -> Tensor:
        model, (x, y) = net(), batch()
        optimizer = GSA(model.parameters(), SGD, [90, 10], lr=0.1, **options)
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                optimizer.step(lambda: group_losses(F.cross_entropy(model(x), y, reduction="none"), halves(y)))
        return weights(model)

    assert torch.equal(update(False), update(True))


def test_an_anchor_without_targets_is_refused() -> None:
    model = net()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    pulls = [torch.ones_like(p) for p in model.parameters()]
    optimizer.set_anchor(pulls, pulls)
    with pytest.raises(ValueError, match="targets is None"):
        optimizer.set_anchor(pulls, None)
    assert optimizer.blocks[0].anchor is not None
