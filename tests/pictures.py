"""Small models that see images, with their processors, and rows of images and text."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from conftest import VOCABULARY, train_tokenizer
from small_models import config_of

SIDE = {"height": 28, "width": 28}


def llava(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIDE)
    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def gemma3(tokenizer):
    tokens = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    ours = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", extra_special_tokens=tokens)
    return Gemma3Processor(Gemma3ImageProcessor(size=SIDE), ours, image_seq_length=4)


def write_model(kind, folder):
    """A checkpoint with its processor."""
    processor = kind(train_tokenizer())
    config = config_of(kind.__name__)
    config.get_text_config().vocab_size = VOCABULARY + 8
    config.image_token_id = config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.max_position_embeddings = 256
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_rows(file):
    """Eight images beside a file of JSON lines with a text for each."""
    rng, lines = np.random.default_rng(0), []
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(file.with_name(f"{number}.png"))
        words = " ".join(rng.choice(["red", "house", "the", "on", "green", "hill", "a"], 12 if number else 200))
        lines.append(json.dumps({"image": f"{number}.png", "text": words}))
    file.write_text("\n".join(lines))
