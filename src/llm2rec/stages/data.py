"""Stage `prepare`: what goes in, and how it is executed."""

from __future__ import annotations

from llm2rec import artifacts
from llm2rec.artifacts import Inputs, flatten
from llm2rec.runs import Domain, Run
from llm2rec.stages.base import Stage, Summary, split_of


def prepare_stages(run: Run) -> list[Stage]:
    """One stage a domain: source, layout or files -> canonical tables and sequences."""
    return [_prepare_stage(run, domain) for domain in run.domains]


def _prepare_stage(run: Run, domain: Domain) -> Stage:
    config = domain.config

    def inputs() -> Inputs:
        from llm2rec.data import origins

        chosen = flatten("data", config.model_dump(mode="json", include={"columns", "filters", "split"}))
        return {
            "data": origins.content_hash(config),
            "data.layout": config.layout,
            "data.short_histories": config.short_histories,
            "seed": run.recipe.seed,
            **chosen,
        }

    def execute(summary: Summary) -> None:
        from llm2rec.data import filters, origins, sequences
        from llm2rec.data.texts import item_texts

        log, catalogue, left_out = origins.read(config)
        log, filtered_out = filters.filtered(log, **dict(config.filters), seed=run.recipe.seed)
        only_consumed = config.filters.k_core > 1
        read = sequences.consumed(catalogue, log) if only_consumed else catalogue
        item_texts(read, config.text)  # what later stages read is refused here, before anything is trained
        if config.categories:
            read.labels(config.categories)
        prepared = sequences.prepare(
            log,
            catalogue,
            split=split_of(config, run.recipe.seed),
            short_histories=config.short_histories,
            only_consumed=only_consumed,
            out=domain.data,
            origin=config.origin,
        )
        prepared["dropped"] = left_out | filtered_out | prepared.pop("dropped", {})
        summary |= prepared
        summary["item_ids"] = artifacts.hash_json(sequences.Sequences.load(domain.data).item_ids)

    return Stage("prepare", domain.data, inputs, execute)
