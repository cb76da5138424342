import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from conftest import TITLES
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import attention
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.packing import TokenisedTexts, gather_texts, pack, tokenise
from llm2rec.lm.tiny import make_tiny_random

FAMILIES = [LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig, Gemma3TextConfig]


def random_model(config_class, **changes):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = config_class(**(sizes | heads | tokens | changes))
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("config_class", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_every_family_attends_as_told(config_class, causal):
    lm = Backbone(random_model(config_class), None)
    lm.set_causal(causal)
    assert lm.is_causal == causal
    assert (backbones.future_sensitivity(lm) == 0) == causal


@pytest.mark.parametrize("config_class", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_equals_plain_attention_in_every_family(config_class, causal):
    lm = Backbone(random_model(config_class).eval(), None)
    lm.set_causal(causal)
    rows = [np.array([5, 6, 7, 8, 9]), np.array([10, 11]), np.array([12, 13, 14])]
    packed = pack(np.concatenate(rows), np.array([len(row) for row in rows]))
    with torch.no_grad():
        together = lm.hidden_states(packed)[0].split([len(row) for row in rows])
        for row, states in zip(rows, together, strict=True):
            alone = lm.body(input_ids=torch.from_numpy(row)[None], use_cache=False).last_hidden_state[0]
            assert torch.allclose(states, alone, atol=1e-5)


def attended(attend, seen, dropout=0.0, heads=6, groups=2, dtype=torch.float32):
    """What a way of attending gives for random states, and the gradients it passes on."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, 7, 8), (3, groups, 7, 8), (3, groups, 7, 8)]
    states = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    mixed = attend(*states, seen, dropout, None)
    (mixed * torch.randn(mixed.shape, generator=generator)).sum().backward()
    return [mixed.detach(), *(state.grad for state in states)]


RULES = {
    "causal": None,
    "bidirectional": (torch.arange(7) < torch.tensor([[7], [3], [1]]))[:, None, None, :],
    "tree": torch.tensor([[True], [False], [True]])[..., None, None] | torch.eye(7, dtype=torch.bool),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [6, 2, 1])
def test_attention_at_once_equals_attention_in_tiles(rule, groups):
    ways = [
        attended(way, RULES[rule], groups=groups)
        for way in (attention._attend_at_once, attention._attend_in_tiles)
    ]
    for ours, torchs in zip(*ways, strict=True):
        assert ours.abs().max() > 0.1  # premise
        assert torch.allclose(ours, torchs, atol=1e-5)


def test_attention_at_once_in_bfloat16_is_about_as_near_to_float32_as_torchs():
    exact = attended(attention._attend_at_once, None)

    def errors(attend):
        rounded = attended(attend, None, dtype=torch.bfloat16)
        return [float((one - whole).norm() / whole.norm()) for one, whole in zip(rounded, exact, strict=True)]

    for ours, torchs in zip(errors(attention._attend_at_once), errors(attention._attend_in_tiles), strict=True):
        assert 0 < ours < 1.5 * torchs


def test_a_cell_that_sees_nothing_gives_finite_gradients():
    seen = RULES["bidirectional"] & torch.tensor([True] * 5 + [False] * 2)[:, None]
    assert all(torch.isfinite(one).all() for one in attended(attention._attend_at_once, seen))


def test_attention_at_once_drops_shares_and_keeps_their_mean():
    torch.manual_seed(0)
    mixed = torch.stack([attended(attention._attend_at_once, None, dropout=0.3)[0] for _ in range(400)])
    whole = attended(attention._attend_at_once, None)[0]
    assert mixed.std(0).mean() > 0.1
    assert (mixed.mean(0) - whole).abs().mean() < 0.05


def test_long_sequences_keep_no_scores(monkeypatch):
    ways = []
    monkeypatch.setattr(attention, "LONGEST_AT_ONCE", 4)
    for name in ("_attend_at_once", "_attend_in_tiles"):
        way = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, way=way, name=name: ways.append(name) or way(*a))
    lm = Backbone(random_model(LlamaConfig).eval(), None)
    for length in (4, 5):
        lm.hidden_states(pack(np.arange(5, 5 + length), np.array([length])))
    assert ways == ["_attend_at_once"] * 2 + ["_attend_in_tiles"] * 2


def test_the_probe_refuses_a_model_that_stays_causal(tiny):
    tiny.set_causal(True)
    with pytest.raises(ArtifactError, match="should be bidirectional"):
        backbones.probe(tiny, causal=False)


def test_the_probe_refuses_a_model_that_sees_the_future(tiny):
    tiny.set_causal(False)
    with pytest.raises(ArtifactError, match="should be causal"):
        backbones.probe(tiny, causal=True)


def test_the_probe_does_not_take_rounding_for_sight_of_the_future(tiny):
    def scale(share):
        def by_the_last_token(module, args, options, output):
            output.last_hidden_state *= 1 + share * options["input_ids"][0, -1]

        return tiny.body.register_forward_hook(by_the_last_token, with_kwargs=True)

    with scale(1e-4), pytest.raises(ArtifactError, match="should be causal"):  # premise
        tiny.set_causal(True)
    with scale(1e-7):
        tiny.set_causal(True)
        assert backbones.future_sensitivity(tiny) == 0


def test_the_probe_does_not_take_rounding_for_a_leak(tiny_folder, monkeypatch):
    lm = backbones.load(tiny_folder, torch.bfloat16)
    before = [weight.clone() for weight in lm.model.parameters()]
    angles = lm.body.rotary_emb.inv_freq.clone()
    measured, plain = [], backbones.packed_difference

    def far_apart_in_16_bits(lm):
        measured.append(lm.body.dtype)
        return 0.9 if lm.body.dtype == torch.bfloat16 else plain(lm)

    monkeypatch.setattr(backbones, "packed_difference", far_apart_in_16_bits)
    lm.set_causal(False)
    assert measured == [torch.bfloat16, torch.float32]
    assert all(
        one.dtype == torch.bfloat16 and torch.equal(one, other)
        for one, other in zip(lm.model.parameters(), before, strict=True)
    )
    assert torch.equal(lm.body.rotary_emb.inv_freq, angles)
    monkeypatch.setattr(backbones, "packed_difference", lambda lm: 0.9)
    with pytest.raises(ArtifactError, match="as if it were alone"):
        lm.set_causal(False)


def test_bidirectional_attention_survives_saving(tiny, tmp_path):
    tiny.set_causal(False)
    backbones.save(tiny, tmp_path)
    reloaded = backbones.load(tmp_path, torch.float32, head=False)
    assert not reloaded.is_causal
    backbones.probe(reloaded, causal=False)


def test_dropout_holds_inside_the_block_only(tiny):
    layers = [layer for layer in tiny.model.modules() if hasattr(layer, "attention_dropout")]
    with attention.dropout(tiny.model, 0.2):
        assert {layer.attention_dropout for layer in layers} == {0.2}
    assert {layer.attention_dropout for layer in layers} == {0.0}


def test_a_folder_without_a_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot load a language model"):
        backbones.load(tmp_path, torch.float32)


@pytest.mark.parametrize("head", [True, False])
def test_a_model_that_lacks_weights_is_refused(tiny, tmp_path, head):
    tiny.model.model.layers = tiny.model.model.layers[:1]  # its configuration still says two
    backbones.save(tiny, tmp_path)
    with pytest.raises(ArtifactError, match=r"lacks 9 of the weights .*layers\.1\.input_layernorm\.weight"):
        backbones.load(tmp_path, torch.float32, head=head)


def test_weights_of_another_shape_than_the_configuration_says_are_refused(tiny, tmp_path):
    backbones.save(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ArtifactError, match=r"down_proj\.weight is \(16, \d+\), by config.json it is \(16, 48\)"):
        backbones.load(tmp_path, torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_without_its_head_has_one_only_where_it_is_tied(tiny, tmp_path, tied):
    model = random_model(LlamaConfig, vocab_size=400, tie_word_embeddings=tied)
    backbones.save(Backbone(model.model, tiny.tokenizer), tmp_path)
    backbones.load(tmp_path, torch.float32, head=False)
    with nullcontext() if tied else pytest.raises(ArtifactError, match=r"lacks 1 .*lm_head\.weight"):
        backbones.load(tmp_path, torch.float32)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8"])
def test_a_quantised_model_is_refused(tiny, tmp_path, method):
    tiny.model.config.quantization_config = {"quant_method": method}
    backbones.save(tiny, tmp_path)
    for read in (backbones.model_shape, partial(backbones.load, dtype=torch.float32)):
        with pytest.raises(ConfigError, match=rf"are quantised \({method}\).* or its GGUF file"):
            read(tmp_path)


def test_a_missing_gguf_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="no GGUF file"):
        backbones.load(tmp_path / "model.gguf", torch.float32)


def test_the_same_seed_gives_the_same_tiny_model(tmp_path):
    for name in ("one", "two"):
        make_tiny_random(["a b", "c d"], tmp_path / name, seed=3)
    one, two = (backbones.load(tmp_path / name, torch.float32).model for name in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def hidden_gradients(lm, packed, checkpointed):
    """Gradients of the packed row's states, and how often a layer's attention ran."""
    calls = []
    lm.body.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    if checkpointed:
        lm.checkpoint_gradients()
    lm.model.train()
    lm.model.zero_grad()
    lm.hidden_states(packed).square().sum().backward()
    return [p.grad.clone() for p in lm.body.parameters()], len(calls)


@pytest.mark.parametrize("causal", [True, False])
def test_checkpointed_gradients_are_the_plain_ones(tiny_folder, causal):
    texts = tokenise(backbones.load(tiny_folder, torch.float32).tokenizer, TITLES, 64, special_tokens=False)
    packed = pack(*gather_texts(texts, np.arange(6)))
    results = []
    for checkpointed in (False, True):
        lm = backbones.load(tiny_folder, torch.float32)
        lm.set_causal(causal)
        results.append(hidden_gradients(lm, packed, checkpointed))
    (plain, once), (recomputed, twice) = results
    assert (once, twice) == (1, 2)  # premise: the layer really ran again
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_a_sequence_longer_than_the_context_is_refused(tiny):
    texts = tokenise(tiny.tokenizer, TITLES, 64, special_tokens=False)
    tiny.check_readable(texts, 4096)
    with pytest.raises(ConfigError, match="4,097 tokens, the model reads at most 4,096"):
        tiny.check_readable(texts, 4097)


@pytest.mark.parametrize(
    ("config_class", "changes", "window"),
    [
        (Gemma3TextConfig, {"layer_types": ["sliding_attention", "full_attention"]}, 6),
        (Gemma3TextConfig, {"layer_types": ["full_attention"] * 2}, None),
        (MistralConfig, {}, 6),
        (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 0}, 6),
        (Qwen2Config, {"use_sliding_window": False}, None),
        (Qwen2MoeConfig, {"use_sliding_window": False}, None),
    ],
)
def test_a_sequence_longer_than_a_sliding_window_in_use_is_refused(config_class, changes, window):
    lm = Backbone(random_model(config_class, sliding_window=6, **changes).eval(), None)
    texts = TokenisedTexts(np.arange(5, 12), np.array([0, 7]))
    lm.check_readable(texts, 6)
    lm.hidden_states(pack(np.arange(5, 11), np.array([6])))
    with nullcontext() if window is None else pytest.raises(ConfigError, match="reads at most 6 "):
        lm.check_readable(texts, 7)
    with nullcontext() if window is None else pytest.raises(ArtifactError, match="no sliding window"):
        lm.hidden_states(pack(np.arange(5, 12), np.array([7])))


def test_a_model_with_capped_scores_is_refused_before_it_reads_anything():
    lm = Backbone(random_model(Gemma2Config), None)
    with pytest.raises(ArtifactError, match="no soft cap"):
        lm.set_causal(True)


def test_a_token_that_the_model_does_not_know_is_refused(tiny):
    texts = TokenisedTexts(np.array([3, len(tiny.tokenizer)]), np.array([0, 2]))
    with pytest.raises(ArtifactError, match=f"gives token {len(tiny.tokenizer)}"):
        tiny.check_readable(texts, 2)


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tiny, tmp_path):
    tiny.tokenizer.pad_token = tiny.tokenizer.eos_token = None
    backbones.save(tiny, tmp_path)
    with pytest.raises(ArtifactError, match="pad token None"):
        backbones.load(tmp_path, torch.float32)


def test_the_shape_of_a_model_is_read_from_its_configuration(tiny_folder, tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())  # and no weights
    config = tiny.body.config
    assert backbones.model_shape(tmp_path) == (config.hidden_size, config.num_hidden_layers) == (16, 2)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        backbones.model_shape(tmp_path / "nowhere")
