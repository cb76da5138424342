"""A decoder and a tokenizer made on the spot, with which any recipe runs in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm2rec.lm.backbone import Backbone, save

HIDDEN_SIZE, LAYERS = 16, 2


def make_tiny_random(texts: list[str], folder: Path, seed: int) -> None:
    """Writes a random 2-layer decoder and a tokenizer trained on `texts`: any recipe runs in seconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=core.get_vocab_size(),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save(Backbone(LlamaForCausalLM(config), tokenizer), folder)
