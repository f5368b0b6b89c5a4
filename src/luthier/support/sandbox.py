"""Run generated programs safely: own user, network, process and mount namespaces, an empty home, read-only system, no
capabilities, limits on memory, processor time, processes and files, and a time limit.

Restricted builtins are not a sandbox, so there is no fallback: if namespaces do not work, nothing runs.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from luthier.support.errors import LuthierError

NOBODY = 65534
OUTPUT_LIMIT = 64_000  # bytes kept of each stream
TOOLS = ("unshare", "setpriv", "mount", "chroot")
# Debian's users do not have /usr/sbin in their PATH, where chroot is.
SEARCHED = ":".join(filter(None, (os.environ.get("PATH"), "/usr/sbin", "/sbin")))

# $1 new root, $2 "--reuid=..." or "", $3... folders to show read-only, up to "--"; the rest is the command, run without
# any capability.
_INSIDE = """
set -e
root=$1; who=$2; shift 2
mount -t tmpfs -o size=64m,mode=755 tmpfs "$root"
while [ "$1" != -- ]; do
  mkdir -p "$root$1"
  mount --rbind "$1" "$root$1"
  mount -o remount,bind,ro,nosuid,nodev "$root$1"
  shift
done
shift
mkdir -p "$root/home" "$root/tmp" "$root/proc" "$root/dev"
chmod 777 "$root/home" "$root/tmp"
for device in null zero urandom; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t proc proc "$root/proc"
cat > "$root/home/program.py"
cd "$root/home"
exec chroot "$root" /usr/bin/setpriv $who --bounding-set=-all --inh-caps=-all --ambient-caps=-all --no-new-privs \
  /usr/bin/env -i HOME=/home TMPDIR=/tmp PATH=/usr/bin:/bin LANG=C.UTF-8 /bin/sh -c 'cd /home && exec "$@"' sandbox "$@"
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0  # wall clock
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 16 << 20


@dataclass(frozen=True)
class Verdict:
    """How a program ended: "ok", "failed" (its own exit code), or "timeout"."""

    status: str
    code: int | None
    stdout: str
    stderr: str
    seconds: float


def unavailable() -> str | None:
    """Why programs cannot be run on this machine; None if they can."""
    missing = [t for t in TOOLS if shutil.which(t, path=SEARCHED) is None]
    if missing:
        return f"the sandbox needs {', '.join(missing)} (util-linux)"
    return _trial()


@cache
def _trial() -> str | None:
    """Why a trial program did not run; None if it did. One trial is enough for a process: no program runs without namespaces."""
    verdict = _run("print(40 + 2)", Limits(seconds=20.0))
    if verdict.status != "ok" or verdict.stdout.strip() != "42":
        return f"namespaces do not work here ({verdict.stderr.strip().splitlines()[-1:] or verdict.status})"
    return None


def execute(program: str, limits: Limits = Limits()) -> Verdict:
    """Run a Python program. Raises LuthierError if no sandbox works: it never runs without one."""
    (verdict,) = execute_all([program], limits)
    return verdict


def execute_all(programs: Sequence[str], limits: Limits = Limits(), workers: int | None = None) -> list[Verdict]:
    """Run many programs, several at a time (default: one for each core). Raises LuthierError if no sandbox works."""
    if not programs:
        return []
    reason = unavailable()
    if reason is not None:
        raise LuthierError(f"generated code is not run: {reason}")
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda p: _run(p, limits), programs))


def _visible() -> list[str]:
    """Folders a Python program needs to see: the system's libraries and the interpreter."""
    wanted = ["/usr", "/bin", "/lib", "/lib64", sys.base_prefix]
    real = [p for p in wanted if os.path.isdir(p)]
    return [p for p in real if not any(p != q and p.startswith(q.rstrip("/") + "/") for q in real)]


def _command(root: str) -> list[str]:
    interpreter = os.path.realpath(sys.executable)
    spaces = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--ipc", "--uts"]
    if os.geteuid() == 0:  # root needs no user namespace, but would escape the limit on processes: run as nobody
        who = f"--reuid={NOBODY} --regid={NOBODY} --clear-groups"
    else:
        who, spaces = "", [*spaces, "--user", "--map-root-user"]
    command = [interpreter, "-I", "/home/program.py"]
    return [*spaces, "/bin/bash", "-c", _INSIDE, "sandbox", root, who, *_visible(), "--", *command]


def _limiter(limits: Limits) -> Callable[[], None]:
    def limit() -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
        resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return limit


def _run(program: str, limits: Limits) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="luthier-sandbox-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "root").mkdir()
        started = time.monotonic()
        with (root / "out").open("w+b") as out, (root / "err").open("w+b") as err:
            # Streams go to files under the file-size limit, so that endless output ends instead of filling memory.
            child = subprocess.Popen(
                _command(str(root / "root")),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                preexec_fn=_limiter(limits),
                cwd="/",
                env={**os.environ, "PATH": SEARCHED},
            )
            timed_out = False
            try:
                child.communicate(program.encode("utf-8", "surrogatepass"), timeout=limits.seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _end(child)
            seconds = time.monotonic() - started
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read(OUTPUT_LIMIT).decode("utf-8", "replace"))
    status = "timeout" if timed_out else "ok" if child.returncode == 0 else "failed"
    return Verdict(status, None if timed_out else child.returncode, texts[0], texts[1], seconds)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the whole group. The process namespace ends with its first process."""
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
