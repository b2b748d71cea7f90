"""Bidirectional models: the published encoders' numbers, pooling, pairs, padding and batch mates."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from modeling_seqboat import SeqBoatConfig, SeqBoatForSequenceClassification

GOLDENS = Path(__file__).parent / "goldens"


def classifier(**overrides):
    torch.manual_seed(0)
    fields = {
        "bidirectional": True, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "qk_head_dim": 8,
        "v_head_dim": 40, "memory_size": 8, "num_labels": 5, "classifier_hidden_size": 16,
    }  # fmt: skip
    model = SeqBoatForSequenceClassification(SeqBoatConfig(**(fields | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router.weight" in name or "qk_scale" in name:
                parameter.normal_(0, 1)
    return model


@pytest.mark.parametrize("name", ["text", "pixels"])
def test_published_encoder_reproduces_its_logits(name):
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(GOLDENS / f"encoder_{name}.pt", weights_only=True)["model"]
    with safe_open(GOLDENS / f"encoder_{name}.safetensors", "pt") as file:
        kind = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = classifier(
        input_type="tokens" if name == "text" else "values", vocab_size=kind["vocab"] or 264, norm_type=kind["norm"],
        norm_first=kind["prenorm"], attention_activation=kind["attention_activation"],
        position_embedding_type="simple",
        add_absolute_positions=kind["absolute_positions"], max_position_embeddings=kind["max_positions"],
        classifier_hidden_size=kind["classifier_hidden"], final_norm_affine=True, pad_token_id=1, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    renamed = {}
    for key, value in weights.items():
        key = key.removeprefix("encoder.encoder.")
        if "hx_proj" in key:
            stem, leaf = key.split("mega_layer.hx_proj.")
            renamed[f"model.{stem}router.{leaf}"], renamed[f"model.{stem}hidden_proj.{leaf}"] = value[:2], value[2:]
            continue
        for old, new in (
            ("embed_tokens.embed.", "embed_tokens."), ("pos_emb.", "absolute_positions."), ("move.", "ssm."),
            ("mega_layer.gamma", "mega_layer.attention.qk_scale"),
            ("mega_layer.beta", "mega_layer.attention.qk_offset"),
            ("rel_pos_bias.rel_pos_bias", "attention.position_bias.weight"),
            ("q_router.temp", "router.log_temperature"),
            ("mx_proj", "attention.in_proj"), ("h_proj", "attention.out_proj"), ("mega_layer.", ""),
            ("classifier.0.0.", "classifier.dense."), ("sentence_projection_layer.", "classifier.output."),
        ):  # fmt: skip
            key = key.replace(old, new)
        if kind["norm"] == "layernorm":
            key = key.replace("norm.norm.", "norm.")
        if name == "pixels":
            key = key.replace("embed_tokens.", "embed_values.")
        renamed[key if key.startswith("classifier") else f"model.{key}"] = value
    model.load_state_dict(renamed)
    if name == "text":
        inputs = {"input_ids": tensors["input_ids"], "attention_mask": tensors["input_ids"] != 1}
    else:
        inputs = {"input_values": tensors["input_values"]}
    out = model(**inputs, labels=tensors["labels"], output_hidden_states=True)
    torch.testing.assert_close(out.pooled, tensors["pooled"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.logits, tensors["logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, tensors["loss"][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("attention", ["softmax", "relu2", "laplace"])
def test_padding_and_batch_mates_change_nothing(pooling, attention):
    model = classifier(pooling_type=pooling, attention_activation=attention)
    rows = [torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(n)) for n in (1, 9, 40, 70)]
    ids, mask = torch.zeros(4, 80, dtype=torch.long), torch.zeros(4, 80, dtype=torch.long)
    for i, row in enumerate(rows):
        at = torch.randperm(80, generator=torch.Generator().manual_seed(i))[: row.shape[1]].sort().values
        ids[i, at], mask[i, at] = row[0], 1
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        alone = torch.cat([model(row).logits for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["concat", "nli"])
def test_pair_features_are_the_published_ones(kind):
    model = classifier(pair_features=kind)
    first, second = torch.randint(0, 256, (2, 20)), torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        joined = model(first, pair_input_ids=second, output_hidden_states=True).pooled
        single = classifier()
        single.model.load_state_dict(model.model.state_dict())
        a, b = (single(text, output_hidden_states=True).pooled for text in (first, second))
    want = [b, a] if kind == "concat" else [b, a, a * b, a - b]
    torch.testing.assert_close(joined, torch.cat(want, dim=-1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="pair_input_ids"):
        model(first)


def test_heads_that_pool_refuse_packing():
    with pytest.raises(ValueError, match="position_ids"):
        classifier()(torch.zeros(1, 4, dtype=torch.long), position_ids=torch.tensor([[0, 1, 0, 1]]))


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_every_parameter_gets_a_gradient_and_survives_saving(norm, tmp_path):
    model = classifier(norm_type=norm, input_type="values", add_absolute_positions=True, classifier_hidden_size=0)
    model.train()
    model(input_values=torch.randn(3, 33), labels=torch.tensor([0, 1, 4])).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.save_pretrained(tmp_path)
    loaded = SeqBoatForSequenceClassification.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
