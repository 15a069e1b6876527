"""The tests of igpo.py and eval.py, in their order: each formula on numbers worked out by hand or
against a plain loop, each promise once, what a user gets wrong in tables. Run: pytest"""

import ast
import contextlib
import copy
import dataclasses
import dis
import errno
import functools
import gc
import gzip
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import fsdp
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)

import eval as evaluation
import igpo

HERE = Path(__file__).parent
torch.set_num_threads(1)
igpo.setup()

def tiny_tokenizer():
    return igpo.toy_model(0)[1]

V, END, MASK = len(tiny_tokenizer()), tiny_tokenizer().eos_token_id, tiny_tokenizer().mask_token_id

def tiny_model(seed=0, cls=LlamaForCausalLM, **changes):
    """A random bidirectional model whose weights are large, so that its predictions differ."""
    torch.manual_seed(seed)
    config = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=4, initializer_range=0.3,
                  is_causal=False, mask_token_id=MASK, bos_token_id=None, eos_token_id=[END],
                  pad_token_id=END) | changes
    return cls(cls.config_class(**config)).eval()

def random_prompts(rows, length, seed=1):
    return torch.randint(0, min(MASK, END), (rows, length), generator=igpo.seeded(seed))

def padded(rows):
    """Prompts of 5 tokens, the i-th without its first i % 4: -> (rows, 5) ids and mask"""
    prompts = random_prompts(rows, 5).tolist()
    return igpo.pad_prompts([p[i % 4:] for i, p in enumerate(prompts)], tiny_model())

def write_jsonl(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "latin-1")
    return str(path)

LLADA = [  # Llama's names and its own, spelled out once more by hand
    ("model.layers", "blocks"), ("lm_head", "ff_out"), ("model.embed_tokens", "wte"),
    ("model.norm", "ln_f"), ("input_layernorm", "attn_norm"), ("self_attn.o_proj", "attn_out"),
    ("post_attention_layernorm", "ff_norm"), ("mlp.gate_proj", "ff_proj"),
    ("mlp.down_proj", "ff_out"), ("self_attn.", ""), ("mlp.", "")]  # q, k, v and up keep theirs

def llada_folder(folder, tokenizer=None, new_model=tiny_model, **changes):
    """A tiny Llama as a LLaDA checkpoint."""
    tokenizer = tokenizer or tiny_tokenizer()
    rope, weights = {"rope_type": "default", "rope_theta": 5e5}, {}
    model = new_model(rope_parameters=rope, rms_norm_eps=1e-3, **changes)
    for name, weight in model.state_dict().items():
        for ours, theirs in LLADA:
            name = name.replace(ours, theirs)
        weights[f"model.transformer.{name}"] = weight.clone()
    if model.config.tie_word_embeddings:
        del weights["model.transformer.ff_out.weight"]
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")
    write_jsonl(folder / "config.json", dict(
        model_type="llada", auto_map={"AutoConfig": "configuration_llada.LLaDAConfig"},
        d_model=32, mlp_hidden_size=48, n_layers=2, n_heads=4, rms_norm_eps=1e-3, rope_theta=5e5,
        n_kv_heads=changes.get("num_key_value_heads"), max_sequence_length=128,
        vocab_size=len(tokenizer), embedding_size=len(tokenizer),
        weight_tying=model.config.tie_word_embeddings, mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        init_device="meta", block_type="llama", rope=True, attention_dropout=0.0,
        include_bias=False, use_cache=False))
    (folder / "configuration_llada.py").write_text("raise SystemExit('remote code was run')")
    return model

# --- Random streams

def test_streams_of_a_run_do_not_meet():
    """torch's generator keeps 32 bits of a seed. 25,600 streams have 0.08 collisions among them."""
    keys = [(seed, "rollout", step, i)
            for seed in (3, 4) for step in range(200) for i in range(64)]
    first = {tuple(torch.rand(4, generator=igpo.seeded(*key)).tolist()) for key in keys}
    assert len(keys) == 25_600 and len(first) >= len(keys) - 3
    again, *others = (torch.rand(9, generator=igpo.seeded(*key))
                      for key in [keys[0], (3, "rollout", 0, 1), (3, "sft", 0, 0), (3,)])
    assert torch.equal(again, torch.rand(9, generator=igpo.seeded(3, "rollout", 0, 0)))
    assert not any(torch.equal(again, other) for other in others)

# --- 1. The sampler

def test_the_first_end_token_is_counted():
    ids = torch.tensor([[1, 3, END, 3, END], [2, 1, 1, 1, 1], [1, 3, 3, 4, 5]])
    counted = igpo.counted_tokens(ids, [END, 2])
    assert counted.tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4, [True] * 5]
    assert torch.equal(igpo.counted_tokens(ids[0], END), counted[0])  # of any shape, one end token

def test_places_in_descending_order():
    values = torch.tensor([[0.2, 0.9, 0.5, 0.1], [1.0, 2.0, 1.0, 2.0]])
    assert igpo.descending_places(values).tolist() == [[2, 0, 1, 3], [2, 0, 3, 1]]  # stable
    many = torch.randn(50, generator=igpo.seeded(0))
    assert igpo.descending_places(many).tolist() == [(many > x).sum().item() for x in many]

def test_prompts_are_padded_on_the_left():
    model = tiny_model(pad_token_id=0)
    ids, mask = igpo.pad_prompts([[5, 6, 7], [8]], model)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert [x.numel() for x in igpo.pad_prompts([], model)] == [0, 0]

@torch.no_grad()
def published_sampler(model, prompt, hints, W, steps, threshold=None, temperature=0.0, noise=None):
    """LLaDA's, for one unpadded row. Above a threshold all are filled in.

    noise: (blocks, steps per block, W) numbers, in place of the published noise for each word
    """
    x, P = torch.cat([prompt, hints]), len(prompt)
    S = steps * W // len(hints) if threshold is None else W
    for block in range(len(hints) // W):
        start = P + block * W
        places = range(start, start + W)
        total = sum(x[i] == MASK for i in places)
        for step in range(S):
            logits = model(input_ids=x[None]).logits[0].double()
            p = logits.softmax(-1)
            logits[:, MASK] = -math.inf
            best = logits.argmax(-1)
            if temperature:
                up_to = (logits / temperature).softmax(-1).cumsum(-1)
                for i in places:
                    best[i] = (up_to[i] <= noise[block, step, i - start]).sum()
            sure = p[range(len(x)), best]
            count = total // S + (step < total % S)
            masks = [i for i in places if x[i] == MASK]
            for place, i in enumerate(sorted(masks, key=lambda i: -sure[i])):
                if place < count or threshold is not None and sure[i] > threshold:
                    x[i] = best[i]
    return x[P:]

@pytest.mark.parametrize("W, steps, threshold", [
    (12, 5, None), (4, 6, None), (4, 3, 0.0), (4, 3, 0.4), (12, 1, 0.2)])
def test_sampling_is_the_published_sampler(W, steps, threshold):
    model, (prompts, mask) = tiny_model(2), padded(3)
    given, seen = torch.rand(3, 12, generator=igpo.seeded(4)) < 0.3, []
    hints = torch.where(given, random_prompts(3, 12, 5), MASK)
    settings = dict(gen_length=12, block_length=W, steps=steps, threshold=threshold, hints=hints,
                    prompt_mask=mask)
    out = igpo.sample(model, prompts, watch=lambda x: seen.append(x.clone()), **settings)
    hot = igpo.sample(model, prompts, temperature=1.5, generator=igpo.seeded(6), **settings)
    assert torch.equal(seen[-1], out) and not torch.equal(hot, out)
    S = W if threshold is not None else steps * W // 12
    noise = torch.rand(3, 12 // W, S, W, generator=igpo.seeded(6))
    for i in range(3):
        row = model, prompts[i][mask[i]], hints[i], W, steps, threshold
        assert torch.equal(out[i], published_sampler(*row))
        assert torch.equal(hot[i], published_sampler(*row, temperature=1.5, noise=noise[i]))

def test_the_first_steps_take_the_remainder():
    """Ten masks in four steps are 3, 3, 2, 2; one mask is filled in by the first step."""
    shown = []
    hints = torch.full((2, 10), MASK)
    hints[1, 1:] = 7
    igpo.sample(tiny_model(), random_prompts(2, 3), gen_length=10, block_length=10, steps=4,
                hints=hints, watch=lambda x: shown.append((x == MASK).sum(1).tolist()))
    assert shown == [[7, 0], [4, 0], [2, 0], [0, 0]]

def test_the_draw_has_the_softmax_distribution():
    """The mask id, far ahead, is never chosen, yet it counts in the confidence."""
    logits = torch.randn(128, generator=igpo.seeded(0)) * 2
    logits[5], logits[-3:] = 30.0, -200.0
    allowed = logits.index_fill(0, torch.tensor(5), -math.inf)
    u = torch.linspace(0, 1 - 1e-6, 20000)
    tokens, confidence = igpo.choose_tokens(logits.expand(20000, 128), 5, 0.7, u)
    share = tokens.bincount(minlength=128) / 20000
    assert torch.allclose(share, (allowed / 0.7).softmax(-1), atol=1e-3)
    assert torch.allclose(confidence, logits.log_softmax(-1)[tokens], rtol=1e-4)

def test_no_token_past_the_last_one_is_drawn():
    """LLaDA has 126,464 words. In float32 the sum of their probabilities is up to 4e-4 below 1."""
    logits = torch.zeros(5, 126464)
    logits[:, 0] = torch.tensor([8.0, 11, 12, 13, 15])
    tokens, _ = igpo.choose_tokens(logits, 5, 1.0, torch.full((5,), 1 - 1e-6))
    assert (tokens < 126464).all()

def test_noise_belongs_to_its_generator():
    one, two = (torch.rand(2, 3, generator=igpo.seeded(s)) for s in (1, 2))
    assert torch.equal(igpo.uniform_noise((2, 3), igpo.seeded(1), "cpu"), one)
    both = igpo.uniform_noise((4, 3), [igpo.seeded(1), igpo.seeded(2)], "cpu")
    assert torch.equal(both, torch.cat([one, two]))
    below_one = igpo.uniform_noise((3000, 3000), igpo.seeded(1), "cpu").max()
    assert 0.9999 < below_one < 1 - 5e-7

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_are_named(bad, temperature):
    model = tiny_model()
    model.lm_head.weight.data[3, 4] = bad
    with pytest.raises(igpo.UsageError, match="logits are not finite"):
        igpo.sample(model, random_prompts(2, 3), gen_length=4, block_length=4, steps=2,
                    temperature=temperature)

def test_a_word_of_probability_zero_is_no_error():
    logits = torch.tensor([[1.0, -math.inf, 2.0, -math.inf], [-math.inf, 1.0, 0.0, -math.inf]])
    for temperature, u in (0.0, None), (1.0, torch.tensor([0.999, 0.0])):
        tokens, confidence = igpo.choose_tokens(logits, 3, temperature, u)
        assert tokens.tolist() == [2, 1] and confidence.isfinite().all()

def test_a_tiny_temperature_is_greedy():
    model, (prompts, mask) = tiny_model(2), padded(3)
    settings = dict(gen_length=12, block_length=4, steps=6, prompt_mask=mask)
    greedy = igpo.sample(model, prompts, **settings)
    for temperature in 1e-40, 1e-6:
        drawn = igpo.sample(model, prompts, temperature=temperature, generator=igpo.seeded(1),
                            **settings)
        assert torch.equal(drawn, greedy)
    hot = igpo.sample(model, prompts, temperature=1.0, generator=igpo.seeded(1), **settings)
    assert not torch.equal(hot, greedy)

def test_lengths_must_fit():
    for lengths in (21, 8, 4), (16, 8, 3), (4, 8, 2):
        with pytest.raises(igpo.UsageError, match="gen_length {} .*_length {}.*_steps {}".format(
                *lengths)):
            igpo.count_blocks(*lengths)
    assert igpo.count_blocks(256, 32, 128) == 8

def test_each_prompt_is_sampled_by_itself():
    """Whatever else is in the batch, which a row leaves as it ends."""
    model, (prompts, mask) = tiny_model(2), padded(16)
    model.lm_head.weight.data[END] *= 2  # so that rows end at different places
    settings = dict(gen_length=24, block_length=4, steps=24, temperature=0.5)
    hints = random_prompts(16, 48).view(16, 2, 24).where(torch.arange(24) == 2, MASK)
    out = igpo.sample_groups(model, prompts, mask, [igpo.seeded(i) for i in range(16)], hints,
                             group_size=2, rows_per_call=12, stop_early=True, **settings)
    full = torch.stack([
        igpo.sample(model, prompts[[i, i]], prompt_mask=mask[[i, i]], hints=hints[i],
                    generator=igpo.seeded(i), **settings) for i in range(16)])
    blocks = (igpo.counted_tokens(full, END).sum(-1, keepdim=True) + 3) // 4
    assert torch.equal(out, torch.where(torch.arange(24) < 4 * blocks, full, END))
    assert len(blocks.unique()) > 3

def test_an_end_token_in_a_later_hint_ends_nothing_yet():
    model, hints = tiny_model(2), torch.full((2, 12), MASK)
    model.lm_head.weight.data[END] = 0
    hints[0, 9] = END
    settings = dict(gen_length=12, block_length=4, steps=6, hints=hints)
    out = igpo.sample(model, random_prompts(2, 5), stop_early=True, **settings)
    assert (out == END).nonzero().tolist() == [[0, 9]]
    assert torch.equal(out, igpo.sample(model, random_prompts(2, 5), **settings))

@pytest.mark.parametrize("cls, shift", [(LlamaForCausalLM, 0), (Qwen2ForCausalLM, 1)])
def test_the_cache_computes_the_block_alone(cls, shift):
    """With one layer, keys and values depend on their own token alone: the cache is exact."""
    model, shapes = tiny_model(2, cls, num_hidden_layers=1, logit_shift=shift), []
    model.register_forward_hook(lambda _, args, inputs, output: shapes.append(
        (*inputs["input_ids"].shape, *output.logits.shape)), with_kwargs=True)
    prompts, mask = padded(2)
    settings = dict(gen_length=12, block_length=4, steps=12, prompt_mask=mask)
    exact = igpo.sample(model, prompts, **settings)
    assert torch.equal(igpo.sample(model, prompts, cache="block", **settings), exact)
    whole, block = (2, 5 + 12, 2, 4, V), (2, 4 + shift, 2, 4, V)  # ids, logits
    assert shapes == [whole] * 12 + [whole, block, block, block] * 3
    with pytest.raises(ValueError, match="cache is None or 'block', not 'dual'"):
        igpo.sample(model, prompts, cache="dual", **settings)

def test_dream_is_read_one_to_the_left():
    model, ids = tiny_model(2, Qwen2ForCausalLM, logit_shift=1), random_prompts(2, 9)
    logits = igpo.logits_at(model, ids, None, torch.arange(4, 7))
    assert torch.allclose(logits, model(ids).logits[:, 3:6], atol=1e-5)

def test_the_sampler_costs_what_its_forwards_cost():
    """CPU time of 32 steps, over that of 32 passes of the model. It is about 1.0, cached 0.4."""
    model = tiny_model(hidden_size=256, eos_token_id=None, pad_token_id=None)
    prompts, canvas = random_prompts(2, 128), random_prompts(2, 256)
    settings = dict(gen_length=128, block_length=32, steps=32)

    def seconds(work):
        began = time.process_time()
        work()
        return time.process_time() - began

    @torch.no_grad()
    def bare():
        for _ in range(32):
            igpo.logits_at(model, canvas, None, torch.arange(128, 160))

    rounds = [[seconds(work) for work in (
        bare, lambda: igpo.sample(model, prompts, **settings),
        lambda: igpo.sample(model, prompts, cache="block", **settings))] for _ in range(4)]
    base, exact, cached = map(min, zip(*rounds))
    assert exact < 1.6 * base and cached < 0.8 * base

# --- 2. Hints

def test_the_example_of_a_hint():
    """The trace 1 2 | 3 4 5 | 6 7 and one of its three chunks."""
    M = 0
    hints = [igpo.make_hint(range(1, 8), 0.4, gen_length=9, mask_id=M, min_chunk=2, max_chunk=3,
                            room=2, generator=igpo.seeded(seed)).tolist() for seed in range(99)]
    assert [M, M, 3, 4, 5, M, M, M, M] in hints
    assert all(hint[7:] == [M, M] and 1 <= sum(x != M for x in hint) <= 3 for hint in hints)

def test_a_hint_is_floor_eta_N_chunks():
    trace, five = torch.arange(1, 999), dict(mask_id=0, min_chunk=5, max_chunk=5)
    for ratio, chunks in (0, 0), (0.001, 1), (0.29, 29), (0.999, 99), (1, 100):
        hint, again = (igpo.make_hint(trace, ratio, gen_length=600, room=102, **five,
                                      generator=igpo.seeded(1)) for _ in range(2))
        given = hint[:498] != 0  # 100 chunks, the last of 3 tokens
        assert torch.equal(hint, again)
        assert torch.equal(hint, F.pad(trace[:498] * given, (0, 102)))  # room for the answer
        pieces = given.split(5)
        assert sum(map(torch.any, pieces)) == sum(map(torch.all, pieces)) == chunks
    assert igpo.make_hint(trace, 1, gen_length=32, **five).tolist() == [1, 2] + [0] * 30
    assert igpo.make_hint(trace, 1, gen_length=2, **five).tolist() == [0, 0]
    assert igpo.make_hint([], 1, gen_length=40, **five).tolist() == [0] * 40

def test_chunks_have_any_length_within_bounds():
    hints = [igpo.make_hint(torch.arange(40), 1e-9, gen_length=70, mask_id=99,
                            generator=igpo.seeded(seed)) for seed in range(300)]
    chunks = [hint[hint != 99].tolist() for hint in hints]  # one of each
    assert set().union(*chunks) == set(range(40))
    assert {len(c) for c in chunks if c[-1] < 39} == {5, 6, 7, 8, 9, 10}  # the last may be shorter

# --- 3. Elastic roll-out

G, L, TRACE = 8, 6, torch.arange(10, 16)

def test_the_example_of_a_rescue():
    """A response is one token. Four are wrong; of four more, three are 42 and two are taken."""
    own, second = (torch.tensor(x).view(1, 4, 1) for x in ([17, 9, 4, 24], [42, 8, 42, 42]))
    groups = igpo.elastic_rollout(
        lambda prompts, mask, generators, hints: own if hints is None else second,
        lambda completion, answer: completion.item() == answer, torch.zeros(1, 1),
        torch.ones(1, 1).bool(), [42], [[7]], [igpo.seeded(0)], mask_id=99, lam=0.5,
        eta_range=(1, 1), room=0)
    assert groups.completions.flatten().tolist() == [42, 42, 4, 24]
    assert groups.correct.tolist() == [[True, True, False, False]]
    assert groups.hinted.flatten().tolist() == [True, True, False, False]
    assert groups.own.flatten().tolist() == [17, 9, 4, 24] and not groups.own_correct.any()
    assert groups.second_correct.tolist() == [[True, False, True, True]]
    assert groups.stuck == [0] and groups.hints.flatten().tolist() == [7] * 4
    assert groups.etas.tolist() == [[1, 1, 1, 1]]

def test_all_wrong_groups_are_augmented():
    """Prompt n is the token n and has the generator of seed n. A response is right if it begins
    with a 1: one of prompt 1's; in the second draw three of prompt 0's and all of prompt 2's."""
    first = torch.tensor([[0] * G, [1] + [0] * 7, [2] * G, [0] * G])
    again = torch.tensor([[0] * 5 + [1] * 3, [1] * G])
    prompts, traces = torch.arange(4)[:, None], [TRACE] * 3 + [None]  # without a trace no hint

    def draw(prompts, prompt_mask, generators, hints):
        draws.append((prompts[:, 0].tolist(), hints))
        assert [g.initial_seed() for g in generators] == draws[-1][0]
        assert prompt_mask[:, 0].tolist() == [n > 0 for n in draws[-1][0]]
        out = torch.randint(99, (len(prompts), G, L))
        out[..., 0] = first if hints is None else again
        return out

    for algo, lam, *replaced in [("grpo", 0.5), ("resample", 0.5, 3, 4), ("igpo", 0.3, 2, 2),
                                 ("igpo", 0.5, 3, 4), ("igpo", 1.0, 3, 8)]:
        draws = []
        out = igpo.elastic_rollout(
            draw, lambda o, answer: o[0].item() == answer, prompts, prompts > 0, [1] * 4, traces,
            [torch.Generator().manual_seed(n) for n in range(4)], mask_id=MASK, algo=algo,
            lam=lam, eta_range=(0.4, 0.9), min_chunk=1, max_chunk=1, room=0)
        assert torch.equal(out.own_correct, first == 1)
        assert torch.equal(out.correct, out.completions[..., 0] == 1)
        want, hinted = out.own.clone(), torch.zeros(4, G, L).bool()
        assert (out.own[..., 0] == first).all()  # the swap leaves what the policy drew as it was
        if algo == "grpo":
            assert out.stuck == [] and len(out.second) == len(out.hints) == len(out.etas) == 0
        else:  # resample is sample-matched: it draws what igpo would
            asked, hints = draws[1]
            given = hints != MASK
            assert asked == out.stuck == [0, 2]
            assert torch.equal(hints, torch.where(given, TRACE, MASK))
            assert torch.equal(hints, out.hints) and torch.equal(out.second_correct, again == 1)
            counts = given.sum(-1)  # of six chunks, with an eta for each response
            assert set(counts.flatten().tolist()) == ({2, 3, 4, 5} if algo == "igpo" else {0})
            assert torch.equal(counts, (out.etas * 6).floor().long())
            for s, n, K in zip([0, 1], [0, 2], replaced):  # a hint mask goes with its response
                winners = again[s].nonzero().flatten()[:K]
                want[n, :K], hinted[n, :K] = out.second[s, winners], given[s, winners]
        assert torch.equal(out.completions, want) and torch.equal(out.hinted, hinted)
        assert len(draws) == 1 + (algo != "grpo")

@pytest.mark.parametrize("algo, sizes", [("grpo", [2]), ("resample", [2, 0]), ("igpo", [2, 0])])
def test_the_second_draw_is_called_for_no_prompts_too(algo, sizes):
    """Among several processes all must take part in it."""
    drawn = []

    def draw(prompts, prompt_mask, generators, hints):
        drawn.append(len(prompts))
        assert len(prompt_mask) == len(generators) == drawn[-1]
        assert hints is None or hints.shape == (0, G, L)
        return torch.ones(len(prompts), G, L).long()

    groups = igpo.elastic_rollout(
        draw, lambda o, answer: True, torch.zeros(2, 1), torch.ones(2, 1).bool(), [1] * 2,
        [TRACE] * 2, [igpo.seeded(0)] * 2, mask_id=MASK, algo=algo)
    assert drawn == sizes and groups.correct.all() and not groups.hinted.any()
    assert groups.second.shape == groups.hints.shape == (0, G, L)
    assert groups.second_correct.shape == groups.etas.shape == (0, G)

def test_lambda_in_floating_point():
    """floor(0.29 * 100) is 29, although the product of the floats is 28.999999999999996."""
    def draw(prompts, prompt_mask, generators, hints):
        return torch.full((1, 100, 1), 0 if hints is None else 1)

    groups = igpo.elastic_rollout(
        draw, lambda o, answer: o.item() == answer, torch.zeros(1, 1), torch.ones(1, 1).bool(),
        [1], [[5]], [igpo.seeded(0)], mask_id=99, lam=0.29)
    assert groups.correct.sum() == 29

LENGTHS = [260, 61, 171, 74, 128, 83, 110, 97]

def test_prompts_of_like_length_share_a_call():
    """Sorted, two prompts a call are 74, 97, 128 and 260 tokens wide: 0.63 of 8 times 260."""
    model, positions = tiny_model(2), []
    prompts = [random_prompts(1, length, seed=length)[0] for length in LENGTHS]
    ids, mask = igpo.pad_prompts([prompt.tolist() for prompt in prompts], model)
    hints = torch.full((8, 4, 64), MASK)
    hints[torch.arange(8), :, 5 + torch.arange(8)] = torch.arange(8)[:, None]  # each has its own
    settings = dict(gen_length=64, block_length=32, steps=4, temperature=0.7)
    hook = model.register_forward_hook(
        lambda _, args, inputs, output: positions.append(inputs["input_ids"].numel()),
        with_kwargs=True)
    drawn = igpo.sample_groups(model, ids, mask, [igpo.seeded(i) for i in range(8)], hints,
                               group_size=4, rows_per_call=8, **settings)
    hook.remove()
    assert sum(positions) <= 0.63 * 4 * (8 * 4 * (260 + 64))  # 4 steps of 8 groups of 4
    assert [len(positions), drawn.shape] == [4 * 4, (8, 4, 64)]
    for i, prompt in enumerate(prompts):
        alone = igpo.sample(model, prompt.expand(4, -1), hints=hints[i], generator=igpo.seeded(i),
                            **settings)
        assert torch.equal(drawn[i], alone)
        assert (drawn[i, :, 5 + i] == i).all()
    nothing = igpo.sample_groups(model, ids[:0], mask[:0], [], group_size=4, rows_per_call=8,
                                 **settings)
    assert nothing.shape == (0, 4, 64)

@pytest.mark.parametrize("rows_per_call, rows", [(1, [4] * 3), (8, [8, 4]), (11, [8, 4])])
def test_whole_groups_are_sampled_at_once(rows_per_call, rows):
    model, (prompts, mask), seen = tiny_model(), padded(3), []
    model.register_forward_hook(
        lambda _, args, inputs, output: seen.append(len(inputs["input_ids"])), with_kwargs=True)
    igpo.sample_groups(model, prompts, mask, [None] * 3, group_size=4, gen_length=4,
                       rows_per_call=rows_per_call, block_length=4, steps=1)
    assert seen == rows

# Processes as threads: what they exchange is pickled, as between real ones.

def in_threads(monkeypatch, count, work):
    """work(rank) in `count` threads, each of which takes itself for a process -> their results"""
    this, meeting, slots = threading.local(), threading.Barrier(count, timeout=60), [None] * count

    def gather_objects(value):
        slots[this.rank] = pickle.dumps(value)
        meeting.wait()
        values = [pickle.loads(slot) for slot in slots]
        meeting.wait()
        return values

    def run(rank):
        this.rank = rank
        return work(rank)

    monkeypatch.setattr(igpo, "rank", lambda: this.rank)
    monkeypatch.setattr(igpo, "world", lambda: count)
    monkeypatch.setattr(igpo, "gather_objects", gather_objects)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))

def test_stuck_groups_are_dealt_out_evenly(monkeypatch):
    """Process 0 has five stuck groups, 1 has none and 2 has two: they draw 3, 2 and 2."""
    model, (prompts, mask) = tiny_model(2), padded(7)
    hints = random_prompts(7, 2 * 8).view(7, 2, 8).where(torch.arange(8) == 2, MASK)
    parts, sizes = [slice(0, 5), slice(5, 5), slice(5, 7)], {}

    def streams():
        """Each has been used before, as the first draw and the hints have done."""
        streams = [igpo.seeded(i) for i in range(7)]
        for i, stream in enumerate(streams):
            torch.rand(i, generator=stream)
        return streams

    def draw(prompts, prompt_mask, generators, hints):
        sizes[igpo.rank()] = len(prompts)
        return igpo.sample_groups(model, prompts, prompt_mask, generators, hints, group_size=2,
                                  rows_per_call=4, gen_length=8, block_length=4, steps=4,
                                  temperature=1.0)

    alone = draw(prompts, mask, streams(), hints)
    everyones = in_threads(monkeypatch, 3, lambda r: igpo.draw_together(
        draw, model, prompts[parts[r]], mask[parts[r]], streams()[parts[r]], hints[parts[r]]))
    assert sizes == {0: 3, 1: 2, 2: 2}
    for part, tokens in zip(parts, everyones):
        assert tokens.dtype == torch.long and torch.equal(tokens, alone[part])

    sizes.clear()  # nothing is stuck anywhere
    nothing = in_threads(monkeypatch, 2, lambda r: igpo.draw_together(
        draw, model, prompts[:0], mask[:0], [], hints[:0]))
    assert sizes == {} and [tuple(x.shape) for x in nothing] == [(0, 2, 8)] * 2

# --- 4. Log-probabilities

def test_one_forward_serves_the_group():
    """Here each row runs by itself, and without padding."""
    model, (prompts, mask) = tiny_model(1), padded(2)
    completions = torch.randint(0, V, (2, 3, 7), generator=igpo.seeded(0))
    logps, entropy = igpo.completion_logps(model, prompts, completions, prompt_mask=mask)
    for n in range(2):
        canvas = torch.cat([prompts[n][mask[n]], torch.full((7,), MASK)])
        table = model(canvas[None]).logits[0, -7:].log_softmax(-1)
        for g in range(3):
            assert torch.allclose(logps[n, g], table[range(7), completions[n, g]], atol=1e-4)
        assert torch.allclose(entropy[n], -(table.exp() * table).sum(-1), atol=1e-4)
    assert logps.requires_grad and not entropy.requires_grad  # the entropy selects, no more

def stub_model(logits):
    """A model that predicts these (T, V) logits whatever it reads."""
    class Stub:
        config = types.SimpleNamespace(mask_token_id=0)

        def __call__(self, input_ids, logits_to_keep, **_):
            kept = logits[logits_to_keep].expand(len(input_ids), -1, -1)
            return types.SimpleNamespace(logits=kept)
    return Stub()

def test_a_word_without_probability_adds_no_entropy():
    """Two words at 1/2 and one at 0 have an entropy of log 2."""
    logits = torch.zeros(3, 3)
    logits[:, 2] = -math.inf
    logits.requires_grad_()
    logps, entropy = igpo.completion_logps(
        stub_model(logits), torch.tensor([[1]]), torch.tensor([[[1, 0], [1, 2]]]))
    assert entropy.tolist() == [pytest.approx([math.log(2)] * 2)]
    assert logps.tolist() == [[pytest.approx([-math.log(2)] * 2), [pytest.approx(-math.log(2)),
                                                                   -math.inf]]]
    logps[0, 0].sum().backward()
    assert logits.grad[1:].tolist() == [[-0.5, 0.5, 0], [0.5, -0.5, 0]]

# --- 5. Advantages, entropy filter and loss

def test_advantages_are_centred_not_scaled():
    rewards = torch.tensor([[True, False, False, False], [True, True, False, False],
                            [False] * 4])
    want = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0.0] * 4])
    assert torch.equal(igpo.group_advantages(rewards), want)
    assert torch.equal(igpo.group_advantages(rewards * 3), 3 * want)

def test_the_most_uncertain_hints_learn():
    entropy = torch.tensor([[0.5, 3.0, 0.1, 2.0, 9.0, 1.0]])
    hints = torch.tensor([[[1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1]]]).bool()
    for keep, first, second in [
            (0, [4], [0, 1, 2, 3]), (1e-5, [1, 4], [0, 1, 2, 3, 4]),
            (0.5, [1, 3, 4, 5], [0, 1, 2, 3, 4]), (1, range(6), range(6))]:
        learn = igpo.entropy_filter(entropy, hints, keep)
        assert [row.nonzero().flatten().tolist() for row in learn[0]] == [[*first], [*second]]
        for g in range(2):  # an entropy for each response
            assert torch.equal(igpo.entropy_filter(entropy, hints[:, g], keep), learn[:, g])
    example = igpo.entropy_filter(entropy[0, :5], torch.arange(5) < 4, 0.5)  # of the docstring
    assert example.nonzero().flatten().tolist() == [1, 3, 4]
    for H, keep, kept in (170, 0.3, 51), (100, 0.07, 7):  # also in floating point
        assert igpo.entropy_filter(torch.rand(H), torch.ones(H).bool(), keep).sum() == kept

def test_the_policy_loss():
    """As a loop over the tokens that learn, with its gradient."""
    g = igpo.seeded(2)
    logps, old, ref = (-torch.rand(2, 4, 6, generator=g) * 4 for _ in range(3))
    A, mask = torch.randn(2, 4, generator=g), torch.rand(2, 4, 6, generator=g) < 0.7
    mask[1, 3] = False  # a response of which nothing learns adds nothing, and no nan
    logps.requires_grad_()
    for kind in "sequence", "token":
        want = torch.zeros(4)
        for n, i, k in mask.nonzero().tolist():
            rho = (logps - old)[n, i, mask[n, i] if kind == "sequence" else [k]].mean().exp()
            full, clipped = rho * A[n, i], rho.clamp(0.8, 1.2) * A[n, i]
            x = (ref - logps)[n, i, k].exp()
            kl = x - 1 - x.log()  # k3
            row = [0.3 * kl - min(full, clipped), kl, rho, (clipped < full).float()]
            want = want + torch.stack(row) / mask[n, i].sum() / 8
        loss, found = igpo.policy_loss(logps, old, ref, A, mask, epsilon=0.2, beta=0.3, ratio=kind)
        assert [loss.item(), *found.values()] == pytest.approx(want.tolist(), rel=1e-4)
        assert torch.allclose(*(torch.autograd.grad(y, logps)[0] for y in (loss, want[0])))
    assert list(found) == ["kl", "ratio", "clip_fraction"]
    loss, found = igpo.policy_loss(logps, old, None, A, mask, beta=0)
    assert found["kl"] == 0 and loss.isfinite()
    default = igpo.policy_loss(logps, old, ref, A, mask)[0]
    assert default == igpo.policy_loss(logps, old, ref, A, mask, epsilon=0.2, beta=0.01,
                                       ratio="sequence")[0]
    with pytest.raises(ValueError, match="ratio is 'sequence' or 'token', not 'words'"):
        igpo.policy_loss(logps, old, ref, A, mask, ratio="words")

@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [-200.0, 200.0, -math.inf])
def test_what_does_not_learn_reaches_no_number(ratio, which, value):
    """The same bits, whatever logps, old_logps or ref_logps hold there."""
    g = igpo.seeded(5)
    given = [-torch.rand(2, 3, 7, generator=g) * 2 for _ in range(3)]
    A, mask = torch.randn(2, 3, generator=g), torch.rand(2, 3, 7, generator=g) < 0.6

    def outcome(tensors):
        logps = tensors[0].clone().requires_grad_()
        loss, metrics = igpo.policy_loss(logps, *tensors[1:], A, mask, ratio=ratio, beta=0.5)
        loss.backward()
        return loss, logps.grad, metrics

    loss, gradient, metrics = outcome(given)
    given[which] = given[which].masked_fill(~mask, value)
    loss_again, gradient_again, metrics_again = outcome(given)
    assert torch.equal(loss, loss_again) and metrics == metrics_again
    assert torch.equal(gradient, gradient_again)
    assert gradient[mask].all() and not gradient[~mask].any()

# --- 6. The SFT loss

def test_the_sft_loss():
    model, (prompts, mask) = tiny_model(1), padded(3)
    completions = F.pad(random_prompts(3, 5, 2), (0, 3), value=END)
    t, nll = torch.tensor([0.3, 0.6, 0.9]), torch.zeros(3)
    loss, metrics = igpo.sft_loss(model, prompts, completions, prompt_mask=mask, t=t,
                                  generator=igpo.seeded(7))
    masked = igpo.uniform_noise((3, 8), igpo.seeded(7), "cpu") < t[:, None]
    for b in range(3):
        canvas = torch.cat([prompts[b][mask[b]], torch.where(masked[b], MASK, completions[b])])
        logps = model(canvas[None]).logits[0, -8:].log_softmax(-1)[range(8), completions[b]]
        nll[b] = -logps[masked[b]].sum()
    assert loss.item() == pytest.approx((nll / t).sum().item() / (3 * 8), rel=1e-4)
    assert metrics["nll"] == pytest.approx((nll.sum() / masked.sum()).item(), rel=1e-4)
    assert metrics["masked"] == pytest.approx(masked.sum().item() / (3 * 8))
    loss, metrics = igpo.sft_loss(model, prompts, completions, t=torch.full((3,), 1e-9))
    assert loss.item() == 0 and metrics == {"nll": 0.0, "masked": 0.0}
    _, metrics = igpo.sft_loss(model, random_prompts(400, 1), random_prompts(400, 9))
    assert 0.4 < metrics["masked"] < 0.6  # t is uniform

def test_what_is_not_masked_reaches_no_sft_loss():
    """A word of the text that the model rules out (-inf), where it is not masked."""
    completions = torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2]])
    masked = igpo.uniform_noise((1, 8), igpo.seeded(3), "cpu") < 0.5
    logits = torch.randn(9, 4, generator=igpo.seeded(1))
    assert masked.any() and not masked.all()

    def outcome(logits):
        logits = logits.clone().requires_grad_()
        loss, metrics = igpo.sft_loss(stub_model(logits), torch.tensor([[3]]), completions,
                                      t=torch.tensor([0.5]), generator=igpo.seeded(3))
        loss.backward()
        return loss, logits.grad, metrics

    loss, gradient, metrics = outcome(logits)
    for k in (~masked[0]).nonzero().flatten():
        logits[1 + k, completions[0, k]] = -math.inf
    loss_again, gradient_again, metrics_again = outcome(logits)
    assert torch.equal(loss, loss_again) and metrics == metrics_again
    assert torch.equal(gradient, gradient_again)
    assert gradient[1:][masked[0]].all() and not gradient[1:][~masked[0]].any()

# --- Each public function lifts out of igpo.py with the names that it needs, and nothing else.

CACHE = {"make_block_cache", "cached_logits_at"}  # of a branch that the exact sampler never takes
LIFTS = [  # the lines to copy, at most, and a test that the copy passes too
    ("seeded", 8, test_streams_of_a_run_do_not_meet),
    ("sample", 190, test_each_prompt_is_sampled_by_itself),
    ("sample_groups", 216, test_each_prompt_is_sampled_by_itself),
    ("make_hint", 38, test_a_hint_is_floor_eta_N_chunks),
    ("elastic_rollout", 130, test_all_wrong_groups_are_augmented),
    ("completion_logps", 48, test_one_forward_serves_the_group),
    ("group_advantages", 12, test_advantages_are_centred_not_scaled),
    ("entropy_filter", 32, test_the_most_uncertain_hints_learn),
    ("policy_loss", 50, test_the_policy_loss),
    ("sft_loss", 70, test_the_sft_loss)]

@pytest.mark.parametrize("name, most, check", LIFTS)
def test_each_public_function_lifts_out(name, most, check, monkeypatch, tmp_path):
    binds, reads, needed, before = {}, {}, {name}, None
    exact = CACHE if name.startswith("sample") else set()
    for node in ast.parse((HERE / "igpo.py").read_text()).body:
        codes = [compile(ast.Module([node], []), "igpo.py", "exec")]
        for code in codes:  # functions
            codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        steps = [step for code in codes for step in dis.get_instructions(code)]
        binds[node] = {step.argval for step in steps if step.opname == "STORE_NAME"}
        reads[node] = {step.argval for step in steps if step.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
    while needed != before:
        before, nodes = needed, [node for node in binds if binds[node] & needed]
        needed = needed.union(*map(reads.get, nodes)) - exact
    lifted = {"__name__": "lifted"}
    exec(compile(ast.Module(nodes, []), "lifted", "exec"), lifted)
    monkeypatch.setattr(igpo, name, lifted[name])
    check(*[tmp_path] * check.__code__.co_argcount)
    copied = [node for node in nodes if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("cache" in key.lower() for node in nodes for key in binds[node])
    lines = sum(node.end_lineno - node.lineno + 1 + len(getattr(node, "decorator_list", []))
                for node in copied)
    print(f"{name}: {lines} lines copied")
    assert lines <= most

# --- 7 and 8. The loops, on a random model and a few problems, against plain loops.

def arbitrary(completion, reference):
    """In place of grade: a random model's answers are never right, and IGPO would have no work."""
    return completion == rf"\boxed{{{reference}}}" or zlib.crc32(completion.encode()) % 8 == 0

@pytest.fixture
def arbitrary_grades(monkeypatch):
    monkeypatch.setattr(igpo, "grade", arbitrary)

@pytest.fixture
def saved(monkeypatch):
    """No checkpoint is written; what would have been, as (stage, step)."""
    steps = []
    monkeypatch.setattr(igpo, "save_checkpoint", lambda out, *step: steps.append(step[:2]))
    return steps

def lines_of(out, stage="rl"):
    """The lines of one stage in metrics.jsonl, less what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_"))}
            for line in lines if line["stage"] == stage]

def tiny_examples(target):
    """24 problems of 3 or 4 tokens; target(a, b) is a trace, or what SFT learns to write."""
    tokenizer, examples = tiny_tokenizer(), []
    for a in range(1, 7):
        for b in range(4):
            problem = igpo.Problem(f"{a}.{b}=" if b else f"{a}.=", f"{a + 8}", target(a, b))
            ids = [tokenizer(text).input_ids for text in (problem.question, problem.trace)]
            examples.append(igpo.Example(problem, *ids))
    return examples

RL_EXAMPLES = tiny_examples(lambda a, b: f"{a}{b}={a}.{b}.{a}.{b}.")
SFT_EXAMPLES = tiny_examples(lambda a, b: f"{a}{b}")
SMALL = dict(
    gen_length=16, diffusion_steps=4, block_length=8, rows_per_call=8, prompts_per_step=4,
    group_size=4, room=4, min_chunk=1, max_chunk=3, max_steps=3, mu=2, lr=3e-3, warmup_steps=2,
    prompts_per_forward=3, sft_steps=4, sft_batch=4, sft_lr=1e-2, sft_length=8, save_every=0,
    sft_rows_per_forward=3, save_rollouts=False)

def talkative_model(**changes):
    """It ends its completions at different places, and its first roll-out has a group to rescue."""
    model = tiny_model(2, **changes)
    model.lm_head.weight.data[END] *= 1.5
    return model

def run_sft(model, out, **changes):
    """train_sft, without files but the log -> its lines"""
    igpo.shard(model, torch.device("cpu"))
    igpo.train_sft(model, SFT_EXAMPLES, igpo.Checkpoint("start", 0, None),
                   igpo.Config(**SMALL | changes), out)
    return lines_of(out, "sft")

def run_rl(model, out, examples=RL_EXAMPLES, **changes):
    """train_rl, without files but the log -> its lines"""
    igpo.shard(model, torch.device("cpu"))
    igpo.train_rl(model, tiny_tokenizer(), examples, [], igpo.Checkpoint("start", 0, None),
                  igpo.Config(**SMALL | changes), out)
    return lines_of(out)

def same_weights(model, other, atol=1e-5):
    return all(torch.allclose(a.full_tensor(), b, atol=atol)
               for a, b in zip(model.parameters(), other.parameters(), strict=True))

def update(model, optimizer, lr, max_grad_norm):
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm

def test_the_schedule_by_hand():
    rates = [igpo.schedule(update, 10, 2) for update in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *(k / 8 for k in range(8, 0, -1))])
    assert [igpo.schedule(update, 4, 0) for update in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [igpo.schedule(update, 2, 3) for update in range(2)] == [0.25, 0.5]  # cut short

def test_sft_is_a_plain_loop(tmp_path, saved):
    """Whole batches in one pass here. In train_sft they take two, of three examples and one."""
    model, rates = talkative_model(), [1 / 3, 2 / 3, 1, 1 / 2]
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    want = []
    for step in range(4):
        rows = [SFT_EXAMPLES[i] for i in igpo.batch_indices(24, 4, step, 5)]
        shift = torch.rand((), generator=igpo.seeded(5, "t", step))
        t = torch.tensor([(shift + b / 4) % 1 for b in range(4)]).clamp(min=1e-3)
        prompts, mask = igpo.pad_prompts([row.prompt for row in rows], plain)
        completions = torch.tensor([row.target + [END] * (8 - len(row.target)) for row in rows])
        loss, metrics = igpo.sft_loss(
            plain, prompts, completions, prompt_mask=mask, t=t,
            generator=[igpo.seeded(5, "sft", step, b) for b in range(4)])
        loss.backward()
        norm = update(plain, optimizer, 1e-2 * rates[step], 1.0)
        want.append([loss.item(), metrics["masked"], norm, 1e-2 * rates[step]])
    lines = run_sft(model, tmp_path, seed=5)
    for line, numbers in zip(lines, want, strict=True):
        assert [line[name] for name in ("loss", "masked", "grad_norm", "lr")] == pytest.approx(
            numbers, rel=1e-4)
    assert same_weights(model, plain)
    assert saved == [("sft", 4)]

def test_sft_ends_a_turn_and_then_pads(tmp_path, saved, monkeypatch):
    seen, sft_loss = [], igpo.sft_loss
    monkeypatch.setattr(igpo, "sft_loss", lambda model, prompts, completions, **options: (
        seen.extend(completions.tolist()) or sft_loss(model, prompts, completions, **options)))
    run_sft(talkative_model(eos_token_id=[5, END], pad_token_id=6), tmp_path, sft_steps=1,
            sft_length=5)
    assert len(seen) == 4 and all(row[2:] == [5, 6, 6] for row in seen)

def test_sft_learns_with_a_linear_schedule(tmp_path, saved):
    lines = run_sft(tiny_model(), tmp_path, sft_steps=60, sft_batch=24, sft_rows_per_forward=9,
                    warmup_steps=9, sft_save_every=25)
    losses, rates = ([line[name] for line in lines] for name in ("loss", "lr"))
    assert len(losses) == 60 and sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert max(rates) == pytest.approx(1e-2) == rates[9] and rates[0] == pytest.approx(1e-3)
    assert saved == [("sft", 25), ("sft", 50), ("sft", 60)]

def with_dropout(model):
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.Dropout())
    return model

def test_dropout_in_sft_depends_on_the_step_alone(tmp_path, saved):
    losses = []
    for name in "a", "b", "without":
        (tmp_path / name).mkdir()
        model = tiny_model()
        if name != "without":
            model = with_dropout(model)
        torch.rand(len(losses))  # other numbers were drawn before
        lines = run_sft(model, tmp_path / name, sft_lr=1e-12)
        losses.append([line["loss"] for line in lines])
    assert losses[0] == losses[1] and losses[0] != pytest.approx(losses[2], rel=1e-3)

def plain_rl(model, cfg):
    """IGPO for Config cfg, each group drawn alone and each update in one pass -> its lines"""
    tokenizer, initial, lines = tiny_tokenizer(), copy.deepcopy(model), []
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)

    def draw(prompts, prompt_mask, streams, hints):
        drawn = torch.zeros(len(prompts), cfg.group_size, cfg.gen_length).long()
        for n, stream in enumerate(streams):
            rows = [n] * cfg.group_size
            drawn[n] = igpo.sample(
                model, prompts[rows], prompt_mask=prompt_mask[rows], generator=stream,
                hints=None if hints is None else hints[n], temperature=cfg.temperature,
                gen_length=16, block_length=8, steps=4, stop_early=True)
        return drawn

    def text(o):
        return igpo.decode(tokenizer, o, [END])

    def rewards(completions, correct):
        form = [[igpo.format_score(text(o)) for o in group] for group in completions]
        return cfg.reward_correct * correct + cfg.reward_format * torch.tensor(form)

    for step in range(cfg.max_steps):
        indices = igpo.batch_indices(24, cfg.prompts_per_step, step, cfg.seed)
        batch = [RL_EXAMPLES[i] for i in indices]
        prompts, mask = igpo.pad_prompts([e.prompt for e in batch], model)
        groups = igpo.elastic_rollout(
            draw, lambda o, answer: arbitrary(text(o), answer), prompts, mask,
            [e.problem.answer for e in batch], [e.target for e in batch],
            [igpo.seeded(cfg.seed, "rollout", step, i) for i in indices], mask_id=MASK,
            algo=cfg.algo, lam=cfg.lam, eta_range=(cfg.eta_low, cfg.eta_high), min_chunk=1,
            max_chunk=3, room=4)
        advantages = igpo.group_advantages(rewards(groups.completions, groups.correct))
        inputs = dict(prompts=prompts, completions=groups.completions, prompt_mask=mask)
        with torch.no_grad():
            old, entropy = igpo.completion_logps(model, **inputs)
            ref, _ = igpo.completion_logps(initial, **inputs)
        counted = igpo.counted_tokens(groups.completions, [END])
        learning = counted & igpo.entropy_filter(entropy, groups.hinted & counted, cfg.tau)
        numbers = []
        for inner in range(cfg.mu):
            logps, _ = igpo.completion_logps(model, **inputs)
            loss, values = igpo.policy_loss(logps, old, ref, advantages, learning, beta=cfg.beta,
                                            epsilon=cfg.epsilon, ratio=cfg.ratio)
            loss.backward()
            count, updates = step * cfg.mu + inner, cfg.max_steps * cfg.mu
            lr = cfg.lr * min((count + 1) / (cfg.warmup_steps + 1),
                              (updates - count) / (updates - cfg.warmup_steps))
            norm = update(model, optimizer, lr, cfg.max_grad_norm)
            numbers.append(values | {"loss": loss.item(), "grad_norm": norm, "lr": lr})
        lines.append({name: sum(n[name] for n in numbers) / cfg.mu for name in numbers[0]} | {
            "reward": rewards(groups.own, groups.own_correct).mean().item(),
            "accuracy": groups.own_correct.float().mean().item(),
            "accuracy_after": groups.correct.float().mean().item(),
            "all_wrong": (~groups.own_correct.any(1)).float().mean().item(),
            "all_wrong_after": (~groups.correct.any(1)).float().mean().item(),
            "hint_tokens": (groups.hinted & counted).sum().item() / 16,
            "hint_tokens_kept": (groups.hinted & learning).sum().item() / 16})
    return lines

@pytest.mark.parametrize("changes", [
    dict(beta=0.3, tau=0.5, epsilon=0.1, reward_format=2.0, eta_low=0.7, eta_high=0.9, seed=1),
    dict(algo="resample", mu=3, beta=0.0, ratio="token", max_grad_norm=50.0, lam=0.3,
         temperature=0.8, prompts_per_forward=9, seed=1)])
def test_rl_is_a_plain_loop(tmp_path, saved, arbitrary_grades, changes):
    model = talkative_model()
    plain = copy.deepcopy(model)
    want = plain_rl(plain, igpo.Config(**SMALL | changes))
    lines = run_rl(model, tmp_path, **changes)
    for line, numbers in zip(lines, want, strict=True):
        assert {name: line[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-6)
    assert same_weights(model, plain, 1e-4)
    assert any(line["all_wrong_after"] < line["all_wrong"] for line in lines)
    if changes.get("algo") != "resample":
        assert any(0 < x["hint_tokens_kept"] < x["hint_tokens"] - 0.2 for x in lines), lines

def test_hint_tokens_behind_the_end_neither_learn_nor_count(tmp_path, saved, monkeypatch):
    """Hints at 0, 1, 3, ..., 7 and an end at 2: of two hint tokens ceil(tau * 2) = 1 learns."""
    completions, hinted = torch.full((1, 4, 16), 7), torch.zeros(1, 4, 16).bool()
    completions[0, 0, 2] = END
    hinted[0, 0, [0, 1, 3, 4, 5, 6, 7]] = True
    right, wrong = torch.tensor([[True, False, False, False]]), torch.zeros(1, 4).bool()
    groups = igpo.Groups(completions, right, hinted, completions, wrong, [0], torch.zeros(1, 4),
                         completions, completions, right)
    prompt = random_prompts(1, 3)
    monkeypatch.setattr(igpo, "roll_out_examples", lambda *_: (prompt, prompt > -1, groups))
    score_groups, policy_loss, learning = igpo.score_groups, igpo.policy_loss, []
    monkeypatch.setattr(igpo, "score_groups", lambda *inputs: (  # it rises along the completion
        score_groups(*inputs)[0], torch.arange(16.0)[None]))
    monkeypatch.setattr(igpo, "policy_loss", lambda *inputs, **options: (
        learning.append(inputs[4]) or policy_loss(*inputs, **options)))
    run_rl(tiny_model(), tmp_path, RL_EXAMPLES[:1], prompts_per_step=1, mu=1, max_steps=1, tau=0.5)
    assert learning[0][0, 0].nonzero().flatten().tolist() == [1, 2] and learning[0][0, 1:].all()

def test_the_kl_is_to_the_initial_policy(tmp_path, saved, monkeypatch, arbitrary_grades):
    """The first ratio is 1 and the first KL 0, the scored reference stays the same later."""
    scored, score_groups = [], igpo.score_groups
    fixed = random_prompts(2, 9)
    seen = fixed > -1, random_prompts(8, 4).view(2, 4, 4), 2

    def spy(model, *inputs):
        scored.append(score_groups(model, fixed, *seen)[0])
        return score_groups(model, *inputs)

    monkeypatch.setattr(igpo, "score_groups", spy)
    lines = run_rl(tiny_model(), tmp_path, mu=1)
    old, reference = scored[0::2], scored[1::2]
    assert len(old) == len(reference) == 3
    assert all(torch.equal(reference[0], x) for x in (old[0], *reference))
    assert not torch.allclose(old[1], old[0], atol=1e-2)
    assert [line["ratio"] for line in lines] == [1, 1, 1]
    assert lines[0]["kl"] == 0 < lines[1]["kl"]

def test_epochs_give_the_steps(tmp_path, saved, arbitrary_grades, capsys):
    lines = run_rl(tiny_model(), tmp_path, RL_EXAMPLES[:20], epochs=1, max_steps=None, lr=1e-4)
    assert "RL: 5 steps of 4 prompts" in capsys.readouterr().out
    rates = [line["lr"] / 1e-4 for line in lines]  # means over two updates
    assert rates == pytest.approx([3 / 6, 15 / 16, 11 / 16, 7 / 16, 3 / 16])

@pytest.mark.parametrize("save_every, steps", [(2, [2, 4, 5]), (0, [5])])
def test_evaluations_and_checkpoints(tmp_path, saved, arbitrary_grades, monkeypatch, save_every,
                                     steps):
    names = []
    monkeypatch.setattr(igpo, "evaluate", lambda name, *rest: names.append((name, rest[-1])))
    run_rl(tiny_model(), tmp_path, max_steps=5, save_every=save_every, mu=1, diffusion_steps=2)
    assert saved == [("rl", step) for step in steps]
    assert names == [("eval_accuracy", step) for step in steps[:-1]] + [("accuracy_final", 5)]

def test_modes_and_passes_of_an_rl_step(tmp_path, saved, arbitrary_grades, monkeypatch):
    """Drawing and scoring are in eval mode, updates in training mode: there, on a GPU, activations
    are computed again to save memory. No pass has more prompts than prompts_per_forward."""
    calls = []
    for name in "sample", "completion_logps":
        def spy(model, prompts, *args, name=name, function=getattr(igpo, name), **options):
            calls.append((name, model.training, len(prompts)))
            return function(model, prompts, *args, **options)
        monkeypatch.setattr(igpo, name, spy)
    run_rl(talkative_model(), tmp_path, max_steps=2, mu=2)
    scored, updated = "completion_logps", [("completion_logps", True, n) for n in (3, 1)]
    for _ in range(2):
        while calls[0][0] == "sample":
            assert not calls[0][1] and calls.pop(0)[2] <= 8
        passes = [(scored, False, 3), (scored, False, 1)] * 2 + updated * 2
        assert calls[: len(passes)] == passes
        del calls[: len(passes)]
    assert calls == []

def test_updates_that_are_not_finite_end_the_run(tmp_path, saved, arbitrary_grades, monkeypatch):
    model = tiny_model()
    igpo.shard(model, torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    (model(random_prompts(1, 3)).logits.mean() * math.nan).backward()
    optimizer, _ = igpo.begin_stage(model, "rl", 1, igpo.Checkpoint("start", 0, None))
    found = igpo.optimizer_step(model, optimizer, 1.0, 1.0)
    assert math.isnan(found["grad_norm"]) and found["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    loss = igpo.policy_loss
    monkeypatch.setattr(igpo, "policy_loss",
                        lambda *a, **k: (loss(*a, **k)[0] * math.inf, {"kl": 0}))
    with pytest.raises(igpo.UsageError, match="no gradient of rl step 1 was finite"):
        run_rl(tiny_model(), tmp_path, mu=10)
    assert len(lines_of(tmp_path)) == 1

# Dropout and compiling

def test_without_dropout_training_mode_is_eval_mode():
    model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Dropout(0.5))
    x = torch.ones(1, 50)
    assert not torch.equal(model.train()(x), model.eval()(x))
    igpo.remove_dropout(model)
    assert torch.equal(model.train()(x), model.eval()(x))

def test_the_first_ratio_is_one_with_dropout(tmp_path, saved, arbitrary_grades):
    model = with_dropout(tiny_model())
    model.requires_grad_(True)
    [line] = run_rl(model, tmp_path, max_steps=1, mu=1)
    assert (line["ratio"], line["kl"], line["clip_fraction"]) == (1, 0, 0)

def test_the_first_ratio_is_one_with_lora_dropout(tmp_path, saved, arbitrary_grades):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, generator=igpo.seeded(name))
    [line] = run_rl(model, tmp_path, max_steps=1, mu=1)
    assert (line["ratio"], line["kl"], line["clip_fraction"]) == (1, 0, 0)

def test_compiled_layers_compute_the_same(monkeypatch):
    """With a backend that needs no compiler, on rows, widths and modes as a run has them. More
    layers need no more graphs: torch has a limit on these, behind which a run would end."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for name in "recompile_limit", "fail_on_recompile_limit_hit":  # restored after the test
        monkeypatch.setattr(torch._dynamo.config, name, getattr(torch._dynamo.config, name))
    counters, graphs = torch._dynamo.utils.counters, []
    settings = dict(gen_length=8, block_length=4, steps=4)
    for layers in 1, 3:
        torch._dynamo.reset()
        counters.clear()
        model = tiny_model(2, num_hidden_layers=layers)
        compiled = copy.deepcopy(model)
        igpo.compile_layers(compiled)
        for rows in 3, 1:
            prompts = random_prompts(rows, 4 + rows)
            mask = torch.arange(4 + rows).expand(rows, -1) >= torch.arange(rows)[:, None]
            for options in {}, {"prompt_mask": mask}, {"prompt_mask": mask, "cache": "block"}:
                plain, fast = (igpo.sample(m, prompts, **settings, **options)
                               for m in (model, compiled))
                assert torch.equal(plain, fast)
            completions = random_prompts(rows, 2 * 6).view(rows, 2, 6)
            for m in model.train(), compiled.train():
                m.zero_grad()
                logps, _ = igpo.completion_logps(m, prompts, completions, prompt_mask=mask)
                logps.mean().backward()
                m.eval()
            for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
                assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert 0 < graphs[0] == graphs[1]

# Reports

def test_ratios_of_hint_tokens_and_generated_ones():
    """A ratio of 2 or 1/2 is clipped to 1.1 or 0.9 where that lowers the objective."""
    log_ratio = torch.tensor([[[2, 0.5, 1, 1000], [2, 0.5, 1, 1]]]).log()
    log_ratio[0, 0, 3] = 1000
    learning = torch.tensor([[[1, 1, 1, 0], [1, 1, 1, 0]]]).bool()
    hinted = torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 0]]]).bool()
    found = igpo.describe_ratios(log_ratio, torch.tensor([[1.0, -1.0]]), learning, hinted, 0.1)
    assert {name: value.tolist() for name, value in found.items()} == {
        "ratio_hint": pytest.approx([2, 0.5]), "clip_fraction_hint": [True, True],
        "ratio_generated": pytest.approx([0.5, 1, 2, 1]),
        "clip_fraction_generated": [False] * 4}

def test_the_numbers_of_a_rollout():
    """Two prompts with two responses. The second prompt was stuck, one response was replaced."""
    a, E, M = 1, END, MASK
    own = torch.tensor([[[a, a, E, E], [a, E, a, a]], [[a, a, a, a], [E, E, E, E]]])
    second = torch.tensor([[[a, a, a, E], [a, a, E, a]]])
    hints = torch.tensor([[[M, M, M, M], [a, a, M, a]]])
    completions = own.clone()
    completions[1, 0] = second[0, 1]
    hinted = torch.zeros(2, 2, 4).bool()
    hinted[1, 0] = hints[0, 1] != M  # the last of its three is behind the end
    groups = igpo.Groups(
        completions, torch.tensor([[True, True], [True, False]]), hinted, own,
        torch.tensor([[True, True], [False, False]]), [1], torch.tensor([[0.2, 0.5]]), hints,
        second, torch.tensor([[False, True]]))
    entropy = torch.tensor([[1.0, 2.0, 6.0, math.nan], [4.0, 5.0, 6.0, 9.0]])
    learning = igpo.counted_tokens(completions, [END])
    learning[1, 0, 1] = False
    found = igpo.describe_rollout(groups, entropy, learning, tiny_model().config)
    assert {name: torch.as_tensor(value).tolist() for name, value in found.items()} == {
        "accuracy": [[True, True], [False, False]], "accuracy_after": [[True, True], [True, False]],
        "all_right": [True, False], "all_wrong": [False, True], "all_wrong_after": [False, False],
        "second_right": [[False, True]], "eta": [[pytest.approx(0.2), 0.5]],
        "empty_hints": [[True, False]], "hint_tokens": [[0, 0], [2, 0]],
        "hint_tokens_kept": [[0, 0], [1, 0]], "completion_length": [[3, 2], [4, 1]],
        "entropy": [[3, 1.5], [6, 4]], "responses": 6, "tokens": 10 + 7}

def test_the_view_of_a_rescued_response():
    tokenizer = tiny_tokenizer()
    wrong, right = (torch.tensor([tokenizer(text).input_ids]) for text in ("1.2=", "1.3="))
    hinted = torch.tensor([[False, True, True, False]])
    learning = torch.tensor([[True, True, False, True]])
    groups = igpo.Groups(right[None], None, hinted[None], wrong[None], *[None] * 6)
    batch = [igpo.Example(igpo.Problem("2?", "3", None), [], [])]
    shown = igpo.show_rescued(tokenizer, batch, groups, learning[None])
    assert "question   '2?', answer '3'\n  wrong      '1.2='\n" in shown
    assert "inpainted  '1[.^][3]='" in shown

def test_a_run_rolls_out_the_same_on_three_processes(monkeypatch):
    """All groups with the answer 9 are right, all others wrong; the last one has no trace."""
    tokenizer, model, examples = tiny_tokenizer(), talkative_model(), RL_EXAMPLES[:9]
    examples[8] = examples[8]._replace(target=[])
    cfg = igpo.Config(**SMALL | {"temperature": 0.7})
    monkeypatch.setattr(igpo, "grade", lambda completion, answer: (
        answer == "9" or "=" in completion[2:4]))

    def roll_out(r, world):
        part = slice(r, None, world)
        return igpo.roll_out_examples(
            model, tokenizer, examples[part], [igpo.seeded(2, i) for i in range(9)][part], cfg)

    prompts, mask, whole = roll_out(0, 1)
    assert [row[real].tolist() for row, real in zip(prompts, mask)] == [
        e.prompt for e in examples]
    assert whole.stuck == [4, 5, 6, 7] and 1 < whole.hinted.any(2).any(1).sum() < 5
    assert torch.equal(whole.own_correct[:, 0], torch.arange(9) < 4)
    blocks = (igpo.counted_tokens(whole.own, [END]).sum(-1, keepdim=True) + 7) // 8
    assert (blocks == 1).any()  # rows that are done stop early, and hold padding from there on
    assert (whole.own[(torch.arange(16) >= 8 * blocks).expand_as(whole.own)] == END).all()
    for r, (_, _, groups) in enumerate(in_threads(monkeypatch, 3, lambda r: roll_out(r, 3))):
        for name in "completions", "correct", "hinted", "own", "own_correct":
            assert torch.equal(getattr(groups, name), getattr(whole, name)[r::3]), name
        assert groups.stuck == [i // 3 for i in whole.stuck if i % 3 == r]

# --- Rewards. A row for each rule and known fault: reference | right, or reference ≠ wrong

ANSWERS = r"""
18 | \$18.00
18 | 18.
18 | **18**
-1./3 | -\frac{1}{3}
60 | 60\%
101 | \boxed{}101
11,\! 111,\! 100 | 11,111,100
-5 | –5
72 | 72^\circ F
76^\circ | 76°
76^\circ | 76\degree
18 | 18\ \text{dollars}
12 | 12~\mathrm {cm}
15\mbox{ cm}^2 | 15 \text{ square cm}
12\pi | 12\pi \text{ inches}
\frac{270}7\text{ degrees} | \frac{270}{7}
5 | 5 m/s
5 | 5\ \mathrm{m/s^2}
5 | 5 J
240 | 240 sheets per month
31 | 8 + 8 + 15 = 31 units
10:30 | 10:30 AM
10:30 \text{ AM} | 10:30 AM
\arctan(2) | arctan(2)
\frac{\pi}{2} | pi/2
4 | √16
16\sqrt{3} | 16sqrt(3)
\sqrt{2+x} | √(2+x)
1\frac{4}{5} | 1 4/5
1\frac{4}{5} | \frac{9}{5}
58,500 | 58{,}500
385000 | 385\,000
10 | 2(5)
4.5e33 | 4.5 \times 10^{33}
1e11 | 10^{11}
E_{1},E_{2} | E_1, E_2
m_{p} c^{2}(\gamma^{2}-1)\sin^{2}\theta | (\gamma^2-1) m_p c^2\sin^2\theta
\text{even} | Even
\text{even} | \textbf{even}.
\text{(C)} | C
4210_{5} | 4210_5
204_5 | 204
\frac{1}{2} | 0.5
\frac{1}{2} | \frac12
\frac{mg}{2} | mg/2
2 a b | 2ab
ax+by | by+ax
R^2-r^2 | (R-r)(R+r)
\frac{1}{99!} | \frac{100}{100!}
\sqrt{2}+\sqrt{3} | \sqrt{5+2\sqrt{6}}
(-\infty,2)\cup(3,\infty) | x<2 \text{ or } x>3
x<2 \text{ or } x>3 | (-\infty,2)\cup(3,\infty)
(5,\infty) | x > 5
\infty | \infty
1,-2 | x=1 \text{ or } x=-2
(3, \frac{\pi}{2}) | (r,\theta) = (3, \frac{\pi}{2})
3\pi | 3\pi \approx 9.42
x \in [-2,7] | [-2,7]
\begin{pmatrix} 1/5 \\ 2 \end{pmatrix} | \begin{bmatrix} 0.2 \\ 2 \end{bmatrix}
R-r ≠ 0
R^2-r^2 ≠ r^2-R^2
\frac{T}{t} ≠ 1
R_1 ≠ r_1
\Gamma ≠ \gamma
E ≠ e
\angle ABC ≠ \angle abc
\angle ABC ≠ \angle BAC
\angle DEF ≠ \angle ABC
a x^2 + b x ≠ x^2+bx
ax+2by ≠ ax+2
2mgh ≠ 2
3stu ≠ 3pqr
5 m ≠ 5
5 ≠ 5x
5 ≠ 5 x
5 ≠ 5 e^2
2\pi ≠ 2\pi R
5 ≠ x 5
\operatorname{arctan}(2) ≠ 2
np.arcsin(10/13) ≠ np.arccos(10/13)
FAD_{16} ≠ BAD_{16}
FAD_{16} ≠ AFD_{16}
m_{p} c^{2}(\gamma^{2}-1)\sin^{2}\theta ≠ m_{p} c^{2}(\gamma^{2}-8)\sin^{2}\theta
-1./3 ≠ -1
E_1 ≠ E_2
E_1 ≠ E
\infty ≠ -\infty
\infty ≠ \frac{1}{0}
\frac{1}{0} ≠ \frac{2}{0}
\{\infty,3\} ≠ \{\infty+1,3\}
1 ≠ \frac{0}{0}
\text{information} ≠ \infty
\frac{1}{99!} ≠ \frac{1}{100!}
1-\frac{1}{2^{99}} ≠ 1-\frac{1}{2^{98}}
10^{-40}x ≠ 10^{-41}x
(0, 1e-20) ≠ (0, 2e-20)
\pi ≠ 3.14159265
1.6e-19 ≠ 1.7 × 10^{-19}
4.5e33 ≠ 4.5 \cdot 33 e
6 ≠ √16
3 ≠ 3 \text{ million}
3\text{ million} ≠ 3
5 ≠ 5 or more
5 ≠ 5 and a half
(-\infty,2)\cup(3,\infty) ≠ x<2 \text{ and } x>3
(-\infty,2)\cup(3,\infty) ≠ x\le 2 \text{ or } x>3
10:30 ≠ 1:3
10:30 \text{ AM} ≠ 10:30 PM
odd ≠ ddo
\text{even} ≠ \text{not even}
\text{no} ≠ \text{on}
2516_8 ≠ 2516_7
204_5 ≠ 204_10
11 ≠ 11_8
(100,200) ≠ 100200
100200 ≠ (100,200)
\{100,200\} ≠ 100200
(1,100,200) ≠ (1,100200)
3,1234 ≠ 31234
1.5000 ≠ 1.5,000
[1,2] ≠ (1,2)
(1,2) ≠ (2,1)
530 ≠ 5 30
7 ≠ 2 5
7 ≠ 2(5)
40 ≠ 4{10}
1 ≠ 1 4/5
\frac{x}{2} ≠ 1\frac{1}{2}x
50 ≠ 0.5\%
15 ≠ 18 liters
5 ≠ -5
p - q ≠ q - p
x^{12} ≠ x^1 2
y' ≠ y
5 ≠ x <= 5
x=5 ≠ y=5
"""

def test_the_rules_of_the_grader():
    rows = [re.split(" ([|≠]) ", row) for row in ANSWERS.strip().split("\n")]
    assert not [(reference, answer) for reference, sign, answer in rows
                if igpo.grade(rf"Hence \boxed{{{answer}}}.", reference) != (sign == "|")]
    assert igpo.grade("<answer>\n$18 dollars\n</answer>", 18.0) and not igpo.grade("18", 18)

@pytest.mark.parametrize("completion, answer", [
    ("", None), ("The answer is 18.", None), ("<answer>18", None),  # merely mentioned
    (r"\boxed{17} then \boxed{18} and \boxed{19", "18"),            # the last that is closed
    (r"\boxed{18} and \boxed{\text{}} and \boxed{\ldots} and \boxed{_}", "18"),
    (r"\boxed{\{1, \frac{1}{2}\}}", r"\{1, \frac{1}{2}\}"), (r"} \boxed {1\}}", r"1\}"),
    ("<answer>17</answer><answer> 18 </answer><answer></answer>", "18"),
    ("<answer>x < 5</answer>", "x < 5"), ("<answer> <answer>18</answer>", "18"),
    (r"\boxed{18} <answer>17</answer>", "18"), (r"\boxed{...} <answer>17</answer>", "17")])
def test_committed_answer(completion, answer):
    assert igpo.committed_answer(completion) == answer

def test_some_references_only_match_as_text():
    for reference in "18", "-1./3", r"\frac{1}{2}", "E_1", r"(-\infty, 2)", 18.0:
        assert igpo.is_mathematics(reference), reference
    for reference in r"\text{even}", "2516_8", "np.arcsin(10/13)", r"\frac{x}{0}", "", "9" * 301:
        assert not igpo.is_mathematics(reference), reference

HOSTILE = [
    r"9^{9^{9^9}}", "(a+b+c+d+e+f)^{40}", "1e999999999", "9" * 4301, "5\0", "\ud800+x", "," * 290,
    "()" * 140 + "=", "(" * 140 + "x" + ")" * 140, r"\boxed{" * 100_000 + "}" * 100_000,
    "{" * 1_000_000, "<answer>" * 120_000, r"\boxed" + " " * 1_000_000, "5 " + "m/" * 140,
    r"\binom{10^{9}}{10^{8}}", "2^{2^{40}}"]

def test_hostile_answers_are_given_up_and_counted():
    right = r"\boxed{1+x}", "x+1"
    assert igpo.grade(*right)
    judge = igpo.judge.pid
    for text in HOSTILE:
        began = time.process_time()
        assert not igpo.grade(rf"\boxed{{{text}}}", r"\frac{3}{5}")
        assert not igpo.grade(r"\boxed{x+1}", text)
        igpo.is_mathematics(text)  # ends in time, too
        assert igpo.committed_answer(text + r"\boxed{7}") == "7"
        assert time.process_time() - began < 2, text[:40]
    assert igpo.judge.pid == judge  # it gave up in time by itself
    before = igpo.GRADE_TIMEOUTS
    assert not igpo.grade(r"\boxed{9^{9^{9^9}}}", "x+1") and igpo.GRADE_TIMEOUTS == before + 1
    assert not igpo.grade(r"\boxed{2+x}", "x+1") and igpo.GRADE_TIMEOUTS == before + 1
    igpo.judge.kill()
    igpo.judge.wait()
    assert igpo.grade(*right)  # a dead judge is replaced, a stuck one given up
    os.kill(igpo.judge.pid, signal.SIGSTOP)
    began = time.time()
    assert not igpo.grade(*right) and time.time() - began < 15
    assert igpo.GRADE_TIMEOUTS == before + 2 and igpo.grade(*right)

def test_a_judge_that_does_not_start_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(igpo, "judge", None)
    monkeypatch.setattr(igpo, "JUDGE", "import no_such_module")
    with pytest.raises(igpo.UsageError, match="math-verify"):
        igpo.grade(r"\boxed{1+x}", "x+1")

def test_format_score_by_hand():
    form = "<reasoning>\n1+1=2\n</reasoning>\n<answer>\n\\boxed{2}\n</answer>"
    assert igpo.format_score(form) == 0.75
    assert igpo.format_score(form + "</answer>") == igpo.format_score(form[1:]) == 0.625
    assert igpo.format_score("\\boxed{2} \\boxed{3}") == 0.25
    assert igpo.format_score("<answer>2</answer>") == 0.125  # the opening tags end their lines

WORDS = [*"0123456789abcdefgh=.", "<[MASK]>", "<|mask|>", "<|im_end|>", "<end>", "<mask>"]

def word_tokenizer(**special):
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<mask>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\S+>|[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    special = special or dict(mask_token="<mask>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", **special)

WV, WEND, WMASK = len(WORDS), WORDS.index("<end>"), WORDS.index("<mask>")

def word_model(seed=0, cls=LlamaForCausalLM, **changes):
    ids = dict(vocab_size=WV, mask_token_id=WMASK, eos_token_id=[WEND], pad_token_id=WEND)
    return tiny_model(seed, cls, **ids | changes)

def word_prompts(rows, length, seed=1):
    return torch.randint(0, 20, (rows, length), generator=igpo.seeded(seed))

def word_llada(folder, **changes):
    return llada_folder(folder, word_tokenizer(), word_model, **changes)

# --- Models

@pytest.mark.parametrize("shape", [{"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
def test_a_llada_is_loaded_and_saved_exactly(tmp_path, shape):
    ids, folder, copy = word_prompts(2, 9), tmp_path / "in", tmp_path / "out"
    ids[0, 3] = WEND
    original = word_llada(folder, **shape)
    model, tokenizer = igpo.load_model(folder)
    logits = model(ids).logits
    assert torch.equal(logits, original(ids).logits)
    assert not torch.allclose(logits[:, :4], model(ids[:, :4]).logits)  # not causal
    assert model.config.eos_token_id == [WORDS.index("<|im_end|>"), WEND]
    logits.square().mean().backward()
    assert model.get_input_embeddings().weight.grad[WEND].any()  # padding as well

    igpo.save_model(model, tokenizer, copy)
    before, after = (load_file(f / "model.safetensors") for f in (folder, copy))
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, copy))
    assert before == after
    assert (copy / "configuration_llada.py").exists()  # for LLaDA's own loader

# model_type, class, the mask token, whether config.json has it, what the tokenizer calls special
KINDS = [
    ("illada", LlamaForCausalLM, "<[MASK]>", False, {"bos_token": "0"}),
    ("a2d-llama", LlamaForCausalLM, "<|mask|>", False, {"mask_token": "<|mask|>"}),
    ("a2d-qwen2", Qwen2ForCausalLM, "<|mask|>", True, {"bos_token": "0"}),
    ("a2d-qwen3", Qwen3ForCausalLM, "<|mask|>", False, {"mask_token": "<|mask|>"}),
    ("Dream", Qwen2ForCausalLM, "<mask>", True, {"mask_token": "<mask>"}),
    ("llama", LlamaForCausalLM, "<mask>", True, {"mask_token": "<mask>"}),
    ("qwen2", Qwen2ForCausalLM, "<mask>", True, {"mask_token": "<mask>"}),
    ("qwen3", Qwen3ForCausalLM, "<mask>", True, {"mask_token": "<mask>"})]

def family_folder(folder, kind, cls, mask, in_config, special, **changes):
    """The bidirectional twin, and its checkpoint as the family publishes it."""
    twin = word_model(2, cls, num_key_value_heads=2, rms_norm_eps=1e-3, **changes)
    twin.save_pretrained(folder)
    word_tokenizer(**special).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": kind, "rope_theta": raw.pop("rope_parameters")["rope_theta"],
            "rope_scaling": None, "layer_norm_eps": None, "eos_token_id": WEND,
            "auto_map": {"AutoModel": "modeling_family.Model"}}
    del raw["is_causal"], raw["mask_token_id"]
    raw |= {"mask_token_id": WORDS.index(mask)} if in_config else {}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "modeling_family.py").write_text("raise SystemExit('remote code was run')")
    return twin

@pytest.mark.parametrize("kind, cls, mask, in_config, special", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_each_kind_is_its_bidirectional_twin(tmp_path, kind, cls, mask, in_config, special, tied):
    ids, folder, copy = word_prompts(2, 9), tmp_path / "in", tmp_path / "out"
    twin = family_folder(folder, kind, cls, mask, in_config, special, tie_word_embeddings=tied)
    model, tokenizer = igpo.load_model(folder)
    assert torch.equal(model(ids).logits, twin(ids).logits)
    assert not torch.allclose(model(ids).logits[:, :4], model(ids[:, :4]).logits)  # not causal
    assert model.config.mask_token_id == WORDS.index(mask)
    assert model.config.logit_shift == (kind == "Dream")
    assert model.config.eos_token_id == [WORDS.index("<|im_end|>"), WEND]

    igpo.save_model(model, tokenizer, copy)
    again, tokenizer = igpo.load_model(copy)
    assert torch.equal(again(ids).logits, twin(ids).logits)
    assert again.config.mask_token_id == WORDS.index(mask)
    raw = json.loads((copy / "config.json").read_text())
    assert raw == json.loads((folder / "config.json").read_text())  # its model_type above all
    names = [load_file(f / "model.safetensors").keys() for f in (folder, copy)]
    assert names[0] == names[1] and (copy / "modeling_family.py").exists()

def test_an_untied_head_needs_a_config_that_says_so(tmp_path):
    ids = word_prompts(2, 9)
    twin = family_folder(tmp_path, *KINDS[2])
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    with pytest.raises(igpo.UsageError, match="untie them in config.json"):
        igpo.load_model(tmp_path)
    path.write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    assert torch.equal(igpo.load_model(tmp_path)[0](ids).logits, twin(ids).logits)

def test_meta_gives_shapes_and_tokens(tmp_path):
    folder = tmp_path / "m"
    family_folder(folder, *KINDS[0])
    model, _ = igpo.load_model(folder, device="meta", dtype=torch.bfloat16)
    real, _ = igpo.load_model(folder, dtype=torch.bfloat16)
    for (name, a), (same, b) in zip(model.state_dict().items(), real.state_dict().items()):
        assert (name, a.shape, a.dtype, a.device.type) == (same, b.shape, b.dtype, "meta")
    unlike = {"dtype": None, "_name_or_path": None}
    assert model.config.to_dict() | unlike == real.config.to_dict() | unlike

REFUSED = [  # what config.json says | what is said
    ({"model_type": "llada2_moe"}, "'llada2_moe' is not supported.*block-causal"),
    ({"model_type": "sdar"}, "'sdar' is not supported"),
    ({"model_type": "Fast_dLLM_Qwen"}, "'Fast_dLLM_Qwen' is not supported"),
    ({"model_type": "llada", "num_experts": 64, "hidden_size": 32}, "'llada with experts' is not"),
    ({"model_type": "gpt2"}, "'gpt2' is not supported"), ({}, "None is not supported"),
    ({"model_type": "qwen3", "hidden_size": 1024}, "no mask_token_id, so .* autoregressive"),
    ({"model_type": "llada", "d_model": 32}, "mlp_hidden_size"),
    ({"model_type": "llada", "alibi": True}, "sets alibi"),
    ({"model_type": "illada", "num_attention_heads": 5, "hidden_size": 32}, "")]

@pytest.mark.parametrize("raw, message", REFUSED)
def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(
        raw, message, tmp_path, monkeypatch):
    def fetch_config(name, file):
        assert (name, file) == ("me/model", "config.json")
        return write_jsonl(tmp_path / "config.json", raw)

    monkeypatch.setattr(igpo, "hf_hub_download", fetch_config)
    monkeypatch.setattr(igpo, "snapshot_download", lambda *_, **__: pytest.fail("weights"))
    with pytest.raises(igpo.UsageError, match=f"me/model: .*{message}") as error:
        igpo.load_model("me/model")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400

def test_a_model_of_the_hub_is_fetched_in_two_steps(tmp_path, monkeypatch):
    original, fetched = word_llada(tmp_path), []

    def fetch(name, file=None, ignore_patterns=()):
        fetched.append((file, *ignore_patterns))
        return tmp_path / file if file else tmp_path

    monkeypatch.setattr(igpo, "hf_hub_download", fetch)
    monkeypatch.setattr(igpo, "snapshot_download", fetch)
    model, _ = igpo.load_model("GSAI-ML/LLaDA")
    assert fetched == [("config.json",), (None, "*.bin", "*.pth")]
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)

def change(**changes):
    path = Path("m/config.json")
    return lambda: write_jsonl(path, json.loads(path.read_text()) | changes)

def change_weights(change_one):
    weights = load_file("m/model.safetensors")
    change_one(weights)
    save_file(weights, "m/model.safetensors")

def truncate(name, size):
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:size])

DAMAGED = [
    (lambda: Path("m/config.json").unlink(), "m: No such file"),
    (truncate("m/config.json", 0), "m: Expecting value"),
    (lambda: Path("m/config.json").write_bytes(b"\xff"), "m: "), (change(n_heads=5), "m: "),
    (change(mask_token_id=99), "m: mask_token_id is 99, which is not one of the 25 tokens"),
    (change(mask_token_id="x"), "m: .*mask_token_id"),
    (change(eos_token_id=None), "m: eos_token_id is None"),
    (change(eos_token_id=[]), "m: eos_token_id is None"),
    (change(eos_token_id=[WEND, None]), "m: .*eos_token_id"),
    (change(eos_token_id=-1), "m: eos_token_id is -1"),
    (change(pad_token_id=WMASK), "m: the mask token 24 is the pad or end token"),
    (change(pad_token_id=99), "m: pad_token_id is 99"),
    (change(mask_token_id=None), "m: mask_token_id is None"),
    (change(embedding_size=20), "m: "),
    (change(weight_tying=True), "m: config.json ties head and embedding"),
    (change(n_layers=3), "m: the weights do not fit config.json, missing_keys model.layers.2"),
    (change(n_layers=1), "m: the weights do not fit config.json, unexpected_keys "),
    (change(mlp_hidden_size=50), "m: the weights do not fit config.json, mismatched_keys "),
    (lambda: change_weights(lambda w: w.pop("model.transformer.ln_f.weight")),
     "missing_keys model.norm"),
    (lambda: Path("m/tokenizer.json").unlink(), "m has no tokenizer"),
    (truncate("m/tokenizer.json", 100), "m: "),
    (lambda: Path("m/model.safetensors").unlink(), "m: .*model.safetensors"),
    (truncate("m/model.safetensors", 5000), "m: ")]

@pytest.mark.parametrize("damage, message", DAMAGED)
def test_what_is_wrong_with_a_model_is_one_line(damage, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    word_llada(tmp_path / "m")
    words = {w for w in WORDS if w.startswith("<|") or w.startswith("<[")}
    text = Path("m/tokenizer.json").read_text()
    for word in words:  # neither a mask nor an end of turn to fall back on
        text = text.replace(word, word.strip("<>"))
    Path("m/tokenizer.json").write_text(text.replace('"<mask>"', '"mask"'))
    config = json.loads(Path("m/tokenizer_config.json").read_text())
    config.pop("mask_token")
    Path("m/tokenizer_config.json").write_text(json.dumps(config))
    damage()
    with pytest.raises(igpo.UsageError) as error:
        igpo.load_model("m")
    assert re.fullmatch(f"{message}.*", str(error.value)) or message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400

def test_no_model_folder(tmp_path):
    for name in tmp_path / "none", "a/b/c", "none":
        with pytest.raises(igpo.UsageError, match="no model folder at"):
            igpo.load_model(name)

def test_lora_is_merged_in_float32(tmp_path):
    peft = pytest.importorskip("peft")
    model = word_model(tie_word_embeddings=True).to(torch.bfloat16)
    want = {name: weight.float() + 2 ** -10 * ("up_proj" in name)  # too little for bfloat16
            for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"]))
    for name, weight in model.named_parameters():
        if "lora" in name:
            weight.data.fill_(2 ** -6)  # alpha / r times B A is 2 * (2 * 2 ** -12)
    igpo.save_model(model, word_tokenizer(), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6, check_dtype=False)

def with_adapters(folder, values=False, rank=4, target="all-linear"):
    """A checkpoint in bfloat16 with float32 adapters, as load_policy makes them."""
    from peft import LoraConfig
    model, tokenizer = igpo.load_model(folder, dtype=torch.bfloat16)
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=8, lora_dropout=0.1, target_modules=target))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if values:
                parameter.data.normal_(std=0.2)
    return model.eval(), tokenizer

@pytest.mark.parametrize("family", ["llada", "a2d-qwen2"])
def test_adapters_are_in_pefts_own_format(tmp_path, family):
    peft = pytest.importorskip("peft")
    folder, out, ids = tmp_path / "in", tmp_path / "out", word_prompts(2, 9)
    if family == "llada":
        word_llada(folder)
    else:
        family_folder(folder, *KINDS[2])
    model, tokenizer = with_adapters(folder, values=True)
    igpo.save_model(model, tokenizer, out)
    assert {path.name for path in (out / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 7 and all(w.dtype == torch.float32 for w in saved.values())

    # RL goes on from an SFT's adapters: base and adapters are bit for bit what was trained
    again, _ = with_adapters(folder)
    assert not torch.allclose(again(ids).logits, model(ids).logits, atol=1e-2)
    igpo.load_adapter_weights(again, out)
    assert torch.equal(again(ids).logits, model(ids).logits)
    trained = [p for p in again.parameters() if p.requires_grad]
    assert len(trained) == len(saved) and all(p.dtype == torch.float32 for p in trained)

    # peft's own loader reads the folder, and so does transformers'
    base, _ = igpo.load_model(folder, dtype=torch.bfloat16)
    assert torch.equal(peft.PeftModel.from_pretrained(base, out / "adapter")(ids).logits,
                       model(ids).logits)
    base, _ = igpo.load_model(folder, dtype=torch.bfloat16)
    base.load_adapter(str(out / "adapter"))
    assert torch.allclose(base(ids).logits, model(ids).logits, atol=0.5)  # this rounds to bfloat16

    # the merged model is the same in float32, and in the family's own names
    merged, _ = igpo.load_model(out)
    precise, _ = with_adapters(folder, values=True)
    assert torch.allclose(merged(ids).logits, precise.float()(ids).logits, atol=1e-4)
    assert (load_file(out / "model.safetensors").keys()
            == load_file(folder / "model.safetensors").keys())
    assert model._hf_peft_config_loaded  # training may go on after saving
    for changes in {"rank": 2}, {"target": ["q_proj"]}:
        wrong, _ = with_adapters(folder, **changes)
        with pytest.raises(igpo.UsageError, match="out: "):
            igpo.load_adapter_weights(wrong, out)
    with pytest.raises(igpo.UsageError, match="No such file"):
        igpo.load_adapter_weights(again, tmp_path / "none")

# --- Data

@pytest.mark.parametrize("solution, answer, question", [  # the trace ends at the |
    ("6-5=$1.00 and 720+270=|$990.00", "990", ""), ("max is the| a of it", "a", ""),
    ("We get 1,200 + 34 =| 1,234.\nThe answer is: 1234", "1234", ""),
    (r"So $x =| \frac{1}{2}$, hence $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", ""),
    (r"So $x =| \dfrac{1}{2}$, or $\frac{1}{2}$.", r"\tfrac{1}{2}", ""),
    ("In all it is| 1{,}234 or 1234.", "1,234", ""),
    (r"It is| $\frac{a b}{c + 12}$ or 12.", "12", ""),  # not in a command
    ("There are 120 of| 12, so 12.", "12", ""), ("The sum is| -3.\n#### -3", "-3", ""),
    ("Lyn has 5 apples. 5 + 3 - 3 =| 5", "5", "Lyn has 5 apples"),
    ("Lyn has| 5 apples. 2 + 3 = 5", "5", "Lyn has 50 apples"),
    ("|Seventy-two.\n#### 72", "72", ""), ("|72", "72", ""), ("|any", "", ""),
    ("|" + "9" * 5000, "72", "")])  # more digits than int() takes
def test_no_trace_holds_its_answer(solution, answer, question):
    trace = solution.split("|")[0] or None
    assert igpo.cut_trace(solution.replace("|", ""), answer, question) == trace

def meta(query, response, kind="GSM_AnsAug"):
    return {"type": kind, "query": query, "response": response}

def read(path, *rows, **options):
    return igpo.read_problems(write_jsonl(path / "rows.jsonl", *rows), **options)

# A row as each data set has it -> question, answer, trace.
FORMS = {
    "GSM8K": ({"question": "Sold 48 and half of it?",
               "answer": "Half is 48/2 = <<48/2=24>>24.\nAll 48+24 = <<48+24=72>>72.\n#### 72"},
              "Sold 48 and half of it?", "72", "Half is 48/2 = 24.\nAll 48+24 ="),
    "GSM8K with a comma": ({"question": "1?", "answer": "18.\n#### 1,080"}, "1?", "1,080", None),
    "MetaMathQA": (meta("2+3?", "It is\n2+3 = 5\n#### 5\nThe answer is: 5"),
                   "2+3?", "5", "It is\n2+3 ="),
    "MATH": ({"problem": "Half?", "level": "Level 1", "type": "Algebra",
              "solution": r"First \boxed{3}, then $x = \boxed{\frac{1}{2}}$."},
             "Half?", r"\frac{1}{2}", r"First \boxed{3}, then $x ="),
    "MATH-500": ({"problem": "Half?", "answer": "0.5", "solution": "So 1/2 or 0.5.", "level": 1},
                 "Half?", "0.5", "So 1/2 or"),
    "DeepScaleR": ({"problem": "Sum?", "answer": "26", "solution": r"Add: 12 + 14 = \boxed{26}."},
                   "Sum?", "26", "Add: 12 + 14 ="),
    "no solution": ({"problem": "Sum?", "answer": "26", "solution": ""}, "Sum?", "26", None),
    "OpenR1-Math": ({"problem": "v?", "solution": "## Solution\n\nThus v = 3 \\mathrm{~km}.",
                     "answer": "3", "problem_type": "Algebra", "source": "olympiads",
                     "generations": [r"\boxed{4}"], "messages": [{"role": "user", "content": "v"}]},
                    "v?", "3", "## Solution\n\nThus v ="),
    "headings": ({"problem": "v?", "solution": "#### 1\nv = 1 + 2\n#### 2\n$\\boxed{3}$."},
                 "v?", "3", None),
    "verl": ({"data_source": "openai/gsm8k", "ability": "math",
              "prompt": [{"role": "system", "content": "You count."},
                         {"role": "user", "content": "2+3?"},
                         {"role": "assistant", "content": "6"}, {"role": "user", "content": "No!"}],
              "reward_model": {"style": "rule", "ground_truth": "5"},
              "extra_info": {"answer": "We add 2+3 = <<2+3=5>>5\n#### 5", "index": 0}},
             "No!", "5", "We add 2+3 ="),
    "verl without a solution": ({"prompt": [{"role": "user", "content": "2+3?"}],
                                 "reward_model": {"ground_truth": 5}, "extra_info": None},
                                "2+3?", "5", None),
    "text prompt": ({"prompt": "2+3?", "ground_truth_answer": "5"}, "2+3?", "5", None),
    "AMC": ({"problem": "How far?", "answer": 27.0, "url": "x"}, "How far?", "27", None),
    "zero": ({"problem": None, "question": "0?", "answer": 0}, "0?", "0", None),
    "a fraction": ({"problem": "?", "answer": -0.125}, "?", "-0.125", None),
    "a long integer": ({"problem": "?", "answer": 2**60 + 1}, "?", "1152921504606846977", None),
    "a boxed answer": ({"problem": "?", "answer": r"So $\boxed{12}$.", "solution": r"\boxed{3}"},
                       "?", "12", None),
    "the column first": ({"problem": "?", "answer": "12", "solution": r"\boxed{3}"}, "?", "12",
                         None),
    "Minerva": ({"problem": "D?", "solution": "Start:\n\\[ s=\\boxed{1.6} \\mathrm{~cm} \\]"},
                "D?", "1.6", "Start:\n\\[ s="),
    "an empty cell": ({"problem": "D?", "answer": float("nan"), "solution": r"is $\boxed{1.6}$"},
                      "D?", "1.6", "is")}

@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_problems(name, tmp_path):
    row, question, answer, trace = FORMS[name]
    trace = trace and f"<reasoning>\n{trace}"
    assert read(tmp_path, row) == [igpo.Problem(question, answer, trace)]

@pytest.mark.parametrize("form", ["verl", "OpenR1-Math", "AMC"])
def test_parquet(form, tmp_path):
    pandas = pytest.importorskip("pandas")
    row, question, answer, trace = FORMS[form]
    pandas.DataFrame([row, row]).to_parquet(tmp_path / "train.parquet")
    trace = trace and f"<reasoning>\n{trace}"
    assert igpo.read_problems(tmp_path / "train.parquet") == [(question, answer, trace)] * 2

def test_metamath_is_filtered_and_its_answers_cut(tmp_path):
    rows = [meta("What is 2+3?", "It is\n2+3 = 5\n#### 5\nThe answer is: 5"),
            meta("What is 2+3?", "Again 2+3 = 5\nThe answer is: 5"),
            meta("Tell me 2+3", "5\nThe answer is: 5", "GSM_Rephrased"),
            meta("Half?", "It is $\\frac{1}{2}$.\nThe answer is: \\frac{1}{2}", "MATH_AnsAug"),
            meta("Words?", "Five.\n#### 5\nThe answer is: 5"), meta("None?", "It is 5."),
            meta("Later?", "5."), meta("Later?", "5.\nThe answer is: 5")]
    left_out = igpo.Counter()
    problems = igpo.read_problems(write_jsonl(tmp_path / "[1].jsonl", *rows), left_out=left_out)
    assert problems == [
        ("What is 2+3?", "5", "<reasoning>\nIt is\n2+3 ="),
        ("Half?", "\\frac{1}{2}", "<reasoning>\nIt is"),
        ("Words?", "5", None), ("Later?", "5", None)]
    assert left_out == {"a query that was there before": 1, "no answer": 2,
                        "a type that is not GSM_AnsAug or MATH_AnsAug": 1}
    assert igpo.describe_problems(problems, left_out, "f.jsonl").startswith(
        "f.jsonl: 4 usable rows, 1 left out with a query that was there before, 1 left out with a "
        "type that is not GSM_AnsAug or MATH_AnsAug, 2 left out with no answer; 2 of the usable "
        "rows have no trace")

def test_bad_rows_are_left_out_and_counted(tmp_path):
    good = {"problem": "1+1?", "answer": "2", "solution": "1+1 = 2"}
    bad = {"no question": [{"problem": None}, {"problem": " "}, {"problem": 1 > 2, "question": []},
                           {"problem": [{"role": "user"}]}, {"problem": ["text"]}],
           "no answer": [{"answer": None, "solution": "two"}, {"answer": "", "solution": None},
                         {"answer": ["2"], "solution": ""}],
           "text that is not valid": [{"problem": "\ud800"}, {"solution": "1+1\udfff = 2"}],
           "an answer that does not grade equal to itself": [
               {"answer": "..."}, {"answer": r"\frac{1}{2"}, {"answer": "word " * 99}]}
    bad["no question"].pop(2)  # False is a number to JSON's reader: not worth a rule
    rows = [good, *[good | wrong for faults in bad.values() for wrong in faults], good]
    left_out = igpo.Counter()
    problems = read(tmp_path, *rows, left_out=left_out)
    assert problems == [("1+1?", "2", "<reasoning>\n1+1 =")] * 2  # repeated ones stay here
    assert left_out == {reason: len(faults) for reason, faults in bad.items()}
    assert "warning" not in igpo.describe_problems(problems, left_out, "f")
    untraced = [igpo.Problem("q", "1", None)] * 3
    assert igpo.describe_problems(problems + untraced, {}, "f") == (
        "f: 5 usable rows; 3 of the usable rows have no trace to make hints from\n"
        "warning: most problems have no trace, and so they train as plain GRPO")

def test_sft_examples(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": " ", "completion": "b"},
            {"prompt": "a", "completion": None}, {"prompt": "a"}, {"prompt": "a\ud800",
            "completion": "b"}, {"prompt": "c", "completion": "2020-01-01", "kept": True}]
    examples, left_out = igpo.read_examples(write_jsonl(tmp_path / "s.jsonl", *rows))
    assert examples == [("a", None, "b"), ("c", None, "2020-01-01")]
    assert left_out == {"no prompt or no completion": 3, "text that is not valid": 1}
    with pytest.raises(igpo.UsageError, match="Its columns are problem. Expected are prompt; and "):
        igpo.read_examples(write_jsonl(tmp_path / "s.jsonl", {"problem": "a"}))

ROWS = [{"problem": "día 1?", "answer": "1", "date": "2020-01-01"}, {"problem": "2?", "answer": 2}]
WRITTEN = {  # ways to write the same rows
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)), "lines.json": "\n".join(map(json.dumps, ROWS)),
    "blank lines.jsonl": "\n\n".join(map(json.dumps, ROWS)) + "\n \n",
    "windows.jsonl": "\r\n".join(map(json.dumps, ROWS)),
    "bom.jsonl": "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "array.json": json.dumps(ROWS), "pretty.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS), "objects.json": "\n".join(json.dumps(r, indent=1)
                                                                for r in ROWS),
    "lines.jsonl.gz": "\n".join(map(json.dumps, ROWS)), "array.json.gz": json.dumps(ROWS),
    "[1]*.jsonl": "\n".join(map(json.dumps, ROWS))}

@pytest.mark.parametrize("name", WRITTEN)
def test_json_in_any_layout(name, tmp_path):
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(WRITTEN[name].encode()))
    assert igpo.read_rows(tmp_path / name) == ROWS  # the date is text, 2 is a number
    assert igpo.read_problems(str(tmp_path / name)) == [("día 1?", "1", None), ("2?", "2", None)]

def test_csv_is_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer,note\n"How, then?",007,a\nShort?\n"Two\nlines?",27.0,,more\n')
    assert igpo.read_rows(path) == [
        {"question": "How, then?", "answer": "007", "note": "a"},
        {"question": "Short?", "answer": None, "note": None},
        {"question": "Two\nlines?", "answer": "27.0", "note": "", "": ["more"]}]
    assert igpo.read_problems(path) == [("How, then?", "007", None), ("Two\nlines?", "27.0", None)]

def test_columns_may_change_their_type_beyond_10_MB(tmp_path):
    with open(tmp_path / "big.jsonl", "w") as file:
        for i in range(30000):
            late = i > 29000
            extra = {"new": {"key": [i]}} if late else {}
            file.write(json.dumps({
                "problem": f"{i} + 0?", "answer": f"{i}" if late else i, "pad": "x" * 400,
                "note": "text" if late else None, "score": 0.5 if late else 1} | extra) + "\n")
    assert (tmp_path / "big.jsonl").stat().st_size > 10e6
    problems = igpo.read_problems(tmp_path / "big.jsonl")
    assert problems == [(f"{i} + 0?", str(i), None) for i in range(30000)]

def test_large_files_need_no_judge(tmp_path, monkeypatch):
    """155,000 of MetaMathQA's 395,000 rows are of the two types, on 15,000 queries."""
    monkeypatch.setattr(igpo, "ask_judge", lambda *_: pytest.fail("the judge was asked"))
    rows = [meta(f"{i % 1500}?", f"x = \\frac{{{i % 1500}}}{{7}}\nThe answer is: "
                 f"\\frac{{{i % 1500}}}{{7}}", "MATH_AnsAug" if i % 2 else "MATH_FOBAR")
            for i in range(40000)]
    start = time.time()
    assert len(read(tmp_path, *rows)) == 750
    assert time.time() - start < 6  # a tenth of the rows; a minute for all

def test_hub_names(monkeypatch):
    import datasets
    asked = []

    def load_dataset(name, subset=None, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([FORMS["GSM8K"][0]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source, split in ("openai/gsm8k:main", "test"), ("me/mine", "train"):
        assert [p.answer for p in igpo.read_problems(source, split=split)] == ["72"]
    assert asked == [("openai/gsm8k", "main", "test"), ("me/mine", None, "train")]

BAD_FILES = [  # name, content, message
    ("none.jsonl", None, "none.jsonl: No such file"), ("none.parquet", None, "none.parquet: "),
    ("a.txt", b"x", r"a.txt: only .jsonl, .json, .csv and .parquet files are read"),
    ("folder", ..., "folder: only .jsonl"), ("a.jsonl", b"", "a.jsonl holds no rows"),
    ("a.json", b"[]", "a.json holds no rows"), ("a.csv", b"", "a.csv holds no rows"),
    ("a.jsonl", b'{"a": 1}\n7\n', "a.jsonl, row 2: 7 has no columns"),
    ("a.jsonl", b'{"a": 1}\n\n{"a": \n{"a": 2}\n', "a.jsonl: what begins on line 3 is no JSON: .*"),
    ("a.jsonl", b'{"a": 1}\nnot JSON\n', "a.jsonl: what begins on line 2 is no JSON: .* line 2 "),
    ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl: what begins on line 1 is no JSON"),
    ("a.jsonl", b"\xff", "a.jsonl: .*invalid start byte"),
    ("a.jsonl.gz", b"x", "a.jsonl.gz: Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(b"{}" * 999)[:30], "a.jsonl.gz: "),
    ("a.csv", b"a,b\n" + b"x" * 200_000, "a.csv: field larger"),
    ("a.parquet", b"PAR1", "a.parquet: "),
    ("a.jsonl", b'{"problem": "1?", "solution": "one"}', r"a.jsonl: 0 usable rows, 1 left out with "
     r"no answer. Its columns are problem, solution. Expected are one of query, problem, question, "
     r"prompt; and one of answer, ground_truth_answer, reward_model.ground_truth, solution, resp"),
    ("a.jsonl", b'{"problem": "1?", "answer": 12345678901234567890.0}', "a.jsonl, row 1: .*digits"),
    ("a.jsonl", b'{"problem": "1?", "answer": Infinity}', "a.jsonl, row 1: inf .*digits")]

@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_a_bad_file_is_one_line(name, content, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    if content is ...:
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(igpo.UsageError) as error:
        igpo.read_problems(name)
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert capfd.readouterr() == ("", "")

def test_an_unknown_name_goes_to_the_hub(monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(igpo.UsageError, match="^no/such:thing: ") as error:
        igpo.read_problems("no/such:thing")
    assert "\n" not in str(error.value)

def test_rows_to_rewrite_have_their_columns(tmp_path):
    rows = [{"problem": "1?", "answer": 1, "solution": "one"}, {"problem": "1?", "answer": "1"}]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    igpo.check_text_columns(igpo.read_rows(path), ["problem", "answer"], path)
    with pytest.raises(igpo.UsageError, match="row 2: None in column 'solution' is no text; its "):
        igpo.check_text_columns(igpo.read_rows(path), ["problem", "answer", "solution"], path)

@pytest.mark.parametrize("name, problems, untraced", [
    ("gsm8k_train", 7473, 18), ("gsm8k_test", 1319, 5), ("math500", 500, 500), ("amc23", 40, 40),
    ("minerva_math", 272, 20), ("gsm8k_train_as_metamathqa", 7473, 18)])
def test_the_shared_files(name, problems, untraced):
    path = Path("/work/shared/data") / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("not here")
    found = igpo.read_problems(path)
    assert (len(found), sum(p.trace is None for p in found)) == (problems, untraced)
    assert all(re.sub(r"[^\d]", "", p.answer) for p in found if "gsm8k" in name)

# --- The recipe: most run main() on a LLaDA-format folder with random weights.

@pytest.fixture(autouse=True)
def group_of_one():
    igpo.setup()

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with m (the model), meta.jsonl (MetaMathQA's columns) and sft.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    llada_folder(folder / "m")
    pairs = [(a, b) for a in range(1, 7) for b in range(4)]
    write_jsonl(folder / "meta.jsonl", *[
        meta(f"{a}.{b}=", f"{a} less {b} leaves what is\n= {a + 8}\nThe answer is: {a + 8}")
        for a, b in pairs])
    write_jsonl(folder / "sft.jsonl", *[{"prompt": f"{a}.{b}=", "completion": f"{a}{b}"}
                                        for a, b in pairs])
    return folder

def flags(world, out, *more, sft=True):
    at = ["--model", world / "m", "--train_data", world / "meta.jsonl", "--out_dir", out]
    sft = ["--sft_data", world / "sft.jsonl", "--sft_steps", 4, "--sft_batch", 4, "--sft_lr", 1e-4,
           "--sft_length", 8] if sft else []
    small = ("--prompts_per_step 4 --group_size 4 --gen_length 16 --diffusion_steps 4 "
             "--block_length 8 --room 4 --min_chunk 1 --max_chunk 3 --eval_size 4 --max_steps 3 "
             "--save_every 1 --warmup_steps 2 --mu 2 --lr 1e-4").split()
    return [str(word) for word in [*at, *sft, *small, *more]]

def same_runs(a, b, rel=0.0):
    for stage in "sft", "rl", "eval":
        for x, y in zip(lines_of(a, stage), lines_of(b, stage), strict=True):
            for name in x.keys() | y.keys():
                if rel and isinstance(y[name], float):
                    assert x[name] == pytest.approx(y[name], rel=rel, abs=1e-7), (stage, x, y)
                else:
                    assert x[name] == y[name], (stage, x, y)
    a, b = (load_file(out / "final" / "model.safetensors") for out in (a, b))
    assert rel or all(torch.equal(a[name], b[name]) for name in a)

# Wrong inputs: what to do to a copy of the world, in which run/ was killed; flags; the one line.

def remove(name):
    return lambda: os.remove(name)

def cut(name, size):
    return lambda: os.truncate(name, size)

def config(**changes):
    path = Path("m/config.json")
    return lambda: write_jsonl(path, json.loads(path.read_text()) | changes)

def without_norm():
    weights = load_file("m/model.safetensors")
    save_file({k: v for k, v in weights.items() if "ln_f" not in k}, "m/model.safetensors")

def data(*rows, name="data.jsonl", flag="--train_data"):
    return lambda: write_jsonl(Path(name), *rows), f"{flag} {name}"

SFT = "--stage sft --sft_length 8 --sft_data sft.jsonl"
REWRITE = "--stage rewrite --rewriter m --rewrite_data sft.jsonl"
GOOD = meta("1.1=", "It is 5. The answer is: 5")
SHARD = "run/checkpoint-rl-2/__0_0.distcp"
WRONG = [
    (None, "--preset nonsense", "--preset: invalid choice: 'nonsense'"),
    (None, "--tau nan", "--tau must be within 0..1, not nan"),
    (None, "--eta_low 0.9", "--eta_low is above --eta_high"),
    (None, "--gen_length 21", "gen_length 21 .*block_length 8"),
    (None, "--stage sft", "--stage sft needs --sft_data"),
    ("three processes", "", "--prompts_per_step 4 .* 3 processes"),
    (None, "--out_dir m", "m is not empty: --resume"),
    (None, "--out_dir absent --resume", "absent/config.json: No such"),
    ("no folder named", "--resume", "--resume needs --out_dir"),
    (None, "--out_dir " + 300 * "x", "x: File name too long"),
    (None, "--model GSAI-ML/LLaDA-8B-Instruct", "finds no GPU.* --preset toy"),
    # data
    (*data(), "data.jsonl holds no rows"), (*data(GOOD, "{"), "what begins on line 2 is no JSON"),
    (*data("type,query", "a,b", name="d.csv"), "0 usable rows.* columns are type, query. Expected"),
    (*data(GOOD, GOOD | {"query": None}, meta("2", "none"), meta("3", "The answer is: 3", "other")),
     "data.jsonl: 1 problems are too few, since --eval_size 4"),
    (None, "--max_prompt_length 2", "all prompts are empty or exceed --max_prompt_length 2"),
    (None, "--gen_length 512 --diffusion_steps 64", "prompt of 4 and .* of 512 .* 128 positions"),
    (None, f"{SFT} --sft_length 2", "all completions exceed --sft_length 2"),
    (None, REWRITE, "row 1: None in column 'problem'"),
    (*data({"problem": "1", "answer": "1", "solution": "1"},
           flag=f"{REWRITE} --rewriter /absent --rewrite_data"), "/absent: "),
    # the model
    (remove("m/config.json"), "", "m: No such file"),
    (cut("m/config.json", 0), "", "Expecting value"),
    (config(mask_token_id=99), "", "mask_token_id is 99"), (config(n_heads=5), "", "m: .*multiple"),
    (config(model_type="gpt2"), "", "'gpt2' is not supported"), (without_norm, "", "model.norm"),
    # the run
    (cut("run/config.json", 99), "--resume", "config.json: "),
    (remove("run/checkpoint-rl-2/metrics.jsonl"), "--resume", "checkpoint-rl-2: No such file"),
    (cut(SHARD, 1000), "--resume", "checkpoint-rl-2: "),
    (remove(SHARD), "--resume", "checkpoint-rl-2: "),
    (lambda: Path("run/checkpoint-rl-2").rename("run/checkpoint-rl-9"), "--resume", "beyond the 3"),
    (cut("run/sft/model.safetensors", 1000), "--resume", "run/sft: "),
    (lambda: shutil.rmtree("run/checkpoint-rl-2"), "--resume", "no checkpoint any more"),
    (lambda: shutil.rmtree("run/sft"), "--resume", "no model folder at .*run/sft")]

@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed") / "world"
    shutil.copytree(world, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(igpo, "grade", arbitrary)
        broken(flags(Path(), "run"), "rl", 3)
    return folder

@pytest.mark.parametrize("damage, wrong, message", WRONG)
def test_what_a_user_gets_wrong_is_one_line(damage, wrong, message, killed, tmp_path, monkeypatch,
                                            capfd):
    monkeypatch.chdir(shutil.copytree(killed, tmp_path / "world"))
    if damage == "three processes":
        monkeypatch.setattr(igpo, "world", lambda: 3)
    elif damage and damage != "no folder named":
        damage()
    before, resumes = sorted(Path().rglob("*")), wrong == "--resume"
    with pytest.raises(igpo.UsageError) as error:
        argv = flags(Path(), "run" if resumes else "out", *wrong.split(), sft=resumes)
        if damage == "no folder named":
            del argv[4:6]
        igpo.main(argv)
    assert re.fullmatch(f".*{message}.*", str(error.value)) and len(str(error.value)) < 400
    said = re.sub(r"\rLoading weights.*\n?", "", capfd.readouterr().err)  # a progress bar
    assert sorted(Path().rglob("*")) == before and said == ""

def test_every_number_is_refused_or_within_its_bounds():
    for f in dataclasses.fields(igpo.Config):
        bounds = f.metadata.get("metavar")
        assert bounds or not any(kind in str(f.type) for kind in ("int", "float")), f.name
        for word in ("nan", "inf", "-1", "0", "1e12", "1000000000000") if bounds else ():
            try:
                cfg = igpo.parse_flags(igpo.Config, [f"--{f.name}", word], igpo.PRESETS)
            except igpo.UsageError as error:
                assert f"--{f.name}" in str(error) and "\n" not in str(error)
                continue
            low, high = map(float, bounds.split(".."))
            assert low <= getattr(cfg, f.name) <= high, (f.name, word)
    argv = ["--preset", "toy", "--lr", "0.5", "--tau", "1"]
    cfg = igpo.parse_flags(igpo.Config, argv, igpo.PRESETS)
    assert (cfg.lr, cfg.tau, cfg.model, cfg.group_size) == (0.5, 1, "toy", 8)

def test_problems_are_held_out_filtered_and_batched(tmp_path):
    rows = [meta(f"{a}" * (a + 1), f"The answer is: {a}") for a in range(9)]
    path = write_jsonl(tmp_path / "meta.jsonl", *rows)
    cfg = igpo.Config(train_data=path, eval_size=2)
    problems, held_out, _ = igpo.load_data(cfg)
    assert (len(problems), len(held_out)) == (7, 2) and not set(problems) & set(held_out)
    examples = igpo.encode_problems(tiny_model(), tiny_tokenizer(), problems, 16, 5)
    assert [e.problem.answer for e in examples] == ["2", "3", "4"]  # the longer ones are left out
    assert [len(e.prompt) for e in examples] == [3, 4, 5]
    seen = [i for step in range(10) for i in igpo.batch_indices(20, 4, step, 0)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]
    assert igpo.batch_indices(20, 4, 7, 0) == seen[28:32]  # a function of the step alone
    across = igpo.batch_indices(20, 8, 2, 0)  # 16 to 23: over the end of an epoch
    assert across == seen[16:24]

def test_the_chat_template_asks_for_the_form():
    tokenizer = tiny_tokenizer()
    assert tokenizer.batch_decode(igpo.encode_prompts(tokenizer, ["26.4=", "a"])) == ["26.4=", "a"]
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}{{ m['content'] }}"
                               "{% endfor %}{% if add_generation_prompt %}</answer>{% endif %}")
    words = tokenizer.convert_ids_to_tokens(igpo.encode_prompts(tokenizer, ["26.4=", "a"])[0])
    assert "".join(words[-6:]) == "26.4=</answer>" and {"<reasoning>\n", "\\boxed{"} < set(words)

def test_the_toy_world():
    tokenizer = tiny_tokenizer()
    first, again, other = (igpo.toy_data(igpo.toy_problem, 200, seed) for seed in (1, 1, 2))
    assert first == again != other
    for question, _, trace in igpo.toy_data(igpo.toy_example, 200, 1):
        ids = tokenizer(question + trace).input_ids
        assert tokenizer.decode(ids) == question + trace and len(ids) <= 5 + 19

CONTRACT = set(
    "reward accuracy accuracy_after all_wrong all_wrong_after rescued hint_tokens hint_tokens_kept "
    "all_right second_right eta empty_hints kl ratio ratio_hint ratio_generated clip_fraction "
    "clip_fraction_hint clip_fraction_generated entropy loss grad_norm skipped lr responses "
    "completion_length cache threshold tokens_per_second seconds seconds_rollout "
    "seconds_update".split())

def test_the_toy_recipe_with_the_fast_sampler(tmp_path, monkeypatch):
    asked, sample = [], igpo.sample
    monkeypatch.setattr(igpo, "sample", lambda *a, **k: asked.append(k) or sample(*a, **k))
    out = tmp_path / "run"
    igpo.main([*("--preset toy --sft_steps 3 --sft_batch 8 --max_steps 2 --prompts_per_step 4 "
                 "--group_size 4 --eval_size 8 --save_every 1 --cache block --threshold 0.9 "
                 "--out_dir").split(), str(out)])
    lines = igpo.read_lines(out / "metrics.jsonl")
    steps = [f"{line['stage']} {line['step']}" for line in lines]
    assert steps == "eval 0,sft 1,sft 2,sft 3,eval 0,rl 1,eval 1,rl 2,eval 2".split(",")
    assert CONTRACT <= lines[-2].keys() and lines[-2]["seconds"] > 0
    for drawn in lines[-2], *asked:
        assert drawn["cache"] == "block" and drawn["threshold"] == 0.9
    values = [v for line in lines for v in line.values() if not isinstance(v, (str, type(None)))]
    assert all(map(math.isfinite, values))
    summary = json.loads((out / "summary.json").read_text())
    assert set("accuracy_start accuracy_sft accuracy_final all_wrong all_wrong_after steps seconds"
               .split()) <= summary.keys() and summary["steps"] == 2

def rescued_groups():
    """Two prompts; of the second one both responses are wrong, and the second is replaced."""
    ids = {text: tiny_tokenizer()(text).input_ids for text in ("1.2=", "1.3=", "1.4=")}
    own = torch.tensor([[ids["1.3="], ids["1.2="]], [ids["1.2="], ids["1.2="]]])
    second = torch.tensor([[ids["1.4="], ids["1.3="]]])
    hints = second.where(torch.tensor([False, True, True, False]), MASK)
    completions, hinted = own.clone(), torch.zeros(2, 2, 4).bool()
    completions[1, 1], hinted[1, 1] = second[0, 1], hints[0, 1] != MASK
    return igpo.Groups(
        completions, torch.tensor([[True, False], [False, True]]), hinted, own,
        torch.tensor([[True, False], [False, False]]), [1], torch.tensor([[0.3, 0.5]]), hints,
        second, torch.tensor([[False, True]]))

def test_rollouts_are_written_as_text(tmp_path):
    batch = [igpo.Example(igpo.Problem(f"{n}?", str(n), None), [], []) for n in (7, 8)]
    igpo.append_rollouts(tmp_path, 3, tiny_tokenizer(), batch, rescued_groups(),
                         tiny_model().config)
    assert igpo.read_lines(tmp_path / "rollouts.jsonl") == [
        {"step": 3, "question": "7?", "answer": "7", "completions": ["1.3=", "1.2="],
         "correct": [True, False]},
        {"step": 3, "question": "8?", "answer": "8", "completions": ["1.2=", "1.2="],
         "correct": [False, False], "hints": ["_.4_", "_.3_"], "second": ["1.4=", "1.3="],
         "second_correct": [False, True]}]

def test_a_diverged_run_ends_and_can_go_on(world, tmp_path, monkeypatch, capsys):
    loss, calls = igpo.policy_loss, []

    def diverging(*inputs, **options):
        """Of step 1 one update of two is not finite, of step 2 both are."""
        value, metrics = loss(*inputs, **options)
        calls.append(1)
        return value * (math.inf if len(calls) > 1 else 1.0), metrics

    monkeypatch.setattr(igpo, "policy_loss", diverging)
    argv = flags(world, tmp_path / "run", sft=False)
    message = r"no gradient of rl step 2 was finite\. .*metrics\.jsonl.* lower --lr"
    with pytest.raises(igpo.UsageError, match=message):
        igpo.main(argv)
    shown = capsys.readouterr().out
    assert re.search("RL 1/3 .* grad_norm nan .* skipped 0.50: gradients", shown)
    assert [line["skipped"] for line in lines_of(tmp_path / "run")] == [0.5, 1.0]
    monkeypatch.setattr(igpo, "policy_loss", loss)  # the message says how to go on
    igpo.main([*argv, "--resume", "--lr", "1e-6"])
    assert [line["skipped"] for line in lines_of(tmp_path / "run")] == [0.5, 0, 0]

class Interrupted(Exception):
    pass

def test_rewriting_keeps_what_is_in_form_and_right(world, tmp_path, monkeypatch, capsys):
    igpo.save_model(*igpo.toy_model(0), tmp_path / "w")
    data = write_jsonl(tmp_path / "data.jsonl", *[
        {"problem": f"{a}.1=", "answer": str(a - 1), "solution": f"6{a}"} for a in range(1, 7)])
    argv = [*"--preset toy --stage rewrite --sft_length 24 --rows_per_call 2".split(),
            "--rewrite_data", data, "--rewriter", str(tmp_path / "w"), "--out_dir"]
    igpo.main([*argv, str(tmp_path / "useless")])  # the real pipeline
    assert "0 of 6 rewritten traces" in capsys.readouterr().out

    good, asked = "<reasoning>\n1\n</reasoning>\n<answer>\n\\boxed{ANSWER}\n</answer>", []
    texts = {2: "\\boxed{1}", 4: good.replace("ANSWER", "6")}  # not in form; not right

    def write(requests, **options):
        numbers = [int(re.search(r"Problem:\n(\d)\.1=\n\nSolution:\n6\1", request)[1])
                   for request in requests]
        asked.extend(numbers)
        if asked == [1, 2, 3, 4]:
            raise Interrupted
        return [[{"generated_text": texts.get(a, good.replace("ANSWER", str(a - 1)))}]
                for a in numbers]

    write.tokenizer = tiny_tokenizer()
    monkeypatch.setattr(igpo.transformers, "pipeline", lambda *_, **__: write)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        igpo.main([*argv, str(out)])
    igpo.main([*argv, str(out), "--resume"])
    assert asked == [1, 2, 3, 4, 3, 4, 5, 6]
    kept = igpo.read_lines(out / "traces.jsonl")
    assert [row["prompt"] for row in kept] == ["1.1=", "3.1=", "5.1=", "6.1="]
    assert kept[3]["completion"] == good.replace("ANSWER", "5")

@contextlib.contextmanager
def interrupted(*when):
    """All processes end before the checkpoint of this (stage, step) is written."""
    save = igpo.save_checkpoint

    def stopping(out, stage, step, *state):
        if (stage, step) == when:
            raise Interrupted
        save(out, stage, step, *state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(igpo, "save_checkpoint", stopping)
        yield

def broken(argv, stage, step):
    with interrupted(stage, step), pytest.raises(Interrupted):
        igpo.main(argv)

@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(igpo, "grade", arbitrary)
        igpo.main(flags(world, out))
    return out

def test_a_resumed_run_is_the_uninterrupted_one(world, whole, tmp_path, arbitrary_grades):
    assert any(line["all_wrong"] > line["all_wrong_after"] for line in lines_of(whole))
    out, argv = tmp_path / "run", flags(world, tmp_path / "run", "--sft_save_every", 1)
    broken(argv, "sft", 1)  # nothing is checkpointed yet
    broken([*argv, "--resume"], "sft", 3)
    assert igpo.find_checkpoints(out)[-1] == ("sft", 2, out / "checkpoint-sft-2")
    broken([*argv, "--resume"], "rl", 1)  # from sft/ and no checkpoint of this stage
    broken([*argv, "--resume"], "rl", 3)
    shutil.copytree(out / "checkpoint-rl-2", out / "checkpoint-rl-1")  # a kill left the one before
    shutil.copytree(out / "checkpoint-rl-2", out / "unfinished-checkpoint-rl-3")  # or of the next
    shutil.copytree(out / "checkpoint-rl-2", out / "checkpoint-rl-2 (copy)")  # not ours
    igpo.main([*argv, "--resume"])
    same_runs(whole, out)
    assert sorted(p.name for p in out.glob("*checkpoint*")) == [
        "checkpoint-rl-2 (copy)", "checkpoint-rl-3"]
    shutil.rmtree(out / "final")  # as if the disk had been full
    igpo.main([*argv, "--resume"])
    same_runs(whole, out)
    with pytest.raises(igpo.UsageError, match=r"--mu is 1, but the run was started with 2$"):
        igpo.main([*argv, "--resume", "--mu", "1"])

def test_lora_resumes_and_goes_on_from_base_and_adapter(world, tmp_path, arbitrary_grades):
    pytest.importorskip("peft")
    lora = "--lora_rank", 2, "--lora_dropout", 0.2, "--sft_lr", 1e-2, "--lr", 1e-2
    igpo.main(flags(world, tmp_path / "whole", *lora))
    argv, out = flags(world, tmp_path / "run", *lora, "--sft_save_every", 1), tmp_path / "run"
    broken(argv, "sft", 3)
    broken([*argv, "--resume"], "rl", 1)
    broken([*argv, "--resume"], "rl", 3)
    igpo.main([*argv, "--resume"])
    same_runs(tmp_path / "whole", out)
    reader = torch.distributed.checkpoint.FileSystemReader(out / "checkpoint-rl-3")
    stored = reader.read_metadata().state_dict_metadata
    assert stored and all(".lora_" in name or "param_groups" in name for name in stored)  # no base

    cfg = igpo.parse_flags(igpo.Config, argv, igpo.PRESETS)
    ids, base = random_prompts(2, 9), igpo.load_model(world / "m")[0]
    for name in "sft", "final":  # the merged model is base and adapter
        policy, _ = igpo.load_policy(cfg, torch.device("cpu"), out / name)
        logits = policy.eval()(ids).logits
        assert torch.allclose(logits, igpo.load_model(out / name)[0](ids).logits, atol=1e-3)
        assert not torch.allclose(logits, base(ids).logits, atol=1e-2)
    learns = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert learns and all(".lora_" in name for name in learns)

def in_processes(argv, count=1, limit=resource.RLIM_INFINITY):
    """main() in forked processes -> [(status, stderr)]. limit: as if the disk were full after so
    many bytes in a file."""
    torch.distributed.destroy_process_group()  # a fork lacks its threads
    gc.collect()
    with contextlib.suppress(OSError):  # closing a file also gives up this process's lock of it
        open(Path(argv[argv.index("--out_dir") + 1]) / ".lock").close()
    with socket.socket() as port:
        port.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port.getsockname()[1])}
    said, children = [tempfile.TemporaryFile("w+") for _ in range(count)], []
    for rank, file in enumerate(said):
        children.append(os.fork())
        if children[-1] == 0:
            gc.freeze()  # what is left of a group would wait for its threads when it is collected
            try:
                sys.stdout, sys.stderr, time.sleep = open(os.devnull, "w"), file, id
                os.dup2(file.fileno(), 2)
                if count > 1:
                    os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(count)}
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                igpo.run_main(lambda: igpo.main(argv), "igpo.py")
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                file.flush()
                os._exit(1)
    status = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    igpo.setup()
    bar = re.compile(r"(Loading weights|Writing model shards):.*|\s*$")  # rank 0's; not after a toy
    errors = [file.seek(0) or file.read().splitlines(True) for file in said]
    errors = ["".join(line for line in lines if not bar.match(line)) for lines in errors]
    return list(zip(status, errors))

def test_two_processes_take_the_steps_of_one(world, whole, tmp_path, arbitrary_grades):
    first, second = flags(world, tmp_path / "a"), flags(world, tmp_path / "b")
    with interrupted("rl", 2):
        (left, _), (right, error) = in_processes(first, 2)
        assert (left, right) == (1, 1) and "Interrupted" in error, error
    igpo.main([*first, "--resume"])
    same_runs(tmp_path / "a", whole, rel=1e-5)
    broken(second, "rl", 2)
    assert in_processes([*second, "--resume"], 2) == [(0, "")] * 2
    same_runs(tmp_path / "b", whole, rel=1e-5)

def test_tied_weights_and_lopsided_roll_outs_on_two_processes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(igpo, "grade", lambda completion, _: (  # rank 0 draws twice, 1 once
        igpo.rank() == 1 or completion.startswith("\\boxed")))
    tied = llada_folder(tmp_path / "m", tie_word_embeddings=True)
    argv = flags(world, tmp_path / "run", "--model", tmp_path / "m", "--max_steps", 1,
                 "--eval_size", 1, sft=False)  # rank 1 has no held-out problem of its own
    assert in_processes(argv, 2) == [(0, "")] * 2
    assert [line["all_wrong"] for line in lines_of(tmp_path / "run")] == [0.5]
    final, _ = igpo.load_model(tmp_path / "run" / "final")
    assert final.lm_head.weight is final.get_input_embeddings().weight
    names = load_file(tmp_path / "run" / "final" / "model.safetensors").keys()
    assert "model.transformer.wte.weight" in names  # in LLaDA's format again
    assert not torch.equal(final.lm_head.weight, tied.lm_head.weight)

def test_a_full_disk_is_one_line_and_loses_nothing(world, whole, tmp_path, arbitrary_grades):
    out = tmp_path / "run"
    argv = flags(world, out)

    def full(file, limit, *more):
        (status, error), = in_processes([*argv, *more], limit=limit)
        line = error.splitlines()[-1]
        assert status == 2 and "Traceback" not in error and str(out / file) in line, error
        return line.startswith("igpo.py: ") and len(error.splitlines()) == 1

    assert full("config.json", 600)
    full("checkpoint-sft-4", 100_000)  # behind SFT's progress bar
    broken([*argv, "--resume"], "rl", 2)
    assert full("checkpoint-rl-2", 100_000, "--resume")
    igpo.main([*argv, "--resume"])
    shutil.rmtree(out / "final")
    assert full("final", 50_000, "--resume") and not (out / "final").exists()
    igpo.main([*argv, "--resume"])
    same_runs(whole, out)

def test_a_run_goes_on_after_a_kill_of_torchrun(world, tmp_path):
    argv = flags(world, tmp_path / "run", "--max_steps", 40)
    log = tmp_path / "run" / "metrics.jsonl"
    run = subprocess.Popen([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(HERE / "igpo.py"), *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (log.exists() and '"stage": "rl", "step": 2' in log.read_text()):
            assert run.poll() is None
            time.sleep(0.1)
        with pytest.raises(igpo.UsageError, match="another process is still writing"):
            igpo.main([*argv, "--resume"])
    finally:
        run.kill()
        run.wait()
    for _ in range(9):  # the orphans end with their parent
        with contextlib.suppress(igpo.UsageError):
            igpo.main([*argv, "--resume"])
            break
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, 41))

def test_a_prompt_that_comes_twice_in_a_step_is_drawn_twice():
    first, _, again = (torch.rand(3, generator=igpo.prompt_stream(0, 5, [4, 7, 4], place))
                       for place in range(3))
    assert torch.equal(first, torch.rand(3, generator=igpo.seeded(0, "rollout", 5, 4)))
    assert not torch.equal(first, again)

def test_the_numbers_of_sft_do_not_depend_on_its_passes(tmp_path, saved):
    found = []
    for rows in 1, 3, 4:
        (tmp_path / str(rows)).mkdir()
        found.append(run_sft(tiny_model(1), tmp_path / str(rows), sft_rows_per_forward=rows))
    for step, *others in zip(*found, strict=True):
        for other in others:
            assert other.pop("stage") == "sft"
            assert other == pytest.approx({name: step[name] for name in other}, rel=1e-4)

def test_no_temperature_is_too_small():
    logits = torch.randn(9, 50, generator=igpo.seeded(1))
    for temperature in 1e-9, 1e-40, 1e-300:
        tokens, _ = igpo.choose_tokens(logits, 3, temperature, torch.full((9,), 0.5))
        assert tokens.tolist() == logits.index_fill(1, torch.tensor(3), -9.0).argmax(1).tolist()

def test_a_fixed_eta_shows_its_share_of_chunks():
    """0.7 of 10 chunks are 7, though 0.7 in single precision is a little less."""
    shown = []
    igpo.elastic_rollout(
        lambda prompts, mask, generators, hints: shown.append(hints) or torch.zeros(
            len(prompts), 2, 10).long(), lambda *_: False, torch.ones(1, 1).long(),
        torch.ones(1, 1).bool(), ["1"], [list(range(1, 11))], [igpo.seeded(0)], mask_id=0,
        eta_range=(0.7, 0.7), min_chunk=1, max_chunk=1, room=0)
    assert (shown[1] != 0).sum(-1).tolist() == [[7, 7]]

TEMPLATES = [  # what is wrong with a chat template | what is said of it
    ("{{ raise_exception('only tools') }}", "only tools"), ("{% if %}", "Expected an expression"),
    ("{{ messages.x.y }}", "no attribute 'x'"), ({"tools": "{{ messages }}"}, "with no default")]

@pytest.mark.parametrize("template, message", TEMPLATES)
def test_a_chat_template_that_fails_is_one_line(template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(igpo.UsageError, match=f"^the tokenizer's chat template: .*{message}.*$"):
        igpo.encode_prompts(tokenizer, ["1"])

def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch, capfd):
    def refuse(code):
        def lockf(*_):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(igpo.fcntl, "lockf", lockf)

    for code in errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP:
        refuse(code)
        igpo.lock_folder(tmp_path / "run")
        assert re.fullmatch(rf".*run cannot be locked \({os.strerror(code)}\): .*\n",
                            capfd.readouterr().err)
    for code in errno.EAGAIN, errno.EACCES:
        refuse(code)
        with pytest.raises(igpo.UsageError, match="another process is still writing to .*run$"):
            igpo.lock_folder(tmp_path / "run")

def test_a_folder_that_cannot_be_finished_is_removed(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "before").touch()
    for error, kind in (OSError(errno.ENOSPC, "No space left on device"), igpo.UsageError), \
            (ZeroDivisionError("ours"), ZeroDivisionError):
        with pytest.raises(kind, match="final: No space left|ours"):
            with igpo.write_folder(tmp_path / "final") as folder:
                folder.mkdir()
                (folder / "half").touch()
                raise error
        assert [path.name for path in tmp_path.rglob("*")] == ["final", "before"]
    with igpo.write_folder(tmp_path / "final") as folder:
        folder.mkdir()
        (folder / "after").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "after"]

def test_a_resumed_run_is_one_run_at_wandb(world, tmp_path, monkeypatch, arbitrary_grades):
    started, logged = [], []
    fake = types.SimpleNamespace(run=None, log=logged.append, init=lambda **options: (
        started.append(options), setattr(fake, "run", True)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    argv = flags(world, tmp_path / "run", "--wandb", "project", sft=False)
    broken(argv, "rl", 2)
    igpo.main([*argv, "--resume"])
    assert [run["resume"] for run in started] == ["allow"] * 2 and started[0]["id"]
    assert started[0]["id"] == started[1]["id"] and started[0]["project"] == "project"
    steps = [line["rl/step"] for line in logged if "rl/step" in line]
    assert steps == [1, 2, 2, 3] and "rl/reward" in logged[-2]

def test_how_long_processes_wait_for_each_other(world, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(igpo, "setup", lambda hours=2: waits.append(hours) or torch.device("cpu"))
    monkeypatch.setattr(igpo, "rewrite_traces", lambda *_: None)
    monkeypatch.setattr(igpo, "train", lambda *_: None)
    igpo.main(["--preset", "toy"])
    igpo.main(["--preset", "toy", "--stage", "rewrite"])
    assert waits == [2, 12]

# Memory, by running the real functions on fake tensors of LLaDA-8B's shape

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gpus, lora_rank, rows_per_call, N, most", [
    (8, 0, 16, 8, 40), (4, 0, 16, 8, 60), (1, 128, 16, 8, 40), (1, 16, 8, 2, 24)])
def test_memory_of_an_rl_step(gpus, lora_rank, rows_per_call, N, most, monkeypatch, P=200, L=256):
    peft = pytest.importorskip("peft") if lora_rank else None
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    mesh, peaks = init_device_mesh("cpu", (gpus,)), {}
    bf16 = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def peak(phase):
        """Since the last call."""
        peaks[phase] = live._peak_mem.pop(torch.device("cpu")) / 2**30

    for hook in "_pre_fw_hook", "_post_fw_hook", "_pre_bw_hook", "_post_bw_hook":
        monkeypatch.setattr(MemTracker, hook, lambda *_: None)  # of modules we ask nothing
    with FakeTensorMode(allow_non_fake_inputs=True), MemTracker() as live:
        monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)  # there are no values
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
        with torch.device("meta"):
            config = LlamaConfig(
                hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, is_causal=False,
                vocab_size=126464, num_attention_heads=32, mask_token_id=126336)
            dtype = torch.bfloat16 if lora_rank else torch.float32
            policy = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if lora_rank:
                policy.add_adapter(peft.LoraConfig(r=lora_rank, target_modules="all-linear"))
                for parameter in igpo.trainable_parameters(policy):
                    parameter.data = parameter.data.float()
        for module in (*policy.model.layers, policy):
            fsdp.fully_shard(module, mesh=mesh, mp_policy=bf16, reshard_after_forward=True)
        policy.to_empty(device="cpu")
        policy.model.rotary_emb = type(policy.model.rotary_emb)(policy.config)
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, _ = igpo.begin_stage(policy, "rl", 1, igpo.Checkpoint("start", 0, None))
        ids = torch.zeros(N, P, dtype=torch.long)
        initial = igpo.copy_weights(policy)
        completions = torch.zeros(N, 8, L, dtype=torch.long)
        for _ in range(2):  # in the second step Adam's moments are there
            with igpo.whole_weights(policy), torch.no_grad():
                canvas = torch.zeros(rows_per_call, P + L, dtype=torch.long)
                logits = igpo.logits_at(policy, canvas, None, torch.arange(P, P + 32)).flatten(0, 1)
                igpo.choose_tokens(logits, 126336, 1.2, torch.zeros(len(logits)))
                del logits
            peak("roll-out")
            with torch.no_grad(), igpo.weights_replaced(policy, initial):
                old, _ = igpo.completion_logps(policy, ids, completions)
            peak("scoring")
            logps, _ = igpo.completion_logps(policy.train(), ids, completions)
            loss, _ = igpo.policy_loss(logps, old, old, torch.zeros(N, 8), completions == 0)
            loss.backward()
            del logps, loss
            igpo.optimizer_step(policy, optimizer, 1e-6, 1.0)
            peak("update")
    torch.distributed.destroy_process_group()
    print(f"{gpus} GPUs, LoRA {lora_rank}, GiB a GPU:", peaks)
    least = 15 if lora_rank else 12 * 8e9 / gpus / 2**30  # the base; weights and both moments
    assert least < max(peaks.values()) < most

# --- eval.py

def test_the_tasks_and_their_sources(monkeypatch, capsys):
    asked = []

    def read(source, split, left_out):
        asked.append((source, split))
        if source == "me/mine":
            left_out["no answer"] += 1
        return [igpo.Problem("1?", answer, None) for answer in ("1/2", "a dog", "7")]

    monkeypatch.setattr(igpo, "read_problems", read)
    tasks = " gsm8k, math500,amc ,minerva"
    found, left_out = evaluation.load_problems(tasks, "math500=me/mine, amc=me/a:b=c", 2)
    assert asked == [("openai/gsm8k:main", "test"), ("me/mine", "test"), ("me/a:b=c", "test"),
                     ("math-ai/minervamath", "test")]
    assert list(found) == ["gsm8k", "math500", "amc", "minerva"]
    assert all([p.answer for p in problems] == ["1/2", "a dog"] for problems in found.values())
    assert left_out["math500"] == {"no answer": 1} and not left_out["amc"]
    shown = capsys.readouterr().out
    assert ("gsm8k: 2 problems of openai/gsm8k:main; rows left out: none; references that only "
            "match as text: 1\n") in shown
    assert "math500: 2 problems of me/mine; rows left out: {'no answer': 1}; " in shown
    evaluation.load_problems("amc", "", None)
    assert asked[-1] == ("AI-MO/aimo-validation-amc", "train")

def test_the_four_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        "gsm8k": {"question": "1?", "answer": "18.\n#### 1,080"},
        "math500": {"problem": "1?", "answer": r"\frac{1}{2}", "solution": r"\boxed{3}"},
        "amc": {"problem": None, "question": "1?", "answer": 36.0},
        "minerva": {"problem": "1?", "solution": r"\boxed{3} or $\boxed{1.6}$ m"}}
    sources = ",".join(f"{task}={task}.jsonl" for task in rows)
    for task, row in rows.items():
        write_jsonl(Path(f"{task}.jsonl"), row, row, row, {"problem": "1?"})
    found, left_out = evaluation.load_problems(",".join(evaluation.TASKS), sources, 2)
    answers = {"gsm8k": "1,080", "math500": r"\frac{1}{2}", "amc": "36", "minerva": "1.6"}
    assert {task: [p[:2] for p in problems] for task, problems in found.items()} == {
        task: [("1?", answer)] * 2 for task, answer in answers.items()}
    assert left_out == {task: {"no answer": 1} for task in rows}

def test_rescore_by_hand(tmp_path, monkeypatch, capsys):
    """avg@4: means 1, 1/4, 1/4; variance (1/4 + 1/16 + 1/16) / 2 = 3/16, a third 1/16"""
    def slow_grade(completion, reference):
        igpo.GRADE_TIMEOUTS += "x" in completion.replace("boxed", "")
        return completion == r"\boxed{0.5}"

    monkeypatch.setattr(igpo, "grade", slow_grade)
    texts = {"1": r"\boxed{0.5}", "x": r"\boxed{x}", "-": "0.5"}
    problems = ("amc", 0, "1111"), ("amc", 1, "1x--"), ("amc", 2, "---1"), ("gsm8k", 0, "-")
    samples = [{"task": task, "problem": i, "sample": s, "completion": texts[kind],
                "reference": "1/2", "verdict": kind == "1", "length": i}
               for task, i, kinds in problems for s, kind in enumerate(kinds)]
    samples[4]["verdict"] = False
    path = write_jsonl(tmp_path / "samples.jsonl", *samples)
    before = Path(path).read_text()
    for place in path, str(tmp_path):  # the file, or the folder that holds it
        evaluation.main(["--rescore", place])
        shown = re.sub(" +", " ", capsys.readouterr().out).splitlines()
        assert shown[:1] + shown[3:] == [
            "amc problem 1 sample 0: '0.5' for '1/2' is now True",
            "| amc | 0.500 | 0.250 | 3 | 12 | 0.417 | 1.000 | 1 |",
            "| gsm8k | 0.000 | None | 1 | 1 | 1.000 | 0.000 | 0 |", "1 of 13 verdicts changed"]
    assert Path(path).read_text() == before

FLAGS = """--model model --tasks gsm8k,amc --data gsm8k=gsm8k.jsonl,amc=amc.jsonl --out_dir out
    --seed 5 --gen_length 8 --diffusion_steps 8 --block_length 4 --batch_size 4 --amc_samples 6
    --amc_temperature 2""".split()

@pytest.fixture
def samples(tmp_path, monkeypatch):
    """What a random model says on two tasks, in a new folder."""
    monkeypatch.chdir(tmp_path)
    igpo.save_model(igpo.toy_model(0)[0].half(), tiny_tokenizer(), "model")
    rows = [{"problem": "abcdefg="[i:], "answer": rf"so \boxed{{{i}}}"} for i in range(7)]
    write_jsonl(Path("gsm8k.jsonl"), *rows)
    write_jsonl(Path("amc.jsonl"), *rows[:5])
    evaluation.main(FLAGS)
    return igpo.read_lines(Path("out/samples.jsonl"))

def test_ask_and_evaluate(samples, monkeypatch, capsys):
    evaluation.main([*FLAGS, "--ask", "ab="])
    shown = capsys.readouterr().out.splitlines()
    shown = shown[shown.index("model: 1 process(es) on the CPU", -14) + 1 :]
    assert [line.count("_") for line in shown[:8]] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert shown[-1] == "answer: None"
    model, tokenizer = igpo.load_model("model")
    keys = [("gsm8k", i, 0) for i in range(7)] + [("amc", i, s) for i in range(5) for s in range(6)]
    for (task, i, s), sample in zip(keys, samples, strict=True):
        prompt = igpo.encode_prompts(tokenizer, ["abcdefg="[i:]])
        [alone] = igpo.sample(  # in no batch
            model, torch.tensor(prompt), gen_length=8, block_length=4, steps=8,
            temperature=2.0 if task == "amc" else 0.0,
            generator=igpo.seeded((5, task), "answer", i, s))
        assert sample.items() >= {
            "task": task, "problem": i, "sample": s, "prompt": "abcdefg="[i:], "reference": str(i),
            "completion": igpo.decode(tokenizer, alone, [END]),
            "length": igpo.counted_tokens(alone, [END]).sum().item()}.items()
        assert sample["verdict"] == igpo.grade(sample["completion"], str(i))
        assert sample["extracted"] == igpo.committed_answer(sample["completion"])
    monkeypatch.setattr(evaluation, "answer_batch", None)  # nothing is left to do
    evaluation.main(FLAGS)
    assert igpo.read_lines(Path("out/samples.jsonl")) == samples
    results = json.loads(Path("out/results.json").read_text())
    assert results["results"] == evaluation.summarise(samples)
    assert results["left_out"] == {"gsm8k": {}, "amc": {}}
    assert results.keys() == {"results", "settings", "left_out", "processes", "tokens_per_second",
                              "device", "versions"}

@pytest.mark.parametrize("processes, kept", [(1, 7), (2, 7), (2, 0), (3, 36)])
def test_a_killed_evaluation_goes_on(samples, capfd, processes, kept):
    """From what was written before, with half a line at the end, on any number of processes."""
    lines = [json.dumps(sample | {"kept": 1}) + "\n" for sample in samples]
    shutil.copytree("out", "killed")
    Path("killed/samples.jsonl").write_text("".join(lines[:kept]) + lines[9][:-25])
    command = [*FLAGS, "--out_dir", "killed"]
    if processes == 1:
        evaluation.main(command)
    else:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={processes}", HERE / "eval.py", *command],
                       check=True, timeout=200)
    after = igpo.read_lines(Path("killed/samples.jsonl"))
    assert sum(sample.pop("kept", 0) for sample in after) == kept and after == samples
    assert capfd.readouterr().out.count("| accuracy") == 1

def test_a_folder_is_for_one_setting(samples):
    def refused(name, *more):
        with pytest.raises(igpo.UsageError, match=rf"{name} was \d+, now it is \d+\)"):
            evaluation.main([*FLAGS, *more])

    refused(r"\(seed", "--seed", "1")
    data = Path("amc.jsonl")
    data.write_text(data.read_text().replace("{4}", "{5}"))
    refused(r"\(problems")
    model, tokenizer = igpo.load_model("model")
    model.lm_head.weight.data = model.lm_head.weight.flip(0)  # the same sum
    igpo.save_model(model, tokenizer, "model")
    refused(", weights")

def test_rows_that_are_left_out_are_reported(samples, capsys):
    rows = [{"problem": text, "answer": 1} for text in ("ab=", " ", "b=")]
    write_jsonl(Path("amc.jsonl"), *rows, {"problem": "c="})
    evaluation.main([*FLAGS, "--out_dir", "new"])
    left_out = json.loads(Path("new/results.json").read_text())["left_out"]
    assert left_out == {"gsm8k": {}, "amc": {"no question": 1, "no answer": 1}}
    shown = "amc: 2 problems of amc.jsonl; rows left out: {'no question': 1, 'no answer': 1}; "
    assert shown in capsys.readouterr().out

def test_a_question_that_is_too_long_stops_nothing(samples, capsys):
    rows = [json.loads(line) for line in Path("gsm8k.jsonl").read_text().splitlines()]
    rows[3]["problem"] = "a" * 30 + "bcdef" * 11 + "="  # 86; the model has 64 positions
    write_jsonl(Path("gsm8k.jsonl"), *rows)
    evaluation.main([*FLAGS, "--out_dir", "new"])
    assert "gsm8k problem 3: the model sees only the last 56 of the 86 " in capsys.readouterr().out
    after = igpo.read_lines(Path("new/samples.jsonl"))
    assert after[3]["prompt"] == rows[3]["problem"][-56:]
    assert after[:3] == samples[:3] and after[4:] == samples[4:]
    for row in rows:
        row["problem"] = "a" * 57
    write_jsonl(Path("gsm8k.jsonl"), *rows)
    with pytest.raises(igpo.UsageError, match="57 .* 8 tokens do not fit"):
        evaluation.main([*FLAGS, "--out_dir", "third"])

def test_a_damaged_line_of_samples_is_named(samples):
    """By its file and its line, by both commands that read samples; nothing is overwritten."""
    path = Path("out/samples.jsonl")
    lines = path.read_text().splitlines()

    def refused(damaged, message, rescore=True):
        write_jsonl(path, *lines[:2], damaged, *lines[3:])
        text = path.read_text()
        for command in [FLAGS] + [["--rescore", "out"]] * rescore:
            with pytest.raises(igpo.UsageError, match=rf"^out/samples.jsonl, line 3\b.*{message}"):
                evaluation.main(command)
        assert path.read_text() == text

    refused('{"task": "gsm8k", "problem": ', "JSON")
    refused("[1]", "")
    for name in json.loads(lines[2]):
        sample = json.loads(lines[2])
        del sample[name]
        if name in ("extracted", "timed_out"):  # --rescore finds these out
            refused(sample, f"no '{name}'", rescore=False)
            evaluation.main(["--rescore", "out"])
        elif name != "prompt":  # for the reader alone
            refused(sample, f"no '{name}'")

def test_the_default_folder_and_the_progress_bar(samples, capfd):
    at = FLAGS.index("--out_dir")
    evaluation.main(["--model", "./model/", *FLAGS[2:at], *FLAGS[at + 2 :]])
    assert igpo.read_lines(Path("runs/eval-model/samples.jsonl")) == samples
    shown = capfd.readouterr()
    assert "gsm8k: 100%" in shown.err and "amc: 100%" in shown.err
    assert "0 of 37 samples are in runs/eval-model already" in shown.out

def test_speed(capsys):
    """Threshold 1 is never passed, so that one position is filled in a step."""
    evaluation.main("--speed --model random --batch_size 2 --prompt_length 5 --gen_length 8 "
                    "--block_length 4 --diffusion_steps 4 --threshold 1".split())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "seconds", "tokens/s", "forwards", "x bare", "as exact"]
    assert [(row[0], row[3]) for row in rows[2:]] == [
        ("exact", "4"), ("bare forwards", "4"), ("cache", "4"), ("threshold", "8"),
        ("cache + threshold", "8")]
    assert rows[2][5] == "1.000" and rows[3][4] == "1.000"

def test_weights_that_are_not_finite_end_in_one_line(samples):
    model, tokenizer = igpo.load_model("model")
    model.lm_head.weight.data[:] = torch.nan
    igpo.save_model(model, tokenizer, "model")
    with pytest.raises(igpo.UsageError, match="not finite"):
        evaluation.main([*FLAGS, "--out_dir", "new"])
    assert not Path("new/results.json").exists()

def test_what_runs_where_is_said_at_once(samples, capsys, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    for flags, first in ([], "load_problems"), (["--ask", "a="], "load_model"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation if first == "load_problems" else igpo, first, stop)
            capsys.readouterr()
            with pytest.raises(KeyboardInterrupt):
                evaluation.main([*FLAGS, *flags])
        assert capsys.readouterr().out == "model: 1 process(es) on the CPU\n"

def write_run(name, evaluations, responses, **changes):
    """A finished RL run of 20 steps that drew `responses` in each of the second ten, 100 before."""
    Path(name).mkdir()
    Path(name, "summary.json").touch()
    rl = [{"stage": "rl", "step": i + 1, "all_wrong": i < 15, "all_wrong_after": 0.25,
           "grad_norm": 2, "kl": i / 10, "responses": 100 if i < 10 else responses} | changes
          for i in range(20)]
    write_jsonl(Path(name, "metrics.jsonl"), {"stage": "eval", "step": 0, "accuracy_start": 0.1},
                *rl, *[{"stage": "eval", "step": step, what: x} for step, what, x in evaluations])

def points(half, shift):
    return [(0, "accuracy_sft", 0.2 + shift), (half, "eval_accuracy", 0.4 + shift),
            (20, "accuracy_final", 0.5 + shift)]

def test_compare_by_hand(tmp_path, monkeypatch, capsys):
    """b drew 1000 and then 3000 responses: 0.2, 0.4, 0.5 after 0, 1, 4 thousand, so 1/30 more
    than 0.4 after the 2 thousand at which a ends."""
    monkeypatch.chdir(tmp_path)
    write_run("a-0", points(10, 0.0), 100)
    write_run("a-1", points(10, 0.2), 100)
    write_run("b-0", points(10, 0.0), 300)
    evaluation.main(["--compare", "a-0", "a-1", "b-0"])
    shown = capsys.readouterr().out
    assert re.findall(r"\d\.\d+ ± \d\.\d+", shown) == [
        "0.300 ± 0.100", "0.600 ± 0.100", "1.000 ± 0.000", "0.000 ± 0.000", "0.250 ± 0.000",
        "2.000 ± 0.000", "1.850 ± 0.000"]
    steps, responses = re.findall(r"^```mermaid\n(.*?)^```$", shown, re.M | re.S)
    for figure in steps, responses:
        assert figure.splitlines()[1:3] == ["xychart-beta", '    title "a royalblue, b darkorange"']
        assert '"plotColorPalette": "royalblue, darkorange"' in figure.splitlines()[0]
        assert '    y-axis "held-out accuracy" 0 --> 1\n' in figure
    assert re.findall(r'(x-axis|line) "(.*)" (\[.*\])', steps) == [
        ("x-axis", "RL steps", "[0, 10, 20]"),
        ("line", "a", "[0.3, 0.5, 0.6]"), ("line", "b", "[0.2, 0.4, 0.5]")]
    assert re.findall(r'(x-axis|line) "(.*)" (\[.*\])', responses) == [
        ("x-axis", "thousand responses drawn", "[0.0, 1.0, 2.0]"),
        ("line", "a", "[0.3, 0.5, 0.6]"), ("line", "b", "[0.2, 0.4, 0.433]")]

def test_runs_that_do_not_compare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("a-0", points(10, 0.0), 100)
    write_run("b-0", points(5, 0.0), 100)
    with pytest.raises(igpo.UsageError, match="different"):
        evaluation.main(["--compare", "a-0", "b-0"])
    Path("b-0/summary.json").unlink()
    with pytest.raises(igpo.UsageError, match="b-0 holds no finished run"):
        evaluation.main(["--compare", "a-0", "b-0"])
    old = Path("a-0/metrics.jsonl")
    old.write_text(old.read_text().replace("responses", "replies"))
    with pytest.raises(igpo.UsageError, match=r"^a-0/metrics.jsonl lacks what.*'responses'"):
        evaluation.main(["--compare", "a-0"])
    old.write_text('{"stage": "sft", "step": 1}\n')
    with pytest.raises(igpo.UsageError, match=r"^a-0/metrics.jsonl lacks"):
        evaluation.main(["--compare", "a-0"])

EVAL_WRONG = [  # flags, message, amc.jsonl from then on
    ("--model=", "no model"), ("--tasks amc,aime", "no task 'aime'"), ("--tasks=", "no task ''"),
    ("--data math=a.jsonl", "no task 'math'"), ("--limit 0", "limit must be"),
    ("--gen_length 64 --diffusion_steps 16", "64 positions"),
    ("--out_dir amc.jsonl", "amc.jsonl: File"), ("--compare out", "no finished run"),
    ("--out_dir model", "model holds no evaluation.*No such file"),
    ("--out_dir .", "no evaluation.*Expecting"),
    (f"--out_dir {'x' * 300}", "File name too long"),
    ("--ask=", "--ask needs a question"), ("--rescore=", "samples.jsonl holds no samples"),
    ("--rescore model", "model/samples.jsonl holds no samples"),
    ("--rescore absent.jsonl", "absent.jsonl holds no samples"),
    ("--rescore amc.jsonl", "amc.jsonl, line 1 is no sample: it has no 'task'"),
    ("", "amc.jsonl holds no rows", ""), ("", "amc.jsonl, row 1: 5 has no columns", 5),
    ("", "1 left out with text", {"problem": "\ud800", "answer": 1}), ("--data amc", "TASK=SOURCE"),
    ("", "amc.jsonl, row 1: .* as text", {"problem": "1?", "answer": 1e30})]

def test_errors_of_eval_are_one_line(samples):
    Path("settings.json").write_text('{"model": ')  # damaged
    for flags, message, *rows in EVAL_WRONG:
        if rows:
            write_jsonl(Path("amc.jsonl"), *rows)
        with pytest.raises(igpo.UsageError) as error:
            evaluation.main([*FLAGS, "--out_dir", "new", *flags.split()])
        assert re.fullmatch(f".*{message}.*", str(error.value)), message
        assert not Path("new").exists()
    with pytest.raises(igpo.UsageError, match="--ask needs a question"):
        evaluation.main([*FLAGS, "--ask", " "])

def test_a_fault_of_ours_keeps_its_traceback(samples, monkeypatch):
    monkeypatch.setattr(igpo, "grade", lambda *_: {}["no such key"])
    for command in [*FLAGS, "--out_dir", "new"], ["--rescore", "out"]:
        with pytest.raises(KeyError):
            evaluation.main(command)

# --- The README

README = (HERE / "README.md").read_text()

def test_the_reading_order_names_the_right_lines():
    lines = (HERE / "igpo.py").read_text().splitlines()
    places = re.findall(r"\[(\w+)\]\(igpo\.py#L(\d+)\)", README)
    assert len(places) > 10
    for name, line in places:
        assert re.match(rf"(def|class) {name}\b", lines[int(line) - 1]), name

def test_the_snippets_run(monkeypatch, capsys):
    monkeypatch.setattr(igpo, "load_model", lambda *_, **__: (tiny_model(
        max_position_embeddings=256), tiny_tokenizer()))
    monkeypatch.setattr(igpo, "run_main", lambda main, name: ran.append(name))
    monkeypatch.setattr(igpo, "grade", igpo.grade)
    ran, snippets = [], re.findall(r"```python\n(.*?)```", README, re.S)
    for snippet in snippets:
        exec(snippet, {})
        comment = re.search(r"^# (.*_.*)$", snippet, re.M)
        if comment:
            assert capsys.readouterr().out == comment[1] + "\n"
    assert len(snippets) == 3 and ran == ["mine.py"] and igpo.grade(r"\boxed{1}", "1")
