"""Hostile programs: each is stopped, and leaves nothing behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.support import sandbox
from luthier.support.errors import LuthierError
from luthier.support.sandbox import Limits, execute

REASON = sandbox.unavailable()


@pytest.fixture(autouse=True)
def works():
    assert REASON is None, REASON


def test_a_program_runs_and_its_exit_is_told():
    assert execute("print(sum(range(10)))").stdout == "45\n"
    failed = execute("raise ValueError('no')")
    assert failed.status == "failed" and "ValueError: no" in failed.stderr
    assert execute("import sys; sys.exit(7)").code == 7


def test_no_network(tmp_path):
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        said = execute(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)")
    assert said.status == "failed" and ("unreachable" in said.stderr or "refused" in said.stderr.lower())


def test_nothing_of_the_user_is_readable(tmp_path):
    secret, at_home = tmp_path / "secret", Path.home() / f".luthier-sandbox-test-{os.getpid()}"
    for file in (secret, at_home):
        file.write_text("key")
        file.chmod(0o644)
    try:
        for path in (secret, at_home, Path(__file__), Path("/etc/passwd"), Path("/work"), Path("/var")):
            assert execute(f"import os; print(os.path.exists({str(path)!r}))").stdout == "False\n", path
    finally:
        at_home.unlink()
    known = {"HOME", "LANG", "OLDPWD", "PATH", "PWD", "TMPDIR"}
    assert set(execute("import os; print(*os.environ)").stdout.split()) <= known


def test_nothing_outside_is_writable():
    program = """
import os, sys, ctypes
tried = []
for path in ('/usr/x', '/x', '/bin/x', sys.base_prefix + '/x'):
    try:
        open(path, 'w').close()
        tried.append(path)
    except OSError:
        pass
libc = ctypes.CDLL(None, use_errno=True)
for target in (b'/usr', b'/'):
    if libc.mount(None, target, None, 32 | 4096, None) == 0:  # remount without read-only
        tried.append(target)
if libc.umount(b'/proc') == 0 or libc.unshare(0x00020000) == 0:
    tried.append('namespace')
print([t for t in tried if t != '/x'])
open('/home/mine', 'w').write('fine')
"""
    said = execute(program)
    assert said.stdout == "[]\n" and said.status == "ok", said
    assert not os.path.exists("/usr/x") and not os.path.exists("/x")


def test_endless_programs_are_stopped():
    started = time.monotonic()
    assert execute("while True: pass", Limits(seconds=2)).status == "timeout"
    assert execute("import time; time.sleep(60)", Limits(seconds=1)).status == "timeout"
    assert time.monotonic() - started < 15
    assert execute("while True: pass", Limits(seconds=20, cpu_seconds=1)).status == "failed"


def test_memory_is_limited():
    said = execute("x = bytearray(1 << 31)", Limits(memory_bytes=1 << 29))
    assert said.status == "failed" and "MemoryError" in said.stderr


def test_a_fork_bomb_hits_its_limit():
    program = """
import os
import subprocess
import sys
children = 0
try:
    while children < 2000:
        if os.fork() == 0:
            import time; time.sleep(30)
        children += 1
except OSError:
    print('stopped', children < 100)
"""
    assert execute(program, Limits(seconds=10)).stdout == "stopped True\n"
    leftovers = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"program.py" in _read(p)]
    assert not leftovers


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_background_child_dies_with_the_program():
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(30)\n"
    execute(program, Limits(seconds=5))
    time.sleep(0.2)
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"program.py" in _read(p)]


def test_endless_output_ends():
    said = execute("while True: print('x' * 1000)", Limits(seconds=8, file_bytes=1 << 20))
    assert said.status == "failed" and len(said.stdout) <= sandbox.OUTPUT_LIMIT


def test_an_ordinary_users_path_will_do():
    """Debian's has no /usr/sbin, where chroot lies."""
    code = "from luthier.support.sandbox import execute; print(execute('print(6 * 7)').stdout)"
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(sandbox.__file__).parents[2]),
    }  # the luthier that is tested here
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert found.stdout.strip() == "42", found.stderr


def test_without_namespaces_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "TOOLS", ("no-such-tool",))
    with pytest.raises(LuthierError, match="generated code is not run: the sandbox needs no-such-tool"):
        execute("print(1)")
