"""The tests of igpo.py, in its order: each formula on numbers worked out by hand or against a plain loop. Run: pytest"""

import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import eval as evaluation
import igpo

HERE = Path(__file__).parent
V, MASK, END = 24, 23, 22  # the tiny models' vocabulary


def tiny_model(seed=0, cls=LlamaForCausalLM, **changes):
    """A random bidirectional model whose weights are large enough for its predictions to differ from place to place."""
    torch.manual_seed(seed)
    config = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=4, initializer_range=0.3, is_causal=False, mask_token_id=MASK, bos_token_id=None,
                  eos_token_id=[END], pad_token_id=END) | changes
    model = cls({LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config}[cls](**config))
    return model.eval()


def tiny_tokenizer():
    return igpo.toy_model(0)[1]


def random_prompts(rows, length, seed=1):
    return torch.randint(0, MASK - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# 1. The model


def llada_folder(folder, model, tokenizer, **config):
    """Write a Llama as a LLaDA checkpoint, with LLaDA's names spelled out once more by hand."""
    layer = {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
             "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
             "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}
    names = {"wte": "model.embed_tokens", "ln_f": "model.norm"} | ({} if model.config.tie_word_embeddings else {"ff_out": "lm_head"})
    names |= {f"blocks.{i}.{a}": f"model.layers.{i}.{b}" for i in range(model.config.num_hidden_layers) for a, b in layer.items()}
    weights = model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"model.transformer.{a}.weight": weights[f"{b}.weight"].clone() for a, b in names.items()}, folder / "model.safetensors")
    c = model.config
    raw = dict(model_type="llada", architectures=["LLaDAModelLM"], auto_map={"AutoConfig": "configuration_llada.LLaDAConfig"},
               d_model=c.hidden_size, n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads, n_layers=c.num_hidden_layers,
               mlp_hidden_size=c.intermediate_size, vocab_size=c.vocab_size, embedding_size=c.vocab_size, max_sequence_length=128,
               rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_parameters["rope_theta"], weight_tying=c.tie_word_embeddings,
               mask_token_id=MASK, eos_token_id=END, pad_token_id=END) | config
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "configuration_llada.py").write_text("raise SystemExit('code from a checkpoint was run')")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}], ids=["LLaDA", "grouped", "tied"])
def test_llada_round_trip(tmp_path, shape):
    original = tiny_model(**shape, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    folder = llada_folder(tmp_path / "in", original, tiny_tokenizer(), n_kv_heads=shape.get("num_key_value_heads"))
    model, tokenizer = igpo.load_model(folder)
    ids = random_prompts(2, 9)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert model.config.mask_token_id == MASK and model.config.eos_token_id == [END]

    igpo.save_model(model, tokenizer, tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config | {"torch_dtype": None} == json.loads((folder / "config.json").read_text()) | {"torch_dtype": None}
    assert (tmp_path / "out" / "configuration_llada.py").exists()  # for those who load it with LLaDA's own code
    again, _ = igpo.load_model(tmp_path / "out")
    assert torch.equal(again(ids).logits, original(ids).logits)


def test_attention_is_bidirectional(tmp_path):
    model, _ = igpo.load_model(llada_folder(tmp_path / "m", tiny_model(), tiny_tokenizer()))
    ids = random_prompts(1, 9)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % MASK
    assert not torch.allclose(model(ids).logits[0, 0], model(changed).logits[0, 0])


def test_own_checkpoint_round_trip(tmp_path):
    model, tokenizer = igpo.toy_model(3)
    igpo.save_model(model, tokenizer, tmp_path / "m")
    again, tokenizer_again = igpo.load_model(tmp_path / "m")
    text = "<reasoning>\n5161</reasoning><answer>\\boxed{5161}</answer>"
    ids = tokenizer_again(text).input_ids
    assert ids == tokenizer(text).input_ids and len(ids) == 15 and tokenizer_again.decode(ids) == text
    assert torch.equal(again(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


def test_dream_is_read_one_position_to_the_left(tmp_path):
    original = tiny_model(cls=Qwen2ForCausalLM, num_key_value_heads=2)
    igpo.save_model(original, tiny_tokenizer(), tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text()) | {"model_type": "Dream", "architectures": ["DreamModel"]}
    del raw["is_causal"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    model, tokenizer = igpo.load_model(tmp_path / "m")
    ids = random_prompts(2, 9)
    assert torch.allclose(igpo.logits_at(model, ids, None, torch.arange(4, 7)), original(ids).logits[:, 3:6], atol=1e-5)
    igpo.save_model(model, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "Dream"


@pytest.mark.parametrize("damage, message", [
    (lambda w: w.pop("model.transformer.blocks.1.ff_proj.weight"), "missing.*layers.1.mlp.gate_proj"),
    (lambda w: w.update(extra=torch.zeros(3)), "unexpected.*extra"),
    (lambda w: w.update({"model.transformer.ln_f.weight": torch.ones(7)}), "mismatched.*model.norm"),
])
def test_every_weight_must_match(tmp_path, damage, message):
    folder = llada_folder(tmp_path / "m", tiny_model(), tiny_tokenizer())
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(igpo.UsageError, match=message):
        igpo.load_model(folder)


@pytest.mark.parametrize("config, message", [({"alibi": True}, "alibi"), ({"model_type": "gpt2"}, "gpt2.*not supported")])
def test_unsupported_checkpoints_say_so(tmp_path, config, message):
    with pytest.raises(igpo.UsageError, match=message):
        igpo.load_model(llada_folder(tmp_path / "m", tiny_model(), tiny_tokenizer(), **config))


def test_a_causal_llama_is_refused(tmp_path):
    model, tokenizer = igpo.toy_model(0)
    igpo.save_model(model, tokenizer, tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    del raw["mask_token_id"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(igpo.UsageError, match="mask_token_id"):
        igpo.load_model(tmp_path / "m")
    with pytest.raises(igpo.UsageError, match="no model folder"):
        igpo.load_model("/no/such/folder")


def test_the_end_token_s_embedding_learns(tmp_path):
    """transformers gives the padding id an embedding without gradient, but here padding is the end token."""
    igpo.save_model(*igpo.toy_model(0), tmp_path / "m")
    model, tokenizer = igpo.load_model(tmp_path / "m")
    ids = torch.tensor([[1, 2, tokenizer.pad_token_id, 3]])
    model(ids).logits.square().mean().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.pad_token_id].abs().sum() > 0


def test_counted_tokens_include_the_first_end_token():
    ids = torch.tensor([[1, 2, END, 3, END], [END, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    assert igpo.counted_tokens(ids, END).tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4, [True] * 5]
    assert igpo.counted_tokens(ids, [END, 2]).sum(1).tolist() == [2, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# 2. The sampler


@torch.no_grad()
def published_sampler(model, prompt, hints, L, K, steps):
    """LLaDA's sampler at temperature 0, written out for one unpadded row."""
    x = torch.cat([prompt, hints])
    P, S = len(prompt), steps // (L // K)
    for start in range(P, P + L, K):
        block = range(start, start + K)
        total = sum(x[i].item() == MASK for i in block)
        for step in range(S):
            p = model(x[None]).logits[0].double().softmax(-1)
            open_places = [i for i in block if x[i].item() == MASK]
            best = {i: max((v for v in range(V) if v != MASK), key=lambda v: p[i, v].item()) for i in open_places}
            count = total // S + (step < total % S)
            for i in sorted(open_places, key=lambda i: -p[i, best[i]].item())[:count]:
                x[i] = best[i]
    return x[P:]


@pytest.mark.parametrize("K, steps", [(12, 12), (12, 5), (4, 6), (4, 12), (3, 4)])
@pytest.mark.parametrize("hint", [None, 0.0, 0.5, 1.0])
def test_greedy_sampling_is_the_published_sampler(K, steps, hint):
    model, L, prompts = tiny_model(2), 12, random_prompts(3, 5)
    hints = torch.full((3, L), MASK)
    if hint is not None:
        given = torch.rand(3, L, generator=torch.Generator().manual_seed(4)) < hint
        hints[given] = random_prompts(3, L, 5)[given]
    out = igpo.sample(model, prompts, gen_length=L, block_length=K, steps=steps, hints=None if hint is None else hints)
    want = torch.stack([published_sampler(model, q, h, L, K, steps) for q, h in zip(prompts, hints)])
    assert torch.equal(out, want)
    assert torch.equal(out[hints != MASK], hints[hints != MASK]) and not (out == MASK).any()


def test_padding_changes_nothing():
    model = tiny_model(2)
    short, long = random_prompts(1, 4), random_prompts(1, 7)
    prompts, mask = igpo.pad_left([short[0].tolist(), long[0].tolist()], END)
    assert mask.tolist() == [[False] * 3 + [True] * 4, [True] * 7]
    settings = dict(gen_length=8, block_length=4, steps=8)
    both = igpo.sample(model, prompts, prompt_mask=mask, **settings)
    assert torch.equal(both, torch.cat([igpo.sample(model, q, **settings) for q in (short, long)]))


def test_the_mask_id_is_never_chosen_but_counts_in_the_confidence():
    logits = torch.zeros(1, V)
    logits[0, MASK], logits[0, 7] = 9.0, 2.0
    for temperature in (0.0, 1.0):
        tokens, confidence = igpo.choose_tokens(logits, MASK, temperature, torch.tensor([0.999999]))
        assert tokens[0] != MASK
        assert confidence[0].item() == pytest.approx(logits[0].log_softmax(-1)[tokens[0]].item())
    model = tiny_model(2)
    model.lm_head.weight.data[MASK] = 5 * model.lm_head.weight.data[MASK]  # the mask is often the likeliest word
    out = igpo.sample(model, random_prompts(64, 5), gen_length=8, block_length=4, steps=4, temperature=1.5)
    assert not (out == MASK).any()


def test_temperature_gives_the_softmax_distribution():
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0)) * 2
    u = (torch.arange(20000) + 0.5) / 20000
    tokens, _ = igpo.choose_tokens(logits.expand(20000, V), MASK, 1.7, u)
    allowed = logits[0].clone()
    allowed[MASK] = -math.inf
    assert torch.allclose(tokens.bincount(minlength=V) / 20000, (allowed / 1.7).softmax(-1), atol=1e-3)


def test_a_row_depends_on_its_own_generator_alone():
    model, prompts = tiny_model(2), random_prompts(6, 5)
    settings = dict(gen_length=8, block_length=4, steps=4, temperature=1.0)
    together = igpo.sample(model, prompts, generator=[igpo.seeded(i) for i in range(3)], **settings)
    for i in range(3):
        alone = igpo.sample(model, prompts[2 * i: 2 * i + 2], generator=igpo.seeded(i), **settings)
        assert torch.equal(together[2 * i: 2 * i + 2], alone)
    assert len({tuple(row) for row in igpo.sample(model, prompts[:1].expand(6, -1), **settings).tolist()}) > 1


def test_stopping_early_keeps_the_text():
    model = tiny_model(2)
    model.lm_head.weight.data[END] *= 2.5  # so that rows end at different places
    prompts, settings = random_prompts(32, 5), dict(gen_length=24, block_length=4, steps=24)
    full, early = igpo.sample(model, prompts, **settings), igpo.sample(model, prompts, stop_early=True, **settings)
    lengths = igpo.counted_tokens(full, END).sum(1)
    assert len(set(lengths.tolist())) > 2, "the test needs rows of mixed length"
    for a, b, n in zip(full, early, lengths.tolist()):
        assert torch.equal(a[:n], b[:n])
    assert not (early == MASK).any()


def test_the_quota_of_a_block_is_spread_over_its_steps():
    assert igpo.transfer_quota(torch.tensor([7, 3, 0, 8]), 4).tolist() == [[2, 2, 2, 1], [1, 1, 1, 0], [0] * 4, [2] * 4]


@pytest.mark.parametrize("settings, message", [
    (dict(gen_length=10, block_length=4, steps=8), "gen_length 10 is not divisible by block_length 4"),
    (dict(gen_length=12, block_length=4, steps=8), "steps 8 is not divisible by the number of blocks 3")])
def test_lengths_that_do_not_fit_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        igpo.sample(tiny_model(), random_prompts(1, 3), **settings)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Hints


def test_a_hint_is_whole_chunks_at_their_own_positions():
    trace = torch.arange(100, 133)
    for seed in range(50):
        hint = igpo.make_hint(trace, 0.5, gen_length=64, mask_id=0, min_chunk=5, max_chunk=5, generator=igpo.seeded(seed))
        assert hint.shape == (64,)
        given = hint != 0
        assert torch.equal(hint[:33][given[:33]], trace[given[:33]]) and not given[33:].any()
        chunks = [given[i: min(i + 5, 33)] for i in range(0, 33, 5)]  # 7 chunks, the last of 3 tokens
        assert all(c.all() or not c.any() for c in chunks)
        assert sum(bool(c.any()) for c in chunks) == 3  # floor(0.5 * 7)


def test_chunk_lengths_and_choice_are_random_within_bounds():
    hints = [igpo.make_hint(torch.arange(1, 201), 0.3, gen_length=200, mask_id=0, generator=igpo.seeded(s)) for s in range(200)]
    given = torch.stack(hints) != 0
    assert 0.2 < given.float().mean() < 0.32
    assert (given.float().mean(0)[:190] > 0.1).all()  # every position is hinted now and then
    edges = F.pad(given.int(), (1, 1)).diff(dim=1)
    runs = torch.cat([(e == -1).nonzero() - (e == 1).nonzero() for e in edges])
    assert runs.min() >= 1 and len(runs.unique()) > 8


@pytest.mark.parametrize("length", [0, 1, 7, 30, 90])
def test_ratio_zero_and_one_are_exact(length):
    trace = torch.arange(1, length + 1)
    nothing = igpo.make_hint(trace, 0, gen_length=40, mask_id=0)
    everything = igpo.make_hint(trace, 1, gen_length=40, mask_id=0)
    assert (nothing == 0).all()
    assert everything.tolist() == (trace.tolist() + [0] * 40)[:40]  # a longer trace is cut


@pytest.mark.parametrize("solution, answer, trace", [
    ("She sold 48/2 = 24.\nThen 48+24 = 72 clips.\n#### 72\nThe answer is: 72", "72", "She sold 48/2 = 24.\nThen 48+24 ="),
    ("It costs 6-5=$1.00 and 720 + 270 = $990.00\n#### 990\nThe answer is: 990", "990", "It costs 6-5=$1.00 and 720 + 270 = $"),
    ("We get 1,200 + 34 = 1,234 in all.\nThe answer is: 1234", "1234", "We get 1,200 + 34 ="),
    ("So $x = \\frac{1}{2}$, hence $\\boxed{\\frac{1}{2}}$.\nThe answer is: \\frac{1}{2}", "\\frac{1}{2}", "So $x ="),
    ("Adding up gives $\\boxed{12}$.\nThe answer is: 12", "12", "Adding up gives $"),
    ("There are 120 of 12, so 12.", "12", "There are 120 of"),
    ("The sum is -3.\nThe answer is: -3", "-3", "The sum is -"),
    ("It is seventy-two.\n#### 72\nThe answer is: 72", "72", None),  # stated in words: better no hint than a leak
    ("anything", "", None)])
def test_the_answer_is_cut_off_the_trace(solution, answer, trace):
    assert igpo.cut_trace(solution, answer) == trace


def test_the_answer_is_never_inside_a_hint():
    """Not in the toy world, where the trace is never given whole, and not in worked solutions, where it is cut."""
    tokenizer = igpo.toy_model(0)[1]
    toy = igpo.PRESETS["toy"]
    for n, problem in enumerate(igpo.toy_problems(300, 0)):
        hint = igpo.make_hint(igpo.encode_trace(tokenizer, problem.trace), toy["eta_high"], gen_length=16, min_chunk=toy["min_chunk"],
                              max_chunk=toy["max_chunk"], mask_id=tokenizer.mask_token_id, generator=igpo.seeded(n))
        assert problem.answer not in tokenizer.decode(hint)
    rng = random.Random(0)
    for _ in range(300):
        a, b = rng.randrange(2, 99), rng.randrange(2, 99)
        trace = igpo.cut_trace(f"First {a} and then {b}. So {a} + {b} = {a + b}.\nThe answer is: {a + b}", str(a + b))
        assert str(a + b) not in igpo.NUMBER.findall(trace)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Rewards. The tables hold: reference ¦ content of the box

RIGHT = r"""
18 ¦ 18 dollars
18 ¦ \$18
18 ¦ $18
18 ¦ \$18.00
18 ¦ 18.
18 ¦ 18\ \text{dollars}
18 ¦ \text{18}
18 ¦ \text{Janet makes 18 dollars}
18 ¦ The answer is 18
18 ¦ Answer: 18
18 ¦ x = 18
18 ¦ x=18 \text{ dollars}
18 ¦ 9 \times 2 = 18
18 ¦ 9 \times 2
18 ¦ 18\text{ dollars per day}
18 ¦ **18**
18 ¦ +18
18 ¦ 018
-5 ¦ −5
-10 ¦ -\$10
-10 ¦ \$-10
1234.5 ¦ $1,234.50
1234 ¦ 1,234
1234 ¦ 1 234
1234567 ¦ 1,234,567 \text{ people}
12 ¦ 12 \text{ km/h}
12 ¦ 12 km/h
12 ¦ 12 \text{ m/s}^2
12 ¦ 12\text{ m}
12 ¦ 12 \mathrm{~cm}
12 ¦ 12\,\mathrm{cm}^3
12 ¦ 12 cm^2
12 ¦ 12cm
12 ¦ 12 square feet
12 ¦ 12 miles/hour
12 ¦ 12 dollars/hour
12 ¦ 12 hours.
12 ¦ 12 people's
12 ¦ 12 in
12.5 ¦ 12.5\%
12.5 ¦ 12.5 percent
12.5 ¦ 12.5 \text{ percent}
0.1 ¦ 10\%
\frac{1}{10} ¦ 10%
\frac{1}{2} ¦ 0.5
\frac{1}{2} ¦ .5
\frac{1}{2} ¦ 1/2
\frac{1}{2} ¦ \frac12
\frac{1}{2} ¦ \tfrac{1}{2}
\frac{1}{2} ¦ \frac{1}{2} \text{ cup}
\frac{1}{2} ¦ 1/2 of a mile
\frac{1}{2} ¦ \frac{2}{4}
\frac{1}{2} ¦ {1}/{2}
-\frac{3}{8} ¦ \frac{-3}{8}
-\frac{3}{8} ¦ -3/8
-\frac{3}{8} ¦ -0.375
-\frac{3}{8} ¦ \frac{3}{-8}
1\frac{4}{5} ¦ \frac{9}{5}
1\frac{4}{5} ¦ 1.8
1\frac{4}{5} ¦ 9/5
1\frac{4}{5} ¦ 1 \frac{4}{5}
1\frac{4}{5} ¦ 1 4/5
137 \frac{1}{2} ¦ 137.5
137 \frac{1}{2} ¦ 137\frac{1}{2}
137 \frac{1}{2} ¦ \frac{275}{2}
\frac 34 ¦ 3/4
\frac9{19} ¦ \frac{9}{19}
\frac{270}7\text{ degrees} ¦ \frac{270}{7}
\frac{270}7\text{ degrees} ¦ \frac{270}{7}^\circ
\frac{270}7\text{ degrees} ¦ \left(\frac{270}{7}\right)^\circ
\frac{270}7\text{ degrees} ¦ 38\frac{4}{7}^\circ
76^\circ ¦ 76
76^\circ ¦ 76°
76^\circ ¦ 76 degrees
76^\circ ¦ 76^{\circ}
76^\circ ¦ 76\text{ degrees}
.0000672 ¦ 6.72 \times 10^{-5}
.0000672 ¦ 0.0000672
.0000672 ¦ 6.72e-5
4.5e33 ¦ 4.5 \times 10^{33}
4.5e33 ¦ 4.5\times10^{33}\text{ erg/s}
4.5e33 ¦ 4.5 \cdot 10^{33}
1e-5 ¦ 10^{-5}
1e11 ¦ 10^{11}
27.0 ¦ 27
58,500 ¦ 58500
58,500 ¦ 58{,}500
58,500 ¦ 58\,500
11,\! 111,\! 111,\! 100 ¦ 11111111100
11,\! 111,\! 111,\! 100 ¦ 11,111,111,100
10,\!080 ¦ 10,080
10,\!080 ¦ 10080
\$32,\!348 ¦ 32348
\$32,\!348 ¦ \$32,348
\$36 ¦ 36 \text{ dollars}
\$18.90 ¦ 18.9
5.4 \text{ cents} ¦ 5.4
5.4 \text{ cents} ¦ 5.4 cents
15\mbox{ cm}^2 ¦ 15
15\mbox{ cm}^2 ¦ 15 \text{ cm}^2
15\mbox{ cm}^2 ¦ 15 \text{ square cm}
864 \mbox{ inches}^2 ¦ 864 square inches
864 \mbox{ inches}^2 ¦ 864
16 \sqrt{3} ¦ 16\sqrt3
16 \sqrt{3} ¦ 16√3
16 \sqrt{3} ¦ 16 \cdot \sqrt{3}
16 \sqrt{3} ¦ 8\sqrt{12}
16 \sqrt{3} ¦ 16sqrt(3)
16 \sqrt{3} ¦ \sqrt{768}
16 \sqrt{3} ¦ 16\sqrt{3} \text{ units}
\frac{\sqrt{3}}{3} ¦ \frac{1}{\sqrt{3}}
\frac{3\sqrt{3}}{4} ¦ \frac{3}{4}\sqrt{3}
11 \sqrt{5} + 11 ¦ 11(1+\sqrt{5})
1+274i ¦ 274i + 1
6 - 5i ¦ -5i+6
288 \pi ¦ 288\pi
288 \pi ¦ 288pi
288 \pi ¦ 288π
288 \pi ¦ 288\pi \text{ cubic units}
\frac{20000}{\pi} ¦ 20000/\pi
18+2\pi ¦ 2\pi + 18
-\frac{\pi}{6} ¦ -\pi/6
3, 5, 7 ¦ 3,5,7
3, 5, 7 ¦ 7, 5, 3
3, 5, 7 ¦ \{3, 5, 7\}
3, 5, 7 ¦ 3, 5, \text{ and } 7
3, 5, 7 ¦ 3, 5, and 7
1,-2 ¦ -2, 1
1,-2 ¦ -2,1
1,-2 ¦ x = 1, x = -2
1,-2 ¦ x=1 \text{ or } x=-2
1,-2 ¦ 1 and -2
1,-2 ¦ x = 1, -2
1,-2 ¦ (1, -2)
-2,1 ¦ \{-2, 1\}
3 \pm 2 \sqrt{2} ¦ 3 + 2\sqrt{2}, 3 - 2\sqrt{2}
3 \pm 2 \sqrt{2} ¦ x = 3 \pm 2\sqrt{2}
1 \pm \sqrt{19} ¦ 1 - \sqrt{19}, 1 + \sqrt{19}
\{1\pm\sqrt{5},-2\} ¦ -2, 1 + \sqrt{5}, 1 - \sqrt{5}
\{1\pm\sqrt{5},-2\} ¦ 1 \pm \sqrt{5}, -2
(5,\infty) ¦ (5, +\infty)
(5,\infty) ¦ x > 5
(5,\infty) ¦ x \in (5, \infty)
(-\infty, 0] ¦ x \le 0
(-\infty, 0] ¦ (-\infty,0]
(2,12) \cup (12,102) ¦ (2,12)\cup(12,102)
(-\infty, 2) \cup (3, \infty) ¦ x \in (-\infty,2) \cup (3,\infty)
(-\infty, 2) \cup (3, \infty) ¦ (3,\infty)\cup(-\infty,2)
x \in [-2,7] ¦ -2 \le x \le 7
x \in [-2,7] ¦ x\in[-2,7]
x \in [-2,7] ¦ -2 \leq x \leq 7
\left(\frac{3}{5},\frac{8}{3}\right] ¦ (0.6, \frac{8}{3}]
\left( 3, \frac{\pi}{2} \right) ¦ (3, \pi/2)
\left( 3, \frac{\pi}{2} \right) ¦ (r,\theta) = (3, \frac{\pi}{2})
(15,-29) ¦ (15, -29)
(15,-29) ¦ (x, y) = (15, -29)
(15,-29) ¦ 15, -29
(6,31,-1) ¦ (6, 31, -1)
(1,-16,-4,43) ¦ (1, -16, -4, 43)
(-1,6) ¦ P = (-1,6)
x=5 ¦ 5
x=5 ¦ x = 5
y = 2x + 3 ¦ y=2x+3
y = 2x + 3 ¦ 2x + 3
y = 2x + 3 ¦ y = 3 + 2x
y = -2x ¦ y=-2x
5x - 7y + 11z + 4 = 0 ¦ 5x-7y+11z+4=0
5x - 7y + 11z + 4 = 0 ¦ 10x-14y+22z+8=0
5x - 7y + 11z + 4 = 0 ¦ 5x-7y+11z=-4
15x - 80 ¦ 15x-80
15x - 80 ¦ 5(3x-16)
15x - 80 ¦ -80+15x
x^3+3x-6 ¦ 3x + x^3 - 6
\frac{11+9a}{20} ¦ \frac{9a + 11}{20}
\frac{11+9a}{20} ¦ \frac{9a}{20}+\frac{11}{20}
(a+5)(b+2) ¦ (b+2)(a+5)
p - q ¦ p-q
p - q ¦ -q+p
2k ¦ k \cdot 2
5r^5 ¦ 5 r^5
\cot x ¦ \frac{\cos x}{\sin x}
\cot x ¦ \cot(x)
\cot x ¦ cot x
8n^2 + 4n + 1 ¦ f(n) = 8n^2+4n+1
3R^2 ¦ 3R^2
204_5 ¦ 204
204_5 ¦ 204_{5}
204_5 ¦ 204_5
4210_{5} ¦ 4210_5
2516_8 ¦ 2516_{8}
43 ¦ 43_{10}
\text{(C)} ¦ C
\text{(C)} ¦ (C)
\text{(C)} ¦ \text{C}
\text{(C)} ¦ \textbf{(C)}
\text{(C)} ¦ \textbf{(C)}\ 12
\text{(C)} ¦ (C) ellipse
\text{(E)} ¦ \mathrm{(E)}
\text{Evelyn} ¦ Evelyn
\text{Evelyn} ¦ evelyn
\text{Evelyn} ¦ \textbf{Evelyn}
\text{Evelyn} ¦ \text{Evelyn}.
\text{even} ¦ even
\text{east} ¦ \text{East}
\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix} ¦ \begin{pmatrix}-18\\-49\\96\end{pmatrix}
\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix} ¦ \begin{bmatrix} -18 \\ -49 \\ 96 \end{bmatrix}
\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix} ¦ \left(\begin{array}{c} -18 \\ -49 \\ 96 \end{array}\right)
\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} ¦ \begin{pmatrix} \frac{1}{5} \\ -\frac{18}{5} \end{pmatrix}
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} ¦ \begin{pmatrix}-1&0\\0&-1\end{pmatrix}
\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} ¦ \begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}
\pi ¦ π
10 ¦ \boxed{10}
10080 ¦ 10! / 360
28800 ¦ 2 \cdot 5! \cdot 5!
600 ¦ \binom{6}{3} \cdot 30
-1 ¦ -1.0
100 ¦ 1e2
0.33 ¦ \frac{33}{100}
160 ¦ 160 minutes
5 ¦ \approx 5
5 ¦ 5 \text{ (remainder)}
13535 ¦ \$13{,}535
3 ¦ \text{3 hours}
3 ¦ 3 h
12 ¦ 12 m
\frac{243}{625} ¦ 0.3888
2220 ¦ 2220_{10}
7.6 Z ¦ 7.6Z
\alpha ¦ \alpha
\frac{1}{4p^2} ¦ \frac{1}{4}p^{-2}
100 p^{\frac{1}{2}} ¦ 100\sqrt{p}
MR=SRMC ¦ MR = SRMC
E_{1},E_{2} ¦ E_1, E_2
1+\sqrt{3} i ¦ 1+i\sqrt{3}
"""
WRONG = r"""
15 ¦ 18 liters
10 ¦ 4, 6
16 ¦ 16.5
\frac{33}{100} ¦ \frac{1}{3}
\frac{1}{3} ¦ 0.33
\frac{1}{3} ¦ 0.333333
\sqrt{2} ¦ 1.414214
\left(\frac{3}{5},\frac{8}{3}\right] ¦ \left(0.6,\infty\right]
\left(\frac{3}{5},\frac{8}{3}\right] ¦ \left(\frac{3}{5},\frac{8}{3}\right)
\left(\frac{3}{5},\frac{8}{3}\right] ¦ [0.6,\infty)
2516_8 ¦ 2516_7
2516_8 ¦ 2516_{10}
2516_8 ¦ 1358
25 ¦ 25_8
-1 ¦ 1
1 ¦ \left(-1\right)
15 ¦ -15
5 ¦ 5 hours 30 minutes
5 ¦ 5 hours and 30 minutes
530 ¦ 5 hours 30 minutes
530 ¦ 5 30
40 ¦ 4{10}
24 ¦ 8{3}
60 ¦ 600
60 ¦ 6
.35625 ¦ 35625
.5 ¦ 5
5 ¦ .5
2k ¦ 2
2 ¦ 2k
2k ¦ 2b
12 ¦ 12xy
5x - 7y + 11z + 4 = 0 ¦ 0
5x - 7y + 11z + 4 = 0 ¦ 4
5x - 7y + 11z + 4 = 0 ¦ 5x - 7y + 11z - 4 = 0
y = 2x + 3 ¦ y = 2x
y = 2x + 3 ¦ 3
y = 2x + 3 ¦ y = 2x + b
x=5 ¦ -5
x=5 ¦ x=6
x=5 ¦ y=x
1,-2 ¦ 1
1,-2 ¦ -2
1,-2 ¦ 1, 2
1,-2 ¦ -1, 2
3, 5, 7 ¦ 5
3, 5, 7 ¦ 3, 5
3, 5, 7 ¦ 3, 5, 7, 9
(3,4) ¦ (4,3)
(3,4) ¦ 4, 3
(15,-29) ¦ (-29, 15)
(5,\infty) ¦ [5,\infty)
(5,\infty) ¦ x \ge 5
(5,\infty) ¦ x < 5
(5,\infty) ¦ 5
(2,12) \cup (12,102) ¦ (2,102)
(-\infty, 2) \cup (3, \infty) ¦ (-\infty, 2) \cap (3, \infty)
(-\infty, 2) \cup (3, \infty) ¦ (-\infty, 2] \cup [3, \infty)
x \in [-2,7] ¦ (-2,7)
x \in [-2,7] ¦ -2 < x < 7
x \in [-2,7] ¦ [-2, 8]
3 \pm 2 \sqrt{2} ¦ 3 + 2\sqrt{2}
3 \pm 2 \sqrt{2} ¦ 3
\{1\pm\sqrt{5},-2\} ¦ 1 \pm \sqrt{5}
\text{(C)} ¦ (B)
\text{(C)} ¦ B
\text{(C)} ¦ D
\text{(C)} ¦ 3
\text{ellipse} ¦ C
\text{even} ¦ neve
\text{even} ¦ odd
\text{even} ¦ \text{uneven}
\text{even} ¦ \text{not even}
\text{Evelyn} ¦ Carla
p - q ¦ q - p
p - q ¦ p + q
15x - 80 ¦ 15x + 80
15x - 80 ¦ 15x
1+274i ¦ 1-274i
1+274i ¦ 274
\cot x ¦ \tan x
\cot x ¦ \frac{1}{\cot x}
\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix} ¦ \begin{pmatrix} 18 \\ -49 \\ 96 \end{pmatrix}
\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix} ¦ \begin{pmatrix} -18 \\ -49 \end{pmatrix}
\begin{pmatrix} -18 \\ -49 \\ 96 \end{pmatrix} ¦ 96
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} ¦ \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}
288 \pi ¦ 288
288 ¦ 288 \pi
\frac{20000}{\pi} ¦ 6366.2
4.6e-24 ¦ 4.7e-24
4.6e-24 ¦ 0
1e-5 ¦ 10^{-6}
4.5e33 ¦ 4.5
4.5e33 ¦ 4.5 \times 10^{32}
43500 ¦ 43, 500
43500 ¦ 43.500
43500 ¦ 43,50
(100,200) ¦ 100200
(100,200) ¦ (200,100)
137 \frac{1}{2} ¦ 137
137 \frac{1}{2} ¦ \frac{137}{2}
1\frac{4}{5} ¦ \frac{4}{5}
58,500 ¦ 58
58,500 ¦ 500
76^\circ ¦ 104^\circ
0 ¦ \emptyset
7 ¦ ?
10 ¦ x
10 ¦ \text{None}
10 ¦ 10 or 12
10 ¦ 10 < x
10 ¦ 10, 20
10 ¦ 10:30
2 ¦ \text{The solution to the equation \(3^{2x} + 19 = 10^x\) cannot be found algebraically.}
3 ¦ \text{three of 5}
50 ¦ 0.5\%
0.5 ¦ 50
100 ¦ 10^
10 ¦ 10^10
11 ¦ 1 1
6 ¦ 2 3
123456 ¦ 123 456 789
1 ¦ \frac{0}{0}
0 ¦ \frac{1}{0}
\frac{1}{2} ¦ \frac{2}{1}
\frac{1}{2} ¦ 12
7 ¦ 7 = 8
5r^5 ¦ r^5
\pi ¦ 3.14
\frac{1}{4p^2} ¦ \frac{1}{4p}
MR=SRMC ¦ MR = LRMC
SRAC=LRAC ¦ LRMC=SRMC
"""


def rows(text):
    return [line.split(" ¦ ") for line in text.strip().split("\n")]


@pytest.mark.parametrize("reference, answer", rows(RIGHT))
def test_right(reference, answer):
    assert igpo.grade(rf"Hence \boxed{{{answer}}}.", reference)


@pytest.mark.parametrize("reference, answer", rows(WRONG))
def test_wrong(reference, answer):
    assert not igpo.grade(rf"Hence \boxed{{{answer}}}.", reference)


@pytest.mark.parametrize("completion, answer", [
    ("", None),
    ("The answer is 18.", None),                                # merely mentioned
    (r"\boxed{17} then \boxed{18}", "18"),                      # the last box
    (r"\boxed{18} and \boxed{}", "18"),                         # ... that is not empty
    (r"\boxed{18} and \boxed{...} and \boxed{\ldots} and \boxed{…}", "18"),     # ... nor a placeholder
    (r"\boxed{18} and \boxed{19", "18"),                        # ... and well-formed
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\boxed{18}}", "18"),
    (r"} \boxed {18}", "18"),
    (r"\boxed{...}", None),
    ("<answer>17</answer><answer> 18 </answer><answer></answer>", "18"),
    (r"\boxed{18} <answer>17</answer>", "18"),                  # a box goes first
    (r"\boxed{...} <answer>17</answer>", "17"),
    ("<answer>18", None),
    ("18</answer>", None),
    ("<answer>...</answer>", None),
])
def test_committed_answer(completion, answer):
    assert igpo.committed_answer(completion) == answer


def test_answer_block_is_graded():
    assert igpo.grade("<answer>\n$18 dollars\n</answer>", "18")
    assert igpo.grade("<answer>\\boxed{}18</answer>", "18")
    assert not igpo.grade("18 <answer>17</answer>", "18")
    assert not igpo.grade("18", "18")


HOSTILE = {
    "tower": r"9^{9^{9^9}}", "factorial": "(10^9)!", "factorials": "((10^9)!)!", "binomial": r"\binom{10^9}{5\cdot10^8}",
    "1e999999999": "1e999999999", "1e-999999999": "1e-999999999", "difference": "10^{10^{10}}-10^{10^{10}}",
    "1/0": r"\frac{1}{0}", "null": "5\0", "surrogate": "\ud800+x", "right-to-left": "\u202e5+x",
    "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n}", "polynomial": "(a+b+c+d+e+f)^{40}", "gamma": r"\Gamma(10^{30})",
    "brackets": "(" * 10_000 + "1" + ")" * 10_000, "150 brackets": "(" * 140 + "x" + ")" * 140, "1 MB": "a+" * 500_000,
    "roots": r"\sqrt{" * 40 + "2" + "}" * 40, "decimal": "0.(" + "9" * 280 + ")", "commas": "," * 290,
    "readings": r"9^{9^{9^9}}\approx" * 15, "percent": r"9^{9^{9^9}}\%", "equals": "()" * 140 + "=",
}
HOSTILE = {name: rf"\boxed{{{answer}}}" for name, answer in HOSTILE.items()} | {
    "open boxes": r"\boxed{" * 140_000, "nested boxes": r"\boxed{" * 100_000 + "}" * 100_000, "braces": "{" * 1_000_000,
    "open blocks": "<answer>" * 120_000, "empty blocks": "<answer></answer>" * 60_000, "spaces": r"\boxed" + " " * 1_000_000,
}


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("run", [lambda function: function(), in_thread], ids=["main thread", "other thread"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, run):
    igpo.grade(r"\boxed{x}", "y")    # the judge's start is not counted
    start = time.process_time()
    assert run(lambda: igpo.grade(HOSTILE[name], r"\frac{3}{5}")) is False
    assert time.process_time() - start < 2


def test_timeouts_are_counted_and_harm_nobody():
    before = igpo.GRADE_TIMEOUTS
    assert not igpo.grade(r"\boxed{9^{9^{9^9}}}", "x+1")
    assert igpo.GRADE_TIMEOUTS == before + 1
    assert igpo.grade(r"\boxed{1+x}", "x+1")
    assert igpo.GRADE_TIMEOUTS == before + 1


def test_a_dead_judge_is_replaced():
    assert igpo.grade(r"\boxed{1+x}", "x+1")
    igpo._judge.kill()
    igpo._judge.wait()
    assert igpo.grade(r"\boxed{1+x}", "x+1")


def test_threads_share_the_judge():
    right = [(rf"\boxed{{{n}+x}}", f"x+{n + n % 2}", n % 2 == 0) for n in range(40)]
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update(
        {(k, row): igpo.grade(row[0], row[1]) == row[2] for row in right[k::4]})) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 40 and all(results.values())


def child(queue):
    queue.put((igpo.grade(r"\boxed{1+x}", "x+1"), igpo.grade(r"\boxed{1+x}", "x+2")))


def test_daemonic_fork_has_its_own_judge():
    igpo.grade(r"\boxed{1+x}", "x+1")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=60) == (True, False)
    process.join()
    assert igpo.grade(r"\boxed{1+x}", "x+1")


@pytest.mark.parametrize("completion, score", [
    ("<reasoning>\n1+1=2\n</reasoning>\n<answer>\n\\boxed{2}\n</answer>", 1),
    ("<reasoning>1+1=2</reasoning><answer>2</answer>", 2 / 3),
    ("<reasoning>1+1=2</reasoning> \\boxed{2}", 1 / 3),
    ("\\boxed{2}", 0), ("", 0)])
def test_format_score(completion, score):
    assert igpo.format_score(completion) == pytest.approx(score)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Elastic roll-out. A response is the number in its first column; 1 is right, everything else wrong.

G, L = 8, 6


class Draw:
    """Stands for the sampler: draws given first columns, keeps hints, and remembers what it was asked for."""

    def __init__(self, *batches):
        self.batches, self.calls = list(batches), []

    def __call__(self, rows, hints):
        self.calls.append((rows, hints))
        out = torch.full((len(rows), G, L), 9)
        out[..., 0] = torch.tensor(self.batches.pop(0))
        if hints is not None:
            out[..., 1:] = torch.where(hints[..., 1:] == MASK, out[..., 1:], hints[..., 1:])
        return out


def roll(draw, N, traces=None, **settings):
    trace = torch.arange(10, 10 + L)
    return igpo.rollout(draw, lambda n, completion: completion[0].item() == 1, [trace] * N if traces is None else traces,
                        [igpo.seeded(n) for n in range(N)], mask_id=MASK, **{"chunk": (2, 2), "eta": (0.4, 0.9)} | settings)


def test_hints_are_drawn_for_the_all_wrong_groups_alone():
    first = [[0] * G, [1] + [0] * 7, [2] * G]
    draw = Draw(first, [[1] * 3 + [0] * 5, [0] * G])
    out = roll(draw, 3)
    assert [rows for rows, _ in draw.calls] == [[0, 1, 2], [0, 2]]  # the group with one right answer is left alone
    assert out.first_correct.sum(1).tolist() == [0, 1, 0] and out.correct.sum(1).tolist() == [3, 1, 0]
    assert torch.equal(out.completions[1:], out.first[1:]) and not out.hinted[1:].any()
    hints = draw.calls[1][1]
    assert hints.shape == (2, G, L) and len({tuple(h) for h in hints[0].tolist()}) > 1  # each its own eta and chunks
    for g in range(3):  # the hint mask travels with the response it belongs to
        assert torch.equal(out.hinted[0, g], hints[0, g] != MASK)
        assert torch.equal(out.completions[0, g, 1:], torch.where(hints[0, g] == MASK, 9, hints[0, g])[1:])


@pytest.mark.parametrize("right, lam, K", [(0, 0.5, 0), (3, 0.5, 3), (4, 0.5, 4), (7, 0.5, 4), (8, 1.0, 8), (8, 0.3, 2), (8, 0.0, 0)])
def test_K_is_the_smaller_of_right_ones_and_lambda_G(right, lam, K):
    out = roll(Draw([[0] * G], [[0] * (G - right) + [1] * right]), 1, lam=lam)
    assert out.correct.sum() == K == out.replaced.sum()
    assert (out.completions[0, :, 0] == 1).sum() == K  # only right ones are swapped in


def test_algorithms():
    draw = Draw([[0] * G])
    out = roll(draw, 1, algo="grpo")
    assert len(draw.calls) == 1 and torch.equal(out.completions, out.first)
    draw = Draw([[0] * G], [[1] * G])
    out = roll(draw, 1, algo="resample")
    assert draw.calls[1][1] is None and out.correct.sum() == 4 and not out.hinted.any()
    draw = Draw([[0] * G, [0] * G], [[1] * G])
    out = roll(draw, 2, traces=[None, torch.arange(10, 16)])  # without a usable trace there is no hint
    assert draw.calls[1][0] == [1] and out.correct.sum(1).tolist() == [0, 4]


def test_eta_one_gives_the_whole_trace():
    draw = Draw([[0] * G], [[1] * G])
    roll(draw, 1, eta=(1.0, 1.0))
    assert torch.equal(draw.calls[1][1][0], torch.arange(10, 16).expand(G, L))
    draw = Draw([[0] * G], [[1] * G])
    roll(draw, 1, eta=(0.0, 0.0))
    assert (draw.calls[1][1] == MASK).all()


# ---------------------------------------------------------------------------------------------------------------------
# 6. Log-probabilities


def row_by_row_logps(model, prompts, mask, completions):
    """What the released code does: each of the N * G rows by itself, without padding."""
    N, G, L = completions.shape
    logps, entropy = [], []
    for n in range(N):
        prompt = prompts[n][mask[n]]
        for g in range(G):
            canvas = torch.cat([prompt, torch.full((L,), MASK)])
            table = model(canvas[None]).logits[0, len(prompt):].log_softmax(-1)
            logps.append(torch.stack([table[k, completions[n, g, k]] for k in range(L)]))
        entropy.append(-(table.exp() * table).sum(-1))
    return torch.stack(logps).view(N, G, L), torch.stack(entropy)


def test_one_forward_for_the_group_has_the_loss_and_gradient_of_row_by_row():
    model = tiny_model(1)
    prompts, mask = igpo.pad_left([[1, 2, 3], [4, 5, 6, 7, 8]], END)
    completions = torch.randint(0, MASK, (2, 4, 7), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1))
    gradients = []
    for logps, entropy in (igpo.completion_logps(model, prompts, completions, prompt_mask=mask),
                           row_by_row_logps(model, prompts, mask, completions)):
        model.zero_grad()
        (logps * weights).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        results = (logps, entropy)
        if len(gradients) == 1:
            shared = results
    assert torch.allclose(shared[0], results[0], atol=1e-4) and torch.allclose(shared[1], results[1], atol=1e-4)
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max().item() + 1e-6)
    assert not shared[1].requires_grad  # the entropy selects tokens; nothing is optimised through it


# ---------------------------------------------------------------------------------------------------------------------
# 7. The IGPO objective


def test_advantages_are_centred_and_not_scaled():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [3.75, 0.75, 0.75, 0.75]])
    assert torch.allclose(igpo.group_advantages(rewards), torch.tensor(
        [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0], [2.25, -0.75, -0.75, -0.75]]))


def test_theorem_1():
    """All wrong: no variance, no gradient. K of G swapped in: mean A^2 = rho (1 - rho) with rho = K / G."""
    for right in range(G + 1):
        out = roll(Draw([[0] * G], [[1] * right + [0] * (G - right)]), 1, lam=0.5)
        A = igpo.group_advantages(out.correct.float())
        rho = min(right, 4) / G
        assert A.square().mean().item() == pytest.approx(rho * (1 - rho))
        assert A.mean().item() == pytest.approx(0, abs=1e-7)


def test_entropy_filter_keeps_the_most_uncertain_hint_tokens():
    entropy = torch.tensor([[0.5, 3.0, 0.1, 2.0, 9.0, 1.0, 0.7, 0.2, 0.3, 0.4]])
    hints = torch.tensor([[[True, True, True, True, False, True, False, False, False, False],
                           [False] * 10, [True] * 10]])  # (N = 1, G = 3, L = 10)
    free = ~hints
    for keep, kept in [(1e-6, ([1], [4])), (0.2, ([1], [1, 4])), (0.4, ([1, 3], [1, 3, 4, 5])), (1.0, ([0, 1, 2, 3, 5], list(range(10)))),
                       (0.0, ([], []))]:
        learn = igpo.entropy_filter(entropy, hints, keep)
        assert learn.shape == hints.shape and learn[free].all()  # every generated token learns
        assert (learn & hints)[0, 0].nonzero().flatten().tolist() == kept[0], keep
        assert (learn & hints)[0, 2].nonzero().flatten().tolist() == kept[1], keep
    assert torch.equal(igpo.entropy_filter(entropy[0], hints[0, 0], 0.2), igpo.entropy_filter(entropy, hints, 0.2)[0, 0])
    assert igpo.entropy_filter(torch.rand(170), torch.ones(170).bool(), 0.3).sum() == 51  # not 52 by rounding


def naive_policy_loss(logps, old, ref, A, mask, epsilon, beta, per_token):
    total = 0.0
    N, G, L = logps.shape
    for n in range(N):
        for g in range(G):
            places = [k for k in range(L) if mask[n, g, k]]
            if not places:
                continue
            sequence = math.exp(sum(logps[n, g, k].item() - old[n, g, k].item() for k in places) / len(places))
            for k in places:
                rho = math.exp(logps[n, g, k].item() - old[n, g, k].item()) if per_token else sequence
                a = A[n, g].item()
                gain = min(rho * a, min(max(rho, 1 - epsilon), 1 + epsilon) * a)
                d = ref[n, g, k].item() - logps[n, g, k].item()
                total += (gain - beta * (math.exp(d) - d - 1)) / len(places)
    return -total / (N * G)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_policy_loss_is_the_formula(ratio):
    g = torch.Generator().manual_seed(0)
    logps, old, ref = (-torch.rand(2, 4, 6, generator=g) * 3 for _ in range(3))
    A, mask = torch.randn(2, 4, generator=g), torch.rand(2, 4, 6, generator=g) < 0.7
    mask[1, 3] = False  # a response of which nothing learns adds nothing, and no nan
    loss, metrics = igpo.policy_loss(logps, old, ref, A, mask, epsilon=0.2, beta=0.3, ratio=ratio)
    assert loss.item() == pytest.approx(naive_policy_loss(logps, old, ref, A, mask, 0.2, 0.3, ratio == "token"), rel=1e-5)
    swapped, _ = igpo.policy_loss(old, logps, ref, A, mask, epsilon=0.2, beta=0.3, ratio=ratio)
    assert abs(loss.item() - swapped.item()) > 1e-3
    assert metrics["kl"] > 0 and 0 < metrics["clip_fraction"] < 1


def test_policy_gradient_by_hand():
    """On policy, the gradient of token k of response i is -A_i / (G |o_i|), and zero where the mask is off."""
    logps = torch.zeros(1, 2, 3, requires_grad=True)
    mask = torch.tensor([[[True, True, False], [True, False, False]]])
    loss, metrics = igpo.policy_loss(logps, torch.zeros(1, 2, 3), None, torch.tensor([[0.5, -0.5]]), mask, beta=0.0)
    loss.backward()
    assert torch.allclose(logps.grad, torch.tensor([[[-0.125, -0.125, 0], [0.25, 0, 0]]]))
    assert metrics == {"kl": 0.0, "ratio": 1.0, "clip_fraction": 0.0}


@pytest.mark.parametrize("shift, A, moves", [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)])
def test_the_clip_stops_only_what_went_too_far(shift, A, moves):
    logps = torch.full((1, 1, 4), shift, requires_grad=True)
    loss, _ = igpo.policy_loss(logps, torch.zeros(1, 1, 4), None, torch.tensor([[A]]), torch.ones(1, 1, 4).bool(), beta=0.0)
    loss.backward()
    assert bool(logps.grad.abs().sum() > 0) == moves


def test_the_kl_pulls_towards_the_reference():
    logps = torch.full((1, 1, 2), -1.0, requires_grad=True)
    ref = torch.tensor([[[-0.5, -2.0]]])
    loss, metrics = igpo.policy_loss(logps, logps.detach(), ref, torch.zeros(1, 1), torch.ones(1, 1, 2).bool(), beta=1.0)
    assert metrics["kl"] == pytest.approx(((math.exp(0.5) - 1.5) + (math.exp(-1) - 0)) / 2)
    loss.backward()
    assert logps.grad[0, 0, 0] < 0 < logps.grad[0, 0, 1]  # descent raises the first and lowers the second


def test_an_update_makes_right_responses_likelier():
    """The sign of everything at once: through model, log-probabilities, advantages, loss and optimizer."""
    model = tiny_model(1)
    prompts, completions = random_prompts(2, 5), torch.randint(0, MASK - 1, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    def gap():
        logps = igpo.completion_logps(model, prompts, completions)[0].sum(-1)
        return (logps[rewards == 1].mean() - logps[rewards == 0].mean()).item()
    with torch.no_grad():
        before, old = gap(), igpo.completion_logps(model, prompts, completions)[0]
    for _ in range(3):
        loss = igpo.policy_loss(igpo.completion_logps(model, prompts, completions)[0], old, old, igpo.group_advantages(rewards),
                                torch.ones_like(completions).bool())
        metrics = igpo.update(model, optimizer, iter([loss]), 1, 1.0)
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert gap() > before + 0.05


def test_update_averages_its_parts():
    prompts, completions = random_prompts(4, 5), random_prompts(4, 6, 2)
    def grads(parts):
        model = tiny_model(1)
        seen = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
        logps = (igpo.completion_logps(model, q, o[:, None])[0].mean() for q, o in zip(prompts.split(parts), completions.split(parts)))
        igpo.update(model, optimizer, ((x, {"x": 2.0}) for x in logps), 4 // parts, 1e9)
        return seen
    for a, b in zip(grads(4), grads(1)):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item() + 1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# 8. The SFT objective


def test_sft_loss_is_the_formula():
    model, B, L = tiny_model(1), 3, 8
    prompts, completions = random_prompts(B, 5), torch.cat([random_prompts(B, L - 3, 2), torch.full((B, 3), END)], 1)
    loss, metrics = igpo.sft_loss(model, prompts, completions, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    t = torch.rand(1, 1, generator=g)
    t = torch.cat([t, (t + 1 / 3) % 1, (t + 2 / 3) % 1]).clamp(min=1e-3)  # (B, 1), spread evenly
    masked = torch.rand(B, L, generator=g) < t
    assert masked[:, -3:].any() and not masked.all()  # the padding is trained too
    total, nll = 0.0, 0.0
    for b in range(B):
        canvas = torch.cat([prompts[b], torch.where(masked[b], MASK, completions[b])])
        logp = model(canvas[None]).logits[0, 5:].log_softmax(-1)
        for k in range(L):
            if masked[b, k]:
                total -= logp[k, completions[b, k]].item() / t[b].item()
                nll -= logp[k, completions[b, k]].item()
    assert loss.item() == pytest.approx(total / (B * L), rel=1e-4)
    assert metrics["nll"] == pytest.approx(nll / masked.sum().item(), rel=1e-4)


def test_sft_loss_with_nothing_masked_is_zero_and_finite():
    model = tiny_model(1)
    for seed in range(100):
        loss, metrics = igpo.sft_loss(model, random_prompts(1, 3), random_prompts(1, 1, 2), generator=igpo.seeded(seed))
        if metrics["masked"] == 0:
            break
    assert loss.item() == 0
    loss.backward()


# ---------------------------------------------------------------------------------------------------------------------
# 9. Data


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" if not isinstance(r, str) else r + "\n" for r in rows))
    return str(path)


META = [{"type": "GSM_AnsAug", "query": "What is 2+3?", "response": "2+3 = 5\n#### 5\nThe answer is: 5"},
        {"type": "GSM_AnsAug", "query": "What is 2+3?", "response": "Again 2+3 = 5\nThe answer is: 5"},
        {"type": "GSM_Rephrased", "query": "Tell me 2+3", "response": "5\nThe answer is: 5"},
        {"type": "MATH_AnsAug", "query": "Half?", "response": "It is $\\boxed{\\frac{1}{2}}$.\nThe answer is: \\frac{1}{2}"},
        {"type": "GSM_AnsAug", "query": "Words?", "response": "Five.\n#### 5\nThe answer is: 5"}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_metamath_filter_deduplication_and_answers(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(META, indent=1))
    else:
        write(path, *META)
    problems = igpo.metamath_problems(path)
    assert problems == [igpo.Problem("What is 2+3?", "5", "2+3 ="), igpo.Problem("Half?", "\\frac{1}{2}", "It is $"),
                        igpo.Problem("Words?", "5", None)]


@pytest.mark.parametrize("content, message", [
    (['{"type": 1, "query": 2, "response": 3}', "{not json"], r"data.jsonl, line 2: not JSON"),
    (['{"type": 1, "query": 2, "respons": 3}'], r"row 1: no column 'response' \(it has type, query, respons\)"),
    ([], "holds no rows"), (["[1]"], "row 1: no column"),
    (['{"type": "other", "query": 2, "response": "3"}'], "no row of type GSM_AnsAug")])
def test_bad_data_is_named(tmp_path, content, message):
    with pytest.raises(igpo.UsageError, match=message):
        igpo.metamath_problems(write(tmp_path / "data.jsonl", *content))
    with pytest.raises(igpo.UsageError, match="no data file"):
        igpo.metamath_problems(str(tmp_path / "absent.jsonl"))


def test_prompts_too_long_are_left_out_and_counted():
    tokenizer = igpo.toy_model(0)[1]
    problems = [igpo.Problem("1" * n, "1", None) for n in (3, 9, 4, 12)]
    examples, left_out = igpo.encode_problems(tokenizer, problems, 8)
    assert [len(e.prompt) for e in examples] == [3, 4] and left_out == 2
    with pytest.raises(igpo.UsageError, match="all 4 prompts are longer"):
        igpo.encode_problems(tokenizer, problems, 2)


def test_the_chat_template_is_used_where_there_is_one():
    tokenizer = igpo.toy_model(0)[1]
    assert tokenizer.decode(igpo.encode_prompt(tokenizer, "2603-4512=")) == "2603-4512="
    tokenizer.chat_template = "{% for m in messages %}<answer>{{ m['content'][-10:] }}{% endfor %}{% if add_generation_prompt %}</answer>{% endif %}"
    ids = igpo.encode_prompt(tokenizer, "2603-4512=")
    assert tokenizer.convert_ids_to_tokens(ids[0]) == "<answer>" and tokenizer.convert_ids_to_tokens(ids[-1]) == "</answer>"
    assert tokenizer.decode(ids[-11:-1]) == "2603-4512="


def test_batches_go_through_each_epoch_once():
    seen = [i for step in range(10) for i in igpo.batch_indices(20, 4, step, 0)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]
    assert igpo.batch_indices(3, 7, 0, 0) and igpo.batch_indices(20, 4, 7, 0) == seen[28:32]
    assert igpo.batch_indices(20, 20, 0, 1) != seen[:20]


def test_the_toy_world():
    for problem in igpo.toy_problems(200, 1):
        a, b = problem.question.rstrip("=").split("-")
        assert problem.answer == "".join(str((int(x) - int(y)) % 7) for x, y in zip(a, b)) == problem.trace
    assert igpo.toy_problems(5, 1) == igpo.toy_problems(5, 1) != igpo.toy_problems(5, 2)
    seen = {"right": 0, "wrong": 0, "easy": 0}
    for row in igpo.toy_sft_rows(2000, 0):
        a, b = row["prompt"].rstrip("=").split("-")
        answer = igpo.committed_answer(row["completion"])
        assert igpo.format_score(row["completion"]) == 1
        for x, y, z in zip(map(int, a), map(int, b), map(int, answer)):
            assert z in ((x - y) % 7, abs(x - y))
            if x >= y:
                seen["easy"] += 1
            elif (x - y) % 7 != y - x:
                seen["right" if z == (x - y) % 7 else "wrong"] += 1
    assert seen["right"] / (seen["right"] + seen["wrong"]) == pytest.approx(0.15, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# 11. The recipe, end to end

SHORT = ["--preset", "toy", "--sft_steps", "6", "--sft_batch", "8", "--sft_rows_per_forward", "4", "--max_steps", "2",
         "--prompts_per_step", "4", "--prompts_per_forward", "2", "--group_size", "4", "--eval_size", "8", "--show_every", "1"]


def test_end_to_end(tmp_path, capsys):
    igpo.main([*SHORT, "--out_dir", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in lines if r["stage"] != "eval"] == [("sft", s) for s in range(1, 7)] + [("rl", 1), ("rl", 2)]
    assert all(math.isfinite(v) for r in lines for v in r.values() if not isinstance(v, str))
    assert {"reward", "accuracy", "accuracy_after", "all_wrong", "all_wrong_after", "rescued", "hint_tokens", "hint_tokens_kept", "kl",
            "ratio", "clip_fraction", "entropy", "loss", "grad_norm", "lr", "completion_length", "tokens_per_second", "seconds",
            "seconds_rollout", "seconds_update"} <= lines[-2].keys()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"accuracy_start", "accuracy_sft", "accuracy_final", "all_wrong", "all_wrong_after", "steps", "seconds"} <= summary.keys()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["preset"] == "toy"
    start, sft, final = (igpo.load_model(tmp_path / "run" / name)[0].state_dict() for name in ("start", "sft", "final"))
    assert all(not torch.equal(start[k], sft[k]) for k in start) and any(not torch.equal(sft[k], final[k]) for k in sft)
    assert "RL 2/2" in capsys.readouterr().out

    with pytest.raises(igpo.UsageError, match="already holds a run"):
        igpo.main([*SHORT, "--out_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "summary.json").exists()


def test_sft_teaches_and_igpo_improves(tmp_path):
    """SFT on two-token answers, then RL from all-wrong groups: a wrong sign anywhere makes accuracy fall, not rise."""
    model, tokenizer = igpo.toy_model(0)
    rows = [{"prompt": f"{a}=", "completion": f"{a}{a}"} for a in range(7)]
    cfg = igpo.parse(["--preset", "toy", "--sft_steps", "60", "--sft_batch", "14", "--sft_rows_per_forward", "14", "--sft_length", "4",
                      "--sft_lr", "5e-3", "--warmup_steps", "5"])
    igpo.train_sft(model, tokenizer, rows, cfg, torch.device("cpu"), tmp_path)
    losses = [line["loss"] for line in igpo.read_log(tmp_path)]
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    examples, _ = igpo.encode_problems(tokenizer, [igpo.Problem(r["prompt"], "", None) for r in rows], 99)
    texts = [t for _, _, t, _ in igpo.answer_examples(model, tokenizer, examples, batch_size=7, gen_length=4, block_length=4, steps=4)]
    assert sum(t == r["completion"] for t, r in zip(texts, rows)) >= 6


def test_rl_on_a_llada_folder_with_real_columns(tmp_path, capsys):
    """The default preset's code path on a LLaDA-format folder with random weights: three steps on MetaMathQA's columns."""
    tokenizer = tiny_tokenizer()
    vocab = len(tokenizer)
    tiny = tiny_model(vocab_size=vocab, mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
                      pad_token_id=tokenizer.pad_token_id)
    folder = llada_folder(tmp_path / "llada", tiny, tokenizer, mask_token_id=tokenizer.mask_token_id,
                          eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    data = write(tmp_path / "meta.jsonl", *[{"type": "GSM_AnsAug", "query": f"{a}-{b}=", "response": f"{a}-{b}={a - b}\nThe answer is: {a - b}"}
                                            for a in range(7) for b in range(7)])
    igpo.main(["--model", str(folder), "--train_data", data, "--max_steps", "3", "--prompts_per_step", "2", "--group_size", "2",
               "--rows_per_call", "4", "--gen_length", "16", "--diffusion_steps", "8", "--block_length", "8", "--eval_size", "4",
               "--out_dir", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["stage"] == "rl"] == [1, 2, 3]
    assert "model.transformer.wte.weight" in load_file(tmp_path / "run" / "final" / "model.safetensors")


@pytest.mark.parametrize("flags, message", [
    (["--preset", "nonsense"], "no preset 'nonsense'; there are llada, toy"),
    (["--preset", "toy", "--nonsense", "1"], "unrecognized arguments: --nonsense"),
    (["--preset", "toy", "--algo", "ppo"], "invalid choice: 'ppo'"),
    (["--preset", "toy", "--max_steps", "many"], "invalid int value"),
    (["--preset", "toy", "--gen_length", "21"], "--gen_length 21 is not divisible by --block_length"),
    (["--preset", "toy", "--diffusion_steps", "7"], "--diffusion_steps 7 is not divisible by the number of blocks"),
    (["--preset", "toy", "--prompts_per_step", "40"], "share of --prompts_per_step is 40, so --prompts_per_forward can be 1, 2, 4, 5, 8, 10, 20, 40, not 16"),
    (["--preset", "toy", "--eta_low", "0.9"], "--eta_low 0.9"),
    (["--preset", "toy", "--block_length", "0"], "--block_length is at least 1, not 0"),
    (["--preset", "toy", "--mu", "0"], "--mu is at least 1, not 0"),
    (["--preset", "toy", "--resume", "--overwrite"], "--resume and --overwrite are opposites"),
    (["--preset", "toy", "--train_data", "absent.jsonl"], "no data file at absent.jsonl"),
    (["--preset", "toy", "--stage", "sft", "--sft_data", "absent.jsonl"], "no data file at absent.jsonl"),
    (["--preset", "toy", "--model", "./absent"], "needs GPUs|no model folder")])
def test_what_a_user_gets_wrong_is_one_line(tmp_path, flags, message):
    with pytest.raises(igpo.UsageError, match=message) as error:
        igpo.main([*flags, "--out_dir", str(tmp_path / "run")])
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_default_preset_without_a_gpu_exits_at_once_with_status_2():
    done = subprocess.run([sys.executable, "igpo.py"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and "python igpo.py --preset toy" in done.stderr and done.stderr.count("\n") == 1


def test_a_batch_that_cannot_be_split_names_the_numbers_that_can(monkeypatch):
    monkeypatch.setattr(igpo, "world", lambda: 7)
    with pytest.raises(igpo.UsageError, match="--x 12 cannot be split over 7 processes, but over 1, 2, 3, 4, 6, 12"):
        igpo.check_split(12, 1, "--x", "--y")
    igpo.check_split(14, 8, "--x", "--y")  # a share smaller than a pass is one pass


def test_overwrite_deletes_nothing_but_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(igpo.UsageError, match="no data file"):
        igpo.main([*SHORT, "--out_dir", str(tmp_path / "run"), "--overwrite", "--train_data", "absent.jsonl"])
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_held_out_problems_are_not_trained_on(tmp_path):
    path = write(tmp_path / "meta.jsonl", *[{"type": "GSM_AnsAug", "query": f"{a}", "response": f"{a}\nThe answer is: {a}"} for a in range(20)])
    train, held_out = igpo.load_problems(path, igpo.parse(["--eval_size", "5"]))
    assert len(train) == 15 and len(held_out) == 5 and not {p.question for p in train} & {p.question for p in held_out}
    assert len(igpo.load_problems(path, igpo.parse(["--eval_size", "50", "--eval_data", path]))[0]) == 20
    with pytest.raises(igpo.UsageError, match="has 20 problems, not more than --eval_size 50"):
        igpo.load_problems(path, igpo.parse(["--eval_size", "50"]))


def test_flags_override_the_preset():
    assert igpo.parse([]).lr == 5e-7 and igpo.parse([]).group_size == 8
    toy = igpo.parse(["--preset", "toy", "--lr", "0.5", "--tau", "1"])
    assert toy.lr == 0.5 and toy.tau == 1 and toy.model == "toy"


def test_show_a_group_and_its_denoising(capsys):
    model, tokenizer = igpo.toy_model(0)
    def ids(text):
        return torch.tensor(tokenizer(text).input_ids + [tokenizer.eos_token_id])
    right, wrong = (ids(f"<reasoning>\n{a}</reasoning><answer>\\boxed{{{a}}}</answer>") for a in ("5161", "3161"))
    hinted = torch.zeros(1, 2, 16, dtype=torch.bool)
    hinted[0, 0, 2:4] = True
    learning = torch.ones(1, 2, 16, dtype=torch.bool)
    learning[0, 0, 3] = False
    roll = igpo.Rollout(torch.stack([right, wrong])[None], hinted, None, torch.stack([wrong, wrong])[None], None, torch.tensor([[True, False]]))
    lines = igpo.show_group(tokenizer, roll, learning, model.config).splitlines()
    assert lines[0].split() == ["wrong", "<reasoning>", "\\n", *"3161", "</reasoning>", "<answer>", "\\boxed{", *"3161", "}", "</answer>", "<end>"]
    assert lines[1].split()[3:7] == ["5", "1", "_", "_"] and lines[2].split()[3:7] == list("5161")
    assert lines[3].split()[1:3] == ["^", "."] and lines[3].index("^") == lines[1].index("5")
    hint = torch.where(hinted[0, 0], right, tokenizer.mask_token_id)
    igpo.show_denoising(model, tokenizer, ids("2603-4512=")[:-1], hint, learning[0, 0], dict(gen_length=16, block_length=8, steps=4), seconds=0)
    frames = capsys.readouterr().out.split("\r")[1:]
    assert len(frames) == 1 + 4 and frames[0].count("_") == 14 and "\033[33;4m5\033[0m \033[33m1\033[0m" in frames[-1]
    assert "_" not in frames[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Rewriting traces


def test_rewritten_traces_are_kept_or_counted_by_reason(tmp_path):
    tokenizer = igpo.toy_model(0)[1]
    rows = [{"problem": f"p{i}", "generations": [f"long {i}"], "answer": "5"} for i in range(7)]
    good = "<reasoning>2+3=5</reasoning>\n<answer>\\boxed{5}</answer>"
    answers = {0: good, 1: good.replace("{5}", "{4}"), 2: good.replace("</reasoning>", ""), 3: good.replace("2+3", "2+3" * 40), 4: good}
    asked = []
    def rewrite(requests):
        numbers = [int(request.split("Problem:\np")[1].split("\n")[0]) for request in requests]
        assert all(f"long {i}" in request for i, request in zip(numbers, requests))
        asked.extend(numbers)
        if 5 in numbers:
            raise KeyboardInterrupt  # killed
        return [answers[i] for i in numbers]
    part, settings = tmp_path / "rewritten.0.jsonl", dict(max_tokens=60, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        igpo.rewrite_traces(list(enumerate(rows)), rewrite, tokenizer, part, **settings)
    with open(part, "a") as file:
        file.write('{"row": 3, "verd')  # half a line
    kept, counts, done = igpo.collect_traces(tmp_path)
    assert set(done) == {0, 1, 2} and counts == {"kept": 1, "wrong answer": 1, "bad format": 1}
    answers |= {5: good, 6: good}
    asked.clear()
    igpo.rewrite_traces(list(enumerate(rows))[:5], rewrite, tokenizer, part, done=done, **settings)
    assert asked == [3, 4]
    kept, counts, _ = igpo.collect_traces(tmp_path)
    assert counts == {"kept": 2, "wrong answer": 1, "bad format": 1, "too long": 1}
    assert kept == [{"prompt": "p0", "completion": good}, {"prompt": "p4", "completion": good}]


def test_rewrite_stage_with_a_tiny_causal_model(tmp_path, monkeypatch):
    """The real generation code on random weights, whose traces are all useless, and then on a rewriter that is right."""
    _, tokenizer = igpo.toy_model(0)
    torch.manual_seed(0)
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                          num_attention_heads=4, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id))
    causal.save_pretrained(tmp_path / "rewriter")
    tokenizer.save_pretrained(tmp_path / "rewriter")
    data = write(tmp_path / "data.jsonl", *[{"problem": f"{a}-1=", "solution": "x", "answer": str(a - 1)} for a in range(1, 5)])
    flags = ["--preset", "toy", "--stage", "rewrite", "--rewrite_data", data, "--rewriter", str(tmp_path / "rewriter"), "--rewrite_max_tokens", "30"]
    with pytest.raises(igpo.UsageError, match="none of 4 rewritten traces"):
        igpo.main([*flags, "--out_dir", str(tmp_path / "run")])
    monkeypatch.setattr(igpo, "load_rewriter", lambda *_: lambda requests: [
        f"<reasoning>1</reasoning><answer>\\boxed{{{int(r.split('Problem:' + chr(10))[1][0]) - 1}}}</answer>" for r in requests])
    igpo.main([*flags, "--out_dir", str(tmp_path / "again")])
    rows = igpo.read_rows(str(tmp_path / "again" / "traces.jsonl"), ("prompt", "completion"))
    assert [r["prompt"] for r in rows] == ["1-1=", "2-1=", "3-1=", "4-1="]
    igpo.main([*SHORT, "--rewrite_data", data, "--out_dir", str(tmp_path / "all"), "--rewrite_max_tokens", "30", "--sft_length", "32"])
    assert {"accuracy_sft", "accuracy_final"} <= json.loads((tmp_path / "all" / "summary.json").read_text()).keys()
    with pytest.raises(igpo.UsageError, match="--rewriter .*absent cannot be loaded"):
        monkeypatch.undo()
        igpo.main([*flags[:-4], "--rewriter", str(tmp_path / "absent"), "--out_dir", str(tmp_path / "bad")])


def test_trace_noise_replaces_a_share_of_the_tokens():
    tokenizer = igpo.toy_model(0)[1]
    examples, _ = igpo.encode_problems(tokenizer, igpo.toy_problems(400, 0), 99)
    noisy = igpo.add_trace_noise(examples, 0.5, igpo.seeded(0))
    same = torch.stack([a.trace == b.trace for a, b in zip(examples, noisy)]).float().mean()
    assert 0.5 < same < 0.65 and [a.prompt for a in examples] == [b.prompt for b in noisy]


# ---------------------------------------------------------------------------------------------------------------------
# 10. Processes and checkpoints


def torchrun(*command, processes=2, **options):
    """Run igpo.py, or a script given as the first word, on two CPU processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def metrics_of(folder, stage="rl"):
    """The metric lines of a run, less what depends on the clock."""
    timed = ("seconds", "tokens_per_second", "flops")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in igpo.read_log(folder) if line["stage"] == stage]


def same_numbers(a, b, rel):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x:
            assert x[k] == (y[k] if isinstance(y[k], str) else pytest.approx(y[k], rel=rel, abs=1e-7)), k


def same_weights(a, b):
    a, b = (load_file(Path(f) / "final" / "model.safetensors") for f in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stage, step", [("sft", 3), ("rl", 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, stage, step):
    flags = [*SHORT, "--save_every", "2", "--max_steps", "4"]
    igpo.main([*flags, "--out_dir", str(tmp_path / "whole")])
    log = igpo.log
    def breaks(out, record):
        log(out, record)
        if (record["stage"], record["step"]) == (stage, step + 1):
            raise Interrupted
    monkeypatch.setattr(igpo, "log", breaks)
    with pytest.raises(Interrupted):
        igpo.main([*flags, "--out_dir", str(tmp_path / "broken")])
    monkeypatch.setattr(igpo, "log", log)
    igpo.main([*flags, "--out_dir", str(tmp_path / "broken"), "--resume"])
    for name in ("sft", "rl", "eval"):
        assert metrics_of(tmp_path / "whole", name) == metrics_of(tmp_path / "broken", name)
    same_weights(tmp_path / "whole", tmp_path / "broken")


def test_resume_refuses_what_does_not_fit(tmp_path):
    run = ["--out_dir", str(tmp_path / "run")]
    with pytest.raises(igpo.UsageError, match="holds no run"):
        igpo.main([*SHORT, *run, "--resume"])
    igpo.main([*SHORT, *run, "--save_every", "2"])
    with pytest.raises(igpo.UsageError, match="was started with --mu 4, --lr 0.0001"):
        igpo.main([*SHORT, *run, "--resume", "--lr", "1", "--mu", "1"])
    newest = igpo.checkpoints(tmp_path / "run")[-1]
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])  # as a full disk leaves it
    with pytest.raises(igpo.UsageError, match="is damaged.*delete it to resume from the one before"):
        igpo.main([*SHORT, *run, "--save_every", "2", "--resume"])
    assert len(igpo.checkpoints(tmp_path / "run")) == 2


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    model, _ = igpo.toy_model(0)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(igpo.UsageError, match="cannot write .*rl-000001"):
        igpo.save_checkpoint(tmp_path, "rl", 1, model, torch.optim.AdamW(model.parameters()), 2)


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
from pathlib import Path
import torch, igpo
out = Path(sys.argv[1])
(out / "metrics.jsonl").touch()
model, _ = igpo.toy_model(0)
optimizer = torch.optim.AdamW(model.parameters())
step = 0
for kill in range(12):
    if (child := os.fork()) == 0:
        while True:
            step += 1
            model.lm_head.weight.data.fill_(step)
            igpo.save_checkpoint(out, "rl", step, model, optimizer, keep=2)
            (out / "said").write_text(str(step))
    time.sleep(random.uniform(0.2, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = igpo.checkpoints(out)[-1]
    step = igpo.load_checkpoint(newest, model, optimizer)
    said = int((out / "said").read_text() or 0)  # empty where the kill fell into its writing
    assert step >= max(said, 1) and (model.lm_head.weight == step).all(), (newest, step, said)
print("survived", step)
"""


def test_a_kill_in_mid_save_leaves_the_checkpoint_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "survived" in done.stdout, done.stderr[-3000:]


def test_sigterm_saves_and_says_so(tmp_path):
    run = subprocess.Popen([sys.executable, "igpo.py", *SHORT, "--max_steps", "10000", "--out_dir", str(tmp_path / "run")], cwd=HERE,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in run.stdout:
        if line.startswith("RL  "):
            run.terminate()
            break
    rest = run.communicate(timeout=60)[0]
    assert run.returncode == 0 and "SIGTERM: saved rl step" in rest and "--resume" in rest
    assert igpo.checkpoints(tmp_path / "run")[-1].name.startswith("rl-")


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    model, tokenizer = igpo.toy_model(0)
    igpo.save_model(model, tokenizer, tmp_path / "m")
    flags = [*SHORT, "--stage", "rl", "--model", str(tmp_path / "m"), "--prompts_per_forward", "1", "--save_every", "1", "--lr", "1e-3"]
    torchrun("igpo.py", *flags, "--out_dir", str(tmp_path / "two"))
    igpo.main([*flags, "--out_dir", str(tmp_path / "one")])
    same_numbers(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), rel=1e-5)
    # and a run of two processes goes on with one
    assert [c.name for c in igpo.checkpoints(tmp_path / "two")] == ["rl-000001"]
    igpo.main([*flags, "--out_dir", str(tmp_path / "two"), "--resume"])
    same_numbers(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), rel=1e-5)


LOPSIDED = """
import sys, igpo
igpo.grade = lambda completion, reference: igpo.rank() == 1  # rank 0 is always wrong and draws twice, rank 1 once
igpo.main(sys.argv[1:])
"""


def test_a_rank_with_more_stuck_groups_does_not_hang_the_others(tmp_path):
    (tmp_path / "lopsided.py").write_text(LOPSIDED)
    torchrun(str(tmp_path / "lopsided.py"), *SHORT, "--out_dir", str(tmp_path / "run"))
    lines = metrics_of(tmp_path / "run")
    assert [line["all_wrong"] for line in lines] == [0.5, 0.5] and len(metrics_of(tmp_path / "run", "sft")) == 6


def test_updates_that_are_not_finite_are_skipped_and_end_the_run():
    model = tiny_model()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    bad = igpo.completion_logps(model, random_prompts(1, 3), random_prompts(1, 4)[:, None])[0].mean() * math.nan
    metrics = igpo.update(model, optimizer, iter([(bad, {})]), 1, 1.0)
    assert metrics["skipped"] == 1 and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    igpo.give_up(9)
    with pytest.raises(igpo.UsageError, match="not finite"):
        igpo.give_up(10)


def test_lora(tmp_path):
    """Frozen base, adapters that learn, the reference with adapters off, merged weights that load without peft."""
    pytest.importorskip("peft")
    igpo.main([*SHORT, "--lora_rank", "4", "--lr", "1e-2", "--save_every", "1", "--gradient_checkpointing", "--out_dir", str(tmp_path / "run")])
    start, sft = (igpo.load_model(tmp_path / "run" / name)[0] for name in ("start", "sft"))
    assert torch.equal(start.lm_head.weight, sft.lm_head.weight) and torch.equal(start.model.norm.weight, sft.model.norm.weight)
    assert not torch.equal(start.model.layers[0].mlp.up_proj.weight, sft.model.layers[0].mlp.up_proj.weight)
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors").exists()

    model, tokenizer = igpo.load_policy(tmp_path / "run" / "sft", torch.device("cpu"), lora_rank=4)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = random_prompts(2, 9) % 18
    with_adapters = model(ids).logits
    with igpo.adapters_off(model) as initial:
        assert torch.allclose(initial(ids).logits, sft(ids).logits, atol=1e-5)
    igpo.save_model(model, tokenizer, tmp_path / "merged")
    assert torch.allclose(igpo.load_model(tmp_path / "merged")[0](ids).logits, with_adapters, atol=1e-4)
    assert not torch.allclose(with_adapters, sft(ids).logits, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The sampler's speed


@pytest.mark.parametrize("words", [24, 128, 300])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.7])
def test_the_draw_has_the_softmax_distribution(words, temperature):
    logits = torch.randn(1, words, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 5], logits[0, -3:] = 3.0, -200.0  # the mask id is likely, and the last words weigh nothing
    u = torch.cat([(torch.arange(19999) + 0.5) / 20000, torch.tensor([1 - 1e-6])])
    tokens, confidence = igpo.choose_tokens(logits.expand(20000, words), 5, temperature, u)
    allowed = logits[0].clone()
    allowed[5] = -math.inf
    assert torch.allclose(tokens.bincount(minlength=words) / 20000, (allowed / temperature).softmax(-1), atol=1e-3)
    assert torch.allclose(confidence, logits[0].log_softmax(-1)[tokens], atol=1e-5)
    assert not (tokens == 5).any() and tokens.max() < words - 3


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("lead", [20.0, 1000.0])
def test_a_mask_id_far_ahead_of_every_word_is_not_chosen(lead, temperature):
    logits = torch.tensor([[0.0, 1.0, lead, -math.inf]]).expand(50, 4)
    tokens, confidence = igpo.choose_tokens(logits.bfloat16(), 2, temperature, torch.linspace(0, 1 - 1e-6, 50))
    assert set(tokens.tolist()) == ({1} if temperature == 0 else {0, 1})
    assert torch.allclose(confidence, logits[0].log_softmax(-1)[tokens], rtol=0.01)


class Forwards:
    """Counts a model's forward passes, the rows in them and the tokens in them."""
    def __init__(self, model):
        self.calls = self.rows = self.tokens = 0
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)
    def count(self, model, args, kwargs):
        ids = kwargs["input_ids"]
        self.calls, self.rows, self.tokens = self.calls + 1, self.rows + ids.shape[0], self.tokens + ids.numel()
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.handle.remove()


def shifted_model(seed=2):
    model = tiny_model(seed, Qwen2ForCausalLM)
    model.config.logit_shift = 1
    return model


@pytest.mark.parametrize("make", [lambda: tiny_model(2), shifted_model], ids=["llama", "dream"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_forward_over_one_block_is_the_full_forward_where_nothing_else_changed(make, padded):
    model, canvas = make(), random_prompts(3, 20)
    seen = torch.arange(20) >= torch.tensor([[0], [2], [4]]) if padded else None
    positions = torch.arange(9, 13)
    with torch.no_grad():
        forward = igpo.cached_logits(model, positions)
        with Forwards(model) as count:
            first, again = forward(canvas, seen), forward(canvas, seen)
        assert count.tokens == 3 * (20 + 4 + getattr(model.config, "logit_shift", 0))
        full = igpo.logits_at(model, canvas, seen, positions)
        assert torch.allclose(first, full, atol=1e-5) and torch.allclose(again, full, atol=1e-5)
        # In a model of one layer keys and values are those of the words, so another block content is exact as well.
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        forward = igpo.cached_logits(model, positions)
        forward(canvas, seen)
        canvas[:, 9:13] = random_prompts(3, 4, 9)
        assert torch.allclose(forward(canvas, seen), igpo.logits_at(model, canvas, seen, positions), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: tiny_model(2), shifted_model], ids=["llama", "dream"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_cache_made_anew_in_each_step_changes_nothing(make, temperature):
    model = make()
    prompts, mask = igpo.pad_left([[1, 2, 3], [4, 5, 6, 7, 8]], END)
    hints = torch.full((2, 12), MASK)
    hints[1, 5] = 3
    settings = dict(gen_length=12, block_length=4, steps=3, hints=hints, prompt_mask=mask, temperature=temperature)
    exact, cached = (igpo.sample(model, prompts, cache=c, generator=igpo.seeded(1), **settings) for c in (None, "block"))
    assert torch.equal(exact, cached)


def test_the_cache_runs_later_steps_over_the_block_alone():
    model, prompts = tiny_model(2), random_prompts(3, 5)
    settings = dict(gen_length=8, block_length=4, steps=8)
    with Forwards(model) as count:
        out = igpo.sample(model, prompts, cache="block", temperature=1.0, **settings)
    assert count.calls == 8 and count.tokens == 2 * 3 * (13 + 3 * 4)
    assert not (out == MASK).any()
    with pytest.raises(igpo.UsageError, match="cache"):
        igpo.sample(model, prompts, cache="dual", **settings)


@torch.no_grad()
def naive_threshold_sampler(model, prompt, hints, L, K, threshold):
    x, P = torch.cat([prompt, hints]), len(prompt)
    for start in range(P, P + L, K):
        while (open_places := [i for i in range(start, start + K) if x[i] == MASK]):
            p = model(x[None]).logits[0].softmax(-1)
            p_other = p.clone()
            p_other[:, MASK] = 0
            confidence, words = p_other.max(-1)
            best = max(open_places, key=lambda i: confidence[i].item())
            for i in open_places:
                if i == best or confidence[i] > threshold:
                    x[i] = words[i]
    return x[P:]


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9, 1.0])
def test_threshold_fills_in_what_is_sure_and_at_least_one(threshold):
    model, prompts, L = tiny_model(2), random_prompts(3, 5), 12
    hints = torch.full((3, L), MASK)
    hints[1, 2:9], hints[2, 4:8] = random_prompts(1, 7, 3)[0], 1
    settings = dict(gen_length=L, block_length=4, hints=hints)
    with Forwards(model) as count:
        out = igpo.sample(model, prompts, steps=3, threshold=threshold, **settings)
    assert torch.equal(out, torch.stack([naive_threshold_sampler(model, q, h, L, 4, threshold) for q, h in zip(prompts, hints)]))
    assert torch.equal(out[hints != MASK], hints[hints != MASK]) and not (out == MASK).any()
    if threshold == 0:  # all at once
        assert count.calls == 3
    if threshold == 1:  # never sure: one at a time
        assert count.calls == 12 and torch.equal(out, igpo.sample(model, prompts, steps=12, **settings))


@pytest.mark.parametrize("cache", [None, "block"])
def test_with_the_options_a_row_depends_on_its_own_generator_alone(cache):
    model, prompts = tiny_model(2), random_prompts(6, 5)
    settings = dict(gen_length=8, block_length=4, steps=4, temperature=1.0, threshold=0.5, cache=cache)
    together = igpo.sample(model, prompts, generator=[igpo.seeded(i) for i in range(6)], **settings)
    alone = [igpo.sample(model, prompts[i: i + 1], generator=igpo.seeded(i), **settings) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


def test_finished_rows_leave_the_batch():
    model = tiny_model(2)
    model.lm_head.weight.data[END] *= 2.5
    settings = dict(gen_length=24, block_length=4, steps=24)
    with Forwards(model) as all_rows:
        full = igpo.sample(model, random_prompts(32, 5), **settings)
    with Forwards(model) as open_rows:
        igpo.sample(model, random_prompts(32, 5), stop_early=True, **settings)
    blocks = (igpo.counted_tokens(full, END).sum(1) + 3) // 4  # a row is written up to the block of its end token
    assert all_rows.rows == 32 * 24 and open_rows.rows == 4 * blocks.sum().item() < all_rows.rows


# ---------------------------------------------------------------------------------------------------------------------
# 6. Log-probabilities in chunks


def unchunked_logps(model, prompts, completions, prompt_mask):
    P, L = prompts.shape[1], completions.shape[-1]
    canvas, positions = F.pad(prompts, (0, L), value=MASK), torch.arange(P, P + L)
    table = igpo.logits_at(model, canvas, igpo.attention_mask(prompt_mask, L), positions).float().log_softmax(-1)
    return table.gather(2, completions.transpose(1, 2)).transpose(1, 2), -(table.exp() * table).sum(-1).detach()


def group(seed):
    prompts, mask = igpo.pad_left([[1, 2, 3], [4, 5, 6, 7, 8 + seed]], END)
    completions = torch.randint(0, MASK, (2, 4, 7), generator=torch.Generator().manual_seed(seed))
    return prompts, completions, mask, torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(9 + seed))


def logps_gradient(model, compute, seed):
    prompts, completions, mask, weights = group(seed)
    logps, entropy = compute(model, prompts, completions, prompt_mask=mask)
    (logps * weights).sum().backward()
    gradient = {name: getattr(p.grad, "full_tensor", lambda: p.grad)() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradient, logps.detach(), entropy


def assert_close(a, b):
    for name in b:
        assert torch.allclose(a[name], b[name], atol=1e-5 * max(1.0, b[name].abs().max().item())), name


MODELS = {"llama": lambda: tiny_model(1), "tied": lambda: tiny_model(1, tie_word_embeddings=True), "dream": shifted_model}


@pytest.mark.parametrize("recompute_layers", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_in_chunks_have_the_gradient_of_the_whole(kind, recompute_layers, monkeypatch):
    model = MODELS[kind]()
    want = logps_gradient(model, unchunked_logps, 0)
    monkeypatch.setattr(igpo.token_logps, "__defaults__", (3 * V,))  # 14 positions in chunks of 3
    if recompute_layers:
        igpo.recompute_activations(model.train())
    got = logps_gradient(model, igpo.completion_logps, 0)
    assert_close(got[0], want[0])
    assert torch.allclose(got[1], want[1], atol=1e-5) and torch.allclose(got[2], want[2], atol=1e-5)
    assert "forward" not in vars(model.lm_head)  # the model is left as it was
    loss = igpo.sft_loss(model, *group(0)[:1], group(0)[1][:, 0], generator=igpo.seeded(1))[0].item()
    monkeypatch.undo()
    assert loss == pytest.approx(igpo.sft_loss(model, *group(0)[:1], group(0)[1][:, 0], generator=igpo.seeded(1))[0].item(), rel=1e-5)


class LargestTable(TorchDispatchMode):
    """Sees every tensor that is made, forward and backward, and keeps the size of the largest table of 29 words."""
    size = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[-1] == 29 and t.shape[0] != 32:  # 32: the head's weights
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("chunk, size", [(2**26, 14 * 29), (3 * 29, 3 * 29)], ids=["whole", "chunks"])
def test_no_table_of_logits_is_larger_than_a_chunk(chunk, size, monkeypatch):
    monkeypatch.setattr(igpo.token_logps, "__defaults__", (chunk,))
    model, (prompts, completions, mask, _) = tiny_model(1, vocab_size=29), group(0)
    with LargestTable() as largest:
        igpo.completion_logps(model, prompts, completions, prompt_mask=mask)[0].sum().backward()
        igpo.sft_loss(model, prompts, completions[:, 0], generator=igpo.seeded(2))[0].backward()
    assert largest.size == size


def sharded_worker(rank, folder, kinds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    igpo.token_logps.__defaults__ = (3 * V,)
    for kind in kinds:
        model, mesh = MODELS[kind](), init_device_mesh("cpu", (2,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
        igpo.recompute_activations(model.train())
        with igpo.gathered(model):
            igpo.sample(model, random_prompts(2, 3), gen_length=4, block_length=2, steps=4 if rank else 2, cache="block")
        result = logps_gradient(model, igpo.completion_logps, rank)
        result = (*result, logps_gradient(model, igpo.completion_logps, rank)[0])  # and once more, after a backward pass
        torch.save(result, folder / f"{kind}{rank}.pt")
    dist.destroy_process_group()


def test_log_probabilities_in_chunks_on_two_processes(tmp_path):
    torch.multiprocessing.start_processes(sharded_worker, (tmp_path, list(MODELS)), nprocs=2, start_method="fork")
    for kind in MODELS:
        model = MODELS[kind]()
        want = [logps_gradient(model, unchunked_logps, rank) for rank in (0, 1)]
        mean = {name: (want[0][0][name] + want[1][0][name]) / 2 for name in want[0][0]}
        for rank in (0, 1):
            gradient, logps, entropy, again = torch.load(tmp_path / f"{kind}{rank}.pt")
            assert_close(gradient, mean)
            assert_close(again, mean)
            assert torch.allclose(logps, want[rank][1], atol=1e-4) and torch.allclose(entropy, want[rank][2], atol=1e-4)


def test_flops_on_a_hand_count():
    config = tiny_model(num_key_value_heads=2).config  # D 32, 4 heads of 8, 2 key/value heads, MLP 48, V 24, 2 layers
    layer = 10 * 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)  # query, key and value, output, MLP; 10 tokens
    scores = 2 * 4 * (10 * 10 * 8) * 2  # 4 heads, each a (10, 8) x (8, 10) and a (10, 10) x (10, 8) product
    assert igpo.flops(config, 3, 10, 6) == 3 * (2 * (layer + scores) + 6 * 2 * 32 * 24)
    assert igpo.flops(config, 3, 10, 6, backward=True) == 3 * igpo.flops(config, 3, 10, 6)
    assert igpo.flops(config, 3, 10, 6, queries=5) == 3 * ((layer + scores) + 6 * 2 * 32 * 24)  # half of the tokens
    llada = LlamaConfig(hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=32, vocab_size=126464)
    assert igpo.flops(llada, 1, 1, 1) == pytest.approx(2 * 7.5e9, rel=0.01)  # 8.0e9 parameters less the 0.5e9 of the embedding


def test_flops_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny_model()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        igpo.logits_at(model, random_prompts(3, 10), None, torch.arange(4, 10))
    counted = counter.get_total_flops()
    rotary = counted - igpo.flops(model.config, 3, 10, 6)
    assert 0 <= rotary < 0.01 * counted  # the rotary angles are a small matrix product as well


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
                                        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2250e12), ("NVIDIA RTX A1000", None)])
def test_peak_flops(name, peak):
    assert igpo.peak_flops(name) == peak


# ---------------------------------------------------------------------------------------------------------------------
# The speed table


def test_speed_table():
    model = tiny_model(2)
    table = {row["variant"]: row for row in evaluation.speed_table(model, rows=2, prompt_length=5, gen_length=8, block_length=4, steps=4)}
    assert list(table) == ["bare forwards", "exact", "cache", "threshold", "cache + threshold"]
    assert table["bare forwards"]["forwards"] == table["exact"]["forwards"] == table["cache"]["forwards"] == 4
    assert table["exact"]["equal"] == 1 and table["bare forwards"]["ratio"] == 1 and 2 <= table["threshold"]["forwards"] <= 8
    assert not model._forward_pre_hooks


def test_two_rl_steps_with_lora_on_a_random_model():
    pytest.importorskip("peft")
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    metrics = evaluation.speed_training(evaluation.random_model(shape, "cpu", torch.float32), lora_rank=2, prompt_length=9,
                                        gen_length=16, diffusion_steps=8, block_length=8, prompts_per_step=2, group_size=4, rows_per_call=8)
    assert metrics["all_wrong"] == 1 and metrics["forwards"] == 16 and metrics["step"] == 2  # two draws of 8 steps
    assert metrics["flops_rollout"] > 0 and metrics["flops_update"] > 0


def test_memory_by_hand():
    config = LlamaConfig(hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                         vocab_size=126464)
    P = 32 * (4 * 4096 ** 2 + 3 * 4096 * 12288) + 2 * 126464 * 4096
    assert 8.0e9 < P < 8.1e9  # LLaDA-8B
    assert igpo.memory_gib(config, 8) == pytest.approx((16 * P / 8 + 2 * P / 8 + 2 * P) / 2**30)
    adapters = 32 * 128 * (4 * 8192 + 3 * 16384)
    assert igpo.memory_gib(config, lora_rank=128) == pytest.approx((2 * P + 16 * adapters) / 2**30)
    model = tiny_model(num_key_value_heads=2, tie_word_embeddings=True)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert igpo.memory_gib(model.config, kl=False) * 2**30 == 18 * (sum(p.numel() for p in model.parameters()) - norms)


def processor_seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began


def test_the_sampler_costs_little_more_than_its_forwards_and_the_cache_far_less():
    """Bounds far from what is measured (1.05 and 4 to 8 times), in processor time, since other work may share the machine."""
    model = evaluation.random_model(dict(hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4, vocab_size=2048), "cpu", torch.float32)
    prompts, L, K, S = random_prompts(2, 96), 128, 16, 16
    canvas = F.pad(prompts, (0, L), value=2047)
    def bare():
        with torch.no_grad():
            for step in range(S):
                igpo.logits_at(model, canvas, None, torch.arange(96, 96 + K))
    settings = dict(gen_length=L, block_length=K, temperature=1.0)
    runs = {"bare": bare, "exact": lambda: igpo.sample(model, prompts, steps=S, **settings),
            "cached": lambda: igpo.sample(model, prompts, steps=4 * S, cache="block", **settings)}
    rounds = [{name: processor_seconds(run) for name, run in runs.items()} for _ in range(4)][1:]
    seconds = {name: statistics.median(r[name] for r in rounds) for name in runs}
    assert seconds["exact"] < 1.6 * seconds["bare"]
    assert seconds["cached"] < 4 * 0.8 * seconds["bare"]


# ---------------------------------------------------------------------------------------------------------------------
# eval.py


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row, problem", [
    ({"question": "2 + 16?", "answer": "2 + 16 = <<2+16=18>>18.\n#### 18"}, ("2 + 16?", "18")),          # GSM8K
    ({"question": "a lot?", "answer": "Much.\n#### 1,080"}, ("a lot?", "1,080")),
    ({"problem": "Half?", "answer": r"\frac{1}{2}"}, ("Half?", r"\frac{1}{2}")),                          # MATH500
    ({"problem": "Half?", "solution": r"It is \boxed{3}.", "answer": "4"}, ("Half?", "4")),
    ({"problem": "x + y?", "answer": 36.0, "url": "none"}, ("x + y?", "36")),                             # AMC
    ({"problem": "zero?", "answer": 0, "solution": r"\boxed{1}"}, ("zero?", "0")),
    ({"problem": "x?", "answer": 1.5}, ("x?", "1.5")),
    ({"problem": "s?", "solution": r"\[s=\boxed{1.6} \mathrm{~cm}\]"}, ("s?", "1.6")),                    # Minerva
    ({"problem": "s?", "solution": r"\boxed{1} then \boxed{\frac{2}{\text{3}}}"}, ("s?", r"\frac{2}{\text{3}}")),
    ({"question": "s?", "answer": r"so \boxed{7}"}, ("s?", "7")),
    ({"question": "s?", "answer": "", "solution": r"\boxed{7}"}, ("s?", "7"))])
def test_the_four_file_formats(tmp_path, row, problem):
    assert evaluation.read_problems(jsonl(tmp_path / "data.jsonl", row)) == [problem]


@pytest.mark.parametrize("content, message", [
    ('{"problem": "1?", "answer": "1"}\n{"problem', r"data.jsonl, line 2: not JSON"),
    ('{"text": "1?", "answer": "1"}', r"row 1: no column 'problem\|question' \(it has text, answer\)"),
    ('{"problem": "1?", "reply": "1"}', r"row 1: no column 'answer\|solution' \(it has problem, reply\)"),
    ('{"problem": "1?", "solution": "so it is 1"}', r"row 1: no answer, and no #### or \\boxed"),
    ("[1]", "row 1: no column"), ("", "holds no rows")])
def test_bad_problem_files_are_named(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(igpo.UsageError, match=message):
        evaluation.read_problems(str(tmp_path / "data.jsonl"))


def test_hub_names_and_alternatives(monkeypatch):
    """GSM8K needs its subset, AMC its train split; where that is not to be had, amc23 stands in."""
    asked = []

    def read_rows(source, columns, split, subset):
        asked.append((source, split, subset))
        if source.startswith("AI-MO"):
            raise igpo.UsageError("cannot load it")
        return [{"problem": "1?", "answer": 1.0}] * 3

    monkeypatch.setattr(evaluation, "read_rows", read_rows)
    assert [evaluation.task_problems(task, None, 2) for task in evaluation.TASKS] == [
        (source, [("1?", "1")] * 2)
        for source in ("openai/gsm8k", "HuggingFaceH4/MATH-500", "math-ai/amc23", "math-ai/minervamath")]
    assert asked == [("openai/gsm8k", "test", "main"), ("HuggingFaceH4/MATH-500", "test", None),
                     ("AI-MO/aimo-validation-amc", "train", None), ("math-ai/amc23", "test", None),
                     ("math-ai/minervamath", "test", None)]
    monkeypatch.setitem(evaluation.TASKS, "amc", ["AI-MO/aimo-validation-amc"])
    with pytest.raises(igpo.UsageError, match="cannot load it .--data amc=FILE."):
        evaluation.task_problems("amc")


def made_samples(verdicts, length=10):
    """{problem: verdicts of its samples} -> samples"""
    return [dict(task="amc", problem=i, sample=s, completion="", extracted=None if v else "1", reference="1", verdict=v,
                 timed_out=False, length=length + i) for i, vs in verdicts.items() for s, v in enumerate(vs)]


def test_accuracy_and_standard_error_by_hand():
    greedy = evaluation.summarise(made_samples({0: [True], 1: [False], 2: [False], 3: [True], 4: [False]}))
    # p = 2/5; the variance of the five numbers is (2 * 0.6^2 + 3 * 0.4^2) / 4 = 0.3, of their mean 0.3 / 5 = 0.06
    assert greedy["accuracy"] == pytest.approx(0.4) and greedy["standard_error"] == pytest.approx(0.06 ** 0.5)
    assert (greedy["n"], greedy["samples"], greedy["completion_length"], greedy["no_answer"]) == (5, 5, 12, 0.4)
    # avg@4: the problems' means are 1, 1/4 and 1/4: mean 1/2, variance (1/4 + 1/16 + 1/16) / 2 = 3/16, / 3 = 1/16
    T, F = True, False
    avg = evaluation.summarise(made_samples({0: [T, T, T, T], 1: [F, F, T, F], 2: [T, F, F, F]}))
    assert avg["accuracy"] == 0.5 and avg["standard_error"] == pytest.approx(0.25)
    assert (avg["n"], avg["samples"]) == (3, 12)
    assert evaluation.summarise(made_samples({0: [T, F]}))["standard_error"] is None  # one problem says nothing of it


def test_batches_hold_every_sample_once():
    prompts = [[0] * n for n in (5, 1, 9, 3, 7)]
    batches = evaluation.batches_of(prompts, 3, 4, seed=0)
    assert sorted(job for jobs in batches for job in jobs) == [(i, s) for i in range(5) for s in range(3)]
    assert sorted(map(len, batches)) == [3, 4, 4, 4]
    assert [(1, 0), (1, 1), (1, 2), (3, 0)] in batches  # 1 and 3 are the shortest prompts


def test_settings_are_compared_once_there_are_samples(tmp_path):
    evaluation.claim(tmp_path, {"seed": 0, "limit": None})
    evaluation.claim(tmp_path, {"seed": 1, "limit": None})  # nothing was sampled with the first
    jsonl(tmp_path / "samples.rank_3.jsonl", {})
    evaluation.claim(tmp_path, {"seed": 1, "limit": None})
    with pytest.raises(igpo.UsageError, match="other settings: limit was None, now it is 5. Give another --out_dir"):
        evaluation.claim(tmp_path, {"seed": 1, "limit": 5})


def test_one_evaluation_at_a_time_writes_to_a_folder(tmp_path):
    """A torchrun killed by SIGKILL leaves its processes behind; a second run beside them lost a batch."""
    with evaluation.locked(tmp_path / "out"):
        with pytest.raises(igpo.UsageError, match="another evaluation is writing to"):
            with evaluation.locked(tmp_path / "out"):
                pass
    with evaluation.locked(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(igpo.UsageError, match="cannot write to .*file"):
        with evaluation.locked(tmp_path / "file"):
            pass


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random model, files of two tasks, and an uninterrupted evaluation by one process."""
    folder = tmp_path_factory.mktemp("eval")
    igpo.save_model(*igpo.toy_model(0), folder / "model")
    locks = igpo.toy_problems(12, 0)
    jsonl(folder / "gsm8k.jsonl", *[{"question": p.question[: 3 + i % 7], "answer": f"#### {p.answer}"}
                                    for i, p in enumerate(locks[:7])])
    jsonl(folder / "amc.jsonl", *[{"problem": p.question, "answer": float(i % 7)} for i, p in enumerate(locks[7:])])
    flags = ["--model", str(folder / "model"), "--tasks", "gsm8k,amc", "--gen_length", "8", "--diffusion_steps", "8",
             "--data", f"gsm8k={folder}/gsm8k.jsonl,amc={folder}/amc.jsonl", "--block_length", "4", "--batch_size", "4",
             "--amc_temperature", "2", "--amc_samples", "6"]
    evaluation.main([*flags, "--out_dir", str(folder / "whole")])
    return folder, flags


def outcome(out):
    """What must not depend on how an evaluation was run: the samples, and the results but for the speed."""
    result = json.loads((out / "results.json").read_text())
    for task in result["results"].values():
        del task["tokens_per_second"]
    return (out / "samples.jsonl").read_bytes(), result["results"], result["settings"]


def test_what_an_evaluation_leaves_behind(toy, capsys):
    folder, flags = toy
    samples = evaluation.read_samples(folder / "whole" / "samples.jsonl")
    assert [evaluation.key(s) for s in samples] == [("gsm8k", i, 0) for i in range(7)] + [
        ("amc", i, s) for i in range(5) for s in range(6)]
    assert {type(s["verdict"]) for s in samples} == {bool} and len({s["completion"] for s in samples[-6:]}) > 1
    assert all(s["verdict"] == igpo.grade(s["completion"], s["reference"]) for s in samples)
    assert samples[1]["prompt"] == json.loads((folder / "gsm8k.jsonl").read_text().split("\n")[1])["question"]
    assert set(samples[0]) == {"task", "problem", "sample", "prompt", "completion", "extracted", "reference", "verdict",
                               "timed_out", "length"}
    result = json.loads((folder / "whole" / "results.json").read_text())
    assert [(r["n"], r["samples"]) for r in result["results"].values()] == [(7, 7), (5, 30)]
    assert all(r["tokens_per_second"] > 0 for r in result["results"].values())
    settings = result["settings"]
    assert settings["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert settings["amc_temperature"] == 2
    assert set(settings) >= {f.name for f in dataclasses.fields(evaluation.Config)} - {"speed", "prompt_length", "train", "proof", "seeds",
                                                                                  "variants"} - {
        "out_dir", "overwrite", "rescore"}
    assert result["versions"]["math-verify"] == importlib.metadata.version("math-verify")
    assert not list((folder / "whole").glob("*rank*")) and not list((folder / "whole").glob("*unfinished"))

    before = outcome(folder / "whole"), result["results"]["amc"]["tokens_per_second"]
    evaluation.main([*flags, "--out_dir", str(folder / "whole")])  # nothing left to do
    shown = capsys.readouterr().out
    assert "37 of 37 samples are in" in shown and re.search(r"^amc +\d+\.\d\d .* 30 ", shown, re.M)
    result = json.loads((folder / "whole" / "results.json").read_text())
    assert (outcome(folder / "whole"), result["results"]["amc"]["tokens_per_second"]) == before

    with pytest.raises(igpo.UsageError, match="other settings: seed was 0, now it is 1"):
        evaluation.main([*flags, "--out_dir", str(folder / "whole"), "--seed", "1"])


def test_igpo_evaluates_by_the_same_code(toy, tmp_path, monkeypatch):
    """With a verdict that depends on every character of the completion, both have the same accuracy."""
    folder, flags = toy
    for module in (igpo, evaluation):
        monkeypatch.setattr(module, "grade", lambda completion, reference: sum(completion.encode()) % 2 == 0)
    evaluation.main([*flags, "--tasks", "gsm8k", "--out_dir", str(tmp_path)])
    model, tokenizer = igpo.load_model(folder / "model")
    examples = [igpo.Example(igpo.encode_prompt(tokenizer, question), answer, None)
                for question, answer in evaluation.read_problems(f"{folder}/gsm8k.jsonl")]
    cfg = igpo.Config(gen_length=8, diffusion_steps=8, block_length=4, rows_per_call=3)
    accuracy = json.loads((tmp_path / "results.json").read_text())["results"]["gsm8k"]["accuracy"]
    assert igpo.evaluate(model, tokenizer, examples, cfg) == accuracy and 0 < accuracy < 1


def test_two_processes_have_the_results_of_one(toy):
    """The ten batches of 4 are shared out by fives, but for what one process had left there already."""
    folder, flags = toy
    (folder / "two").mkdir()
    for name in ("settings.json", "samples.jsonl"):
        lines = (folder / "whole" / name).read_text().splitlines(keepends=True)
        (folder / "two" / name).write_text("".join(lines[:9] if name == "samples.jsonl" else lines))
    output = torchrun("eval.py", *flags, "--out_dir", str(folder / "two"))
    assert output.count("std. error") == 1
    assert outcome(folder / "two") == outcome(folder / "whole")


def test_a_killed_evaluation_continues(toy):
    """Killed while it writes; then as a kill may leave it, with half a line, and of two processes."""
    folder, flags = toy
    out = folder / "killed"
    process = subprocess.Popen([sys.executable, "eval.py", *flags, "--out_dir", str(out)], cwd=HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / "samples.jsonl").is_file() and (out / "samples.jsonl").stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    evaluation.main([*flags, "--out_dir", str(out)])
    assert outcome(out) == outcome(folder / "whole")

    whole = (folder / "whole" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(b"".join(whole[:3] + whole[20:23]) + whole[9][:-25])
    (out / "samples.rank_1.jsonl").write_bytes(whole[30] + whole[2] + whole[11][:1])
    assert len(evaluation.read_samples(out / "samples.jsonl")) == 6
    evaluation.main([*flags, "--out_dir", str(out)])
    assert outcome(out) == outcome(folder / "whole") and not list(out.glob("*rank*"))


def test_another_checkpoint_in_the_same_folder_is_noticed(toy):
    folder, flags = toy
    model, tokenizer = igpo.load_model(folder / "model")
    igpo.save_model(model, tokenizer, folder / "moving")
    flags = [*flags, "--model", str(folder / "moving"), "--limit", "1", "--out_dir", str(folder / "moved")]
    evaluation.main(flags)
    model.lm_head.weight.data[0, 0] += 1e-3
    igpo.save_model(model, tokenizer, folder / "moving")
    with pytest.raises(igpo.UsageError, match="weights_checksum was"):
        evaluation.main(flags)
    evaluation.main([*flags, "--overwrite"])


def test_rescore(toy, tmp_path, capsys):
    folder, _ = toy
    capsys.readouterr()
    evaluation.main(["--rescore", str(folder / "whole" / "samples.jsonl")])
    assert "0 of 37 verdicts changed" in capsys.readouterr().out
    stored = [(r"\boxed{0.25}", False), (r"\boxed{3}", True), (r"\boxed{\frac14}", True)]
    rows = [dict(task="math500", problem=i, sample=0, completion=completion, reference="1/4", verdict=verdict, length=9)
            for i, (completion, verdict) in enumerate(stored)]
    path = Path(jsonl(tmp_path / "samples.jsonl", *rows))
    before = path.read_bytes()
    evaluation.main(["--rescore", str(path)])
    shown = capsys.readouterr().out
    assert "2 of 3 verdicts changed" in shown and re.search(r"^math500 +66.67 +33.33 +3 ", shown, re.M)
    assert "math500 problem 0 sample 0: wrong -> right, '0.25' for '1/4'" in shown
    assert "math500 problem 1 sample 0: right -> wrong, '3' for '1/4'" in shown and path.read_bytes() == before


def test_grader_timeouts_are_reported(monkeypatch):
    def grade(completion, reference):
        igpo.GRADE_TIMEOUTS += completion == "slow"
        return completion == "right"

    monkeypatch.setattr(evaluation, "grade", grade)
    samples = [s | {"completion": c} | evaluation.graded(c, "1") for s, c in
               zip(made_samples({0: [True], 1: [True], 2: [True]}), ["right", "slow", "wrong"])]
    assert [(s["verdict"], s["timed_out"]) for s in samples] == [(True, False), (False, True), (False, False)]
    results = evaluation.summarise(samples)
    assert results["grade_timeouts"] == 1
    assert "\n1 answers could not be graded in time" in evaluation.table({"amc": results})


@pytest.mark.parametrize("flags, message", [
    (["--tasks", "gsm8k"], "no model; give --model"),
    (["--model", "m", "--tasks", "gsm8k,aime"], "no task 'aime'; there are gsm8k, math500, amc, minerva"),
    (["--model", "m", "--tasks", ","], "no task ''; there are"),
    (["--model", "m", "--data", "math=a.jsonl"], "--data takes TASK=FILE, TASK being one of .* not 'math'"),
    (["--model", "m", "--tasks", "amc", "--data", "amc=absent.jsonl"], "no data file at absent.jsonl"),
    (["--model", "m", "--gen_length", "100"], "--gen_length 100 is not divisible by --block_length 32"),
    (["--model", "m", "--diffusion_steps", "100"], "--diffusion_steps 100 is not divisible by the number of blocks, 8"),
    (["--model", "m", "--limit", "0"], "--limit is at least 1, not 0"),
    (["--model", "m", "--temperature", "-1"], "--temperature is at least 0, not -1"),
    (["--model", "m", "--nonsense", "1"], "unrecognized arguments: --nonsense"),
    (["--rescore", "absent.jsonl"], "no samples file at absent.jsonl")])
def test_what_a_user_of_eval_gets_wrong_is_one_line(tmp_path, flags, message):
    with pytest.raises(igpo.UsageError, match=message) as error:
        evaluation.main([*flags, "--out_dir", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, message", [
    ('{"task": 1}\n', "line 1: no column 'completion' .it has task."),
    ("{\n{}\n", "line 1: not JSON"), ("", "no samples")])
def test_bad_samples_files_are_named(tmp_path, content, message):
    (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(igpo.UsageError, match=message):
        evaluation.main(["--rescore", str(tmp_path / "samples.jsonl")])


def test_the_command_exits_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "./absent", "--tasks", "amc", "--data", "amc=absent.jsonl"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "eval.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "eval.py: no data file at absent.jsonl\n")
