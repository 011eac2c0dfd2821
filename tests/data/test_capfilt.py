"""CapFilt: the best captions are kept, a killed job goes on, a folder of another job is refused."""

import json

import numpy as np
import pytest
from omnax.data.capfilt import bootstrap
from omnax.data.drawn import tiles
from omnax.data.images.decode import CorruptExample, encode_png
from omnax.data.text.tokenizer_file import TokenizerFile, clean_caption, clean_question


class Web:
    """Drawn tiles of which every second has a caption of another; number 5 cannot be read."""

    class_names = ()

    def __init__(self, count=12):
        rng = np.random.default_rng(0)
        self.right = [tiles.CAPTIONS[i * 7] for i in range(count)]
        self.found = [tiles.CAPTIONS[i * 7 if i % 2 else i * 7 + 1] for i in range(count)]
        self.images = [encode_png(tiles.draw(i * 7, rng)) for i in range(count)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == 5:
            raise CorruptExample("5", "on purpose")
        return {"image": self.images[index], "captions": (self.found[index],), "name": str(index)}


def captioner(examples):
    """Writes the right caption twice, and another."""
    web = Web()
    return [(web.right[int(e["name"])], web.right[int(e["name"])], "a red bar") for e in examples]


def ranker(examples, texts):
    """As a model would: by words in common with what is there."""
    web = Web()
    return [
        [len(set(text.split()) & set(web.right[int(e["name"])].split())) / 8 for text in row]
        for e, row in zip(examples, texts, strict=True)
    ]


def test_more_kept_captions_are_right_than_were_found(tmp_path):
    web = Web()
    folder = bootstrap(web, captioner, ranker, tmp_path / "out", batch_size=5)
    with pytest.raises(CorruptExample):
        folder[5]
    rows = [folder[i] for i in range(12) if i != 5]
    assert all(row["captions"][0] == web.right[int(row["name"][-8:])] for row in rows)
    assert rows[0]["image"] == web.images[0] and len(rows[0]["captions"]) == 2
    found = np.mean([a == b for a, b in zip(web.found, web.right, strict=True)])
    kept = np.mean([text == web.right[int(row["name"][-8:])] for row in rows for text in row["captions"]])
    assert found == 0.5 and kept == 1
    line = json.loads((tmp_path / "out" / "captions.jsonl").read_text().splitlines()[0])
    assert line["scores"] == sorted(line["scores"], reverse=True) and "a red bar" not in line["text"]


def test_a_killed_job_goes_on(tmp_path):
    whole = bootstrap(Web(), captioner, ranker, tmp_path / "whole", batch_size=5)

    def killed(done):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bootstrap(Web(), captioner, ranker, tmp_path / "part", batch_size=5, on_batch=killed)
    path = tmp_path / "part" / "captions.jsonl"
    path.write_text(path.read_text() + '{"image": "ima')  # half a line, as a power failure leaves it
    asked = []

    def counted(examples):
        asked.extend(e["name"] for e in examples)
        return captioner(examples)

    bootstrap(Web(), counted, ranker, tmp_path / "part", batch_size=5)
    assert path.read_bytes() == (tmp_path / "whole" / "captions.jsonl").read_bytes() and len(whole) == 12
    assert asked == [str(i) for i in range(6, 12)]  # number 5 cannot be read
    with pytest.raises(ValueError, match=r"was begun with .*'keep': 2.*this job has .*'keep': 1"):
        bootstrap(Web(), captioner, ranker, tmp_path / "part", keep=1)
    with pytest.raises(ValueError, match="keep is 0"):
        bootstrap(Web(), captioner, ranker, tmp_path / "none", keep=0)


def test_texts_are_cleaned_as_published():
    """LAVIS blip_processors.py: marks become spaces in captions, and vanish from questions."""
    assert clean_caption("A photo (of) a  Cat.\n") == "a photo of a cat"
    assert clean_caption('one: two; "three" ~ four*five!') == "one two three four five"
    assert clean_caption(" ".join(map(str, range(60)))).split() == [str(i) for i in range(50)]
    assert clean_question("What's in the (red) box?  Really!") == "what's in the red box?  really"


def test_tokenizer_files():
    reader, language = TokenizerFile(tiles.reader_tokenizer()), TokenizerFile(tiles.language_tokenizer())
    assert reader.vocab_size == 23 and reader.id("[DEC]") == 22 and language.vocab_size == 24
    text = tiles.CAPTIONS[100]
    assert reader.decode([2, *reader.encode(text.upper()), 3, 0]) == language.decode(language.encode(text)) == text
    assert language.encode(f"{text}\n")[-1] == language.id("\n")
    with pytest.raises(ValueError, match="has no token '<mask>'"):
        language.id("<mask>")
    with pytest.raises(ValueError, match=r"somewhere has no tokenizer.json, got \['vocab.txt'\]"):
        TokenizerFile.of({"vocab.txt": b""}, "somewhere")
    with pytest.raises(ValueError, match="is no tokenizer"):
        TokenizerFile(b"{}")
