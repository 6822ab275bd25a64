"""Tiny checkpoints with random weights, of the architectures that captioners and rewriters come in.

Each folder holds what the published model's does, file for file: its config in the published layout, its
weights under the published names, its tokenizer with its own special tokens, its processor and a chat
template in its style. So vLLM and transformers load it with the code that they have for the published one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    set_seed,
)

WIDTH, HEADS, LAYERS, CONTEXT = 64, 2, 2, 2048
SPREAD = 0.15  # of the weights; at the usual 0.02 so small a model says the same of all pictures
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI CLIP's
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SENTENCES = (
    "A large red circle is at the top left of the picture, and a small green square is to the right of it.",
    "Please generate a detailed caption of this image. Please be as descriptive as possible.",
    "The image shows three striped triangles on a plain white background.",
    "Rewrite the caption: blue hexagon for sale, free shipping, buy 2 get 1 free!",
    "You are a helpful assistant. Describe this image. Answer in JSON.",
    '{"caption": "two yellow stars", "count": 2, "colours": ["yellow", "blue"]}',
    "Le chat noir dort sur la chaise; das große Haus steht am Fluß; 東京の夜景、きれいですね。",
)


def _tokenizer(special: Iterable[str], split: str, *, bos: str | None = None) -> Tokenizer:
    """A byte-level BPE on a few sentences; the special tokens come last, as they do where they were added."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Of the special tokens."""
    return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _save_model(folder: Path, kind: Callable[[Any], Any], config: Any, stop: list[int]) -> dict[str, Any]:
    """Random weights under the published names, and the config; returns what was written of that."""
    set_seed(0)
    config.dtype = torch.float32
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(0, SPREAD)
    model.generation_config.eos_token_id = stop
    model.save_pretrained(folder)  # transformers 5 renames them back to what was published
    written: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return written


def _save_tokenizer(folder: Path, tokenizer: Tokenizer, **config: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(index): {
            "content": token.content, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for index, token in tokenizer.get_added_tokens_decoder().items()
    }  # fmt: skip
    content = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False} | config
    _write_json(folder / "tokenizer_config.json", content | {"model_max_length": CONTEXT})


QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_vl(folder: Path) -> None:
    """Qwen2.5-VL, as Qwen/Qwen2.5-VL-7B-Instruct is laid out: the text model's settings lie flat in
    config.json, and a picture takes as many tokens as its size asks for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(QWEN_SPECIAL, QWEN_SPLIT)
    ids = _ids(tokenizer)
    text = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1_000_000.0}
    special = {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": HEADS,
        "patch_size": 14, "out_hidden_size": WIDTH, "window_size": 56, "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=False,
        **special,
    )
    stop = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    written = _save_model(folder, Qwen2_5_VLForConditionalGeneration, config, stop)
    flat = {
        "architectures": written["architectures"], "model_type": "qwen2_5_vl", "torch_dtype": "float32",
        "hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False,
        "rope_theta": 1_000_000.0, "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": vision | {"in_chans": 3, "spatial_patch_size": 14, "spatial_merge_size": 2},
    }  # fmt: skip
    _write_json(folder / "config.json", flat | text | special)
    _save_tokenizer(
        folder, tokenizer, tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", bos_token=None,
        pad_token="<|endoftext|>", unk_token=None, add_bos_token=False, add_prefix_space=False,
        chat_template=QWEN_CHAT_TEMPLATE,
    )  # fmt: skip
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    _write_json(folder / "preprocessor_config.json", preprocessor)
    _write_json(folder / "chat_template.json", {"chat_template": QWEN_CHAT_TEMPLATE})


SMOLVLM_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>",
    "<end_of_utterance>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip
SMOLVLM_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def smolvlm(folder: Path) -> None:
    """SmolVLM, as HuggingFaceTB/SmolVLM-256M-Instruct is laid out, which is an Idefics3: a picture is cut
    into tiles, and special tokens between them say where each was. (SmolVLM2's processor needs num2words.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(SMOLVLM_SPECIAL, QWEN_SPLIT)
    ids = _ids(tokenizer)
    px, patch, scale = 64, 16, 2
    text = {
        "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": 1, "head_dim": WIDTH // HEADS, "max_position_embeddings": CONTEXT,
        "bos_token_id": ids["<|im_start|>"], "eos_token_id": ids["<end_of_utterance>"],
        "pad_token_id": ids["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    }  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "image_size": px, "patch_size": patch,
    }  # fmt: skip
    config = Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=scale, image_token_id=ids["<image>"],
        pad_token_id=ids["<|im_end|>"], tie_word_embeddings=False,
    )  # fmt: skip
    _save_model(folder, Idefics3ForConditionalGeneration, config, [ids["<end_of_utterance>"]])
    _save_tokenizer(
        folder, tokenizer, tokenizer_class="GPT2Tokenizer", bos_token="<|im_start|>",
        eos_token="<end_of_utterance>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
        add_prefix_space=False, processor_class="Idefics3Processor", chat_template=SMOLVLM_CHAT_TEMPLATE,
    )  # fmt: skip
    preprocessor = {
        "image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor",
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True,
        "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "resample": 1,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"longest_edge": 2 * px},
        "max_image_size": {"longest_edge": px},
    }  # fmt: skip
    _write_json(folder / "preprocessor_config.json", preprocessor)
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": (px // patch // scale) ** 2}
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "chat_template.json", {"chat_template": SMOLVLM_CHAT_TEMPLATE})


LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>",
)  # fmt: skip
LLAMA3_CHAT_TEMPLATE = (  # of Meta-Llama-3-8B-Instruct: content is a string, a list would be printed as one
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _llama_text(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1,
        "head_dim": WIDTH // HEADS, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": tokenizer.token_to_id("<|eot_id|>"),
    }  # fmt: skip


def llama(folder: Path) -> None:
    """Llama 3, which sees no pictures, as meta-llama/Meta-Llama-3-8B-Instruct is laid out: no processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(LLAMA3_SPECIAL, LLAMA3_SPLIT, bos="<|begin_of_text|>")
    stop = [_ids(tokenizer)[token] for token in ("<|end_of_text|>", "<|eot_id|>")]
    _save_model(folder, LlamaForCausalLM, LlamaConfig(**_llama_text(tokenizer)), stop)
    _save_tokenizer(
        folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>", chat_template=LLAMA3_CHAT_TEMPLATE,
    )  # fmt: skip


VICUNA_CHAT_TEMPLATE = (  # of llava-hf/llava-1.5-7b-hf
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llava(folder: Path) -> None:
    """LLaVA-1.5, as llava-hf/llava-1.5-7b-hf is laid out, but for the tokenizer, which is Llama 3's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer((*LLAMA3_SPECIAL, "<image>", "<pad>"), LLAMA3_SPLIT, bos="<|begin_of_text|>")
    px, patch = 56, 14
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS + 1,
        num_attention_heads=HEADS, image_size=px, patch_size=patch, projection_dim=WIDTH,
    )  # fmt: skip
    image, pad = (tokenizer.token_to_id(token) for token in ("<image>", "<pad>"))
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_llama_text(tokenizer)), image_token_index=image,
        vision_feature_layer=-2, vision_feature_select_strategy="default", pad_token_id=pad,
        image_seq_length=(px // patch) ** 2, tie_word_embeddings=False,
    )  # fmt: skip
    _save_model(folder, LlavaForConditionalGeneration, config, [_ids(tokenizer)["<|eot_id|>"]])
    weights = folder / "model.safetensors"
    tower = "vision_tower."  # transformers 5 renames all back but this
    state = {
        name.replace(tower, f"{tower}vision_model."): value for name, value in load_file(weights).items()
    }
    save_file(state, weights, metadata={"format": "pt"})
    _save_tokenizer(
        folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>", pad_token="<pad>", image_token="<image>", processor_class="LlavaProcessor",
    )  # fmt: skip
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
        "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
        "do_resize": True, "rescale_factor": 1 / 255, "resample": 3, "size": {"shortest_edge": px},
        "crop_size": {"height": px, "width": px}, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    _write_json(folder / "preprocessor_config.json", preprocessor)
    processor = {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": patch,
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "chat_template.json", {"chat_template": VICUNA_CHAT_TEMPLATE})
