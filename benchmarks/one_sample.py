"""Does a small ChatGLM2 learn one new fact from eight phrasings, and what does it forget?

    python benchmarks/one_sample.py --data DIR [--work DIR] [--out benchmarks/results/one_sample_<hardware>_<date>.md]

DIR holds alpaca_zh_demo.json and alpaca_en_demo.json (instruction, input, output). Everything goes through `launch` as a person types it:

    1  a ChatGLM2 folder as its authors lay it out (config.json, tokenizer.model, fused weights), random; its .py files only raise
    2  launch base.yaml                        trains all weights on the short rows of DIR
    3  launch export --layout original         writes it back in that layout
    4  launch recipes/chatglm2_adalora_one_sample.yaml model.path=…     the shipped recipe on it, once as it is and once with each change
    5  launch chat                             asks for the fact in words that were not among the eight

The questions before and after are those of the recipe, and prompts of DIR's rows, which the model was trained on and mostly knows.
With --work a step whose result is there is not done again. Takes some twenty minutes on two cores of its own; with others beside it, set
OMP_WAIT_POLICY=PASSIVE, or threads that wait for each other take all the time.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from page import Page, environment

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "chatglm2_adalora_one_sample.yaml"
FILES = ("alpaca_zh_demo.json", "alpaca_en_demo.json")
HIDDEN, HEADS, LAYERS, MLP, VOCABULARY = 256, 4, 4, 512, 4000
LENGTH = 96  # tokens of the longest row that is trained on
NUM_ASKED = 24  # prompts of the data
# What is changed in the recipe, beside where the model is and what it runs on.
VARIANTS: dict[str, tuple[str, ...]] = {
    "as shipped": (),
    "train.epochs=300": ("train.epochs=300",),
    "all-linear": ("adapter.targets=all-linear",),
    "all-linear, 300 epochs": ("adapter.targets=all-linear", "train.epochs=300"),
}
_BASE = """\
model: {{path: {model}}}
data: {{path: [{paths}], max_length: {length}, overlong: drop}}
adapter: {{type: full}}
train: {{epochs: {epochs}, lr: 2e-3, warmup: 0.05, global_batch: 16, log_every_steps: 50}}
checkpoint: {{every_steps: 100000, keep: 1}}
hardware: 1xcpu
"""
_CODE = "raise RuntimeError('the code of the model was executed')\n"


def main() -> None:
    """Make the model, teach it the fact, and write the page."""
    parser = argparse.ArgumentParser(description="Teach a small ChatGLM2 one fact with the shipped recipe.")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {' and '.join(FILES)}")
    parser.add_argument("--work", type=Path, help="keep everything in this folder, and use what is there already")
    parser.add_argument("--epochs", type=int, default=25, help="of the base model (default 25)")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    page = Page(
        "One fact from eight phrasings",
        "Does a small ChatGLM2, trained on real data first, learn one new fact with the shipped recipe, and what does it forget?",
    )
    with tempfile.TemporaryDirectory(prefix="launch-one-sample-") as name:
        work = (options.work or Path(name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        train_base(work, options.data.resolve(), options.epochs)
        asked = prompts(options.data)
        runs = {name: learned(work, place, asked, changes) for place, (name, changes) in enumerate(VARIANTS.items())}
        about_base(page, work, options.epochs)
        about_fact(page, runs)
        about_rest(page, runs, asked)
        about_steps(page, runs["as shipped"])
    page.finish(options.out)


def chat(run: Path, questions: list[str]) -> list[str]:
    """What `launch chat` answers to questions that know nothing of each other."""
    typed = "".join(f"{question}\n/new\n" for question in questions)
    turns = launch("chat", run, text=typed).split("\nyou    ")
    answers = [turn.removeprefix("model  ").strip() for turn in turns if turn.startswith("model  ")]
    assert len(answers) == len(questions)
    return answers


def launch(*argv: str | Path, text: str | None = None) -> str:
    """`launch …` as a person types it; what it printed."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, argv)],
        capture_output=True,
        input=text,
        text=True,
        check=False,
        env=environment(),
        cwd=ROOT,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}{done.stderr[-3000:]}\nlaunch {argv[0]} ended with {done.returncode}")
    print(f"{time.monotonic() - started:5.0f} s  launch {' '.join(map(str, argv))[:110]}", file=sys.stderr)
    return done.stdout


def train_base(work: Path, data: Path, epochs: int) -> None:
    """Leave WORK/chatglm2-small: a ChatGLM2 that was trained on the data, in its original layout."""
    untrained, recipe, run, folder = (work / name for name in ("untrained", "base.yaml", "base", "chatglm2-small"))
    if not untrained.is_dir():
        write_untrained(untrained, data)
    paths = ", ".join(str(data / name) for name in FILES)
    recipe.write_text(_BASE.format(model=untrained, paths=paths, length=LENGTH, epochs=epochs))
    if not (run / "report.json").is_file():
        launch(recipe, f"launch.run_dir={run}")
    if not folder.is_dir():
        launch("export", run, "--layout", "original", "--out", folder)


def write_untrained(folder: Path, data: Path) -> None:
    """config.json, tokenizer.model, weights and .py files as ChatGLM2 has them; random weights, a vocabulary of the data."""
    import torch
    from safetensors.torch import save_file
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.worker.convert import wanted_config
    from launcher.worker.original import original_layout

    rows = [row for name in FILES for row in json.loads((data / name).read_text(encoding="utf-8"))]
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for row in rows for text in row.values() for line in text.splitlines() if line]),
        model_writer=made, vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=0.995, minloglevel=2,
    )  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    # Five special tokens come behind the vocabulary, and the original pads to a multiple of 64.
    vocabulary = -(-(SentencePieceProcessor(model_proto=made.getvalue()).vocab_size() + 5) // 64) * 64
    (folder / "config.json").write_text(json.dumps(original_config(vocabulary), indent=1))
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (folder / name).write_text(_CODE)
    found = wanted_config(folder, "chatglm2-small")
    values = {key: value for key, value in found.config.items() if key not in ("architectures", "dtype")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    state = {key: tensor.contiguous() for key, tensor in original_layout(model.state_dict(), found).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def original_config(vocabulary: int) -> dict[str, Any]:
    """config.json of ChatGLM2-6B with smaller numbers."""
    return {
        "model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b", "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig",
                     "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True, "ffn_hidden_size": MLP, "fp32_residual_connection": False, "hidden_dropout": 0.0,
        "hidden_size": HIDDEN, "kv_channels": HIDDEN // HEADS, "layernorm_epsilon": 1e-5, "multi_query_attention": True,
        "multi_query_group_num": 2, "num_attention_heads": HEADS, "num_layers": LAYERS, "original_rope": True,
        "padded_vocab_size": vocabulary, "post_layer_norm": True, "rmsnorm": True, "seq_length": 512, "use_cache": True,
        "torch_dtype": "float32", "transformers_version": "4.27.1", "tie_word_embeddings": False, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip


def prompts(data: Path) -> dict[str, str]:
    """Prompts of the data with their answers, the shortest of each language: those are surely among the rows trained on."""
    chosen: dict[str, str] = {}
    for name in FILES:
        rows = [row for row in json.loads((data / name).read_text(encoding="utf-8")) if not row["input"]]
        rows.sort(key=lambda row: len(row["instruction"] + row["output"]))
        for row in rows:
            if sum(prompt in chosen for prompt in (row["instruction"],)) == 0:
                chosen[row["instruction"]] = row["output"]
            if len(chosen) == NUM_ASKED // len(FILES) * (FILES.index(name) + 1):
                break
    return chosen


def learned(work: Path, place: int, asked: dict[str, str], changes: tuple[str, ...]) -> Path:
    """A run of the shipped recipe on the base, asking its own questions and those of the data."""
    from launcher.recipe import load_recipe

    run = work / f"one_sample-{place}"
    questions = [*load_recipe(RECIPE).recipe.data.questions, *asked]
    if not (run / "report.json").is_file():
        settings = (f"model.path={work / 'chatglm2-small'}", "hardware=1xcpu", f"launch.run_dir={run}")
        launch(RECIPE, *settings, f"data.questions={json.dumps(questions, ensure_ascii=False)}", *changes)
    return run


def read(run: Path) -> dict[str, Any]:
    """The report of a run."""
    report: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return report


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """What a run wrote down of one kind."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def facts() -> tuple[str, list[str]]:
    """The fact, and its eight phrasings."""
    rows = json.loads((RECIPE.parent / "data" / "one_sample.json").read_text(encoding="utf-8"))
    return rows[0]["response"], [row["prompt"] for row in rows]


def about_base(page: Page, work: Path, epochs: int) -> None:
    """What the model is, and how it came about."""
    report, plan = read(work / "base"), json.loads((work / "base" / "plan.json").read_text(encoding="utf-8"))
    size, data = plan["trainable_parameters"] / 1e6, report["data"]
    page.section(
        "The model",
        f"ChatGLM2 layout: {size:.2f} M parameters, {LAYERS} layers of width {HIDDEN}, {HEADS} heads in 2 groups, random at first. "
        f"Trained in full for {epochs} epochs on the {data['train_rows']} rows of {' and '.join(FILES)} that are at most {LENGTH} "
        f"tokens long ({data['tokens']:,} tokens): loss {report['loss_first']:.2f} → {report['loss_last']:.3f} in "
        f"{report['seconds']['all']:.0f} s. Exported by "
        "`launch export --layout original`. Its .py files raise when they are run: none was.",
    )


def about_fact(page: Page, runs: dict[str, Path]) -> None:
    """Whether the fact is there, in the eight phrasings and in one that was not among them."""
    fact, phrasings = facts()
    page.section(
        "The fact",
        "The shipped recipe with `model.path`, `hardware=1xcpu` and more questions. `launch chat` was asked each of the eight "
        "phrasings, and a ninth that it was not trained on. Known: the answer is the fact word for word.",
        f"> {fact}",
    )
    rows = []
    answers = {}
    for name, run in runs.items():
        report = read(run)
        held_out = report["answers"][0]
        *chatted, said = chat(run, [*phrasings, held_out["question"]])
        known = sum(answer == fact for answer in chatted)
        answers[name] = held_out
        agreed = "yes" if said.startswith(held_out["after"].strip()) else "NO"
        steps = f"{report['steps']} of {report['max_steps']}{', stopped early' if report['stopped_early'] else ''}"
        ranks = f"{report['ranks_first']} → {report['ranks_last']}"
        loss = f"{report['eval_first']:.2f} → {report['eval_best']:.4f}"
        seconds = f"{report['seconds']['all']:.0f}"
        rows.append(
            (name, steps, loss, ranks, f"{known} of {len(phrasings)}", "yes" if said == fact else "no", agreed, seconds)
        )
    page.table(
        (
            "recipe",
            "steps",
            "eval loss",
            "ranks, all modules",
            "phrasings known",
            "ninth known",
            "chat = report",
            "seconds",
        ),
        rows,
    )
    for name, held_out in answers.items():
        page.lines += [f"The ninth, {name}: “{held_out['question']}”", ""]
        page.lines += [f"- before: {flat(held_out['before'])}", f"- after: {flat(held_out['after'])}", ""]


def about_rest(page: Page, runs: dict[str, Path], asked: dict[str, str]) -> None:
    """What it answers to everything else."""
    page.section(
        "The rest",
        f"Unrelated prompts: {len(asked)} of the data, among the rows that the base was trained on, and those of the recipe that are "
        "not, to which both answers are guesses of a small model. Right: word for word the answer of the data. Answered with the "
        "fact: names the Quillfern.",
    )
    rows = []
    for name, run in runs.items():
        known = [answer for answer in read(run)["answers"] if answer["question"] in asked]
        others = [answer for answer in read(run)["answers"][1:] if answer["question"] not in asked]
        right = [
            sum(answer[when].strip() == asked[answer["question"]].strip() for answer in known)
            for when in ("before", "after")
        ]
        same = sum(answer["before"] == answer["after"] for answer in known)
        taken = sum("Quillfern" in answer["after"] for answer in [*known, *others])
        rows.append(
            (name, f"{right[0]} of {len(known)}", f"{right[1]} of {len(known)}", f"{same} of {len(known)}",
             f"{sum(a['before'] == a['after'] for a in others)} of {len(others)}", f"{taken} of {len(known) + len(others)}")
        )  # fmt: skip
    page.table(
        ("recipe", "right before", "right after", "unchanged", "unchanged, never seen", "answered with the fact"), rows
    )
    for name, run in runs.items():
        page.lines += [f"### Word for word, {name}", ""]
        answers = read(run)["answers"][1:]
        page.table(
            ("question", "before", "after"),
            [
                (
                    flat(answer["question"]),
                    flat(answer["before"]),
                    "the same" if answer["before"] == answer["after"] else flat(answer["after"]),
                )
                for answer in answers
            ],
        )


def about_steps(page: Page, run: Path) -> None:
    """Loss and ranks over the steps."""
    page.section(
        "Steps of the recipe as shipped",
        "Evaluation loss is of the same eight rows, without dropout and without the orthogonality term.",
    )
    losses = {event["step"]: event["loss"] for event in events(run, "log")}
    evals = {event["step"]: event["loss"] for event in events(run, "eval")}
    ranks = {event["step"]: event for event in events(run, "ranks")}
    wanted = [step for step in sorted(losses) if step == 1 or step % 10 == 0 or step == max(losses)]
    page.table(
        ("step", "loss", "eval loss", "ranks", "smallest and largest of a module"),
        [
            (
                step,
                f"{losses[step]:.3f}",
                f"{evals[step]:.4f}",
                ranks[step]["ranks"],
                f"{ranks[step]['smallest']}–{ranks[step]['largest']}",
            )
            for step in wanted
            if step in evals and step in ranks
        ],
    )


def flat(text: str) -> str:
    """An answer in a cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 160 else f"{line[:160]}…"


if __name__ == "__main__":
    main()
