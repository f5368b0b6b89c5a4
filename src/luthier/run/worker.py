"""A process that carries out one run after another: a request in each input line, an answer in each output line.

The process keeps one arm's crash, memory and threads away from the others. It lives on because importing torch takes
seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from luthier.support import machine

LOCK_PATIENCE = 60.0  # seconds to wait for another process in the same folder


def main() -> None:
    """Work until standard input ends, or the parent does."""
    machine.end_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    machine.prepare()
    import torch

    from luthier.support.environment import quiet
    from luthier.training import loop  # noqa: F401 - with it comes most of what a run loads

    quiet(False)
    machine.settle()
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request["threads"])
        answer = carried_out(request)
        out.write(json.dumps(answer) + "\n")
        out.flush()
        if answer["state"] == "stopped":
            return


def carried_out(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request. Returns {"state": "done"}, or "stopped", or "failed" with the reason under "error".

    request  recipe, name, folder, base, code and threads; "call" is the name of the function (recipe, folder, request) that
             does the work. By default this is `execute.whole_run`, which also reads keep, judge and nested. It is given
             by name, because that module imports this one's queue. `threads` is read by `main`
    """
    from luthier.support.errors import LuthierError
    from luthier.training.loop import Interrupted

    folder = Path(request["folder"])
    try:
        _patiently(request, folder)
    except Interrupted:
        return {"state": "stopped"}
    except LuthierError as error:
        return {"state": "failed", "error": str(error)}
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return {"state": "failed", "error": f"{type(error).__name__}: {error} (see {folder / 'error.txt'})"}
    return {"state": "done"}


def _patiently(request: dict[str, Any], folder: Path) -> None:
    """Carry out the request, and wait for a worker of a killed comparison that is still saving in the folder."""
    from luthier.run.folder import FolderInUse

    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            return _run(request, folder)
        except FolderInUse:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)


def _run(request: dict[str, Any], folder: Path) -> None:
    from luthier import recipe as recipes

    code = Path(request["code"]) if request["code"] else None
    recipe = recipes.load(json.dumps(request["recipe"]), request["name"], code=code)
    module, _, function = request.get("call", "luthier.run.execute:whole_run").partition(":")
    getattr(importlib.import_module(module), function)(recipe, folder, request)


if __name__ == "__main__":
    main()
