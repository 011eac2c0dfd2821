"""generation_config.json: every entry of transformers' class is used, neutral, or refused by name."""

import pytest
from omnax.hub.generation import GENERATION, read_generation
from omnax.hub.keys import HARMLESS, REFUSED


def test_every_entry_of_the_class_has_a_fate():
    from oracles import transformers

    published = set(vars(transformers.GenerationConfig()))
    assert published <= set(GENERATION.keys)
    # What the table knows beyond the class are entries of earlier versions, which moved to generate()
    assert not {name for name in set(GENERATION.keys) - published if GENERATION.keys[name].fate == HARMLESS}


def test_defaults_are_those_of_generate():
    from oracles import transformers

    defaults = transformers.GenerationConfig._get_default_generation_params()
    names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    assert {name: read_generation({})[name] for name in names} == {name: defaults[name] for name in names}
    for name, value in defaults.items():
        if GENERATION.keys[name].fate == REFUSED:
            assert read_generation({name: value}), name


def test_null_is_unset():
    written = dict.fromkeys(GENERATION.keys) | {"do_sample": True}
    assert read_generation(written) == read_generation({"do_sample": True})


@pytest.mark.parametrize("name", [name for name, key in GENERATION.keys.items() if key.fate == REFUSED])
def test_what_is_not_done_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"generation_config.json: '{name}' is"):
        read_generation({name: [[3, 4]]})


def test_the_settings_of_qwens_releases_and_wrong_ones():
    qwen = {"do_sample": True, "eos_token_id": [151645, 151643], "repetition_penalty": 1.05, "temperature": 0.1}
    read = read_generation(qwen | {"top_p": 0.001, "top_k": 1, "pad_token_id": 151643, "transformers_version": "4.49"})
    assert read["eos_token_id"] == (151645, 151643) and read["repetition_penalty"] == 1.05 and read["top_k"] == 1
    assert read_generation({"eos_token_id": 7})["eos_token_id"] == (7,)
    for wrong in ({"eos_token_id": ["</s>"]}, {"top_k": 1.5}, {"temperature": "hot"}, {"num_beam": 4}):
        with pytest.raises(ValueError, match=f"generation_config.json: '{next(iter(wrong))}' is"):
            read_generation(wrong)
