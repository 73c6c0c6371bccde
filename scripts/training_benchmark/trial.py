"""One trial: `python -m training_benchmark.trial SPEC.json ANSWER.json`, run by `process.in_new_process`.

Only the side that is asked for is imported: its memory is counted from after its own imports.
"""

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Do what the file says, and write what was measured."""
    asked, answer = map(Path, sys.argv[1:])
    spec = json.loads(asked.read_text(encoding="utf-8"))
    side = importlib.import_module(f"training_benchmark.{spec['side']}_side")
    answer.write_text(json.dumps(side.run(spec)), encoding="utf-8")


if __name__ == "__main__":
    main()
