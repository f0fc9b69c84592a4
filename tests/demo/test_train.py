"""Training: seeded, falling, and cut short on a machine that is too slow."""

import logging
from dataclasses import replace

import pytest
import torch

from bwla_compiler.demo.config import DemoConfig
from bwla_compiler.demo.train import new_model, train
from bwla_compiler.errors import DemoError

CONFIG = DemoConfig(
    hidden_size=16,
    intermediate_size=32,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    steps=60,
    batch=4,
    length=16,
    learning_rate=2e-2,
    warmup_steps=5,
)
STREAM = torch.arange(4000) % 7  # a text whose next token is certain after one


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_loss_falls_to_what_the_text_allows() -> None:
    model = new_model(CONFIG, 32)
    training = train(model, STREAM, config=CONFIG)
    assert training.steps == CONFIG.steps
    assert training.n_tokens == 60 * 4 * 16
    assert not training.shortened
    assert training.loss < 1.2  # from log 32 = 3.5; smoothed over the run, so not yet 0
    assert not model.training


def test_same_weights_at_every_run_and_the_global_seed_is_left_alone() -> None:
    torch.manual_seed(5)
    first = new_model(CONFIG, 32)
    train(first, STREAM, config=CONFIG)
    after = torch.rand(1)
    second = new_model(CONFIG, 32)
    train(second, STREAM, config=CONFIG)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(new_model(replace(CONFIG, seed=1), 32)))


def test_a_slow_machine_gets_a_shorter_schedule_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.WARNING):
        training = train(
            new_model(CONFIG, 32),
            STREAM,
            config=replace(CONFIG, second_limit=1e-9),
            progress=lambda *step: seen.append(step),
        )
    assert training.steps == 31  # the measured 30 and one
    assert training.shortened
    assert "shortened to 31 steps" in caplog.text
    assert seen[-1] == ("training the embedded model", 31, 31)


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    train(new_model(CONFIG, 32), STREAM, config=replace(CONFIG, steps=1))
    assert torch.get_num_threads() == before


def test_too_little_text_is_a_clear_error() -> None:
    with pytest.raises(DemoError, match="too few for a batch of 4 seq"):
        train(new_model(CONFIG, 32), STREAM[:60], config=CONFIG)


def test_a_diverging_run_is_a_clear_error() -> None:
    model = new_model(CONFIG, 32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DemoError, match="loss is nan at step 0"):
        train(model, STREAM, config=CONFIG)
