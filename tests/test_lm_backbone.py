import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone

FAMILIES = [LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig, Gemma3TextConfig]


def random_model(config_class, **changes):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = config_class(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("config_class", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_every_family_attends_as_told(config_class, causal):
    lm = Backbone(random_model(config_class), None)
    lm.set_causal(causal)
    assert lm.is_causal == causal


@pytest.mark.parametrize("config_class", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_equals_plain_attention_in_every_family(config_class, causal):
    import numpy as np

    from llm2rec.lm.packing import pack

    lm = Backbone(random_model(config_class).eval(), None)
    lm.set_causal(causal)
    rows = [np.array([5, 6, 7, 8, 9]), np.array([10, 11]), np.array([12, 13, 14])]
    packed = pack(np.concatenate(rows), np.array([len(row) for row in rows]))
    with torch.no_grad():
        together = lm.hidden_states(packed)[0].split([len(row) for row in rows])
        for row, states in zip(rows, together, strict=True):
            alone = lm.body(input_ids=torch.from_numpy(row)[None], use_cache=False).last_hidden_state[0]
            assert torch.allclose(states, alone, atol=1e-5)


def test_the_probe_refuses_a_model_that_stays_causal(tiny):
    tiny.set_causal(True)
    with pytest.raises(ArtifactError, match="should be bidirectional"):
        backbones.probe(tiny, causal=False)


def test_the_probe_refuses_a_model_that_sees_the_future(tiny):
    tiny.set_causal(False)
    with pytest.raises(ArtifactError, match="should be causal"):
        backbones.probe(tiny, causal=True)


def test_bidirectional_attention_survives_saving(tiny, tmp_path):
    tiny.set_causal(False)
    backbones.save(tiny, tmp_path)
    reloaded = backbones.load(tmp_path, torch.float32, head=False)
    assert not reloaded.is_causal
    backbones.probe(reloaded, causal=False)


def test_dropout_holds_inside_the_block_only(tiny):
    layers = [layer for layer in tiny.model.modules() if hasattr(layer, "attention_dropout")]
    with backbones.dropout(tiny.model, 0.2):
        assert {layer.attention_dropout for layer in layers} == {0.2}
    assert {layer.attention_dropout for layer in layers} == {0.0}


def test_a_folder_without_a_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot load a language model"):
        backbones.load(tmp_path, torch.float32)


def test_a_missing_gguf_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="no GGUF file"):
        backbones.load(tmp_path / "model.gguf", torch.float32)


def test_the_same_seed_gives_the_same_tiny_model(tmp_path):
    for name in ("one", "two"):
        backbones.make_tiny_random(["a b", "c d"], tmp_path / name, seed=3)
    one, two = (backbones.load(tmp_path / name, torch.float32).model for name in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
