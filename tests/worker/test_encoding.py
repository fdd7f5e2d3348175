"""Many rows are tokenised by several processes, with the same result in the same order."""

from __future__ import annotations

import pytest

from launcher.errors import DataError
from launcher.recipe.schema import Data
from launcher.worker.data import encoding
from launcher.worker.data.encoding import Encoder
from launcher.worker.data.tokens import Prompter
from tests.worker.test_tokens import assistant, make_tokenizer, user

ROWS = [[user(f"the sum of {n}" * (n % 7 + 1)), assistant(f"is {n}" * (n % 5 + 1))] for n in range(230)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_MANY", 100)
    monkeypatch.setattr(encoding, "_ROWS_AT_ONCE", 30)
    monkeypatch.setattr(encoding, "_ROWS_PER_PROGRESS", 50)


def encoder(processes: int, prompter: Prompter, told: list[tuple[int, int]]) -> Encoder:
    data = Data(path="rows.json", max_length=40)
    return Encoder(prompter, data, len(ROWS), lambda *progress: told.append(progress), processes)


def test_several_processes_give_what_one_gives() -> None:
    prompter, told = Prompter(make_tokenizer(), "alpaca"), []
    one, three = encoder(1, prompter, []), encoder(3, prompter, told)
    assert three.encode(ROWS) == one.encode(ROWS)
    assert (three.done, three.dropped, three.truncated) == (one.done, one.dropped, one.truncated)
    assert three.truncated > 0
    assert told == [(50, 230), (100, 230), (150, 230), (200, 230)]


def test_an_error_of_one_process_has_its_three_parts() -> None:
    refusing = make_tokenizer(chat_template="{{ raise_exception('no') }}")
    with pytest.raises(DataError, match="name a template of your own choice") as caught:
        encoder(2, Prompter(refusing, "chat"), []).encode(ROWS)
    assert caught.value.you_set == "data.template: chat"
