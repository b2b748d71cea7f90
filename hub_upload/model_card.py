"""The model card: written from the config and what the sources state; what is not known is left out."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_seqboat.configuration_seqboat import LEARNED_ROUTERS, SeqBoatConfig
from modeling_seqboat.generation_seqboat import NEWEST_TESTED, OLDEST_TESTED

from .activation_plot import FILE_NAME as PLOT_FILE
from .activation_plot import write_activation_plot
from .card_sources import Sources, format_number, read_sources
from .errors import HubUploadError
from .long_context import long_context_section
from .markdown import code_block, escaped, one_line

PAPER = "https://arxiv.org/abs/2306.11197"
CITATION = """@inproceedings{ren2023seqboat,
  title     = {Sparse Modular Activation for Efficient Sequence Modeling},
  author    = {Ren, Liliang and Liu, Yang and Wang, Shuohang and Xu, Yichong and Zhu, Chenguang and Zhai, ChengXiang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  url       = {https://arxiv.org/abs/2306.11197}
}"""
PLACEHOLDER = "NAME/REPO"
RECURRENCES = {
    "ema": "a damped moving average",
    "s4d": "an S4D recurrence (arXiv 2206.11893)",
    "s5": "an S5 recurrence (arXiv 2208.04933)",
}


@dataclass
class CardOptions:
    """What the user says about the model.

    Attributes:
        repo_id: `name/repo`, for the usage examples.
        license: the weights' licence, an identifier of the Hub.
        languages, datasets, tags: for the metadata; datasets are Hub ids or plain names.
        data_license: licence of the training data, in words.
        base_model: Hub id of the model this one was fine-tuned from.
        records: folder of a run of `examples/train_lm.py`, to read its records from.
        evaluations, record, state: files to read instead of those found.
        card: a finished card to be used as it is.
    """

    repo_id: str | None = None
    license: str = "mit"
    languages: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    base_model: str | None = None
    data_license: str | None = None
    records: Path | None = None
    evaluations: list[Path] = field(default_factory=list)
    record: Path | None = None
    state: Path | None = None
    card: Path | None = None


@dataclass
class Published:
    """The model that a card is about: its config, the name of its class, how many parameters it has, and whether a
    tokenizer comes with it."""

    config: SeqBoatConfig
    model_class: str
    parameters: int
    has_tokenizer: bool


def write_card(folder: Path, model: Path, published: Published, options: CardOptions) -> list[str]:
    """Write README.md, and the plot of activation rates where there are any, into a Hub folder.

    Args:
        folder: where to write.
        model: the model folder, whose trainer state, run record and evaluation are read.
        published: what is in the folder.
        options: what the user says.

    Returns:
        Remarks for the user.

    Raises HubUploadError when a source, an option or the finished card cannot be read, or the card that was written is
    not read as it was meant.
    """
    check_options(options)
    if options.card is not None:
        return _copy_card(folder, options.card)
    config, model_class = published.config, published.model_class
    sources = read_sources(
        model,
        config.num_hidden_layers,
        records=options.records,
        evaluations=options.evaluations,
        record=options.record,
        state=options.state,
    )
    remarks = list(sources.remarks)
    if (model / "README.md").is_file():
        remarks.append("the README.md in the model folder is not used; pass it by --card to publish it instead.")
    if not sources.results:
        remarks.append("no evaluation file was found, so the card has no model-index; see --evaluation.")
    plotted = bool(sources.activation_rates) and write_activation_plot(sources.activation_rates, folder / PLOT_FILE)
    body = "\n\n".join(
        part
        for part in (
            _introduction(config, model_class, published.parameters, options),
            _usage(published, options),
            _shape(config),
            _training(config, sources, options),
            _results(sources),
            long_context_section(sources.long_context),
            _activation_rates(sources.activation_rates, plotted),
            _limits(config, model_class, published.has_tokenizer, sources),
            f"## Citation\n\n```bibtex\n{CITATION}\n```",
        )
        if part
    )
    metadata = _metadata(config, model_class, sources, options)
    path = folder / "README.md"
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n").save(path)
    read = _read_card(path.read_text(encoding="utf-8"), path)
    if read.data.to_dict() != metadata.to_dict() or read.text.strip() != body.strip():
        raise HubUploadError("the model card that was written is not read as it was meant; nothing is published.")
    return remarks


def _read_card(text: str, path: Path) -> ModelCard:
    try:
        return ModelCard(text, ignore_metadata_errors=False)
    # Errors of YAML and of what the Hub's library makes of it.
    except Exception as error:
        raise HubUploadError(f"the metadata of the card {path} cannot be read: {error}") from error


def check_options(options: CardOptions) -> None:
    """Raises HubUploadError for what the user says of a model, if it is none of the texts that a card is made of."""
    for flag, values in (
        ("--license", [options.license]),
        ("--data-license", [options.data_license]),
        ("--language", options.languages),
        ("--dataset", options.datasets),
        ("--tag", options.tags),
        ("--base-model", [options.base_model]),
        ("--repo-id", [options.repo_id]),
    ):
        for value in values:
            if value is not None and (not value.strip() or one_line(value) != value.strip()):
                raise HubUploadError(f"{flag} {value!r} must be a text of one line, of characters that can be seen.")
    for flag, values in (("--license", [options.license]), ("--language", options.languages)):
        for value in values:
            if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", value) is None:
                raise HubUploadError(f"{flag} {value!r} must be an identifier of the Hub, such as mit or en.")
    if options.base_model is not None:
        try:
            validate_repo_id(options.base_model)
        except HFValidationError as error:
            raise HubUploadError(f"--base-model {options.base_model!r} is no id of the Hub: {error}") from None
    # It stands in the code of the examples.
    if options.repo_id is not None and not all(c.isalnum() or c in "._-/ ~" for c in options.repo_id):
        raise HubUploadError(
            f"--repo-id {options.repo_id!r} must be NAME/REPO or a folder: letters, digits and . _ - / alone."
        )


def _copy_card(folder: Path, card: Path) -> list[str]:
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HubUploadError(f"the card {card} cannot be read: {error}") from error
    _read_card(text, card)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return [] if text.startswith("---\n") else [f"the card {card} has no metadata block at its beginning."]


def _is_language_model(model_class: str) -> bool:
    return model_class.endswith("ForCausalLM")


def _name(options: CardOptions) -> str:
    return (options.repo_id or "SeqBoat").split("/")[-1]


def _pipeline(config: SeqBoatConfig, model_class: str) -> str | None:
    if _is_language_model(model_class):
        return "text-generation"
    if model_class.endswith("ForSequenceClassification") and config.input_type == "tokens":
        return "text-classification"
    return None


def _metadata(config: SeqBoatConfig, model_class: str, sources: Sources, options: CardOptions) -> ModelCardData:
    tags = ["seqboat", "state-space-model", "sparse-activation", "arxiv:2306.11197", *options.tags]
    metrics = list(dict.fromkeys(result.metric_type for result in sources.results))
    return ModelCardData(
        license=options.license,
        language=options.languages or None,
        tags=list(dict.fromkeys(tags)),
        library_name="transformers",
        pipeline_tag=_pipeline(config, model_class),
        datasets=options.datasets or None,
        base_model=options.base_model,
        metrics=metrics or None,
        model_name=_name(options) if sources.results else None,
        eval_results=sources.results or None,
    )


def _introduction(config: SeqBoatConfig, model_class: str, parameters: int, options: CardOptions) -> str:
    kind = "bidirectional encoder" if config.bidirectional else "causal language model"
    if model_class.endswith("ForSequenceClassification"):
        kind = f"classifier with {config.num_labels} classes"
    base = ""
    if options.base_model:
        base = f" It was fine-tuned from [{options.base_model}](https://huggingface.co/{options.base_model})."
    return (
        f"# {_name(options)}\n\nA [SeqBoat]({PAPER}) {kind} with {parameters:,} parameters.{base} Every layer carries "
        f"{RECURRENCES[config.ssm_type]} over the whole sequence; a router in each layer chooses the tokens that "
        "attention, over a window of chosen tokens, is spent on."
    )


def _usage(published: Published, options: CardOptions) -> str:
    config, model_class, has_tokenizer = published.config, published.model_class, published.has_tokenizer
    repo = options.repo_id or PLACEHOLDER
    lines = ["import torch"] if not has_tokenizer else []
    if _is_language_model(model_class) and has_tokenizer:
        lines += [
            "from transformers import pipeline",
            "",
            f'generate = pipeline("text-generation", model="{repo}", trust_remote_code=True)',
            'print(generate("Once upon a time", max_new_tokens=64)[0]["generated_text"])',
        ]
    elif _is_language_model(model_class):
        lines += [
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)',
            f"ids = torch.tensor([[{min(4, config.vocab_size - 1)}]])  # no tokenizer comes with this model",
            "print(model.generate(ids, max_new_tokens=64))",
        ]
    elif model_class.endswith("ForSequenceClassification"):
        lines += [
            f"from transformers import AutoModelForSequenceClassification{', AutoTokenizer' * has_tokenizer}",
            "",
        ]
        lines.append(f'model = AutoModelForSequenceClassification.from_pretrained("{repo}", trust_remote_code=True)')
        if has_tokenizer:
            lines += [
                f'tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)',
                'print(model(**tokenizer("Some text", return_tensors="pt")).logits)',
            ]
        elif config.input_type == "values":
            lines.append("print(model(input_values=torch.randn(1, 64)).logits)  # (batch, length) real numbers")
        else:
            lines.append("print(model(torch.tensor([[4, 5, 6]])).logits)  # no tokenizer comes with this model")
    else:
        lines += [
            "from transformers import AutoModel",
            "",
            f'model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)',
        ]
    code = "\n".join(lines)
    return (
        f"## Use\n\n```python\n{code}\n```\n\n`trust_remote_code=True` runs the Python files of this repo; they need "
        f"`torch` and `transformers` (tested with {OLDEST_TESTED} to {NEWEST_TESTED}), and use `triton` on a GPU "
        "where it is installed."
    )


def _table(rows: dict[str, str]) -> str:
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {escaped(value)} |" for name, value in rows.items())


def _shape(config: SeqBoatConfig) -> str:
    rows = {
        "Layers": str(config.num_hidden_layers),
        "Width": str(config.hidden_size),
        "Query/key and value width": f"{config.qk_head_dim}, {config.v_head_dim}",
        "Recurrence": config.ssm_type,
        "States a layer" if config.ssm_type == "s5" else "States a channel": str(config.state_size),
        "Router": config.router_type,
        "Attention window (activated tokens)": str(config.memory_size),
        "Attention": f"{config.attention_activation}, {config.position_embedding_type} positions",
        "Norm": f"{config.norm_type}, {'before' if config.norm_first else 'after'} each layer",
    }
    if config.intermediate_size:
        rows["Feed-forward width"] = str(config.intermediate_size)
    if config.ssm_truncation is not None:
        rows["EMA kernel cut after (tokens)"] = f"{config.ssm_truncation:,}"
    if config.input_type == "tokens":
        rows["Vocabulary"] = str(config.vocab_size)
    return f"## Model\n\n{_table(rows)}"


def _training(config: SeqBoatConfig, sources: Sources, options: CardOptions) -> str:
    procedure = dict(sources.procedure)
    for name, label in (
        ("hidden_dropout", "Dropout"),
        ("attention_dropout", "Attention dropout"),
        ("value_dropout", "Value dropout"),
        ("activation_dropout", "Feed-forward dropout"),
    ):
        if procedure and getattr(config, name) > 0:
            procedure[label] = format_number(getattr(config, name))
    parts = []
    if options.datasets:
        parts.append("Data: " + ", ".join(map(escaped, options.datasets)) + ".")
    if options.data_license:
        parts.append(f"Licence of the data: {escaped(options.data_license)}.")
    if procedure:
        parts.append(_table(procedure))
    if sources.command:
        parts.append(code_block(sources.command))
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _results(sources: Sources) -> str:
    if sources.results:
        lines = ["| data | split | metric | value |", "| --- | --- | --- | --- |"]
        for result in sources.results:
            metric = result.metric_name or result.metric_type
            value = format_number(result.metric_value)
            cells = (result.dataset_name, result.dataset_split or "", metric, value)
            lines.append(f"| {' | '.join(map(escaped, cells))} |")
        notes = "".join(f"\n\n{note}" for note in sources.protocols)
        return "## Results\n\n" + "\n".join(lines) + notes
    if sources.plain_results:
        rows = {escaped(name): format_number(value) for name, value in sources.plain_results.items()}
        return f"## Results\n\nThe last evaluation of the training run:\n\n{_table(rows)}"
    return ""


def _activation_rates(rates: list[float], plotted: bool) -> str:
    if not rates:
        return ""
    mean = 100 * sum(rates) / len(rates)
    rows = "\n".join(f"| {layer} | {100 * rate:.1f} % |" for layer, rate in enumerate(rates))
    picture = f"![share of activated tokens by layer]({PLOT_FILE})\n\n" if plotted else ""
    return (
        f"## Activation rates\n\nShare of tokens that a layer's router sends through attention; {mean:.1f} % on "
        f"average over the layers.\n\n{picture}| layer | activated |\n| --- | --- |\n{rows}"
    )


def _limits(config: SeqBoatConfig, model_class: str, has_tokenizer: bool, sources: Sources) -> str:
    points = []
    if _is_language_model(model_class):
        points.append(
            "It continues text by what it saw in training, and what it says may be wrong, biased or offensive; check "
            "it before use."
        )
        window = config.memory_size
        points.append(
            f"Attention sees the last {window:,} activated tokens of a layer; what lies further back reaches a token "
            "through the recurrence alone."
        )
    if config.ssm_truncation is not None:
        points.append(f"The moving average forgets what is more than {config.ssm_truncation:,} tokens back.")
    if config.input_type == "tokens" and not has_tokenizer:
        points.append("No tokenizer comes with it; token ids are those of its training data.")
    if not sources.results and not sources.plain_results:
        points.append("No evaluation results are recorded with it.")
    if config.router_type in LEARNED_ROUTERS:
        points.append("How much time attention takes depends on the input: a router decides for each token.")
    return "## Limits\n\n" + "\n".join(f"* {point}" for point in points)
