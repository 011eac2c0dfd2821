"""BLIP-2 beside transformers on the same random weights: the Q-Former's forward pass, captions greedy and by beams.

    python -m omnax.benchmarks.blip2_generation

Needs torch and transformers (the extra `test`). The published Q-Former reads 257 tokens of width 1408, a batch of 8;
captions of 30 tokens come from a small OPT behind 32 queries, at batch 1 and 8, image and decoding together. The two
take turns after a first run of each that compiles; both must give the same numbers, and write the same tokens.
"""

import tempfile
from typing import Any

import jax
import numpy as np

from .. import hub
from ..models.blip2.decoding import Generator
from ..models.generation import Sampling
from .vs_torch import Run, oracles, take_turns

NEW, ROUNDS, QUERIES, IMAGE_TOKEN = 30, 5, 32, 4000
VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
READER = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768}
TEXT = {"model_type": "opt", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "ffn_dim": 1024}
TEXT |= {"vocab_size": 4096, "max_position_embeddings": 128, "word_embed_proj_dim": 256}


def scaled(torch: Any, model: Any) -> Any:
    """Random weights large enough that answers vary."""
    torch.manual_seed(0)
    for parameter in model.eval().parameters():
        parameter.data = torch.randn(parameter.shape) * (0.08 if parameter.ndim > 1 else 0.1)
    return model


def load(model: Any) -> hub.Bundle:
    """The same model here, from the files that transformers writes."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return hub.load(directory)


def reader_runs(torch: Any, transformers: Any) -> dict[str, Run]:
    """The published Q-Former's image branch."""
    oracle = scaled(torch, transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig()))
    bundle, rng = load(oracle), np.random.default_rng(0)
    queries, image = (rng.normal(size=(8, *shape)).astype(np.float32) for shape in ((QUERIES, 768), (257, 1408)))
    forward = jax.jit(
        lambda params: bundle.model.apply(
            {"params": params}, queries, num_queries=QUERIES, context=image, method="encode"
        )[0]
    )

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            inputs = {"query_embeds": torch.tensor(queries), "encoder_hidden_states": torch.tensor(image)}
            return oracle(**inputs).last_hidden_state.numpy()

    return {"omnax": lambda: np.asarray(forward(bundle.params)), "transformers": theirs}


def caption_runs(torch: Any, oracle: Any, bundle: hub.Bundle, batch: int, beams: int) -> dict[str, Run]:
    """Captions [B, NEW] of images; no token ends one."""
    rng = np.random.default_rng(batch)
    images = rng.normal(size=(batch, 224, 224, 3)).astype(np.float32)
    tokens = np.full((batch, QUERIES + 1), IMAGE_TOKEN, np.int32)
    tokens[:, -1] = 2
    generator = Generator(bundle.model, Sampling(max_new_tokens=NEW, num_beams=beams))  # type: ignore[arg-type]
    pixels, ids = torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(tokens.astype(np.int64))
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "num_beams": beams}

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            said = oracle.generate(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return said[:, QUERIES + 1 :].numpy()

    kept = np.ones(tokens.shape, bool)
    return {"omnax": lambda: generator(bundle.params, images, tokens, kept), "transformers": theirs}


def main() -> None:
    """Prints rates of both (medians), and how many times as fast omnax is round by round."""
    torch, transformers = oracles()
    print(f"{'':>22} {'omnax /s':>10} {'transformers':>13} {'ratio':>6} {'from':>6} {'to':>6}")
    runs = reader_runs(torch, transformers)
    np.testing.assert_allclose(runs["omnax"](), runs["transformers"](), atol=2e-4)
    report("Q-Former, images", runs, 8)
    settings = {"qformer_config": READER, "text_config": TEXT, "num_query_tokens": QUERIES}
    config = transformers.Blip2Config(vision_config=VISION, image_token_index=IMAGE_TOKEN, **settings)
    oracle = scaled(torch, transformers.Blip2ForConditionalGeneration(config))
    bundle = load(oracle)
    for beams in (1, 5):
        for batch in (1, 8):
            runs = caption_runs(torch, oracle, bundle, batch, beams)
            np.testing.assert_array_equal(runs["omnax"](), runs["transformers"]())
            report(f"batch {batch}, beams {beams}, tokens", runs, batch * NEW)


def report(name: str, runs: dict[str, Run], count: int) -> None:
    """One line: `count` things in each run."""
    seconds = take_turns(runs, ROUNDS)
    rates = [count / np.median(seconds[each]) for each in runs]
    ratios = seconds["transformers"] / seconds["omnax"]
    low, middle, high = ratios.min(), np.median(ratios), ratios.max()
    print(f"{name:>22} {rates[0]:10.1f} {rates[1]:13.1f} {middle:6.2f} {low:6.2f} {high:6.2f}", flush=True)


if __name__ == "__main__":
    main()
