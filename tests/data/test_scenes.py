"""Scenes show what their captions say."""

from hf_shapley import scenes_dataset, scenes_tokenizer, word_ids_of
from hf_shapley.data.scenes import COLOURS, LONGEST, RELATIONS


def test_captions_say_what_is_seen():
    """Both objects lie in their boxes, in their colours, and apart as the relation says."""
    scenes = scenes_dataset(60, size=32, seed=3)
    seen = set()
    for image, text, boxes in zip(scenes["image"][:], scenes["text"][:], scenes["boxes"][:], strict=True):
        words = text.split()
        relation = " ".join(words[3:-3])
        seen.add(relation)
        for colour, box in zip((words[1], words[-2]), boxes, strict=True):
            centre = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
            assert image.getpixel(centre) == COLOURS[colour]
            assert min(box) >= 0 and max(box) <= 32
        first, second = boxes
        column, row = RELATIONS[relation]
        assert column * (first[0] - second[0]) + row * (first[1] - second[1]) >= first[2] - first[0]
    assert sorted(seen) == sorted(RELATIONS)


def test_a_seed_draws_the_same_scenes():
    first, again, other = (scenes_dataset(5, seed=seed) for seed in (1, 1, 2))
    assert first["text"][:] == again["text"][:] != other["text"][:]
    assert [image.tobytes() for image in first["image"][:]] == [image.tobytes() for image in again["image"][:]]


def test_every_word_is_one_token():
    tokenizer = scenes_tokenizer()
    texts = scenes_dataset(60)["text"][:]
    encoding = tokenizer(texts, padding="max_length", max_length=LONGEST, return_tensors="pt")
    assert tokenizer.unk_token_id not in encoding["input_ids"]
    counts = word_ids_of(encoding).amax(1) + 1
    assert counts.tolist() == [len(text.split()) for text in texts]
    assert max(counts) + 2 < LONGEST
