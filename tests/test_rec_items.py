"""Item tables: transformed vectors, fused tables, categories, added items, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from llm2rec.data.sequences import VALIDATION
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.evaluation import protocol
from llm2rec.rec import model as models
from llm2rec.rec import vectors as vectors_module
from llm2rec.rec.architecture import ITEM_TABLES, MODELS, Architecture
from llm2rec.rec.context import BUCKETS, gap_buckets
from llm2rec.rec.items import Categories, CategorisedItems, DeltaItems, FrozenItems, make_adapter
from llm2rec.rec.smoothing import Neighbours
from llm2rec.rec.table_linear import ROWS
from llm2rec.rec.vectors import freeze, measure
from test_rec_conformance import HISTORIES, LENGTH, N, built, random_sequences, score, times_of, vectors

TEXT_TABLES = [items for items in ITEM_TABLES if items != "id"]
ADDED = np.random.default_rng(9).normal(3.0, 2.0, (3, 6)).astype(np.float32)


def many(items=400, dimensions=6):
    """Correlated vectors of very different spreads."""
    generator = np.random.default_rng(0)
    mixed = generator.normal(size=(items, dimensions)) @ generator.normal(size=(dimensions, dimensions))
    return (mixed * 10.0 ** np.arange(dimensions) + 100.0).astype(np.float32)


def architecture(**changes):
    values = {"name": "sasrec", "items": "text", "hidden_size": 8, "layers": 2, "heads": 2, "dropout": 0.0}
    return Architecture(**values | {"history_length": LENGTH} | changes)


def make(**changes):
    shape = architecture(**changes)
    neighbours = Neighbours.of(random_sequences()) if shape.smoothing else None
    return models.build(shape, n_items=N, seed=0, vectors=vectors(), neighbours=neighbours).eval()


def transformed(matrix, **how):
    """As `freeze` transforms vectors, before it rounds them."""
    return measure(matrix, **how).apply(matrix)


class TestFrozenVectors:
    def test_they_are_standardised_and_constant_dimensions_survive(self):
        matrix = vectors()
        matrix[:, 0] = 7.0
        values = transformed(matrix)
        assert np.allclose(values.mean(0), 0, atol=1e-5)
        assert np.allclose(values[:, 1:].std(0), 1, atol=1e-5)
        assert np.array_equal(values[:, 0], np.zeros(N))

    def test_full_whitening_leaves_uncorrelated_dimensions_of_unit_variance(self):
        values = transformed(many(40_000), whitening="full")
        assert np.allclose(values.T @ values / len(values), np.eye(6), atol=1e-3)

    def test_half_whitening_takes_the_roots_of_the_standard_deviations(self):
        ways = ("none", "half")
        plain, half = (transformed(many(40_000), whitening=way, dimensions=6).std(0) for way in ways)
        assert plain[0] > 2 * plain[-1]  # premise
        assert np.allclose(half / half[0], np.sqrt(plain / plain[0]), rtol=1e-3)

    @pytest.mark.parametrize("whitening", ["none", "half", "full"])
    def test_whitened_vectors_have_a_mean_variance_of_one(self, whitening):
        values = transformed(many(), whitening=whitening, dimensions=4)
        assert values.shape == (400, 4)
        assert (values**2).mean() == pytest.approx(1.0, rel=1e-3)

    def test_the_first_components_are_the_strongest(self):
        three = transformed(many(), dimensions=3)
        six = transformed(many(), dimensions=6)
        assert (np.diff(six.std(0)) < 0).all()
        assert np.allclose(three / three.std(), six[:, :3] / six[:, :3].std(), atol=1e-4)

    def test_unwhitened_components_keep_distances_up_to_scale(self):
        standard, turned = transformed(many()), transformed(many(), dimensions=6)
        ratios = [np.linalg.norm(one[1:50] - one[0], axis=1) for one in (turned, standard)]
        assert np.allclose(ratios[0] / ratios[1], (ratios[0] / ratios[1])[0], rtol=1e-3)

    def test_components_without_variance_are_left_out(self):
        assert freeze(vectors(4), whitening="full").values.shape == (4, 3)

    def test_more_dimensions_than_there_are_is_refused(self):
        with pytest.raises(ConfigError, match="dimensions is 5, but the vectors vary in 3 directions"):
            freeze(vectors(4), dimensions=5)

    def test_vectors_that_are_all_alike_are_refused(self):
        with pytest.raises(ArtifactError, match="the same"):
            freeze(np.ones((4, 3), dtype=np.float32), whitening="half")

    @pytest.mark.parametrize("whitening", ["none", "half", "full"])
    def test_added_items_are_transformed_with_the_statistics_of_training(self, whitening):
        far = np.full((1, 6), 1000.0, dtype=np.float32)
        grown = freeze(vectors(), whitening=whitening, added=far).values
        assert torch.equal(grown[:N], freeze(vectors(), whitening=whitening).values)
        expected = torch.from_numpy(measure(vectors(), whitening).apply(far)[0])
        assert torch.nn.functional.cosine_similarity(grown[N].float(), expected, dim=0) > 0.9999
        again = freeze(np.concatenate([vectors(), far]), whitening=whitening).values
        assert not torch.allclose(again[:N], grown[:N], atol=0.1)  # premise

    @pytest.mark.parametrize("whitening", ["none", "half", "full"])
    def test_held_out_items_have_no_say_in_the_statistics(self, whitening):
        trainable = np.arange(N) != 3
        moved = vectors()
        moved[3] += 100.0
        here, there = (freeze(matrix, whitening=whitening, trainable=trainable) for matrix in (vectors(), moved))
        assert torch.equal(here.values[trainable], there.values[trainable])
        alone = freeze(vectors()[trainable], whitening=whitening)
        assert torch.equal(here.values[trainable], alone.values)
        everybody = freeze(moved, whitening=whitening)
        assert not torch.allclose(everybody.values[trainable], there.values[trainable], atol=0.1)  # premise

    @pytest.mark.parametrize("whitening", ["none", "half", "full"])
    def test_no_added_vector_is_longer_than_the_longest_known(self, whitening):
        added = np.concatenate([vectors()[:2], np.full((1, 6), 1000.0, dtype=np.float32)])
        values = freeze(vectors(), whitening=whitening, added=added).values
        lengths = values.float().norm(dim=1)
        assert lengths[-1] == pytest.approx(float(lengths[:N].max()), rel=1e-2)
        assert torch.equal(values[N : N + 2], values[:2])

    @pytest.mark.parametrize("whitening", ["none", "half", "full"])
    def test_no_held_out_vector_is_longer_than_the_longest_trained_on(self, whitening):
        trainable, far = np.arange(N) != 3, vectors()
        far[3] += 1000.0
        for added in (None, far[[3, 0]]):
            frozen = freeze(far, whitening=whitening, trainable=trainable, added=added)
            lengths = frozen.values.float().norm(dim=1)
            longest = float(lengths[:N][trainable].max())
            assert longest == pytest.approx(frozen.statistics.longest)
            assert lengths[3] == pytest.approx(longest, rel=1e-2) and lengths.max() <= 1.01 * longest
            again = freeze(far, statistics=frozen.statistics, added=added)
            assert torch.equal(again.values, frozen.values)
        assert (
            np.linalg.norm(transformed(far, whitening=whitening, counted=trainable)[3]) > 10 * longest
        )  # premise

    def test_of_few_items_weak_directions_are_not_blown_up(self):
        own, later = np.random.default_rng(0).normal(size=(2, 100, 80)).astype(np.float32)
        own, later = (one * np.geomspace(1, 0.01, 80, dtype=np.float32) for one in (own, later))
        statistics = measure(own, "full")
        known, unknown = (np.linalg.norm(statistics.apply(one), axis=1).mean() for one in (own, later))
        assert unknown < 1.5 * known

    def test_values_are_rounded_to_bfloat16_chunk_by_chunk(self, monkeypatch):
        whole = freeze(many(), whitening="half").values
        assert whole.dtype == torch.bfloat16
        assert torch.equal(whole, torch.from_numpy(transformed(many(), whitening="half")).bfloat16())
        monkeypatch.setattr(vectors_module, "_CHUNK_ROWS", 7)
        assert (freeze(many(), whitening="half").values - whole).abs().max() <= 2**-7 * whole.abs().max()

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_values_that_are_not_finite_are_refused(self, bad):
        matrix = vectors()
        matrix[3, 2] = bad
        with pytest.raises(ArtifactError, match=r"1 of 12 item vectors.*row 3"):
            models.build(architecture(), n_items=N, seed=0, vectors=matrix)


class TestTables:
    @pytest.mark.parametrize("kind", ["linear", "mlp"])
    def test_an_adapter_begins_with_vectors_as_long_as_learned_ones(self, kind):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapted = make_adapter(kind, 64, 128, 32)(torch.randn(500, 64))
        assert adapted.std().item() == pytest.approx(0.02, rel=0.1)

    def test_an_mlp_adapter_bends(self):
        adapter = make_adapter("mlp", 6, 8, 16)
        one, two = torch.randn(2, 1, 6)
        zero = adapter(torch.zeros(1, 6))
        assert not torch.allclose(adapter(one + two) + zero, adapter(one) + adapter(two), atol=1e-5)

    @pytest.mark.parametrize("adapter", ["linear", "mlp"])
    @pytest.mark.parametrize("size", [ROWS + 1, 2 * ROWS + 1])
    def test_without_gradients_a_catalogue_is_mapped_in_parts_and_equal_texts_stay_equal(self, adapter, size):
        texts = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
        table = FrozenItems(freeze(texts[np.arange(size) % 7]), 4, adapter, 16)
        parts = []
        table.adapter.register_forward_hook(lambda _, given, __: parts.append(len(given[0])))
        whole = table.vectors().detach()
        with torch.no_grad():
            mapped = table.vectors()
        assert parts[0] == sum(parts[1:]) == size and max(parts[1:]) <= ROWS and min(parts[1:]) > 1
        assert torch.allclose(mapped, whole, atol=1e-6)
        assert all(torch.equal(mapped[place], mapped[place % 7]) for place in (size - 1, size - 2, ROWS - 1))

    def test_a_sum_is_adapted_text_plus_learned_vector(self):
        items = make(items="sum").items
        assert torch.equal(items.vectors(), items.adapter(items.frozen) + items.weight)

    def test_a_concatenation_is_merged_by_one_linear_map(self):
        items = make(items="concatenation").items
        both = torch.cat([items.adapter(items.frozen), items.weight], dim=1)
        assert torch.allclose(items.vectors(), both @ items.merge.weight.T + items.merge.bias, atol=1e-6)

    def test_a_delta_begins_at_the_adapted_text(self):
        items = make(items="delta").items
        assert torch.equal(items.vectors(), items.adapter(items.frozen))

    def test_a_delta_is_never_longer_than_its_share_and_keeps_its_direction(self):
        items = make(items="delta", delta_share=0.25).items
        with torch.no_grad():
            items.delta.copy_(torch.randn(items.delta.shape, generator=torch.Generator().manual_seed(0)))
            items.delta[::2] *= 0.01
        bounded, lengths = items.bounded_delta(), items.frozen.float().norm(dim=1)
        assert (bounded[1::2].norm(dim=1) / lengths[1::2]).max() <= 0.25 + 1e-5
        assert torch.cosine_similarity(bounded, items.delta).min() > 0.9999
        assert torch.allclose(bounded[::2], items.delta[::2], rtol=1e-4)  # short enough: as they are

    def test_the_gradient_of_a_bounded_delta_is_that_of_finite_differences(self):
        items = DeltaItems(freeze(vectors(4)), 3, "linear", 3, 0.5).double()
        with torch.no_grad():
            items.delta.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double())
            items.delta[0] *= 0.01
        delta = items.delta
        assert torch.autograd.gradcheck(lambda _: items.bounded_delta(), (delta,))

    def test_a_vector_of_length_zero_has_no_delta_and_no_nan(self):
        matrix = np.concatenate([vectors(4), vectors(4).mean(0, keepdims=True)])
        items = DeltaItems(freeze(matrix, statistics=measure(vectors(4))), 3, "linear", 3, 0.5)
        with torch.no_grad():
            items.delta.fill_(1.0)
        items.bounded_delta().sum().backward()
        assert items.bounded_delta()[4].abs().max() < 1e-5 and items.delta.grad.isfinite().all()

    @pytest.mark.parametrize("items", TEXT_TABLES)
    @pytest.mark.parametrize(
        "options",
        [
            {"adapter": "mlp"},
            {"adapter": "mlp", "adapter_size": 7},
            {"smoothing": 0.5},
            {"whitening": "full"},
            {"dimensions": 3},
        ],
    )
    def test_every_option_survives_saving_and_loading(self, items, options, tmp_path):
        model = make(items=items, **options)
        models.save(model, tmp_path)
        loaded = models.load(tmp_path, vectors())
        assert loaded.architecture == model.architecture
        assert torch.equal(loaded.score(HISTORIES), model.score(HISTORIES))
        assert not torch.equal(make(items=items).score(HISTORIES), model.score(HISTORIES))  # premise

    def test_the_length_that_held_out_items_are_cut_to_survives_saving_and_loading(self, tmp_path):
        far, trainable = vectors(), np.arange(N) != 3
        far[3] += 1000.0
        model = models.build(architecture(), n_items=N, seed=0, vectors=far, trainable=trainable).eval()
        models.save(model, tmp_path)
        loaded = models.load(tmp_path, far, added=far[[3]])
        assert torch.equal(loaded.score(HISTORIES)[:, :N], model.score(HISTORIES))
        assert torch.equal(loaded.items.frozen[N], loaded.items.frozen[3])

    def test_a_recommender_saved_without_that_length_takes_all_items_as_trained_on(self, tmp_path):
        from safetensors.torch import load_file, save_file

        model = make()
        models.save(model, tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["items.longest_trained"]
        save_file(weights, tmp_path / "model.safetensors")
        far = vectors()[[3]] + 1000.0
        loaded = models.load(tmp_path, vectors(), added=far)
        assert torch.equal(loaded.score(HISTORIES)[:, :N], model.score(HISTORIES))
        lengths = loaded.items.frozen.float().norm(dim=1)
        assert lengths[N] == pytest.approx(float(lengths[:N].max()), rel=1e-2)

    def test_loading_checks_and_hashes_the_vectors_once(self, tmp_path, monkeypatch):
        models.save(make(), tmp_path)
        calls = []
        for plain in (vectors_module.hash_vectors, vectors_module.checked_vectors):

            def counting(matrix, plain=plain):
                calls.append(plain.__name__)
                return plain(matrix)

            for module in (models, vectors_module):
                monkeypatch.setattr(module, plain.__name__, counting)
        models.load(tmp_path, vectors())
        assert sorted(calls) == ["checked_vectors", "hash_vectors"]

    def test_the_vectors_are_not_written_with_the_model(self, tmp_path):
        from safetensors.torch import load_file

        models.save(make(), tmp_path)
        written = load_file(tmp_path / "model.safetensors")
        assert not [name for name, value in written.items() if value.shape == (N, 6)]


class TestCategories:
    def test_names_become_compressed_rows_in_order_of_the_items(self):
        categories = Categories.of([["b", "a"], [], ["c"]])
        assert categories.indices.tolist() == [1, 0, 2] and categories.offsets.tolist() == [0, 2, 2, 3]

    def test_an_item_has_its_own_vector_plus_the_mean_of_its_categories(self):
        items = CategorisedItems(Categories.of([["b", "a"], [], ["c"]]), 4)
        own, categories = items.weight, items.category_weight
        expected = torch.stack([own[0] + categories[:2].mean(0), own[1], own[2] + categories[2]])
        assert torch.allclose(items.vectors(), expected)

    @pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 2, 3], [0, 2, 2], []])
    def test_offsets_that_do_not_fit_are_refused(self, offsets):
        with pytest.raises(DataError, match="from 0 to the 3 category indices"):
            Categories(np.array([1, 0, 2]), np.array(offsets, dtype=np.int64))

    def test_a_negative_category_is_refused(self):
        with pytest.raises(DataError, match="category -1"):
            Categories(np.array([-1]), np.array([0, 1]))

    def test_categories_of_another_catalogue_are_refused(self):
        with pytest.raises(DataError, match="cover 2 items, the catalogue has 12"):
            models.build(architecture(items="id"), n_items=N, seed=0, categories=Categories.of([["a"], ["b"]]))

    def test_categories_beside_text_are_refused(self):
        with pytest.raises(ConfigError, match="not with 'text'"):
            models.build(
                architecture(), n_items=N, seed=0, vectors=vectors(), categories=Categories.of([["a"]] * N)
            )


class TestTimes:
    def test_gaps_are_bucketed_by_doubling(self):
        times = torch.tensor([0, 0, 1, 3, 6, 10, 17, 10 + 2**40]).cumsum(0)[None]
        gaps = [0, 1, 3, 6, 10, 17]
        expected = [0, *(1 + (gap.bit_length()) for gap in gaps), BUCKETS - 1]
        assert gap_buckets(times).tolist() == [expected]

    def test_the_gaps_change_the_scores(self):
        model = built(("sasrec-context", "id", None))
        soon, late = times_of(HISTORIES), 40 * times_of(HISTORIES)
        assert not torch.allclose(model.score(HISTORIES, soon)[0], model.score(HISTORIES, late)[0])

    def test_what_stands_at_padding_does_not(self):
        model, times = built(("sasrec-context", "id", None)), times_of(HISTORIES)
        other = torch.where(HISTORIES > 0, times, 5)
        assert torch.equal(model.score(HISTORIES, times), model.score(HISTORIES, other))

    def test_no_times_are_refused(self):
        with pytest.raises(ValueError, match="needs the times"):
            built(("sasrec-context", "id", None)).score(HISTORIES)

    def test_times_of_another_shape_are_refused(self):
        with pytest.raises(ValueError, match=r"times are \(8, 4\)"):
            built(("sasrec-context", "id", None)).score(HISTORIES, times_of(HISTORIES)[:, :4])

    def test_times_that_fall_are_refused(self):
        with pytest.raises(ValueError, match="times fall"):
            built(("sasrec-context", "id", None)).score(HISTORIES, -times_of(HISTORIES))

    def test_the_times_of_histories_are_those_of_their_events(self):
        sequences = random_sequences()
        positions = sequences.held_out(VALIDATION)
        times = np.asarray(sequences.items).astype(np.int64) * 2**33  # the time tells the item
        found = dataclasses.replace(sequences, times=times).history_times(positions, 4)
        assert np.array_equal(found, sequences.histories(positions, 4).astype(np.int64) * 2**33)

    def test_evaluation_ranks_each_target_after_its_own_history_and_times(self):
        sequences, model = random_sequences(), built(("sasrec-context", "id", None))
        times = np.cumsum(np.arange(len(sequences.items))) * 60
        timed = dataclasses.replace(sequences, times=times)
        found = protocol.evaluate(model, timed, VALIDATION, LENGTH, batch_size=7)
        ranks = []
        for position in sequences.held_out(VALIDATION):
            start = max(position - LENGTH, sequences.offsets[sequences.users_of(np.array([position]))[0]])
            history, when = sequences.items[start:position].astype(np.int64), times[start:position]
            scores = model.score(torch.from_numpy(history)[None], torch.from_numpy(when)[None])[0]
            ranks.append(int((scores >= scores[sequences.items[position] - 1]).sum()))
        assert found["rank"].to_list() == ranks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("items", TEXT_TABLES)
class TestAddedItems:
    def loaded(self, name, items, folder):
        model = built((name, items, None))
        models.save(model, folder)
        return model, models.load(folder, vectors(), added=ADDED)

    def test_scores_grow_and_the_trained_columns_stay_as_they_were(self, name, items, tmp_path):
        model, grown = self.loaded(name, items, tmp_path)
        scores = score(grown, HISTORIES)
        assert grown.n_items == N + 3 and scores.shape == (len(HISTORIES), N + 3)
        assert torch.equal(scores[:, :N], score(model, HISTORIES))

    def test_matrix_products_take_the_added_items_apart(self, name, items, tmp_path):
        _, grown = self.loaded(name, items, tmp_path)
        trained, added = grown.items.parts(torch.arange(N + 3))
        assert trained.tolist() == list(range(N)) and added.tolist() == [N, N + 1, N + 2]

    def test_added_items_may_stand_in_histories(self, name, items, tmp_path):
        _, grown = self.loaded(name, items, tmp_path)
        scores = score(grown, torch.tensor([[1, 13], [1, 15]]))
        assert scores.isfinite().all() and not torch.allclose(scores[0], scores[1], atol=1e-6)
        with pytest.raises(ValueError, match="item_index 16"):
            score(grown, torch.tensor([[16]]))

    def test_an_added_copy_of_a_trained_item_has_its_text_and_nothing_learned(self, name, items, tmp_path):
        model = built((name, items, None))
        models.save(model, tmp_path)
        copies = models.load(tmp_path, vectors(), added=vectors()).items.vectors()[N:]
        with torch.no_grad():
            for learned in ("weight", "delta"):
                if hasattr(model.items, learned):
                    getattr(model.items, learned).zero_()
        assert torch.allclose(copies, model.items.vectors(), atol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize("options", [{}, {"added": ADDED}])
    def test_a_recommender_over_ids_knows_no_vectors(self, options, tmp_path):
        models.save(built(("sasrec", "id", None)), tmp_path)
        with pytest.raises(ArtifactError, match="learned ids"):
            models.load(tmp_path, None if options else vectors(), **options)

    def test_added_vectors_of_another_width_are_refused(self, tmp_path):
        models.save(make(), tmp_path)
        with pytest.raises(ArtifactError, match="5 dimensions, those of training 6"):
            models.load(tmp_path, vectors(), added=ADDED[:, :5])

    def test_a_recommender_with_added_items_is_not_saved(self, tmp_path):
        models.save(make(), tmp_path)
        with pytest.raises(ArtifactError, match="added items is for serving"):
            models.save(models.load(tmp_path, vectors(), added=ADDED), tmp_path / "again")

    def test_a_saved_text_recommender_refuses_other_vectors(self, tmp_path):
        models.save(make(), tmp_path)
        with pytest.raises(ArtifactError, match="other item vectors"):
            models.load(tmp_path, vectors() + 1)
        with pytest.raises(ArtifactError, match="load it with them"):
            models.load(tmp_path)

    def test_a_checkpoint_of_another_catalogue_is_refused(self, tmp_path):
        ids = [f"i{item}" for item in range(N)]
        models.save(make(), tmp_path, ids)
        assert models.load(tmp_path, vectors(), item_ids=ids).n_items == N
        with pytest.raises(ArtifactError, match="12 items, this one has 11"):
            models.load(tmp_path, vectors(), item_ids=ids[:-1])
        with pytest.raises(ArtifactError, match="other items, or in another order"):
            models.load(tmp_path, vectors(), item_ids=ids[::-1])

    @pytest.mark.parametrize(
        ("file", "words"),
        [
            ("config.json", r"config\.json is not valid JSON"),
            ("model.safetensors", "does not hold a whole recommender"),
        ],
    )
    def test_a_damaged_folder_is_refused(self, file, words, tmp_path):
        models.save(make(), tmp_path)
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
        with pytest.raises(ArtifactError, match=words):
            models.load(tmp_path, vectors())

    def test_vectors_that_do_not_cover_the_catalogue_are_refused(self):
        with pytest.raises(ArtifactError, match="11 items, the catalogue has 12"):
            models.build(architecture(), n_items=N, seed=0, vectors=vectors(11))

    def test_text_items_without_vectors_are_refused(self):
        with pytest.raises(ArtifactError, match="need the vectors"):
            models.build(architecture(), n_items=N, seed=0)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "bert4rec"}, "no recommender 'bert4rec'; allowed: sasrec, sasrec-context, esasrec, gru4rec"),
            ({"items": "image"}, "no item table 'image'"),
            ({"adapter": "moe"}, "no adapter 'moe'; allowed: linear, mlp"),
            ({"whitening": "zca"}, "no whitening 'zca'; allowed: none, half, full"),
            ({"history_length": 0}, "history_length is 0; it must be at least 1"),
            ({"layers": 0}, "layers is 0"),
            ({"hidden_size": 0}, "hidden_size is 0"),
            ({"dimensions": 0}, "dimensions is 0"),
            ({"hidden_size": 4098}, "hidden_size is 4,098"),
            ({"heads": 3}, "hidden_size 8 is not a multiple of heads 3"),
            ({"dropout": 1.0}, r"dropout is 1\.0"),
            ({"smoothing": 1.0}, r"smoothing is 1\.0"),
            ({"delta_share": 0.0}, r"delta_share is 0\.0"),
            ({"temperature": 0.0}, r"temperature is 0\.0"),
            ({"temperature": float("nan")}, "temperature is nan"),
        ],
    )
    def test_an_architecture_that_cannot_be_is_refused(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            architecture(**changes)

    def test_heads_that_do_not_divide_the_width_do_not_concern_a_gru(self):
        assert architecture(name="gru4rec", heads=3).heads == 3


def test_a_frozen_table_knows_the_hash_of_the_raw_vectors():
    plain, whitened = (FrozenItems(freeze(vectors(), whitening=way), 4, "linear", 4) for way in ("none", "full"))
    assert plain.sha256 == whitened.sha256 != FrozenItems(freeze(vectors() + 1), 4, "linear", 4).sha256
