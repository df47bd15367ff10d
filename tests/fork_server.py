"""Python programs that start by a fork of a process which has imported torch:
milliseconds instead of seconds.

    # As subprocess.run of this interpreter, and as subprocess.Popen.
    finished = run_python("-m", "torchtitan_rd.train", "--training.steps=2")
    process = start_python("-c", "print(1)")

Such a program is the main module of a process of its own: with its own environment, working folder and
output, it dies of signals and ends as `python -m` does: threads, atexit, exit status (1 after an
uncaught Ctrl-C). It differs in what is imported when it begins, so a test of imports, or of the start
itself, takes subprocess.
"""

import atexit
import contextlib
import gc
import os
import pickle
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PRELOADED = (
    "torch._dynamo",  # by the first optimizer
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "datasets",  # by every data set of documents
    "torchtitan_rd.train",
)


class Program:
    """A started program; the part of subprocess.Popen that the tests use. Its output is kept in files."""

    def __init__(self, pid: int, status: int, outputs: list[Any]):
        self.args, self.pid, self.returncode = [], pid, None
        self._status, self._outputs = status, outputs

    def poll(self) -> int | None:
        """The exit status, -N after signal N, or None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._read_status()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.args), timeout)
            self._read_status()
        return self.returncode

    def _read_status(self) -> None:
        data = os.read(self._status, 4)
        os.close(self._status)
        if not data:
            raise RuntimeError("the fork server died")
        self.returncode = struct.unpack("i", data)[0]

    def output(self) -> tuple[str, str]:
        """(standard output, standard error) so far."""
        return tuple(Path(file.name).read_text(errors="replace") for file in self._outputs)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits; -> (standard output, standard error)."""
        self.wait(timeout)
        return self.output()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends it, if it has not ended, and deletes its output."""
        self.kill()
        self.wait()
        for file in self._outputs:
            file.close()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_python(*command: Any, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Program:
    """Starts `python *command`: -m MODULE, -c CODE or a path, and the arguments;
    env: instead of this process's.
    """
    outputs = [tempfile.NamedTemporaryFile(prefix="output-") for _ in range(2)]  # noqa: SIM115
    status, theirs = os.pipe()
    request = {
        "command": [str(part) for part in command],
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd),
    }
    channel = _server()
    socket.send_fds(channel, [pickle.dumps(request)], [theirs, *(file.fileno() for file in outputs)])
    os.close(theirs)
    (pid,) = struct.unpack("i", channel.recv(4))
    program = Program(pid, status, outputs)
    program.args = request["command"]
    return program


def run_python(
    *command: Any, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 120.0
) -> subprocess.CompletedProcess:
    """Runs `python *command` to its end; the output is text.
    One that outlives `timeout` is killed and an error.
    """
    with start_python(*command, env=env, cwd=cwd) as program:
        stdout, stderr = program.communicate(timeout)
        return subprocess.CompletedProcess(program.args, program.returncode, stdout, stderr)


_servers: list[tuple[subprocess.Popen, socket.socket]] = []


def _server() -> socket.socket:
    """The channel to this process's server, which is started by the first program."""
    if not _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The server itself must never look for a GPU: CUDA does not survive a fork.
        environment = {
            **os.environ,
            # What else it names stays: ranks would run on another torch than the tests that start them.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-c", "from tests.fork_server import main; main()", str(theirs.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        _servers.append((process, ours))
    return _servers[0][1]


def _stop_server(owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        for process, channel in _servers:
            channel.close()
            process.wait()


# Registered by the import, so what a module that uses this one registers runs first, while the server lives.
atexit.register(_stop_server, os.getpid())


# ---- in the server


def _serve(channel: socket.socket) -> dict[str, Any]:
    """Forks for each request. Returns the request in the child; the server itself ends with its channel."""
    for name in PRELOADED:
        __import__(name)
    gc.set_threshold(100_000, 20, 100)  # as in conftest.py
    gc.freeze()  # else the collector touches, and so copies, all of it in each child
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    while True:
        ready = select.select([channel, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            _reap(statuses)
        if channel not in ready:
            continue
        message, files, *_ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            os._exit(0)
        status, *outputs = files
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (channel.fileno(), woken, wake, status, *statuses.values()):
                os.close(end)
            channel.detach()
            return pickle.loads(message) | {"outputs": outputs}
        statuses[pid] = status
        for file in outputs:
            os.close(file)
        channel.send(struct.pack("i", pid))


def _reap(statuses: dict[int, int]) -> None:
    """Passes on the exit status of every child that has ended."""
    for pid in list(statuses):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended == 0:
            continue
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(statuses[pid], struct.pack("i", os.waitstatus_to_exitcode(status)))
        os.close(statuses.pop(pid))


def _become(request: dict[str, Any]) -> None:
    """Turns the forked process into the program, which ends it."""
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, file in enumerate(request["outputs"], start=1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    first, *rest = request["command"]
    if first == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # as if it had not been imported: runpy warns of it
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = request["command"]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    """What the server process runs; and, after a fork, each program."""
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
