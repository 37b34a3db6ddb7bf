"""Checkpoints in the format of castorini/DeeBERT and Hugging Face's port of it, and what such a model answers.

Written from the paper and the names and shapes in the checkpoints, in plain torch, one text at a time: it shares
nothing with the software that it tests.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

from tests.conftest import VOCABULARY

WIDTH, HEADS, INNER, POSITIONS = 32, 4, 48, 66
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "o"), ("oo", "d"), ("Ġ", "g"))
BYTE_VOCABULARY = (
    *("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *("".join(pair) for pair in MERGES),
)
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Original:
    """A random model of theirs."""

    prefix: str
    """``bert`` or ``roberta``."""
    num_layers: int
    num_labels: int
    weights: Weights
    eps: float = 1e-5

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> tuple[list[Tensor], Tensor]:
        """Logits (C,) float64 of the highway after each layer, and of the final classifier."""
        w = {name: value.double() for name, value in self.weights.items()}
        first = 2 if self.prefix == "roberta" else 0
        at = f"{self.prefix}.embeddings"
        x = w[f"{at}.word_embeddings.weight"][ids]
        x = x + w[f"{at}.position_embeddings.weight"][first : first + len(ids)]
        x = self._norm(w, f"{at}.LayerNorm", x + w[f"{at}.token_type_embeddings.weight"][0])
        highways = []
        for layer in range(self.num_layers):
            x = self._layer(w, f"{self.prefix}.encoder.layer.{layer}", x)
            highway = f"{self.prefix}.encoder.highway.{layer}"
            pooled = torch.tanh(_linear(w, f"{highway}.pooler.dense", x[0]))
            highways.append(_linear(w, f"{highway}.classifier", pooled))
        pooled = torch.tanh(_linear(w, f"{self.prefix}.pooler.dense", x[0]))
        return highways, _linear(w, "classifier", pooled)

    def _layer(self, w: Weights, at: str, x: Tensor) -> Tensor:
        q, k, v = (_linear(w, f"{at}.attention.self.{name}", x) for name in ("query", "key", "value"))
        size = WIDTH // HEADS
        heads = []
        for h in range(HEADS):
            own = slice(h * size, (h + 1) * size)
            heads.append(torch.softmax(q[:, own] @ k[:, own].T / math.sqrt(size), dim=-1) @ v[:, own])
        attended = _linear(w, f"{at}.attention.output.dense", torch.cat(heads, dim=1))
        x = self._norm(w, f"{at}.attention.output.LayerNorm", x + attended)
        inner = _linear(w, f"{at}.intermediate.dense", x)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return self._norm(w, f"{at}.output.LayerNorm", x + _linear(w, f"{at}.output.dense", inner))

    def _norm(self, w: Weights, at: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return scaled * w[f"{at}.weight"] + w[f"{at}.bias"]

    def config(self) -> dict[str, Any]:
        """As transformers 2.1.1 wrote it: no model type, no label names, no padding id."""
        return {
            "attention_probs_dropout_prob": 0.1,
            "finetuning_task": "sst-2",
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": WIDTH,
            "initializer_range": 0.02,
            "intermediate_size": INNER,
            "layer_norm_eps": self.eps,
            "max_position_embeddings": POSITIONS,
            "num_attention_heads": HEADS,
            "num_hidden_layers": self.num_layers,
            "num_labels": self.num_labels,
            "output_attentions": False,
            "output_hidden_states": False,
            "output_past": True,
            "pruned_heads": {},
            "torchscript": False,
            "type_vocab_size": 1 if self.prefix == "roberta" else 2,
            "use_bfloat16": False,
            "vocab_size": len(BYTE_VOCABULARY if self.prefix == "roberta" else VOCABULARY),
        }

    def save(self, folder: Path, *, pickled: bool = False, **config: Any) -> Path:
        """Everything that theirs leave behind; `config` adds to or replaces fields of its configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        if pickled:
            # What torch wrote in their days, before 1.6 made archives of such files.
            torch.save(self.weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        else:
            save_file(self.weights, folder / "model.safetensors")
        write_json(folder / "config.json", {**self.config(), **config})
        write_tokenizer(folder, self.prefix)
        (folder / "training_args.bin").write_bytes(b"a pickle of flags that nobody should open")
        return folder


def make_original(
    prefix: str = "bert", *, num_layers: int = 3, num_labels: int = 2, seed: int = 0
) -> Original:
    """A random checkpoint of theirs."""
    linear: dict[str, tuple[int, int]] = {f"{prefix}.pooler.dense": (WIDTH, WIDTH)}
    norms = [f"{prefix}.embeddings.LayerNorm"]
    for i in range(num_layers):
        layer, highway = f"{prefix}.encoder.layer.{i}", f"{prefix}.encoder.highway.{i}"
        linear |= {f"{layer}.attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        linear |= {
            f"{layer}.attention.output.dense": (WIDTH, WIDTH),
            f"{layer}.intermediate.dense": (INNER, WIDTH),
            f"{layer}.output.dense": (WIDTH, INNER),
            f"{highway}.pooler.dense": (WIDTH, WIDTH),
            f"{highway}.classifier": (num_labels, WIDTH),
        }
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    linear["classifier"] = (num_labels, WIDTH)

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, spread: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * spread

    roberta = prefix == "roberta"
    weights = {
        f"{prefix}.embeddings.word_embeddings.weight": random(
            len(BYTE_VOCABULARY if roberta else VOCABULARY), WIDTH, spread=1.0
        ),
        f"{prefix}.embeddings.position_embeddings.weight": random(POSITIONS, WIDTH, spread=0.5),
        f"{prefix}.embeddings.token_type_embeddings.weight": random(1 if roberta else 2, WIDTH, spread=0.5),
    }
    for name, shape in linear.items():
        weights[f"{name}.weight"] = random(*shape, spread=shape[1] ** -0.5)
        weights[f"{name}.bias"] = random(shape[0], spread=0.1)
    for name in norms:
        weights[f"{name}.weight"] = 1 + random(WIDTH, spread=0.1)
        weights[f"{name}.bias"] = random(WIDTH, spread=0.1)
    return Original(prefix=prefix, num_layers=num_layers, num_labels=num_labels, weights=weights)


def write_tokenizer(folder: Path, prefix: str) -> None:
    """Vocabulary files only, as their slow tokenizers wrote them."""
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "max_len": 512, "init_inputs": []})
    write_json(folder / "added_tokens.json", {})
    if prefix == "bert":
        names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY))
    else:
        names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>"}
        names["mask"] = "<mask>"
        write_json(folder / "vocab.json", {token: i for i, token in enumerate(BYTE_VOCABULARY)})
        lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
        (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines))
    write_json(folder / "special_tokens_map.json", {f"{key}_token": token for key, token in names.items()})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _linear(w: Weights, at: str, x: Tensor) -> Tensor:
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]
