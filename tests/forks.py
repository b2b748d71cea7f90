"""Commands of Python in processes that have the libraries: importing them anew costs each of them seven seconds.

They are forks of one process that has imported the libraries and done nothing else. Forks of a test's process would be
without the threads that tests have left in it: gloo's and OpenMP's, for which they wait for ever, and autograd's,
without which a torch that is built for CUDA refuses a backward. Where CUDA is, which no fork can use, commands start
anew."""

import faulthandler
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tempfile
from contextlib import contextmanager
from multiprocessing import forkserver, reduction
from pathlib import Path
from subprocess import PIPE, CompletedProcess, TimeoutExpired
from unittest.mock import patch

import torch
from torch.distributed import run as elastic

ROOT = Path(__file__).resolve().parent.parent
FORKS = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
METHOD = "forkserver" if FORKS else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
_PLACE = re.compile("RANK$|WORLD_SIZE$|^ROLE_NAME$|^MASTER_|^TORCHELASTIC_|^TORCH_NCCL_")


def start_server() -> None:
    """Starts the process with the libraries, if commands are forked and it does not run yet."""
    if not FORKS:
        return
    # What it imports is looked for before a child tells it this process's path.
    places = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(places)):
        CONTEXT.set_forkserver_preload(["fork_imports"])
        forkserver.ensure_running()


def run_script(path: str, *flags: str) -> None:
    """What `python PATH FLAGS` does, in this process."""
    sys.argv, sys.path[:0] = [str(path), *flags], [str(Path(path).parent)]
    runpy.run_path(str(path), run_name="__main__")


def _go_to(cwd: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)


class _End:
    """An end of a pipe on its way to another process."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return _received, (reduction.DupFd(self.number),)


def _received(end) -> int:
    return end.detach()


def _opened(file: str | int, flags: int) -> int:
    return os.open(file, flags) if isinstance(file, str) else file


def _child(function, arguments: tuple, cwd: str, environment: dict[str, str], output, errors, questions=None) -> None:
    """The files are paths, or ends of pipes."""
    for number, file in ((1, output), (2, errors)):
        os.dup2(_opened(file, os.O_WRONLY | os.O_APPEND), number)
    if questions is not None:
        os.dup2(_opened(questions, os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    _go_to(cwd, environment)
    for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, usual)
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        # The script's own, which tells a user's mistake from a fault.
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _process(function, arguments: tuple, cwd: str, environment: dict[str, str], *files) -> multiprocessing.Process:
    start_server()
    environment = {**os.environ, **environment}
    process = CONTEXT.Process(target=_child, args=(function, arguments, cwd, environment, *files))
    process.start()
    return process


class Command:
    """What `subprocess.Popen([python, SCRIPT, *FLAGS])` starts. `stdout` is an open file, PIPE, or None for nowhere;
    errors go there too, or to a file of their own. Pipes are of text."""

    def __init__(self, command: list[str], stdin=None, stdout=None, stderr=None, text=True, env=None):
        self.stdin = self.stdout = questions = None
        output, ends = os.devnull, []
        if stdout is PIPE:
            read, write = os.pipe()
            self.stdout, output = open(read, encoding="utf-8"), _End(write)
            ends.append(write)
        elif stdout is not None:
            output = stdout.name
        if stdin is PIPE:
            read, write = os.pipe()
            self.stdin, questions = open(write, "w", encoding="utf-8"), _End(read)
            ends.append(read)
        errors = stderr.name if hasattr(stderr, "name") else output
        files = (output, errors, questions)
        self.process = _process(run_script, tuple(command[1:]), os.getcwd(), env or {}, *files)
        for end in ends:
            os.close(end)
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutExpired(self.process, timeout)
        return self.process.exitcode


def run(function, *arguments, cwd=ROOT, timeout: float = 280, **environment: str) -> CompletedProcess:
    """Calls a function in a process of its own, as `subprocess.run` does a command."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("output", "errors")]
        for file in files:
            file.touch()
        process = _process(function, arguments, str(cwd), environment, *map(str, files))
        process.join(timeout)
        late = process.exitcode is None
        process.kill()
        process.join()
        output, errors = (file.read_text("utf-8") for file in files)
    assert not late, f"{arguments} took more than {timeout} s\n{output[-3000:]}\n{errors[-6000:]}"
    return CompletedProcess(arguments, process.exitcode, output, errors)


def _work(output: int, errors: int, environment: dict[str, str], cwd: str, path: str, *flags: str) -> None:
    os.dup2(output, 1)
    os.dup2(errors, 2)
    # A worker that waits for ever says where, before the test is ended.
    faulthandler.dump_traceback_later(250, exit=True, file=2)
    # What the launcher has told this worker apart from that.
    place = {name: value for name, value in os.environ.items() if _PLACE.search(name)}
    _go_to(cwd, environment | place)
    run_script(path, *flags)


@contextmanager
def forked_workers():
    """Within, torchrun and what is made from it, `accelerate launch` too, start their workers so."""
    usual, handlers = elastic.config_from_args, {}
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"):
        handlers[name] = signal.getsignal(getattr(signal, name))

    def config_from_args(args):
        config, _, command = usual(args)
        start_server()
        config.start_method = METHOD
        told = _End(1), _End(2), dict(os.environ), os.getcwd()
        return config, _work, [*told, *command[command.index(args.training_script) :]]

    elastic.config_from_args = config_from_args
    try:
        yield
    finally:
        elastic.config_from_args = usual
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)


def torchrun(processes: int, script: Path, *flags: str) -> None:
    """`torchrun --standalone`; a worker's failure is an error."""
    with forked_workers():
        elastic.run(elastic.parse_args(["--standalone", "--nproc_per_node", str(processes), str(script), *flags]))
