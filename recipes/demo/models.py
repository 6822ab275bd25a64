"""The tiny models' shapes: a tokenizer, a LLaVA-LLaMA3 and an open_clip model, in the published layouts.

Everything that vLLM, transformers and open_clip read from a checkpoint folder is written here, so the demo's
models go through the same loading code as the 8B captioner and ViT-L/14.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from builder.captions.kinds import RECAP_V1
from recipes.demo import world

WEIGHTS = Path(__file__).parent / "weights"
CAPTIONER = WEIGHTS / "captioner"
CLIP = WEIGHTS / "clip"

IMAGE_PX, PATCH_PX, WIDTH, HEADS = 64, 8, 128, 4
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI CLIP's
CLIP_CONTEXT = 80  # the longest description has 72 tokens

# The special tokens, chat template and split pattern of Llama 3; <image> and <pad> as LLaVA adds them.
# <|end_of_text|> has the highest id: open_clip's argmax pooling finds it.
SPECIAL = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<pad>",
    "<|end_of_text|>",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def train_tokenizer(vocab_size: int = 1024, num_scenes: int = 4000) -> Tokenizer:
    """A byte-level BPE on descriptions, terse captions and alt text of training scenes."""

    def corpus() -> Iterator[str]:
        for seed in range(num_scenes):
            rng, scene = random.Random(seed), world.scene(seed)
            yield from (world.describe(scene, rng), world.terse(scene), world.alt_text(scene, rng))
        for _ in range(200):
            yield "user\n\n\n" + RECAP_V1.prompt + "assistant"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def with_specials(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer in transformers' clothes; `template` is what surrounds a text: `<|begin_of_text|> $A`."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, i) for t, i in ids.items() if t in template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>" if template.split()[-1] == "$A" else "<|end_of_text|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=LLAMA3_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def captioner(tokenizer: Tokenizer) -> LlavaForConditionalGeneration:
    """A fresh LLaVA-1.5 on Llama 3 in miniature.

    CLIP ViT (layer -2, no CLS), 2-layer MLP, decoder with GQA and RoPE base 500,000.
    """
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=5, num_attention_heads=HEADS,
        image_size=IMAGE_PX, patch_size=PATCH_PX, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=3 * WIDTH,
        num_hidden_layers=3, num_attention_heads=HEADS, num_key_value_heads=HEADS // 2,
        head_dim=WIDTH // HEADS, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=tokenizer.token_to_id("<|eot_id|>"), pad_token_id=tokenizer.token_to_id("<pad>"),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.token_to_id("<image>"),
        vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_PX // PATCH_PX) ** 2, projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def save_captioner(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, folder: Path, *, px: int = IMAGE_PX
) -> None:
    """Write a checkpoint folder that vLLM serves: configs, processor, chat template, safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], torch.float32
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=[tokenizer.token_to_id("<|eot_id|>"), tokenizer.token_to_id("<|end_of_text|>")],
        pad_token_id=config.text_config.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": px}, crop_size={"height": px, "width": px}, image_mean=MEAN, image_std=STD
        ),
        tokenizer=with_specials(tokenizer, "<|begin_of_text|> $A"),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=LLAMA3_CHAT_TEMPLATE,
    ).save_pretrained(folder)
    save_weights(model, folder)


def save_weights(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the weights alone."""
    save_file(published_names(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})


def published_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 renamed LLaVA's weights; published checkpoints, and so vLLM, have version 4's names."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = "vision_tower.vision_model." + name.removeprefix("vision_tower.")
        if name.startswith("language_model."):
            name = "language_model.model." + name.removeprefix("language_model.")
        if name.startswith("lm_head."):
            name = "language_model." + name
        renamed[name] = tensor.detach().to(torch.float32).contiguous().clone()
    return renamed


def clip_config(vocab_size: int) -> dict[str, Any]:
    """open_clip's `open_clip_config.json` for the tiny CLIP."""
    return {
        "model_cfg": {
            "embed_dim": WIDTH,
            "vision_cfg": {
                "image_size": IMAGE_PX, "layers": 5, "width": WIDTH, "head_width": WIDTH // HEADS,
                "patch_size": PATCH_PX,
            },
            "text_cfg": {
                "context_length": CLIP_CONTEXT, "vocab_size": vocab_size, "width": WIDTH, "heads": HEADS,
                "layers": 3, "hf_tokenizer_name": "recipes/demo/weights/clip",
                "tokenizer_kwargs": {"clean": "whitespace"},
            },
            "quick_gelu": True,
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"},
    }  # fmt: skip


def save_clip(model: torch.nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that open_clip loads as `local-dir:FOLDER`: config, tokenizer, safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps(clip_config(tokenizer.get_vocab_size()), indent=2) + "\n"
    )
    with_specials(tokenizer, "<|begin_of_text|> $A <|end_of_text|>").save_pretrained(folder)
    state = {
        name: tensor.detach().to(torch.float32).contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def clip_vision_weights(vision: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers CLIP vision tower's weights under open_clip's names, without prefix."""
    renamed = {
        "visual.class_embedding": vision["embeddings.class_embedding"],
        "visual.conv1.weight": vision["embeddings.patch_embedding.weight"],
        "visual.positional_embedding": vision["embeddings.position_embedding.weight"],
    }
    for side in ("weight", "bias"):
        renamed[f"visual.ln_pre.{side}"] = vision[f"pre_layrnorm.{side}"]
        renamed[f"visual.ln_post.{side}"] = vision[f"post_layernorm.{side}"]
        for layer in range(sum(name.endswith("mlp.fc1.bias") for name in vision)):
            here, there = f"encoder.layers.{layer}.", f"visual.transformer.resblocks.{layer}."
            renamed[f"{there}attn.in_proj_{side}"] = torch.cat(
                [vision[f"{here}self_attn.{p}_proj.{side}"] for p in "qkv"]
            )
            for ours, theirs in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
            ):
                renamed[f"{there}{ours}.{side}"] = vision[f"{here}{theirs}.{side}"]
    return renamed
