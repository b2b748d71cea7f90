"""Commands of Python in processes that have this one's imports: starting anew costs each of them seven seconds of
imports. Where CUDA is, or OpenMP's threads, which a fork cannot use again, they start anew all the same."""

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, CompletedProcess, TimeoutExpired

import torch
from torch.distributed import run as elastic

ROOT = Path(__file__).resolve().parent.parent
METHOD = "spawn" if torch.cuda.is_available() or torch.get_num_threads() > 1 else "fork"
CONTEXT = multiprocessing.get_context(METHOD)


def leave_no_group() -> None:
    """Before a fork: gloo shares its device among all groups of a process, so a fork of a process that still has one
    would wait for ever on a thread that it has not. Groups that are destroyed lie in cycles until they are collected.

    Raises:
        RuntimeError: a group is still alive.
    """
    if METHOD == "fork" and _threads_of_gloo():
        gc.collect()
        if left := _threads_of_gloo():
            raise RuntimeError(f"a process group of this process is alive, its forks would hang: threads {left}")


def _threads_of_gloo() -> list[str]:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(FileNotFoundError):  # it has just ended
            names.append(path.read_text("utf-8").strip())
    return [name for name in names if "gloo" in name]


def run_script(path: str, *flags: str) -> None:
    """What `python PATH FLAGS` does, in this process."""
    from accelerate.state import AcceleratorState, GradientState

    # State of this process's own tests.
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    sys.argv, sys.path[:0] = [str(path), *flags], [str(Path(path).parent)]
    runpy.run_path(str(path), run_name="__main__")


def _child(
    function, arguments: tuple, cwd: str, environment: dict[str, str], output: str, errors: str, questions: str = ""
) -> None:
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    if questions:
        os.dup2(os.open(questions, os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.update(environment)
    os.chdir(cwd)
    for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, usual)
    # What earlier tests have left: scripts, which would not run again when they are imported, and the hook of a
    # process group, which puts its rank before errors.
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(ROOT / "examples"):
            del sys.modules[name]
    sys.excepthook = sys.__excepthook__
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        # The script's own, which tells a user's mistake from a fault.
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


class Command:
    """What `subprocess.Popen([python, SCRIPT, *FLAGS])` starts. `stdout` is an open file, PIPE, or None for nowhere;
    errors go there too, or to a file of their own. Pipes are of text, and need processes that are forked."""

    def __init__(self, command: list[str], stdin=None, stdout=None, stderr=None, text=True, env=None):
        self.stdin = self.stdout = None
        output, questions, ends = os.devnull, "", []
        if stdout is PIPE:
            read, write = os.pipe()
            self.stdout, output = open(read, encoding="utf-8"), f"/dev/fd/{write}"
            ends.append(write)
        elif stdout is not None:
            output = stdout.name
        if stdin is PIPE:
            read, write = os.pipe()
            self.stdin, questions = open(write, "w", encoding="utf-8"), f"/dev/fd/{read}"
            ends.append(read)
        errors = stderr.name if hasattr(stderr, "name") else output
        arguments = (run_script, tuple(command[1:]), os.getcwd(), env or {}, output, errors, questions)
        leave_no_group()
        self.process = CONTEXT.Process(target=_child, args=arguments)
        self.process.start()
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
        leave_no_group()
        process = CONTEXT.Process(target=_child, args=(function, arguments, str(cwd), environment, *map(str, files)))
        process.start()
        process.join(timeout)
        late = process.exitcode is None
        process.kill()
        process.join()
        output, errors = (file.read_text("utf-8") for file in files)
    assert not late, f"{arguments} took more than {timeout} s\n{output[-3000:]}\n{errors[-6000:]}"
    return CompletedProcess(arguments, process.exitcode, output, errors)


@contextmanager
def forked_workers():
    """Within, torchrun and what is made from it, `accelerate launch` too, start their workers so."""
    usual, handlers = elastic.config_from_args, {}
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"):
        handlers[name] = signal.getsignal(getattr(signal, name))

    def config_from_args(args):
        config, _, command = usual(args)
        leave_no_group()
        config.start_method = METHOD
        return config, run_script, command[command.index(args.training_script) :]

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
