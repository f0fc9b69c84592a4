"""Rows kept in a file as they are made, so that an interrupted walk of the zoo goes on where it was."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwla_compiler.errors import ModelError
from bwla_compiler.zoo.compiled import Compiled, Packed
from bwla_compiler.zoo.run import Kind, ZooRow


@dataclass(frozen=True)
class Journal:
    """A file of JSON lines, one a row with the conditions that it was made under.

    conditions: what decides about a row besides the project: seed, extent, versions. Rows under other conditions are
    passed over, and stay. A last line that was cut off by the end of its process is passed over too.
    """

    path: Path
    conditions: Mapping[str, Any]

    def rows(self) -> dict[str, ZooRow]:
        """Return the rows made under these conditions by name, the newest of each.

        Raises ModelError where the file is not a journal.
        """
        found: dict[str, ZooRow] = {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for i, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if entry["conditions"] == self.conditions:
                    found[entry["row"]["name"]] = row_of(entry["row"])
            except (ValueError, KeyError, TypeError) as error:
                if i < len(lines) - 1:
                    raise ModelError(f"{self.path}: line {i + 1} is not a row of the zoo; name another file") from error
        return found

    def add(self, row: ZooRow) -> None:
        """Append a row, in the place of a last line that was cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"conditions": self.conditions, "row": dataclasses.asdict(row)}
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(entry).encode() + b"\n")


def row_of(table: Mapping[str, Any]) -> ZooRow:
    """Return the row whose `dataclasses.asdict`, through JSON, is the table."""
    fields = dict(table)
    fields["kinds"] = tuple(Kind(**kind) for kind in fields["kinds"])
    fields["packed"] = Packed(**fields["packed"]) if fields["packed"] else None
    for key in ("compiled", "raw"):
        if found := fields[key]:
            fields[key] = Compiled(**{**found, "breaks": tuple(found["breaks"])})
    return ZooRow(**fields)
