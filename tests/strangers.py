"""Processes of somebody who has the libraries and nothing of this project, as `python -I SCRIPT ...` starts them.

Most of the time of such a process goes into importing the libraries. Here one process, which is this file run as a
script, imports them once for all workers of the tests, and each stranger is a fork of it."""

import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

ADDRESS = "TESTS_STRANGERS"
# Ends of sockets that are open as long as this process.
_HELD: list[socket.socket] = []


def start() -> str:
    """Starts the process that imports the libraries when it is first asked for a stranger. It ends with this process.
    Returns where it is asked."""
    folder = tempfile.mkdtemp(prefix="strangers-")
    if len(folder) > 90 and os.path.isdir("/tmp"):
        # The address of a socket may have some 100 characters.
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="strangers-", dir="/tmp")
    address = os.path.join(folder, "socket")
    listener, (here, there) = socket.socket(socket.AF_UNIX), socket.socketpair()
    with listener, there:
        listener.bind(address)
        listener.listen()
        # The Hub's client reads this at import, and Triton whether kernels are for the interpreter.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": "", "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-I", __file__, folder]
        subprocess.Popen(command, stdin=listener, stdout=there, env=environment)
    _HELD.append(here)
    return address


def share() -> None:
    """Has the processes that this one starts ask the same one; on systems without such sockets nothing is shared."""
    if hasattr(socket, "AF_UNIX"):
        os.environ[ADDRESS] = start()


@functools.cache
def _libraries() -> socket.socket:
    """A connection to the process with the libraries: this process's own, or that of all workers of the tests."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ.get(ADDRESS) or start())
    return connection


class Popen:
    """`subprocess.Popen` of such a process: its stdout is a pipe of text, its stderr an open file."""

    def __init__(self, command: list[str], *, env: dict[str, str], cwd: str | Path, stderr, **_):
        assert command[:2] == [sys.executable, "-I"], command
        output, output_end = os.pipe()
        status, status_end = os.pipe()
        with tempfile.TemporaryFile("w+", encoding="utf-8") as request:
            json.dump([command[2:], env, str(cwd)], request)
            request.seek(0)
            socket.send_fds(_libraries(), [b"."], [request.fileno(), output_end, stderr.fileno(), status_end])
        os.close(output_end)
        os.close(status_end)
        self.stdout, self._status = (open(end, encoding="utf-8") for end in (output, status))
        self._pid, self.returncode = int(self._status.readline()), None

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._status.readline())
        return self.returncode


def run(folder: Path, *command) -> CompletedProcess:
    """Runs a script in a folder, offline, with a Hub cache of its own and no token."""
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    with (folder / "errors.txt").open("w+", encoding="utf-8") as errors:
        process = Popen([sys.executable, "-I", *map(str, command)], env=environment, cwd=folder, stderr=errors)
        output, status = process.stdout.read(), process.wait()
        errors.seek(0)
        return CompletedProcess(command, status, output, errors.read())


def _import_libraries() -> None:
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import dynamic_module_utils, pipelines  # noqa: F401


def _serve(folder: str) -> list[str]:
    """Forks a stranger for each request; returns its command in the stranger."""
    listener, starter, connections = socket.socket(fileno=os.dup(0)), socket.socket(fileno=os.dup(1)), []
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        for ready in select.select([listener, starter, *connections], [], [])[0]:
            if ready is starter:
                shutil.rmtree(folder, ignore_errors=True)
                sys.exit()
            if ready is listener:
                connections.append(listener.accept()[0])
                continue
            _, files, *_ = socket.recv_fds(ready, 1, 4)
            if not files:
                connections.remove(ready)
                ready.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _import_libraries()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            if os.fork():
                for file in files:
                    os.close(file)
                continue
            for end in (listener, starter, *connections):
                end.close()
            return _stranger(*files)


def _stranger(request: int, output: int, errors: int, status: int) -> list[str]:
    """Within a fork: forks the stranger, in which this returns, and waits for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stranger = os.fork()
    if stranger:
        for file in (0, request, output, errors):
            os.close(file)
        os.write(status, f"{stranger}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(stranger, 0)[1])
        os.write(status, f"{code}\n".encode())
        os._exit(0)
    os.close(status)
    with open(request, encoding="utf-8") as file:
        command, environment, folder = json.load(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate((output, errors), start=1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return command


if __name__ == "__main__":
    sys.argv = _serve(sys.argv[1])
    from transformers import dynamic_module_utils

    # Read from the environment when it was imported; the code of each folder is loaded from that folder.
    dynamic_module_utils.HF_MODULES_CACHE = os.environ.get("HF_MODULES_CACHE", os.environ["HF_HOME"] + "/modules")
    runpy.run_path(sys.argv[0], run_name="__main__")
