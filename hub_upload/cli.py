"""Train, evaluate, look at, publish, convert, serve and export SeqBoat models. The command is `seqboat`, or
`python -m hub_upload` where the package is not installed."""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from huggingface_hub import get_token

from .errors import HubUploadError, redact

# Scripts of `examples/`, which read the rest of the command line themselves.
SCRIPTS = {
    "train": ("train_lm.py", "train a language model by a recipe, or by flags"),
    "evaluate": ("evaluate_lm.py", "bits per byte of a language model on a text"),
    "teach": ("teacher_labels.py", "write what a model predicts on a training text, for another to learn from"),
    "activations": ("activation_map.py", "a page that shows where a model attends in a text or picture"),
}


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the list of all options."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def _size(text: str) -> str:
    """A size as transformers' `save_pretrained` reads it, checked before any work."""
    if re.fullmatch(r"0*[1-9][0-9]*(\.[0-9]+)? *[KMGT]B", text.strip(), re.IGNORECASE) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1 of KB, MB, GB or TB, such as 5GB")
    return text


def build_parser(prog: str = "seqboat") -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = _Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in SCRIPTS.items():
        commands.add_parser(name, help=text)

    push = commands.add_parser("publish", aliases=["push"], help="build, verify and upload a model in one commit")
    _add_model(push)
    push.add_argument("--repo-id", required=True, metavar="NAME/REPO", help="created if it does not exist")
    push.add_argument("--private", action="store_true", help="create the repo as a private one")
    push.add_argument("--revision", help="branch to push to (default: main), created if it does not exist")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the repo")
    push.add_argument("--message", help="title of the commit")
    push.add_argument("--token", help="access token; better: `hf auth login` or the variable HF_TOKEN")
    push.add_argument("--overwrite", action="store_true", help="replace the model in a repo that is not empty")
    push.add_argument("--no-verify", action="store_true", help="upload without loading the folder in a fresh process")
    push.set_defaults(run=_push)

    build = commands.add_parser("build", help="write the folder that publish would upload")
    _add_model(build)
    build.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    build.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    build.add_argument("--repo-id", metavar="NAME/REPO", help="or folder that the card's examples load from")
    build.add_argument(
        "--link-code",
        action="store_true",
        help="link to this package's Python files in place of copying them: the folder stays in its checkout",
    )
    build.set_defaults(run=_build)

    verify = commands.add_parser("verify", help="load a built folder in a fresh process without this package")
    verify.add_argument("folder", type=Path, metavar="DIR", help="folder that build wrote")
    verify.set_defaults(run=_verify)

    convert = commands.add_parser("convert", help="turn a published checkpoint into a model folder")
    convert.add_argument("--checkpoint", required=True, type=Path, metavar="X.pt", help="published torch checkpoint")
    convert.add_argument("--dict", type=Path, metavar="dict.txt", help="dictionary of a byte corpus")
    convert.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    convert.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    _add_shard_size(convert)
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="write a model as graphs for other runtimes")
    export.add_argument("model", type=Path, metavar="DIR", help="folder with a saved or built model")
    export.add_argument("--format", required=True, choices=("torch", "onnx", "aoti", "executorch"))
    export.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    export.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    export.add_argument("--rows", type=int, default=1, metavar="N", help="rows of a batch, 0 for any (default: 1)")
    export.add_argument("--length", type=int, metavar="N", help="columns of a prompt (default: any from 2 on)")
    export.set_defaults(run=_export)

    serve = commands.add_parser(
        "serve", help="run `transformers serve` with a SeqBoat model; further options go to it as they are"
    )
    serve.add_argument("model", type=Path, metavar="DIR", help="folder with a saved or built language model")
    serve.set_defaults(run=_serve)
    return parser


def _add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="folder with a saved model")
    _add_shard_size(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="round the weights to this type")
    card = parser.add_argument_group("model card")
    card.add_argument("--license", default="mit", help="licence of the weights (default: mit)")
    card.add_argument("--language", action="append", default=[], metavar="CODE", help="may be repeated")
    card.add_argument("--dataset", action="append", default=[], metavar="NAME", help="training data, may be repeated")
    card.add_argument("--data-license", metavar="TEXT", help="licence of the training data")
    card.add_argument("--tag", action="append", default=[], help="may be repeated")
    card.add_argument("--base-model", metavar="NAME/REPO", help="the model that this one was fine-tuned from")
    card.add_argument(
        "--records",
        type=Path,
        metavar="RUN",
        help="folder of a run of train_lm.py; default: DIR's, for best, final and averaged",
    )
    card.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="may be repeated; default: those in DIR or else in RUN",
    )
    card.add_argument("--record", type=Path, metavar="FILE", help="default: DIR/training_record.json if it exists")
    card.add_argument(
        "--trainer-state", type=Path, metavar="FILE", help="default: DIR/trainer_state.json if it exists"
    )
    card.add_argument("--card", type=Path, metavar="FILE", help="a finished README.md, used as it is")


def _card_options(args: argparse.Namespace):
    from .model_card import CardOptions

    return CardOptions(
        repo_id=args.repo_id,
        license=args.license,
        languages=args.language,
        datasets=args.dataset,
        tags=args.tag,
        base_model=args.base_model,
        data_license=args.data_license,
        records=args.records,
        evaluations=args.evaluation,
        record=args.record,
        state=args.trainer_state,
        card=args.card,
    )


def _print_built(built) -> None:
    print(f"built {built.model_class}, {built.parameters:,} parameters: {', '.join(built.files)}", flush=True)
    for remark in built.remarks:
        print(f"note: {remark}", file=sys.stderr)


def _print_check(check) -> None:
    where = " (saved again)" if check.again else ""
    print(f"ok  {check.name}{where}: {check.detail}", flush=True)


# The subcommands import what they need when they run, so that --help and wrong arguments are answered at once.


def _push(args: argparse.Namespace) -> None:
    from .push import push_folder

    pushed = push_folder(
        args.model,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        message=args.message,
        token=args.token,
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
        dtype=args.dtype,
        card=_card_options(args),
        verify=not args.no_verify,
        on_build=_print_built,
        on_check=_print_check,
    )
    print(pushed.url)


def _build(args: argparse.Namespace) -> None:
    from .build import build_folder

    built = build_folder(
        args.model,
        args.output,
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
        dtype=args.dtype,
        linked_code=args.link_code,
        card=_card_options(args),
    )
    _print_built(built)
    print(built.output)


def _verify(args: argparse.Namespace) -> None:
    from .verify import verify_folder

    verify_folder(args.folder, on_check=_print_check)
    print(f"{args.folder} verified")


def _convert(args: argparse.Namespace) -> None:
    from .convert import convert_checkpoint

    converted = convert_checkpoint(
        args.checkpoint, args.output, args.dict, overwrite=args.overwrite, max_shard_size=args.max_shard_size
    )
    for warning in converted.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"converted {converted.model_class}, {converted.parameters:,} parameters")
    print(converted.output)


def _export(args: argparse.Namespace) -> None:
    from .export import export_folder

    graphs = export_folder(
        args.model, args.output, args.format, rows=args.rows or None, length=args.length, overwrite=args.overwrite
    )
    for name, graph in graphs.items():
        print(f"{name}: {graph.file}, {len(graph.inputs)} inputs, {len(graph.outputs)} outputs")
    print(args.output)


def _serve(args: argparse.Namespace) -> None:
    from .serve import serve_model

    serve_model(args.model, args.rest)


def _run_script(name: str, arguments: Sequence[str], prog: str) -> int:
    """Run a script as `python` would, in this process: a signal reaches it, and it ends the process as it likes."""
    here = Path(__file__).resolve().parent
    # An installed package holds the scripts, in a checkout (editable installs too) they lie beside it.
    for folder in (here / "examples", here.parent / "examples"):
        if (folder / name).is_file():
            file = folder / name
            script = ModuleType("__main__")
            script.__file__ = str(file)
            sys.modules["__main__"], sys.argv = script, [prog, *arguments]
            sys.path.insert(0, str(folder))
            # Not runpy: it would put the file's name in place of the command's, which errors are reported by.
            exec(compile(file.read_bytes(), str(file), "exec"), script.__dict__)
            return 0
    raise HubUploadError(f"{name} is not beside this package: install it again, or run the command in a checkout.")


def main(arguments: Sequence[str] | None = None, prog: str = "seqboat") -> int:
    """Run the command line. Returns the exit status: 0, or 1 after an error that was printed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in SCRIPTS:
        return _run_script(SCRIPTS[arguments[0]][0], arguments[1:], f"{prog} {arguments[0]}")
    # Kernels of torchao that this machine's torch cannot load, and torch's remarks on it: nothing here calls them.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = build_parser(prog)
    args, args.rest = parser.parse_known_args(arguments)
    if args.rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    try:
        args.run(args)
    except (HubUploadError, OSError) as error:
        print(f"error: {redact(str(error), (getattr(args, 'token', None), get_token()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was committed and no partial folder is left", file=sys.stderr)
        return 130
    return 0
