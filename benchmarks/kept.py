"""Results that outlast the script: a JSON line each, appended as they come, so that a long benchmark can be stopped and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Kept:
    """What was measured so far, by label; in a file where one is named, else in memory alone.

    Raises:
        ValueError: the file holds something else than such lines.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        self.results: dict[str, Any] = {}
        for line in lines:
            record = json.loads(line)
            self.results[record["label"]] = record["result"]

    def __contains__(self, label: str) -> bool:
        return label in self.results

    def __getitem__(self, label: str) -> Any:
        return self.results[label]

    def get(self, label: str, default: Any) -> Any:
        """A result, or what stands for one that is not there."""
        return self.results.get(label, default)

    def add(self, label: str, result: Any) -> None:
        """Keep a result, which JSON has to know."""
        self.results[label] = result
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"label": label, "result": result}) + "\n")
