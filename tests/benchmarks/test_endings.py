"""The task of endings: questions of the right text, the choice by hand, and chance where a model knows nothing."""

import pytest
import torch
from torch import Tensor

from benchmarks import endings
from benchmarks.endings import CHOICES, ENDING, PREFIX, Questions, accuracy, questions_of
from tests.evaluate.test_fidelity import Bigram

WIDTH = PREFIX + ENDING


def text(*, files: int, windows_a_file: int = 2, spans: int = 3) -> tuple[Tensor, Tensor]:
    """Return windows whose every token says its file and its place, 1000 * file + place, and their files."""
    length = spans * WIDTH + 1
    stream = torch.arange(windows_a_file * length).view(windows_a_file, length)
    windows = torch.cat([1000 * file + stream for file in range(files)])
    return windows, torch.arange(files).repeat_interleave(windows_a_file)


def test_the_answer_follows_its_beginning_and_the_others_are_of_other_files() -> None:
    windows, files = text(files=4)
    found = questions_of(windows, files)
    assert found is not None
    assert found.prefixes.shape == (4 * 2 * 3, PREFIX)
    assert found.endings.shape == (24, CHOICES, ENDING)
    for prefix, choices, answer in zip(found.prefixes, found.endings, found.answers.tolist(), strict=True):
        assert torch.equal(choices[answer], prefix[-1] + 1 + torch.arange(ENDING))
        others = [choice for place, choice in enumerate(choices) if place != answer]
        assert all(choice[0] // 1000 != prefix[0] // 1000 for choice in others)
        assert len({int(choice[0]) for choice in choices}) == CHOICES  # no ending stands twice
        assert all(torch.equal(choice, choice[0] + torch.arange(ENDING)) for choice in others)
    assert len(set(found.answers.tolist())) == CHOICES  # no place is the answer's own


def test_questions_follow_the_seed_and_are_no_more_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "QUESTIONS", 5)
    first, again, other = (questions_of(*text(files=3), seed=seed) for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert len(first.answers) == 5
    assert torch.equal(first.endings, again.endings)
    assert not torch.equal(first.prefixes, other.prefixes)


def test_text_of_one_file_or_of_short_windows_makes_no_questions() -> None:
    assert questions_of(*text(files=1)) is None
    windows, files = text(files=4)
    assert questions_of(windows[:, : WIDTH - 1], files) is None


def test_the_choice_is_the_likeliest_ending_by_hand() -> None:
    model = Bigram(torch.tensor([[0.4, 0.6], [0.9, 0.1]]).log())
    four = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    prefixes = torch.tensor([[1, 0], [0, 1]])
    # after 0: 0.4*0.4, 0.4*0.6, 0.6*0.9, 0.6*0.1; after 1: 0.9*0.4, 0.9*0.6, 0.1*0.9, 0.1*0.1
    for answers, right in (([2, 1], 1.0), ([2, 2], 0.5), ([1, 2], 0.0)):
        assert accuracy(model, Questions(prefixes, torch.stack((four, four)), torch.tensor(answers))) == right


def test_a_model_that_knows_what_follows_is_right_and_its_opposite_wrong() -> None:
    windows, files = text(files=4, windows_a_file=1, spans=2)
    windows = windows % 1000 + 60 * files[:, None]  # 49 tokens a file, each file's own
    found = questions_of(windows, files)
    assert found is not None
    follows = torch.zeros(240, 240)
    follows[torch.arange(239), torch.arange(1, 240)] = 5.0
    assert accuracy(Bigram(follows), found) == 1.0
    assert accuracy(Bigram(-follows), found) == 0.0


@pytest.mark.parametrize("logit", [0.0, torch.nan], ids=["nothing", "not a number"])
def test_a_model_that_knows_nothing_is_right_by_chance(logit: float) -> None:
    found = questions_of(*text(files=8, windows_a_file=4, spans=8))
    assert found is not None
    found = Questions(found.prefixes % 100, found.endings % 100, found.answers)
    # of 256 questions: four standard deviations of a fair draw of four
    assert accuracy(Bigram(torch.full((100, 100), logit)), found) == pytest.approx(0.25, abs=0.11)
