"""Every model family through every stage, with tiny random weights."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from conftest import adding, prepared_cycle, train_stage, vectors_of
from llm2rec.errors import ArtifactError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import csft
from llm2rec.lm.iem import contrastive, mntp
from llm2rec.lm.packing import added_tokens

FAMILIES = [LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig, Gemma3TextConfig]
BEGINNING = [LlamaConfig, MistralConfig, Gemma3TextConfig]  # whose tokenizers add a BOS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sequences and titles of a small cyclic log."""
    return prepared_cycle(tmp_path_factory.mktemp("world"), users=12)


def save_random(config_class, tokenizer, folder, **changes):
    """A random two-layer model of a family, saved with the tokenizer of the tiny one; each vector of it random.

    It begins a text as that of the family does.
    """
    if config_class in BEGINNING:
        adding(tokenizer, "~ $A")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vocabulary = len(tokenizer) + 8  # transformers adds special tokens for some families
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "vocab_size": vocabulary}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_class(**sizes, **heads, **tokens, **changes))
        if (bias := model.get_output_embeddings().bias) is not None:
            torch.nn.init.normal_(bias)  # of a new model it is 0
    backbones.save(Backbone(model, tokenizer), folder)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__.removesuffix("Config"))
def trained(request, world, tiny_folder, tmp_path_factory):
    """Three steps of csft, then of mntp, then of contrastive learning; the folders and the summaries."""
    root = tmp_path_factory.mktemp("family")
    tokenizer = backbones.load(tiny_folder, torch.float32).tokenizer
    save_random(request.param, tokenizer, root / "model")
    sequences, titles = world
    once = {"checkpoints": 0, "model": root / "model"}
    budget = {"max_tokens": 600, "epochs": None, "batch_tokens": 256, "micro_batch_tokens": 256}
    summaries = [train_stage(csft, sequences, titles, history_length=4, out=root / "csft", **budget, **once)]
    once["model"] = root / "csft"
    options = {"steps": 3, "batch_size": 6}
    summaries.append(train_stage(mntp, titles, mask_share=0.2, out=root / "mntp", **options, **once))
    options |= {"temperature": 0.1, "dropout": 0.2, "evaluations": 1, "patience": 1, "micro_batch_tokens": 64}
    data = sequences, titles
    summaries.append(train_stage(contrastive, *data, model=root / "mntp", out=root / "iem", **options))
    return root, summaries


def test_every_stage_trains_for_three_steps(trained):
    assert [summary["steps"] for summary in trained[1]] == [3, 3, 3]


def test_every_stage_keeps_what_the_tokenizer_adds(trained, request):
    root, _ = trained
    family = request.node.callspec.params["trained"]
    for name in ("csft", "mntp", "iem"):
        assert len(added_tokens(backbones.load_tokenizer(root / name))[0]) == (family in BEGINNING)


def test_every_stage_moves_the_weights(trained):
    root, _ = trained
    folders = [root / name for name in ("model", "csft", "mntp", "iem")]
    bodies = [
        dict(backbones.load(folder, torch.float32, head=False).model.named_parameters()) for folder in folders
    ]
    for before, after in zip(bodies, bodies[1:], strict=False):
        assert all(not torch.equal(before[name], after[name]) for name in before if "embed" not in name)


def test_csft_stays_causal_and_the_others_see_the_future(trained):
    root, _ = trained
    for name, causal in (("csft", True), ("mntp", False), ("iem", False)):
        lm = backbones.load(root / name, torch.float32, head=False)
        assert lm.is_causal == causal
        assert (backbones.future_sensitivity(lm) == 0) == causal


def test_the_exported_encoder_gives_the_vectors_that_encode_gives(trained, world):
    from sentence_transformers import SentenceTransformer

    root, _ = trained
    titles = sorted(set(world[1]))
    lm = backbones.load(root / "iem", torch.float32, head=False)
    ours = vectors_of(lm, titles, 64, max_title_tokens=16)
    theirs = SentenceTransformer(str(root / "iem"), device="cpu").encode(titles, show_progress_bar=False)
    assert np.abs(ours).max() > 0.1  # premise
    assert np.abs(ours - theirs).max() < 1e-4


def random_lm(config_class, **options):
    """A random two-layer model of a family, as causal as it was made."""
    common = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
    return Backbone(AutoModelForCausalLM.from_config(config_class(**common, **options)).eval(), None)


HEADS = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_a_family_that_cannot_see_the_future_is_refused():
    with pytest.raises(ArtifactError, match="MambaModel should be bidirectional"):
        random_lm(MambaConfig, state_size=4).set_causal(False)


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (MambaConfig, {"state_size": 4}),
        (Lfm2Config, HEADS | {"layer_types": ["conv", "full_attention"]}),
        (GptOssConfig, HEADS | {"head_dim": 8}),  # attention sinks, which packed attention would drop
        (BloomConfig, {"n_head": 2}),  # positions as a bias of the scores
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_reads_packed_sequences_otherwise_than_alone_is_refused(config_class, options, dtype):
    lm = random_lm(config_class, **options)
    lm.model.to(dtype)
    assert backbones.future_sensitivity(lm) == 0  # premise: it is causal, as told
    with pytest.raises(ArtifactError, match=f"{type(lm.body).__name__} does not read a packed sequence as if"):
        lm.set_causal(True)


@pytest.mark.parametrize("config_class", [StableLmConfig, FalconConfig])
def test_a_family_that_cannot_read_a_packed_row_is_refused(config_class):
    lm = random_lm(config_class, **HEADS | {"num_key_value_heads": 2})
    with pytest.raises(ArtifactError, match="cannot read a packed row"):
        lm.set_causal(True)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return backbones.load_tokenizer(tiny_folder)


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}),
        (CohereConfig, {"logit_scale": 0.25}),
        (PhiConfig, {}),
        (Gemma3TextConfig, {"final_logit_softcapping": 1.0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_more_than_one_matrix_is_refused(config_class, changes, dtype, tokenizer, tmp_path):
    save_random(config_class, tokenizer, tmp_path, **changes, initializer_range=0.5)
    backbones.load(tmp_path, dtype, head=False)
    with pytest.raises(ArtifactError, match="ForCausalLM is more than one matrix"):
        backbones.load(tmp_path, dtype)


@pytest.mark.parametrize("config_class", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_one_matrix_gives_the_logits(config_class, dtype, tokenizer, tmp_path):
    save_random(config_class, tokenizer, tmp_path, initializer_range=0.5)
    lm, ids = backbones.load(tmp_path, dtype), torch.arange(5, 11)[None]
    with torch.no_grad():
        logits = lm.model(input_ids=ids, use_cache=False).logits.float()
        ours = (lm.body(input_ids=ids, use_cache=False).last_hidden_state @ lm.head.T).float()
    assert logits.std() > 0.1  # premise
    assert (ours - logits).norm() <= backbones.rounding(dtype) * logits.norm()


def test_an_encoder_is_no_decoder(tokenizer, tmp_path):
    save_random(BertConfig, tokenizer, tmp_path)
    with pytest.raises(ArtifactError, match="BertLMHeadModel is no decoder"):
        backbones.load(tmp_path, torch.float32)
