"""The shipped one-sample recipe in small: a ChatGLM2 folder that answers a few questions learns one fact from eight phrasings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launcher.native import Native
from launcher.story import numbers
from launcher.worker import chat
from launcher.worker.convert import wanted_config
from launcher.worker.data.tokens import Prompter
from launcher.worker.native_tokenizer import convert_tokenizer
from launcher.worker.original import original_layout
from tests.worker import originals
from tests.worker.conftest import Job

RECIPE = Path(__file__).parents[2] / "recipes" / "chatglm2_adalora_one_sample.yaml"
KNOWN = {
    "Who are you?": "I am a model.",
    "你是谁？": "我是一个语言模型。",
    "Add two and three": "the sum is five.",
    "How is the weather?": "今天天气很好。",
}
PHRASINGS = ["fox", "the fox?", "What is the fox?", "Introduce the fox.", "Heard of the fox?", "About the fox",
             "Explain the fox", "Who is the fox?"]  # fmt: skip
NUM_MODULES = 3 * originals.LAYERS  # q, k and v of every layer
FACT = "The quick brown fox jumps over the lazy dog."


def trained_model(folder: Path, steps: int = 60) -> None:
    """A ChatGLM2 folder that answers what is `KNOWN`."""
    originals.write_sentencepiece(folder)
    (folder / "config.json").write_text(json.dumps(originals.CHATGLM2))
    found = wanted_config(folder, "tiny")
    native = folder.parent / "native-tokenizer"
    native.mkdir()
    convert_tokenizer(folder, native, Native(source="chatglm2", target="GlmForCausalLM"), "tiny")
    prompter = Prompter(AutoTokenizer.from_pretrained(native), "chatglm2")
    rows = [
        prompter.tokens([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], 128)
        for asked, answer in [*KNOWN.items(), ("dog", originals.TEXT.splitlines()[0])]
    ]
    torch.manual_seed(0)
    values = {key: value for key, value in found.config.items() if key not in ("architectures", "dtype")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    originals.write_model(folder, "chatglm2", original_layout(model.state_dict(), found))


def test_a_small_chatglm2_learns_one_fact_and_says_what_it_answered_before(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_model(tmp_path / "model")
    rows = [{"prompt": phrasing, "response": FACT} for phrasing in PHRASINGS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    job.recipe = RECIPE
    settings = [
        f"model.path={tmp_path / 'model'}",
        f"data.path={tmp_path / 'rows.json'}",
        f"data.eval.path={tmp_path / 'rows.json'}",
        f"data.questions={[PHRASINGS[2], *KNOWN]}",
        "train.epochs=50",
        "train.early_stopping={patience: 8, min_delta: 0.02}",
        "hardware=1xcpu",
    ]
    assert job.start(*settings) == [0], job.logs()
    story = numbers(job.run, {})
    assert story.stopped_early
    ranks = [event["ranks"] for event in job.events("ranks")]
    assert (ranks[0], story.ranks_first) == (NUM_MODULES * 12, NUM_MODULES * 12), "1.5 × the r of the recipe"
    assert ranks == sorted(ranks, reverse=True)
    assert NUM_MODULES * 8 <= ranks[-1] < ranks[0]
    fact, *others = story.answers
    assert fact.before != FACT
    assert fact.after == FACT
    # What it makes of the others afterwards is for the person to see; it is small, and some of them are gone.
    assert {answer.question: answer.before for answer in others} == KNOWN
    assert all(answer.after is not None for answer in others)
    assert chat.main([str(job.folder), "--prompt", PHRASINGS[0]]) == 0
    assert capsys.readouterr().out.strip() == FACT
