"""Tokens per second of greedy generation beside transformers' generate, on the same small random Qwen-VL.

    python -m omnax.benchmarks.qwen_vl_generation             # Qwen2.5-VL, Qwen3-VL, and that with experts
    python -m omnax.benchmarks.qwen_vl_generation qwen3_vl

Needs torch and transformers (the extra `test`). A prompt of 64 text tokens, 128 new ones, at batch 1 and 8, prefill and
decoding together. The two take turns after a first run of each that compiles; both must write the same tokens.
"""

import sys
import tempfile
from typing import Any

import jax
import numpy as np

from .. import hub
from ..models.generation import Sampling
from ..models.qwen_vl.decoding import Generator
from .vs_torch import Run, oracles, take_turns

PROMPT, NEW, ROUNDS = 64, 128, 5
TEXT = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
}
VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 256}
TOKENS = {"image_token_id": 4000, "video_token_id": 4001, "vision_start_token_id": 4002, "vision_end_token_id": 4003}


QWEN3_ROPE = {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True, "rope_theta": 5e6}
QWEN3_TEXT = TEXT | {"head_dim": 32, "rope_parameters": QWEN3_ROPE}
EXPERTS = {"moe_intermediate_size": 384, "num_experts": 8, "num_experts_per_tok": 2}
DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
# name: class of transformers, text and vision settings
MODELS = {
    "qwen2_5_vl": ("Qwen2_5_VL", TEXT, VISION | {"fullatt_block_indexes": [0], "tokens_per_second": 2}),
    "qwen3_vl": ("Qwen3VL", QWEN3_TEXT, VISION | DEEPSTACK),
    "qwen3_vl_moe": ("Qwen3VLMoe", QWEN3_TEXT | EXPERTS, VISION | DEEPSTACK),
}


def make_oracle(torch: Any, transformers: Any, name: str) -> Any:
    """A random model of transformers, scaled up so that its answers vary."""
    torch.manual_seed(0)
    kind, text, vision = MODELS[name]
    settings = {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    config = getattr(transformers, f"{kind}Config")(**settings, **TOKENS)
    oracle = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    for path, parameter in oracle.named_parameters():
        scaled = torch.randn_like(parameter) * 0.1 if path.endswith("mlp.gate.weight") else parameter * 3
        parameter.copy_(scaled if parameter.ndim > 1 else parameter)
    return oracle


def omnax_run(bundle: hub.Bundle, prompt: np.ndarray) -> Run:
    """Answers [B, NEW] of the model loaded from transformers' files."""
    generator = Generator(bundle.model, Sampling(max_new_tokens=NEW))  # type: ignore[arg-type]
    positions = np.broadcast_to(np.arange(PROMPT, dtype=np.int32)[None, :, None], (len(prompt), PROMPT, 3))
    rows = {
        "tokens": prompt,
        "positions": positions,
        "lengths": np.full(len(prompt), PROMPT, np.int32),
        "rope_delta": np.zeros(len(prompt), np.int32),
    }
    return lambda: generator(bundle.params, rows, jax.random.key(0))


def torch_run(torch: Any, oracle: Any, prompt: np.ndarray) -> Run:
    """The same of transformers' own."""
    ids = torch.tensor(prompt.astype(np.int64))
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "use_cache": True}

    def run() -> np.ndarray:
        with torch.inference_mode():
            tokens = oracle.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return tokens[:, PROMPT:].numpy()

    return run


def main(names: list[str]) -> None:
    """Prints tokens per second of both (medians), and how many times as fast omnax is round by round."""
    torch, transformers = oracles()
    print(f"{'model':<13} {'batch':>5} {'omnax tokens/s':>15} {'transformers':>13} {'ratio':>6} {'from':>6} {'to':>6}")
    for name in names or MODELS:
        oracle = make_oracle(torch, transformers, name)
        with tempfile.TemporaryDirectory() as directory:
            oracle.save_pretrained(directory)
            bundle = hub.load(directory)
        for batch in (1, 8):
            prompt = np.random.default_rng(batch).integers(0, 4000, (batch, PROMPT)).astype(np.int32)
            runs = {"omnax": omnax_run(bundle, prompt), "transformers": torch_run(torch, oracle, prompt)}
            np.testing.assert_array_equal(runs["omnax"](), runs["transformers"]())
            seconds = take_turns(runs, ROUNDS)
            rates = [batch * NEW / np.median(seconds[each]) for each in runs]
            ratios = seconds["transformers"] / seconds["omnax"]
            low, middle, high = ratios.min(), np.median(ratios), ratios.max()
            row = f"{rates[0]:15.0f} {rates[1]:13.0f} {middle:6.2f} {low:6.2f} {high:6.2f}"
            print(f"{name:<13} {batch:>5} {row}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
