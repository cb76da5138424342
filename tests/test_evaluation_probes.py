"""Probes on vectors with a known answer."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2rec.data.sequences import TEST, TRAIN, VALIDATION, Sequences
from llm2rec.evaluation import probes

N_ITEMS, SIZE = 60, 8
SEEDS = st.integers(0, 2**16)


def random_vectors(seed=0, n=N_ITEMS, size=SIZE):
    return np.random.default_rng(seed).normal(size=(n, size))


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def couples(n=N_ITEMS):
    """Items 1 and 2, 3 and 4, ... are consumed together."""
    return np.arange(1, n + 1).reshape(-1, 2)


def coupled_vectors(noise=0.1, n=N_ITEMS):
    """Both items of a couple lie near each other."""
    return np.repeat(random_vectors(1, n // 2), 2, axis=0) + noise * random_vectors(2, n)


def shares_of(*given, **options):
    return probes.co_consumption(probes.compare_pairs(*given, **options))


def auc_of(*given, **options):
    return probes.co_consumption_auc(shares_of(*given, **options))


def separation_of(*given, **options):
    return probes.pair_separation(probes.compare_pairs(*given, **options))


ALIKE = np.ones(N_ITEMS, dtype=np.int64)
LABELS = [str(place % 3) for place in range(600)]


def test_vectors_that_know_what_is_consumed_together_are_found():
    assert auc_of(coupled_vectors(), couples(), ALIKE)["value"] > 0.98
    assert separation_of(coupled_vectors(), couples(), ALIKE)["value"] > 2


def test_a_gain_is_measured_pair_by_pair():
    before, after = (shares_of(coupled_vectors(noise), couples(), ALIKE, seed=3) for noise in (2.0, 0.5))
    gain = probes.co_consumption_gain(before, after)
    aucs = [auc_of(coupled_vectors(noise), couples(), ALIKE, seed=3) for noise in (2.0, 0.5)]
    assert gain["value"] == pytest.approx(aucs[1]["value"] - aucs[0]["value"]) and gain["n"] == aucs[0]["n"]
    assert gain["error"] == pytest.approx(np.std(after - before, ddof=1) / np.sqrt(len(before)))
    assert probes.co_consumption_gain(before, before) | {"n": 0} == {
        **gain,
        "value": 0.0,
        "error": 0.0,
        "n": 0,
    }


def test_random_vectors_read_chance():
    pairs = np.stack([np.arange(1, 400), np.arange(2, 401)], axis=1)
    vectors, popularity = random_vectors(n=400), np.ones(400)
    auc = auc_of(vectors, pairs, popularity)
    assert abs(auc["value"] - auc["chance"]) < 3 * auc["error"] < 0.1
    assert abs(separation_of(vectors, pairs, popularity)["value"]) < 0.2


def test_vectors_that_encode_popularity_alone_stay_at_chance():
    generator = np.random.default_rng(0)
    popularity = np.arange(1000)[::-1]
    angle = np.arange(1000) / 1000  # alike where about as popular
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    pairs = generator.integers(1, 100, (500, 2))  # the most popular are consumed together, and by chance alone
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    matched = auc_of(vectors, pairs, popularity)
    unmatched = auc_of(vectors, pairs, generator.permutation(popularity))
    assert unmatched["value"] > 0.8
    assert matched["value"] == pytest.approx(0.5, abs=0.07)


def test_a_tie_counts_half():
    assert auc_of(np.ones((20, 3)), couples(20), np.ones(20))["value"] == 0.5


def test_no_drawn_item_is_a_partner_or_the_item_itself():
    star = np.array([[1, item] for item in range(2, 20)])  # item 1 with all but item 20
    vectors = np.eye(20)
    vectors[19] = vectors[0]  # and that one lies on item 1
    found = auc_of(vectors, star, np.ones(20), draws=8)
    assert found["value"] == 0.0


def test_the_pair_probes_repeat_with_their_seed():
    arguments = (random_vectors(), couples(), np.arange(N_ITEMS))
    readings = [separation_of(*arguments, seed=seed)["value"] for seed in (0, 0, 1)]
    assert readings[0] == readings[1] != readings[2]


def test_the_pair_probes_do_not_see_the_length_of_vectors():
    vectors = random_vectors()
    lengths = np.random.default_rng(5).uniform(0.1, 10, (N_ITEMS, 1))
    plain, scaled = (auc_of(one, couples(), ALIKE)["value"] for one in (vectors, vectors * lengths))
    assert plain == scaled


def test_pairs_where_everything_is_a_partner_are_refused():
    everything = np.array([[a, b] for a in range(1, 4) for b in range(1, 4) if a != b])
    with pytest.raises(ValueError, match="nearly all items are partners"):
        auc_of(np.eye(3), everything, np.ones(3))


def test_vectors_of_a_category_are_found_and_chance_is_the_share_of_pairs():
    labels = ["a"] * 30 + ["b"] * 20 + ["c"] * 10
    centres = {"a": [9, 0, 0], "b": [0, 9, 0], "c": [0, 0, 9]}
    vectors = np.array([centres[label] for label in labels]) + 0.1 * random_vectors(size=3)
    found = probes.same_category_share(vectors, labels, k=5)
    assert found["value"] == 1.0
    assert found["chance"] == pytest.approx((30 * 29 + 20 * 19 + 10 * 9) / (60 * 59))


def test_random_vectors_find_the_category_by_chance():
    labels = [str(place % 4) for place in range(400)]
    found = probes.same_category_share(random_vectors(n=400), labels)
    assert found["value"] == pytest.approx(found["chance"], abs=0.03)


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 30))
def test_the_category_share_equals_a_loop(seed, k):
    vectors = random_vectors(seed, 15)
    labels = [None if value == 0 else str(value) for value in np.random.default_rng(seed).integers(0, 3, 15)]
    known = [place for place, label in enumerate(labels) if label is not None]
    if len(known) < 2:
        return
    cosines = unit(vectors) @ unit(vectors).T
    shares = []
    for place in known:
        others = sorted((other for other in known if other != place), key=lambda other: -cosines[place, other])[:k]
        shares.append(np.mean([labels[other] == labels[place] for other in others]))
    assert probes.same_category_share(vectors, labels, k)["value"] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("labels", [["a"] * 3, [None] * N_ITEMS, ["a"] + [None] * (N_ITEMS - 1)])
def test_categories_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="categor"):
        probes.same_category_share(random_vectors(), labels)


@settings(max_examples=20)
@given(SEEDS)
def test_alignment_uniformity_and_mean_cosine_equal_loops(seed):
    vectors = random_vectors(seed, 12)
    points = unit(vectors)
    everyone = [(a, b) for a in range(12) for b in range(12) if a != b]
    distance = {(a, b): ((points[a] - points[b]) ** 2).sum() for a, b in everyone}
    found = probes.alignment(vectors, couples(12))
    assert found["value"] == pytest.approx(np.mean([distance[a - 1, b - 1] for a, b in couples(12)]), abs=1e-5)
    assert found["chance"] == pytest.approx(np.mean(list(distance.values())), abs=1e-5)
    spread = np.log(np.mean([np.exp(-2 * value) for value in distance.values()]))
    assert probes.uniformity(vectors)["value"] == pytest.approx(spread, abs=1e-5)
    cosine = np.mean([points[a] @ points[b] for a, b in everyone])
    assert probes.mean_cosine(vectors)["value"] == pytest.approx(cosine, abs=1e-5)


def test_uniform_directions_have_the_uniformity_of_chance():
    found = probes.uniformity(random_vectors(n=2000, size=5))
    assert found["value"] == pytest.approx(found["chance"], abs=0.01)


def test_equal_directions_have_uniformity_zero_and_cosine_one():
    vectors = np.ones((10, 3)) * np.arange(1, 11)[:, None]
    assert probes.uniformity(vectors)["value"] == pytest.approx(0, abs=1e-5)
    assert probes.mean_cosine(vectors)["value"] == pytest.approx(1, abs=1e-5)


def test_the_chunks_do_not_change_a_probe(monkeypatch):
    labels = [str(place % 3) for place in range(N_ITEMS)]
    whole = probes.uniformity(random_vectors()), probes.same_category_share(random_vectors(), labels)
    monkeypatch.setattr(probes, "_CHUNK_BYTES", 1)
    parts = probes.uniformity(random_vectors()), probes.same_category_share(random_vectors(), labels)
    assert [one["value"] for one in parts] == pytest.approx([one["value"] for one in whole])


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_the_effective_rank_counts_equal_directions(directions):
    axes = np.eye(8)[:directions]
    vectors = np.concatenate([axes, -axes]) + 3.0  # the mean is taken off
    assert probes.effective_rank(vectors)["value"] == pytest.approx(directions, rel=1e-5)
    assert probes.first_direction_share(vectors)["value"] == pytest.approx(1 / directions)


def test_the_effective_rank_equals_the_entropy_of_the_singular_values():
    vectors = random_vectors() * np.arange(1, SIZE + 1)
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    assert probes.effective_rank(vectors)["value"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert probes.first_direction_share(vectors)["value"] == pytest.approx(values[0] ** 2 / (values**2).sum())


@settings(max_examples=20)
@given(SEEDS, st.integers(3, 40), st.integers(1, 30))
def test_every_probe_lies_in_its_range(seed, n, size):
    vectors = random_vectors(seed, n, size)
    labels = [str(place % 2) for place in range(n)]
    pairs = np.array([[1, 2]])
    found, *_ = probes.vector_probes(vectors, pairs, np.arange(n), labels, neighbours=2, seed=seed)
    for name, one in found.items():
        assert one["lowest"] is None or one["value"] >= one["lowest"] - 1e-5, name
        assert one["highest"] is None or one["value"] <= one["highest"] + 1e-5, name
        assert one["chance"] is not None, name


def test_categories_are_probed_only_where_they_are_known():
    found, left_out, _ = probes.vector_probes(random_vectors(), couples(), ALIKE)
    assert "same_category_share" not in found and "co_consumption_auc" in found
    assert left_out == {"same_category_share": "0 of 60 items have a category; it takes at least 2"}


@pytest.mark.parametrize(
    ("n", "pairs", "labels", "left_out", "reason"),
    [
        (60, np.empty((0, 2), dtype=np.int64), "ab" * 30, {"co_consumption_auc", "alignment"}, "follows an event"),
        (2, np.array([[1, 2]]), "ab", {"co_consumption_auc", "pair_separation"}, "no pair has a random item"),
        (3, np.array([[1, 2], [2, 3], [3, 1]]), "aab", {"co_consumption_auc"}, "no pair has a random item"),
        (60, couples(), [*"a", *[None] * 59], {"same_category_share"}, "1 of 60 items have a category"),
        (1, np.empty((0, 2), dtype=np.int64), "a", {"uniformity", "effective_rank"}, "at least 2"),
    ],
)
def test_a_probe_with_nothing_to_measure_is_left_out_with_its_reason(n, pairs, labels, left_out, reason):
    found, reasons, shares = probes.vector_probes(random_vectors(n=n), pairs, np.ones(n), list(labels))
    assert left_out <= reasons.keys() and all(reason in reasons[name] for name in left_out)
    assert len(found) + len(reasons) == 8 and found.keys().isdisjoint(reasons)
    assert (shares is None) == ("co_consumption_auc" in reasons)


def test_the_map_shows_the_two_directions_of_most_variance():
    plane = random_vectors(3, size=2) * [5, 2]
    rotation, _ = np.linalg.qr(random_vectors(4, 6, 6))
    vectors = np.pad(plane, ((0, 0), (0, 4))) @ rotation + 7
    distances = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    found = probes.principal_plane(vectors)
    assert np.linalg.norm(found[:, None] - found[None], axis=2) == pytest.approx(distances)
    assert found[:, 0].var() > found[:, 1].var()


def test_the_map_does_not_turn_over():
    vectors = random_vectors() * np.arange(1, SIZE + 1)
    found = probes.principal_plane(vectors)
    directions, *_ = np.linalg.lstsq(vectors - vectors.mean(axis=0), found, rcond=None)
    assert (directions[np.abs(directions).argmax(axis=0), [0, 1]] > 0).all()
    assert np.array_equal(found, probes.principal_plane(vectors.copy()))
    assert probes.principal_plane(vectors[::-1])[::-1] == pytest.approx(found)


def test_one_dimension_has_a_map_on_a_line():
    assert probes.principal_plane(np.array([[1.0], [3.0]])).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones(5), "expected"),
        (np.ones((1, 5)), "expected"),
        (np.array([[1.0, 2.0], [np.nan, 1.0]]), "item_index 2 is not finite"),
    ],
)
def test_vectors_without_a_plane_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        probes.principal_plane(vectors)


def test_a_zero_vector_has_no_direction():
    with pytest.raises(ValueError, match="item_index 2 is zero"):
        probes.uniformity(np.array([[1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (np.array([[1, 61]]), "item_index 61; allowed: 1..60"),
        (np.array([[0, 1]]), "item_index 0"),
        (np.array([[2, 2]]), "same item twice"),
        (np.empty((0, 2), dtype=np.int64), "no test event follows"),
        (np.empty((0, 3), dtype=np.int64), "expected"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        probes.alignment(random_vectors(), pairs)


def test_popularity_of_other_items_is_refused():
    with pytest.raises(ValueError, match="popularity"):
        auc_of(random_vectors(), couples(), np.ones(3))


def test_pairs_are_a_held_out_event_and_the_one_before_it():
    items = np.array([1, 2, 3, 4, 5, 5, 2, 3, 9], dtype=np.int32)
    parts = np.array([TRAIN, VALIDATION, TEST, TEST, TRAIN, TEST, TRAIN, TEST, TEST], dtype=np.uint8)
    sequences = Sequences(items, np.array([0, 4, 6, 8, 9]), parts, [str(item) for item in range(9)], list("abcd"))
    # 5 after 5 is no pair, 3 after 2 counts once, and the last user has nothing before the held-out event.
    assert probes.consumed_together(sequences, TEST).tolist() == [[2, 3], [3, 4]]


@pytest.mark.parametrize(
    "probe", [probes.uniformity, lambda *given: probes.same_category_share(given[0], LABELS, 5)]
)
def test_of_many_items_a_sample_is_compared_with_all(monkeypatch, probe):
    vectors = random_vectors(n=600)
    exact = probe(vectors)
    monkeypatch.setattr(probes, "ALL_PAIRS_UP_TO", 599)
    monkeypatch.setattr(probes, "SAMPLED_ITEMS", 200)
    sampled = probe(vectors)
    assert (exact["error"], exact["n"], sampled["n"]) == (None, 600, 200)
    assert 0 < abs(sampled["value"] - exact["value"]) < 4 * sampled["error"] < 0.5
    assert sampled["chance"] == exact["chance"] and probe(vectors) == sampled


def test_chunks_of_items_change_nothing_but_rounding(monkeypatch):
    vectors = random_vectors(n=101) + 3
    whole = (
        probes.vector_probes(vectors, couples(100), np.ones(101), LABELS[:101])[0],
        probes.principal_plane(vectors),
    )
    monkeypatch.setattr(probes, "_CHUNK_BYTES", 2**10)
    found, plane = (
        probes.vector_probes(vectors, couples(100), np.ones(101), LABELS[:101])[0],
        probes.principal_plane(vectors),
    )
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(
        {name: one["value"] for name, one in whole[0].items()}, rel=1e-6
    )
    assert plane == pytest.approx(whole[1])


def test_the_vectors_of_all_pairs_are_never_held_at_once(monkeypatch):
    n_pairs, size = 20_000, 128
    vectors = random_vectors(n=300, size=size)
    pairs = np.random.default_rng(0).permutation(300 * 300)[: 2 * n_pairs]
    pairs = np.stack([pairs // 300, pairs % 300], axis=1) + 1
    pairs = pairs[pairs[:, 0] != pairs[:, 1]][:n_pairs]
    measured = (probes.alignment, lambda *given: shares_of(*given, np.ones(300)))
    whole = [measure(vectors, pairs) for measure in measured]
    monkeypatch.setattr(probes, "_CHUNK_BYTES", 2**18)
    for measure, expected in zip(measured, whole, strict=True):
        tracemalloc.start()
        found = measure(vectors, pairs)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(found, expected) and peak < n_pairs * size * 4  # of float32, one side alone


def test_pairs_are_drawn_and_compared_once_for_all_probes_of_a_set(monkeypatch):
    calls, compared = [], probes.compare_pairs
    monkeypatch.setattr(
        probes, "compare_pairs", lambda *given, **options: calls.append(given) or compared(*given, **options)
    )
    _, _, shares = probes.vector_probes(random_vectors(), couples(), ALIKE)
    assert len(calls) == 1
    assert np.array_equal(shares, shares_of(random_vectors(), couples(), ALIKE))


def test_a_map_of_some_items_has_the_axes_of_all():
    vectors = random_vectors()
    assert np.allclose(probes.principal_plane(vectors, [3, 50]), probes.principal_plane(vectors)[[3, 50]])


def test_equal_vectors_read_the_worst_of_every_probe():
    found, *_ = probes.vector_probes(np.full((N_ITEMS, SIZE), 0.3), couples(), ALIKE)
    assert (found["co_consumption_auc"]["value"], found["pair_separation"]["value"]) == (0.5, pytest.approx(0))
    assert (found["effective_rank"]["value"], found["first_direction_share"]["value"]) == (1.0, 1.0)
    assert probes.principal_plane(np.full((N_ITEMS, SIZE), 0.3)) == pytest.approx(0)
