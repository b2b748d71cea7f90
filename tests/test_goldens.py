"""The model reproduces tensors of the published implementation: layers with all gradients, and language models."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.context_seqboat import Texts, build_context
from modeling_seqboat.layers_seqboat import SeqBoatDecoderLayer

GOLDENS = Path(__file__).parent / "goldens"
LAYERS = json.loads((GOLDENS / "index.json").read_text())
TOLERANCE = 1e-4
# Published name -> name here; `hx_proj` holds the router's two rows and the hidden projection's.
RENAMED = {
    "gamma": "attention.qk_scale",
    "beta": "attention.qk_offset",
    "rel_pos_bias.rel_pos_bias": "attention.position_bias.weight",
    "q_router.temp": "router.log_temperature",
}


def layer_names(tensors: dict[str, torch.Tensor], norm_inside: bool) -> dict[str, torch.Tensor]:
    """Tensors of one published layer under the names of `SeqBoatDecoderLayer`."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("hx_proj."):
            kind = name.removeprefix("hx_proj.")
            renamed[f"router.{kind}"] = tensor[:2]
            renamed[f"hidden_proj.{kind}"] = tensor[2:]
            continue
        name = RENAMED.get(name, name)
        for old, new in (("mx_proj.", "attention.in_proj."), ("h_proj.", "attention.out_proj."), ("move.", "ssm.")):
            if name.startswith(old):
                name = new + name.removeprefix(old)
        renamed[name if norm_inside else name.replace("norm.norm.", "norm.")] = tensor
    return renamed


def layer_config(case: dict) -> SeqBoatConfig:
    position = "local" if case["local_pos"] else case["rel_pos"]
    return SeqBoatConfig(
        bidirectional=case["bidirectional"],
        hidden_size=case["hidden"],
        qk_head_dim=case["z"],
        v_head_dim=case["h"],
        state_size=case["ndim"],
        memory_size=case["window"],
        attention_activation=case["attention_activation"],
        position_embedding_type=position,
        max_position_embeddings=case["max_positions"],
        norm_type=case["norm"],
        norm_first=case["prenorm"],
        norm_affine=case["norm_affine"],
        ssm_truncation=case["truncation"],
        router_temperature_init=case["init_temp_scale"],
        num_hidden_layers=1,
    )


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: Path(case["file"]).stem)
def test_layer_and_all_its_gradients(case):
    tensors = load_file(GOLDENS / case["file"])
    with safe_open(GOLDENS / case["file"], "pt") as file:
        case = json.loads(file.metadata()["config"])
    norm_inside = case["norm"] == "batchnorm"
    layer = SeqBoatDecoderLayer(layer_config(case), 0).train(case["train_mode"])
    published = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    layer.load_state_dict(layer_names(published, norm_inside))
    x = tensors["x"].requires_grad_()
    batch, length, _ = x.shape
    padding = tensors.get("padding_mask")
    real = torch.ones(batch, length, dtype=torch.bool) if padding is None else ~padding.bool()
    mask = None if padding is None else real.long()
    context = build_context(layer.config, batch, length, x.device, Texts(mask), dtype=x.dtype, training=layer.training)
    y, confidence, _ = layer(x, context)
    y.backward(tensors["grad_y"] * real[..., None])
    active = tensors["active"].bool() & real
    assert torch.equal(confidence > 0, active)
    torch.testing.assert_close(y[real], tensors["y"][real], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(x.grad[real], tensors["grad_x"][real], atol=TOLERANCE, rtol=TOLERANCE)
    gradients = layer_names(
        {name.removeprefix("grad."): t for name, t in tensors.items() if name.startswith("grad.")}, norm_inside
    )
    found = dict(layer.named_parameters())
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert found[name].grad is not None, name
        torch.testing.assert_close(
            found[name].grad, expected, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda t, name=name: f"{name}: {t}"
        )


def load_published_lm(name: str) -> SeqBoatForCausalLM:
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(GOLDENS / f"{name}.pt", weights_only=True)
    args, published = checkpoint["args"], checkpoint["model"]
    config = SeqBoatConfig(
        vocab_size=published["decoder.embed_tokens.weight"].shape[0],
        hidden_size=args.decoder_embed_dim,
        num_hidden_layers=args.decoder_layers,
        state_size=args.decoder_n_dim,
        qk_head_dim=args.decoder_z_dim,
        v_head_dim=args.decoder_hidden_dim,
        memory_size=args.decoder_chunk_size,
        intermediate_size=max(0, args.decoder_ffn_embed_dim),
        attention_activation=args.attention_activation_fn,
        position_embedding_type=args.rel_pos_bias,
        max_position_embeddings=args.max_target_positions,
        final_norm_affine=not args.no_affine_final_norm,
        pad_token_id=1,
    )
    model = SeqBoatForCausalLM(config)
    state = {"model.embed_tokens.weight": published["decoder.embed_tokens.weight"]}
    state["lm_head.weight"] = published["decoder.output_projection.weight"]
    for i in range(args.decoder_layers):
        prefix = f"decoder.layers.{i}.slag_layer."
        layer = {name.removeprefix(prefix): t for name, t in published.items() if name.startswith(prefix)}
        state |= {f"model.layers.{i}.{name}": t for name, t in layer_names(layer, False).items()}
        prefix = f"decoder.layers.{i}.nffn."
        ffn = {name.removeprefix(prefix): t for name, t in published.items() if name.startswith(prefix)}
        state |= {f"model.layers.{i}.ffn.{name.replace('norm.norm.', 'norm.')}": t for name, t in ffn.items()}
    prefix = "decoder.final_norm.norm."
    state |= {
        f"model.final_norm.{name.removeprefix(prefix)}": t for name, t in published.items() if name.startswith(prefix)
    }
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("name", ["lm_rotary", "lm_relu2_ffn"])
def test_language_model_logits_loss_and_embedding_gradient(name):
    model = load_published_lm(name)
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    ids = tensors["input_ids"]
    mask = (ids != 1).long()
    outputs = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    real = mask.bool()
    torch.testing.assert_close(outputs.logits[real], tensors["logits"][real], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(outputs.loss, tensors["loss"][0], atol=TOLERANCE, rtol=TOLERANCE)
    outputs.loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(gradient, tensors["grad_embed"], atol=TOLERANCE, rtol=TOLERANCE)
