"""The decoder language model: where it comes from, how it attends, what it returns for a packed row.

No model classes of our own: transformers turns any decoder bidirectional with `config.is_causal = False`.
No release is trusted to honour that: `probe` changes the last token and looks at the first hidden state. It
also looks whether a sequence packed behind another one is read as if it were alone.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from llm2rec import artifacts
from llm2rec.data import sources
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm.attention import PACKED, attending
from llm2rec.lm.packing import Packed, TokenisedTexts, pack, to_device
from llm2rec.processes import processes
from llm2rec.training import default_device

# A graph for each kind of row: of one sequence, one block or two, on a CPU also by `LONGEST_AT_ONCE`; with
# gradients or without; causal or not. All stages of a process share them: beyond torch's 8 they run uncompiled.
COMPILED_GRAPHS = 64


@dataclass(frozen=True)
class Backbone:
    """A decoder and its tokenizer; `model` has a language-model head where it was asked for."""

    model: Any
    tokenizer: Any

    @property
    def body(self) -> Any:
        """The decoder without its head: what gives hidden states."""
        return self.model.get_decoder() if hasattr(self.model, "lm_head") else self.model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, to be compiled or shared out.

        Raises:
            ConfigError: this family keeps them under another name.
        """
        if not hasattr(self.body, "layers"):
            raise ConfigError(
                f"{type(self.body).__name__} does not name its layers as `model.compile` and `shard` expect; "
                "turn them off"
            )
        return self.body.layers

    @property
    def head(self) -> Tensor:
        """The output embedding, (V, H)."""
        return self.model.get_output_embeddings().weight

    @property
    def is_causal(self) -> bool:
        """Whether a position sees only the positions before it."""
        return getattr(self.body.config, "is_causal", True) is not False

    def hidden_states(self, packed: Packed, layer: int = -1) -> Tensor:
        """Hidden states of a packed row, (1, T, H); its sequences do not see each other.

        Args:
            layer: 0 = the embeddings, k = what layer k gives; -1 = the last one, which by either number comes
                after the final norm.
        """
        with attending(self.body, PACKED):
            output = self.body(
                input_ids=packed["input_ids"],
                position_ids=packed["position_ids"],
                segments=packed["segments"],
                use_cache=False,
                output_hidden_states=layer != -1,
            )
        return output.last_hidden_state if layer == -1 else output.hidden_states[layer]

    def set_causal(self, causal: bool) -> None:
        """Makes the model causal or bidirectional, in its configuration, so that saving keeps it.

        Raises:
            ArtifactError: the model does not attend as told (`probe`).
        """
        for config in {id(module.config): module.config for module in (self.model, self.body)}.values():
            config.is_causal = causal
        probe(self, causal)

    def checkpoint_gradients(self) -> None:
        """Keeps only the input of each layer for the backward pass, which computes the rest once more.

        Less memory, about a third more time, the same gradients.

        Raises:
            ConfigError: this model cannot.
        """
        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(f"{type(self.model).__name__} has no gradient checkpointing; turn it off")

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), attending(self.body, PACKED)  # the second pass runs outside `hidden_states`

        self.model._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False, context_fn=contexts)
        )

    def compile_layers(self) -> None:
        """Compiles the decoder layers when they are first used: one graph for all, for any number of tokens.

        There are more for rows of other kinds, at most COMPILED_GRAPHS in a process, for all models together.
        The same numbers up to rounding. Worth its minute or two in long stages only.

        Raises:
            ConfigError: no C++ compiler, gradient checkpointing, which compiled layers do not do, or as `layers`.
        """
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            raise ConfigError("model.compile and gradient_checkpointing exclude each other; turn one of them off")
        compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
        if self.body.device.type == "cpu" and not any(shutil.which(name) for name in compilers):
            raise ConfigError("model.compile needs a C++ compiler (g++ or clang++); install one, or turn it off")
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, COMPILED_GRAPHS)
        for layer in self.layers:
            layer.compile(dynamic=True)

    def check_readable(self, texts: TokenisedTexts, longest: int) -> None:
        """Checks, before anything is computed, that the model can read sequences made of `texts`.

        Args:
            longest: tokens of the longest sequence that they will make.

        Raises:
            ConfigError: a sequence longer than the model's context, or than a sliding window of its attention.
            ArtifactError: a token that the model has no embedding for.
        """
        context = getattr(self.body.config, "max_position_embeddings", None)
        limits = [limit for limit in (context, _sliding_window(self.body.config)) if limit is not None]
        if limits and longest > min(limits):
            raise ConfigError(
                f"the longest sequence has {longest:,} tokens, the model reads at most {min(limits):,} "
                "(its context, or a sliding window); lower data.history_length or model.max_title_tokens"
            )
        vocabulary = self.body.get_input_embeddings().weight.shape[0]
        if len(texts.tokens) and texts.tokens.max() >= vocabulary:
            raise ArtifactError(
                f"the tokenizer gives token {texts.tokens.max()}, the model knows 0 to {vocabulary - 1}; "
                "use the tokenizer that belongs to the model"
            )


def _sliding_window(config: Any) -> int | None:
    """How far a layer's attention reaches; None where all reach everywhere, whatever the configuration carries."""
    layers = getattr(config, "layer_types", None)
    in_use = layers is None or "sliding_attention" in layers
    return getattr(config, "sliding_window", None) if in_use else None


def load_for_training(
    source: str | Path,
    dtype: torch.dtype,
    *,
    causal: bool,
    head: bool = True,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> Backbone:
    """`load`, attending as told, on the device that trains.

    Raises:
        ConfigError, ArtifactError: as `load` and the methods of `Backbone` that it calls.
    """
    lm = load(source, dtype, head=head)
    lm.set_causal(causal)
    lm.model.to(default_device())
    if gradient_checkpointing:
        lm.checkpoint_gradients()
    if compiled:
        lm.compile_layers()
    return lm


def load(source: str | Path, dtype: torch.dtype, *, head: bool = True) -> Backbone:
    """A pretrained decoder from a hub id, a folder, or a GGUF file, with its tokenizer.

    Raises:
        ConfigError: nothing loadable there, or quantised weights.
        ArtifactError: weights are missing or of another shape; the tokenizer has no token to pad with, or knows
            more tokens than the model; the model's logits are not its hidden states times one matrix.
    """
    path = _loadable(source)
    kind = AutoModelForCausalLM if head else AutoModel
    try:
        _configuration(path)
        model = _pretrained(kind, path, dtype=dtype, attn_implementation="sdpa", use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load a language model from {path!r}: {reason}") from error
    tokenizer = load_tokenizer(source)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token is None or len(tokenizer) > vocabulary:
        raise ArtifactError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and pad token {tokenizer.pad_token!r}, the "
            f"model {vocabulary} embeddings; use the tokenizer that belongs to the model"
        )
    lm = Backbone(model.eval(), tokenizer)
    if head:
        _check_head(lm)
    return lm


def _pretrained(kind: Any, path: str, **options: Any) -> Any:
    """A model of transformers with all its weights: transformers itself makes up those that are missing.

    Raises:
        ArtifactError: weights are missing, or have another shape than the configuration says.
    """
    model, found = kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    misshapen = sorted(found["mismatched_keys"])
    if misshapen:
        name, held, expected = misshapen[0]
        raise ArtifactError(
            f"{path}: {name} is {tuple(held)}, by config.json it is {tuple(expected)}; they belong to two models; "
            "fetch both again"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ArtifactError(
            f"{path} lacks {len(missing)} of the weights of a {type(model).__name__} (first: {missing[0]}); fetch "
            "it again, or take a model with its head where that is what is missing"
        )
    return model


def _check_head(lm: Backbone) -> None:
    """Checks by experiment that `head` is all there is between the hidden states and the logits.

    Raises:
        ArtifactError: the model scales, shifts or caps its logits, or has no such head.
    """
    name = type(lm.model).__name__
    if not hasattr(lm.model, "lm_head"):
        raise ArtifactError(
            f"{name} is no decoder with a language-model head; take a decoder such as Llama or Qwen"
        )
    ids = _some_tokens(lm, 5, 8)[None]
    with _measuring(lm):
        logits = lm.model(input_ids=ids, use_cache=False).logits
        ours = lm.body(input_ids=ids, use_cache=False).last_hidden_state @ lm.head.T
    if _distance(ours, logits) > rounding(lm.head.dtype):
        raise ArtifactError(
            f"the head of {name} is more than one matrix (it scales, shifts or caps the logits), so that its "
            "losses would be wrong; take a model of another family"
        )


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a hub id, a folder or a GGUF file, with a token to pad with where it has an eos.

    Raises:
        ConfigError: nothing loadable there.
    """
    path = _loadable(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load a tokenizer from {path!r}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None  # sentence-transformers would wrap every title in a chat message
    return tokenizer


def model_shape(source: str | Path) -> tuple[int, int]:
    """Width of the hidden states and number of layers of a model, from its configuration: no weights are loaded.

    Raises:
        ConfigError: nothing loadable there, or quantised weights.
    """
    config = _decoder_of(source)
    return config.hidden_size, config.num_hidden_layers


def outline(source: str | Path) -> nn.Module:
    """A decoder as its configuration makes it, without weights: to look at its modules.

    Raises:
        ConfigError: as `model_shape`.
    """
    with torch.device("meta"):
        return AutoModel.from_config(_decoder_of(source))


def _decoder_of(source: str | Path) -> Any:
    """The configuration of the decoder of a model."""
    path = _loadable(source)
    try:
        return _configuration(path).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot read the configuration of {path!r}: {reason}") from error


def _configuration(path: str) -> Any:
    """The configuration of a model whose weights are plain numbers.

    Raises:
        ConfigError: they are quantised.
    """
    config = AutoConfig.from_pretrained(path)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method", "unnamed")
        raise ConfigError(
            f"the weights of {path!r} are quantised ({method}), which cannot be trained; take the unquantised "
            "model or its GGUF file"
        )
    return config


def _loadable(source: str | Path) -> str:
    return str(_converted(Path(source)) if str(source).endswith(".gguf") else source)


def future_sensitivity(lm: Backbone, length: int = 8) -> float:
    """How far the first hidden state moves when the last token changes, over its norm (>= 0).

    0 for a causal model, up to rounding (experts, say, are multiplied with other numbers of tokens); above 0 for
    one that sees the whole text.
    """
    first = _some_tokens(lm, 5, length)
    second = torch.cat([first[:-1], _some_tokens(lm, 11 + length, 1)])
    with _measuring(lm):
        before, after = (
            lm.body(input_ids=ids[None], use_cache=False).last_hidden_state[0, 0] for ids in (first, second)
        )
    moved = _distance(after, before)
    return moved if moved > rounding(before.dtype) else 0.0


def packed_difference(lm: Backbone) -> float:
    """How far the states of a sequence packed behind another one are from those it has alone, over their norm."""
    first, second = _some_tokens(lm, 20, 5), _some_tokens(lm, 30, 3)
    row = pack(torch.cat([first, second]).cpu().numpy(), np.array([len(first), len(second)]))
    with _measuring(lm):
        packed = lm.hidden_states(to_device(row, lm.body.device))[0, len(first) :]
        alone = lm.body(input_ids=second[None], use_cache=False).last_hidden_state[0]
    return _distance(packed, alone)


def probe(backbone: Backbone, causal: bool) -> None:
    """Checks by experiment that the model attends as told, and reads packed sequences as if each were alone.

    Does the last token move the first hidden state? Does a sequence behind another one keep its states? What
    looks wrong in 16 bits is looked at once more in float32: rounding alone took the states of a model after a
    long CSFT, read both ways, .2 to .9 of their norm apart, where in float32 it was 1e-5.

    Raises:
        ArtifactError: a bidirectional model does not see the future, or a causal one does; a state flows from one
            packed sequence into the next, or the model cannot read a packed row.
    """
    fault = _attention_fault(backbone, causal)
    if fault is not None:
        with _in_float32(backbone.body):
            fault = _attention_fault(backbone, causal)
    if fault is not None:
        raise ArtifactError(f"{type(backbone.body).__name__} {fault}")


def _attention_fault(backbone: Backbone, causal: bool) -> str | None:
    """What is wrong with how a model attends, and what to do."""
    sees_future = future_sensitivity(backbone) > 0
    if sees_future == causal:
        wanted, got = ("causal", "sees") if causal else ("bidirectional", "does not see")
        return (
            f"should be {wanted}, but its first position {got} the last token with this version of transformers; "
            "use another version or another model"
        )
    try:
        difference = packed_difference(backbone)
    except (TypeError, AttributeError) as error:
        return f"cannot read a packed row ({error}); take a model of another family"
    if difference > 10 * rounding(backbone.body.dtype):  # other kernels; 1e-6 and .015 after 30 layers
        return (
            f"does not read a packed sequence as if it were alone (its states are {difference:.2g} of their norm "
            "apart): it has more than plain attention; take a model of another family"
        )
    return None


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """All weights in float32 for the time being; what is 16 bits comes back as it was."""
    kept = [(weight, weight.dtype) for weight in module.parameters()]
    for weight, _ in kept:
        weight.data = weight.data.float()
    try:
        yield
    finally:
        for weight, dtype in kept:
            weight.data = weight.data.to(dtype)


def rounding(dtype: torch.dtype) -> float:
    """How far apart, over their norm, rounding alone may take states that are computed alike."""
    return 1e-5 if dtype == torch.float32 else 1e-2


def _some_tokens(lm: Backbone, first: int, count: int) -> Tensor:
    vocabulary = lm.body.get_input_embeddings().weight.shape[0]
    return torch.arange(first, first + count, device=lm.body.device).remainder(vocabulary)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@contextmanager
def _measuring(lm: Backbone) -> Iterator[None]:
    """No dropout and no gradients for the time being."""
    training = lm.body.training
    lm.body.eval()
    with torch.no_grad():
        yield
    lm.body.train(training)


def _converted(gguf: Path) -> Path:
    """A GGUF file as a Hugging Face folder in the cache, converted once a content hash."""
    if not gguf.is_file():
        raise ConfigError(f"there is no GGUF file {gguf}")
    folder = sources.cache_folder() / "converted" / artifacts.hash_file_once(gguf)
    manifest = folder / artifacts.MANIFEST
    if not manifest.exists():
        with artifacts.turn(folder.with_suffix(".lock")):
            if not manifest.exists():  # another process may have converted it meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    try:
        model = _pretrained(AutoModelForCausalLM, str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        raise ConfigError(
            f"{gguf} is not a whole GGUF file of a known family ({error}); fetch it again"
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now; saving refuses otherwise
    model.hf_quantizer = None
    save(Backbone(model, tokenizer), folder)
    artifacts.write_manifest(folder, "converted", {"gguf": gguf.name}, {})


def save(backbone: Backbone, folder: Path) -> None:
    """Writes the Hugging Face layout: safetensors, config.json and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)


def save_once(backbone: Backbone, folder: Path) -> None:
    """`save` by the main process; the others wait for it."""
    if processes().is_main:
        save(backbone, folder)
    processes().wait()
