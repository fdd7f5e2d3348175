"""`launch chat RUN`: questions in, answers streamed token by token, with the prompt format that the run was trained on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from threading import Thread
from typing import Any

from launcher.errors import UsageError
from launcher.plan import ChatPlan
from launcher.rundir import RunDir
from launcher.worker.asking import generate_ids
from launcher.worker.data.rows import Message
from launcher.worker.loading import Trained, load_trained
from launcher.worker.quiet import quiet_libraries


def main(argv: list[str]) -> int:
    """Talk until the person leaves; the exit code."""
    options = _options(argv)
    quiet_libraries()
    prompt = None if options.prompt is None else _readable(options.prompt)
    options.placed = options.placed and ChatPlan.model_validate_json(options.placed)
    trained = load_trained(RunDir(Path(options.run)), options.step, quantized=True, spread_so=options.placed)
    history: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    if prompt is not None:
        answer(trained, [*history, {"role": "user", "content": prompt}], options)
        return 0
    print(
        f"{trained.plan.name}, {trained.checkpoint.name}. An empty line or Ctrl-D ends the talk, /new forgets what was said."
    )
    start = len(history)
    while True:
        try:
            question = input("\nyou    ").strip() if sys.stdin else ""
        except EOFError:
            print()
            return 0
        if not question:
            return 0
        question = _readable(question)
        if question == "/new":
            del history[start:]
            continue
        history.append({"role": "user", "content": question})
        print("model  ", end="", flush=True)
        try:
            history.append({"role": "assistant", "content": answer(trained, history, options)})
        except UsageError as error:  # what was said before still stands
            print(f"error: {error}")
            history.pop()


def _readable(text: str) -> str:
    """The text, where it is one.

    Raises:
        UsageError: it is empty, or holds bytes that are no UTF-8.
    """
    if "".join(text.split()) == "":
        raise UsageError("a question", "there is nothing in it", 'ask something: --prompt "…"')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("a question", "it holds bytes that are no UTF-8", "type it in a UTF-8 terminal") from None
    return text


def _room(ids: list[int], options: Any) -> None:
    """Compare a prompt and the longest answer to it with the cache that was planned.

    Raises:
        UsageError: there is too little room.
    """
    needed, placed = len(ids) + options.max_new_tokens, options.placed
    if placed is not None and needed > placed.context:
        more = f"--context {needed}" if needed <= placed.longest else f"--max-new-tokens {options.max_new_tokens // 2}"
        raise UsageError(
            f"{len(ids):,} tokens of question and {options.max_new_tokens:,} of answer",
            f"there is room for {placed.context:,}, and on these devices for {placed.longest:,} at most",
            f"{more}, or /new to forget what was said",
        )


def answer(trained: Trained, messages: list[Message], options: Any) -> str:
    """Print an answer as it comes; the whole of it.

    Raises:
        UsageError: question and answer do not fit into the cache that was planned.
    """
    from transformers import TextIteratorStreamer

    ids = trained.prompter.prompt(messages)
    _room(ids, options)
    streamer = TextIteratorStreamer(trained.tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = (
        {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {"do_sample": False}
    )
    if options.placed is not None and len(ids) > (options.placed.piece or len(ids)):
        settings["prefill_chunk_size"] = options.placed.piece
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            generate_ids(trained.model, ids, trained.prepared, options.max_new_tokens, streamer=streamer, **settings)
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
            failure.append(error)
            # Otherwise the loop below waits for ever. Not end(), which decodes once more what may be what failed.
            streamer.on_finalized_text("", stream_end=True)

    thread = Thread(target=generate, daemon=True)
    thread.start()
    text = ""
    for piece in streamer:
        print(piece, end="", flush=True)
        text += piece
    print()
    thread.join()
    if failure:
        raise failure[0]
    return text


def _options(argv: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="launch chat")
    parser.add_argument("run")
    parser.add_argument("--prompt")
    parser.add_argument("--system")
    parser.add_argument("--step")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--placed")
    return parser.parse_args(argv)
