"""Serving a model by transformers' own server, which `transformers chat` then talks to."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .build import read_config
from .errors import HubUploadError


def serve_model(model: str | Path, options: Sequence[str] = ()) -> None:
    """Run `transformers serve` with a SeqBoat language model until it is stopped.

    That command finds a model's class among those of transformers itself, `trust_remote_code` or not. So the class is
    put there for as long as the server runs.

    Args:
        model: folder with a saved or built model.
        options: passed on, for instance `["--port", "8001"]`.

    Raises:
        HubUploadError: the folder holds no SeqBoat language model, or the installed transformers cannot serve.
    """
    _, model_class = read_config(Path(model))
    if not model_class.__name__.endswith("ForCausalLM"):
        raise HubUploadError(f"{model} holds a {model_class.__name__}; only language models can be served.")
    try:
        from transformers.cli.transformers import main
    except ImportError as error:
        raise HubUploadError(f"the installed transformers has no `transformers serve`: {error}") from error
    # Not `import transformers`: importing replaces the module, and the server reads the one that is registered.
    setattr(sys.modules["transformers"], model_class.__name__, model_class)
    given, sys.argv = sys.argv, ["transformers", "serve", str(model), *options]
    try:
        main()
    except ImportError as error:
        raise HubUploadError(f"`transformers serve` cannot start: {error}") from error
    finally:
        sys.argv = given
