"""The trained encoder as a SentenceTransformer folder, checked to give the same vectors, and how to read it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from llm2rec import artifacts
from llm2rec.errors import ArtifactError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.encode import encode_tokens
from llm2rec.lm.packing import tokenise
from llm2rec.lm.pooling import MEAN, MODES, Pooling
from llm2rec.lm.text import item_texts
from llm2rec.memory import release
from llm2rec.processes import processes

POOLING = "1_Pooling/config.json"


def reading_of(folder: Path) -> tuple[bool, Pooling]:
    """How a model that this package trained reads a title: whether causally, and how the title is pooled.

    Args:
        folder: of the stages `csft` (a decoder, which has the mean) or `iem`.

    Raises:
        ArtifactError: a file of it is damaged or says what this package does not write.
    """
    config, pooling = artifacts.read_json(folder / "config.json"), MEAN
    if (folder / POOLING).exists():
        exported = artifacts.read_json(folder / POOLING).get("pooling_mode")
        modes = [mode for mode, theirs in MODES.items() if theirs == exported]
        if not modes:
            raise ArtifactError(f"{folder / POOLING}: pooling_mode {exported!r} is none that we export")
        pooling = Pooling(modes[0])
    return config.get("is_causal", True) is not False, pooling


def export(lm: Backbone, titles: list[str], max_title_tokens: int, out: Path, pooling: Pooling = MEAN) -> None:
    """Writes a SentenceTransformer folder and checks that it gives the encoder's vectors.

    Of several processes the main one does so, and the others wait for it.

    Raises:
        ArtifactError: the folder cannot express the pooling, or its vectors differ by more than rounding.
    """
    mode = pooling.exported()
    if processes().is_main:
        _export(lm, titles, max_title_tokens, out, pooling, mode)
    processes().wait()


def _export(
    lm: Backbone, titles: list[str], max_title_tokens: int, out: Path, pooling: Pooling, mode: str
) -> None:
    _write(lm, max_title_tokens, out, mode)
    release()  # models of sentence-transformers are reference cycles
    sample = item_texts(titles)[:16]
    # Both in float32: in bfloat16 two kernels differ as much as either does from float32, which is a lot where a
    # model was made bidirectional and hardly trained (cosine 0.93 at worst on SmolLM2-135M).
    theirs = _reread(out, sample)
    release()
    tokens = tokenise(lm.tokenizer, sample, max_title_tokens, special_tokens=True)
    exact = Backbone(_in_host_memory(lm.model), lm.tokenizer)
    ours = torch.from_numpy(encode_tokens(exact, tokens, 4096, "check", pooling))
    similarity = torch.nn.functional.cosine_similarity(ours, theirs).min().item()
    if similarity < 0.999:
        raise ArtifactError(
            f"the exported encoder {out} gives other vectors than the trained one (cosine {similarity:.4f}); "
            "this version of sentence-transformers reads the model's attention, pooling or tokenizer otherwise"
        )


def _write(lm: Backbone, max_title_tokens: int, out: Path, mode: str) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling as STPooling
    from sentence_transformers.sentence_transformer.modules import Transformer

    with artifacts.scratch(out.parent) as folder:
        backbones.save(lm, folder)
        transformer = Transformer(str(folder), max_seq_length=max_title_tokens)
        encoder = SentenceTransformer(
            modules=[transformer, STPooling(lm.body.config.hidden_size, pooling_mode=mode)], device="cpu"
        )
        encoder.save(str(out))


def _reread(folder: Path, sample: list[str]) -> Tensor:
    """What sentence-transformers makes of texts by a folder, in float32: (n, D)."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return torch.from_numpy(encoder.encode(sample, convert_to_numpy=True, show_progress_bar=False))


def _in_host_memory(model: nn.Module) -> nn.Module:
    """A model in float32 on the CPU beside the given one, whose device may have no room for another.

    Weights that already are so are shared.
    """
    there: dict[int, Tensor] = {
        id(weight): nn.Parameter(weight.detach().to("cpu", torch.float32), requires_grad=False)
        for weight in model.parameters()
    }
    there |= {id(buffer): buffer.detach().cpu() for buffer in model.buffers()}
    return copy.deepcopy(model, there).float()
