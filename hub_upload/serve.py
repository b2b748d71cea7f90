"""Serving a model by transformers' own server, which `transformers chat` then talks to."""

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .build import read_config
from .errors import HubUploadError

# The server's handlers of requests that generate text: module and class.
_HANDLERS = (
    ("chat_completion", "ChatCompletionHandler"),
    ("completion", "CompletionHandler"),
    ("response", "ResponseHandler"),
)


def serve_model(model: str | Path, options: Sequence[str] = ()) -> None:
    """Run `transformers serve` with a SeqBoat language model until it is stopped.

    That command finds a model's class among those of transformers itself, `trust_remote_code` or not. So the class is
    put there for as long as the server runs. Its handlers are replaced by ones that sample where a request names a
    temperature or top_p, and that answer requests that cannot be honoured by 400 and the reason.

    Args:
        model: folder with a saved or built model.
        options: passed on, for instance `["--port", "8001"]`.

    Raises:
        HubUploadError: the folder holds no SeqBoat language model, an option cannot be honoured, or the installed
            transformers cannot serve.
    """
    if any(option.split("=")[0] == "--continuous-batching" for option in options):
        raise HubUploadError(
            "--continuous-batching is not for SeqBoat: it shares out pages of a cache that grows, and SeqBoat's state "
            "has a constant size. Leave it out: requests are answered one after the other."
        )
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
        with _checked_handlers():
            main()
    except ImportError as error:
        raise HubUploadError(f"`transformers serve` cannot start: {error}") from error
    finally:
        sys.argv = given


@contextmanager
def _checked_handlers() -> Iterator[None]:
    # Without its packages the server says what it lacks, and its modules cannot be imported.
    from transformers.utils.import_utils import is_serve_available

    replaced = []
    try:
        for name, kind in _HANDLERS if is_serve_available() else ():
            module = importlib.import_module(f"transformers.cli.serving.{name}")
            usual = getattr(module, kind)
            replaced.append((module, kind, usual))
            setattr(module, kind, _checked(usual))
        yield
    finally:
        for module, kind, usual in replaced:
            setattr(module, kind, usual)


def _checked(handler: type) -> type:
    from fastapi import HTTPException
    from jinja2 import TemplateError

    def refuse(reason: str) -> None:
        raise HTTPException(status_code=400, detail=reason)

    class Checked(handler):
        async def handle_request(self, body: dict, request_id: str):
            for name, least, most in _RANGES:
                if not _lies_in(body.get(name), least, most):
                    refuse(f"{name} must be from {least} to {most}, got {body[name]!r}")
            if "messages" in body and (not isinstance(body["messages"], list) or not body["messages"]):
                refuse("messages must hold at least one message")
            try:
                return await super().handle_request(body, request_id)
            # A role that the chat template does not know, a message without one, a value that is no number.
            except (TemplateError, ValueError, KeyError, TypeError, AttributeError) as error:
                told = isinstance(error, (TemplateError, ValueError))
                refuse(str(error) if told else f"{type(error).__name__}: {error}")

        def _build_generation_config(self, body: dict, *args, **kwargs):
            config = super()._build_generation_config(body, *args, **kwargs)
            asked = [body[name] for name in ("temperature", "top_p") if body.get(name) is not None]
            # Else they would have no effect: generation is greedy unless told otherwise.
            if asked and body.get("generation_config") is None:
                config.do_sample = body.get("temperature") != 0
            return config

        def _streaming(self, *args, **kwargs):
            _expect_tokens(args, kwargs)
            return super()._streaming(*args, **kwargs)

        async def _non_streaming(self, *args, **kwargs):
            _expect_tokens(args, kwargs)
            return await super()._non_streaming(*args, **kwargs)

    Checked.__name__ = handler.__name__
    return Checked


_RANGES = (
    ("temperature", 0, math.inf),
    ("top_p", 0, 1),
    ("max_tokens", 1, math.inf),
    ("max_completion_tokens", 1, math.inf),
    ("max_output_tokens", 1, math.inf),
)


def _lies_in(value: Any, least: float, most: float) -> bool:
    return value is None or (type(value) in (int, float) and least <= value <= most)


def _expect_tokens(args: tuple, kwargs: dict) -> None:
    """Raises ValueError where the tokenizer has made no token of a prompt."""
    for inputs in (*args, *kwargs.values()):
        ids = inputs.get("input_ids") if hasattr(inputs, "get") else None
        if ids is not None and (len(ids) == 0 if isinstance(ids, list) else ids.shape[-1] == 0):
            raise ValueError("the prompt is empty: it must hold at least one token")
