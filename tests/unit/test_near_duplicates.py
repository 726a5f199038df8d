"""Near-duplicates are those with the similarity that the module promises."""

import random
import string

from deploy.near_duplicates import SIMILARITY, NearDuplicates, _hashed_shingles, _similarity

LONG = "Please explain step by step how a bill becomes a law in a country with two chambers of parliament."


def test_case_punctuation_and_small_changes_do_not_make_a_text_new():
    seen = NearDuplicates()
    assert seen.is_new(LONG)
    for copy in (LONG, LONG.upper(), LONG.replace(" ", "  ").rstrip("."), LONG.replace("two", "three"), f"{LONG}!"):
        assert not seen.is_new(copy)
    assert seen.is_new("What is the capital of France?")
    assert seen.is_new("What is the capital of Spain?")  # 0.65
    assert seen.is_new("?")
    assert not seen.is_new("!")  # no letters at all, as the one before
    assert seen.is_new("法国的首都是哪里？请详细说明。")  # noqa: RUF001
    assert not seen.is_new("法国的首都是哪里? 请详细说明")


def test_candidates_found_by_hashing_are_those_of_comparing_all():
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        text = "".join(rng.choices(string.ascii_lowercase + "  ", k=120))
        texts.append(text)
        for changes in (1, 3, 8, 20):
            letters = list(text)
            for place in rng.sample(range(120), changes):
                letters[place] = "0"
            texts.append("".join(letters))
    seen, kept = NearDuplicates(), []
    for text in texts:
        shingles = _hashed_shingles(text)
        new = all(_similarity(shingles, other) < SIMILARITY for other in kept)
        assert seen.is_new(text) == new
        if new:
            kept.append(shingles)
    assert 60 < len(kept) < len(texts)
