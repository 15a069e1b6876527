"""The tests of igpo.py and eval.py, in their order: each formula on numbers worked out by hand or
against a plain loop, each promise once, what a user gets wrong in tables. Run: pytest"""

import ast
import contextlib
import csv
import dataclasses
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
import zlib
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import eval as evaluation
import igpo

HERE = Path(__file__).parent
V, MASK, END = 24, 23, 22  # the tiny models' vocabulary
torch.set_num_threads(1)

def tiny_model(seed=0, cls=LlamaForCausalLM, **changes):
    """A random bidirectional model whose weights are large, so that its predictions differ."""
    torch.manual_seed(seed)
    config = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=4, initializer_range=0.3,
                  is_causal=False, mask_token_id=MASK, bos_token_id=None, eos_token_id=[END],
                  pad_token_id=END) | changes
    return cls({LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config}[cls](**config)).eval()

def shifted_model(seed=2):  # as Dream
    model = tiny_model(seed, Qwen2ForCausalLM)
    model.config.logit_shift = 1
    return model

def tiny_tokenizer():
    return igpo.toy_model(0)[1]

def random_prompts(rows, length, seed=1):
    return torch.randint(0, MASK - 1, (rows, length), generator=igpo.seeded(seed))

def write_jsonl(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)

# --------------------------------------------------------------------------------------------------
# 1. The model

def llada_folder(folder, model, tokenizer, **config):
    """Write a Llama as a LLaDA checkpoint, with LLaDA's names spelled out once more by hand."""
    c, names = model.config, {"wte": "model.embed_tokens", "ln_f": "model.norm"}
    if not c.tie_word_embeddings:
        names["ff_out"] = "lm_head"
    for i in range(c.num_hidden_layers):
        for theirs, ours in {
                "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
                "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
                "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
                "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
                "ff_out": "mlp.down_proj"}.items():
            names[f"blocks.{i}.{theirs}"] = f"model.layers.{i}.{ours}"
    weights = model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"model.transformer.{a}.weight": weights[f"{b}.weight"].clone()
               for a, b in names.items()}, folder / "model.safetensors")
    raw = dict(model_type="llada", architectures=["LLaDAModelLM"], d_model=c.hidden_size,
               auto_map={"AutoConfig": "configuration_llada.LLaDAConfig"},
               n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads,
               n_layers=c.num_hidden_layers, mlp_hidden_size=c.intermediate_size,
               vocab_size=c.vocab_size, embedding_size=c.vocab_size, max_sequence_length=128,
               rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_parameters["rope_theta"],
               weight_tying=c.tie_word_embeddings, mask_token_id=MASK, eos_token_id=END,
               pad_token_id=END) | config
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "configuration_llada.py").write_text("raise SystemExit('remote code was run')")
    tokenizer.save_pretrained(folder)
    return folder

TOKENIZER_SIZE = len(tiny_tokenizer())  # the tiny models' folders need room for its ids

def llada_model(**changes):
    t = tiny_tokenizer()
    return tiny_model(vocab_size=TOKENIZER_SIZE, mask_token_id=t.mask_token_id,
                      eos_token_id=[t.eos_token_id], pad_token_id=t.pad_token_id, **changes)

def llada(folder, model=None, **config):
    t = tiny_tokenizer()
    ids = dict(mask_token_id=t.mask_token_id, eos_token_id=t.eos_token_id,
               pad_token_id=t.eos_token_id)
    return llada_folder(folder, model or llada_model(), t, **ids | config)

@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}],
                         ids=["LLaDA", "grouped", "tied"])
def test_llada_round_trip(tmp_path, shape):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    original, ids = llada_model(**shape, rope_parameters=rope), random_prompts(2, 9)
    folder = llada(tmp_path / "in", original, n_kv_heads=shape.get("num_key_value_heads"))
    model, tokenizer = igpo.load_model(folder)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert model.config.eos_token_id == [tokenizer.eos_token_id]
    changed = ids.clone()
    changed[:, -1] += 1
    assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0])  # not causal

    igpo.save_model(model, tokenizer, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out")]
    assert configs[0] | {"torch_dtype": "float32"} == configs[1]
    assert (tmp_path / "out" / "configuration_llada.py").exists()  # for LLaDA's own loader
    assert torch.equal(igpo.load_model(tmp_path / "out")[0](ids).logits, original(ids).logits)

def test_dream_is_read_one_position_to_the_left(tmp_path):
    original, ids = shifted_model(), random_prompts(2, 9)
    original.resize_token_embeddings(TOKENIZER_SIZE)
    igpo.save_model(original, tiny_tokenizer(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    raw = json.loads(path.read_text()) | {"model_type": "Dream", "architectures": ["DreamModel"]}
    del raw["is_causal"], raw["logit_shift"]
    path.write_text(json.dumps(raw))
    model, tokenizer = igpo.load_model(tmp_path / "m")
    logits = igpo.logits_at(model, ids, None, torch.arange(4, 7))
    assert torch.allclose(logits, original(ids).logits[:, 3:6], atol=1e-5)
    igpo.save_model(model, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == "Dream"

def test_the_end_token_s_embedding_learns(tmp_path):
    """transformers gives the padding id an embedding without gradient; here it is the end token."""
    igpo.save_model(*igpo.toy_model(0), tmp_path / "m")
    model, tokenizer = igpo.load_model(tmp_path / "m")
    model(torch.tensor([[1, tokenizer.pad_token_id, 3]])).logits.square().mean().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.pad_token_id].abs().sum() > 0

def test_lora_is_merged_in_float32(tmp_path):
    LoraConfig = pytest.importorskip("peft").LoraConfig
    model = llada_model().to(torch.bfloat16)
    base = {name: w.clone() for name, w in model.state_dict().items()}
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=igpo.seeded(name)) * 1e-2
    merged = igpo.merged_weights(model)
    assert merged.keys() == base.keys()
    module = model.model.layers[0].mlp.up_proj
    delta = 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    name = "model.layers.0.mlp.up_proj.weight"
    assert merged[name].dtype == torch.float32
    assert torch.allclose(merged[name] - base[name].float(), delta, atol=1e-6)
    assert delta.abs().max() > 1e-5
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"].float())

def test_counted_tokens_include_the_first_end_token():
    ids = torch.tensor([[1, 2, END, 3, END], [END, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    T, N = True, False
    assert igpo.counted_tokens(ids, END).tolist() == [[T, T, T, N, N], [T, N, N, N, N], [T] * 5]
    assert igpo.counted_tokens(ids, [END, 2]).sum(1).tolist() == [2, 1, 2]

# --------------------------------------------------------------------------------------------------
# 2. The sampler

@torch.no_grad()
def published_sampler(model, prompt, hints, K, steps, threshold=None):
    """LLaDA's sampler at temperature 0, written out for one unpadded row; with a threshold, each
    step fills in the surest place and all that are surer than it."""
    x, P, L = torch.cat([prompt, hints]), len(prompt), len(hints)
    S = steps // (L // K)
    for start in range(P, P + L, K):
        block = range(start, start + K)
        total = sum(x[i].item() == MASK for i in block)
        for step in range(S if threshold is None else K):
            masks = [i for i in block if x[i].item() == MASK]
            p = model(x[None]).logits[0].double().softmax(-1)
            best = {i: max(range(MASK), key=lambda v: p[i, v].item()) for i in masks}
            count = total // S + (step < total % S) if threshold is None else min(len(masks), 1)
            order = sorted(masks, key=lambda i: -p[i, best[i]].item())
            for i in order:
                if i in order[:count] or threshold is not None and p[i, best[i]] > threshold:
                    x[i] = best[i]
    return x[P:]

class Forwards:
    """Counts a model's forward passes, the rows in them and the tokens in them."""

    def __init__(self, model):
        self.calls = self.rows = self.tokens = 0
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model, args, kwargs):
        self.calls, self.rows = self.calls + 1, self.rows + len(kwargs["input_ids"])
        self.tokens += kwargs["input_ids"].numel()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()

def some_hints(share, L=12):
    hints = torch.full((3, L), MASK)
    given = torch.rand(3, L, generator=igpo.seeded(4)) < share
    hints[given] = random_prompts(3, L, 5)[given]
    return hints

@pytest.mark.parametrize("K, steps", [(12, 12), (12, 5), (4, 6), (4, 12), (3, 4)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_greedy_sampling_is_the_published_sampler(K, steps, share):
    model, prompts, hints = tiny_model(2), random_prompts(3, 5), some_hints(share)
    out = igpo.sample(model, prompts, gen_length=12, block_length=K, steps=steps,
                      hints=hints if share else None)
    want = [published_sampler(model, q, h, K, steps) for q, h in zip(prompts, hints)]
    assert torch.equal(out, torch.stack(want)) and not (out == MASK).any()
    assert torch.equal(out[hints != MASK], hints[hints != MASK])

@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9, 1.0])
def test_threshold_fills_in_what_is_sure_and_at_least_one(threshold):
    model, prompts, hints = tiny_model(2), random_prompts(3, 5), some_hints(0.3)
    with Forwards(model) as count:
        out = igpo.sample(model, prompts, gen_length=12, block_length=4, steps=3, hints=hints,
                          threshold=threshold)
    want = [published_sampler(model, q, h, 4, 3, threshold) for q, h in zip(prompts, hints)]
    assert torch.equal(out, torch.stack(want)) and (threshold > 0 or count.calls == 3)

def test_padding_changes_nothing():
    model, short, long = tiny_model(2), random_prompts(1, 4), random_prompts(1, 7)
    prompts, mask = igpo.pad_left([short[0].tolist(), long[0].tolist()], END)
    assert mask.tolist() == [[False] * 3 + [True] * 4, [True] * 7]
    settings = dict(gen_length=8, block_length=4, steps=8)
    both = igpo.sample(model, prompts, prompt_mask=mask, **settings)
    assert torch.equal(both, torch.cat([igpo.sample(model, q, **settings) for q in (short, long)]))

@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.7])
@pytest.mark.parametrize("lead", [3.0, 1000.0])
def test_the_draw_has_the_softmax_distribution(temperature, lead):
    """The mask id is never chosen, even far ahead, yet it counts in the confidence."""
    logits = torch.randn(1, 128, generator=igpo.seeded(0)) * 2
    logits[0, 5], logits[0, -3:] = lead, -200.0
    u = torch.cat([(torch.arange(19999) + 0.5) / 20000, torch.tensor([1 - 1e-6])])
    tokens, confidence = igpo.choose_tokens(logits.expand(20000, 128), 5, temperature, u)
    allowed = logits[0].clone()
    allowed[5] = -math.inf
    want = (allowed / temperature).softmax(-1) if temperature else F.one_hot(allowed.argmax(), 128)
    assert torch.allclose(tokens.bincount(minlength=128) / 20000, want.float(), atol=1e-3)
    assert torch.allclose(confidence, logits[0].log_softmax(-1)[tokens], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("options", [{}, {"cache": "block", "threshold": 0.5}])
def test_a_row_depends_on_its_own_generator_alone(options):
    model, prompts = tiny_model(2), random_prompts(6, 5)
    settings = dict(gen_length=8, block_length=4, steps=4, temperature=1.0) | options
    together = igpo.sample(model, prompts, generator=list(map(igpo.seeded, range(3))), **settings)
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        alone = igpo.sample(model, prompts[rows], generator=igpo.seeded(i), **settings)
        assert torch.equal(together[rows], alone)
    assert len(igpo.sample(model, prompts[:1].expand(6, -1), **settings).unique(dim=0)) > 1

def test_rows_that_have_ended_leave_the_batch_and_keep_their_text():
    model, prompts = tiny_model(2), random_prompts(32, 5)
    model.lm_head.weight.data[END] *= 2.5  # so that rows end at different places
    settings = dict(gen_length=24, block_length=4, steps=24)
    full = igpo.sample(model, prompts, **settings)
    with Forwards(model) as count:
        early = igpo.sample(model, prompts, stop_early=True, **settings)
    counted = igpo.counted_tokens(full, END)
    assert len(counted.sum(1).unique()) > 2 and torch.equal(full[counted], early[counted])
    assert (early[~counted & (early != full)] == END).all() and not (early == MASK).any()
    blocks = (counted.sum(1) + 3) // 4  # a row is written up to the block of its end token
    assert count.rows == 4 * blocks.sum() < 32 * 24

@pytest.mark.parametrize("make", [lambda: tiny_model(2), shifted_model], ids=["llama", "dream"])
def test_the_cache_computes_the_block_alone(make):
    model, shift = make(), make().config.__dict__.get("logit_shift", 0)
    prompts, mask = igpo.pad_left([[1, 2, 3], [4, 5, 6, 7, 8]], END)
    settings = dict(gen_length=12, block_length=4, prompt_mask=mask, hints=some_hints(0.3)[:2])
    exact, cached = (igpo.sample(model, prompts, cache=c, steps=3, **settings)
                     for c in (None, "block"))
    assert torch.equal(exact, cached)  # one step a block: the cache is never used
    with Forwards(model) as count:
        igpo.sample(model, prompts, cache="block", steps=12, gen_length=12, block_length=4)
    assert count.calls == 12 and count.tokens == 2 * 3 * (17 + 3 * (4 + shift))
    canvas, positions = random_prompts(2, 17), torch.arange(9, 13)
    seen = igpo.attention_mask(mask, 12)
    layers = igpo.block_cache(model, positions)
    with torch.no_grad():  # where nothing else has changed, a pass over the block is exact
        first, again = (igpo.logits_at(model, canvas, seen, positions, layers) for _ in range(2))
        full = igpo.logits_at(model, canvas, seen, positions)
    assert torch.allclose(first, full, atol=1e-5) and torch.allclose(again, full, atol=1e-5)

def test_the_sampler_costs_little_more_than_its_forwards_and_the_cache_far_less():
    """Bounds far from what is measured (1.0 and 0.24), since others may use the machine."""
    model = tiny_model(hidden_size=128, intermediate_size=344, vocab_size=2048)
    cfg = igpo.parse(evaluation.Config, (
        "--gen_length 128 --diffusion_steps 32 --batch_size 2 --prompt_length 96").split())
    rounds = [evaluation.time_sampler(model, cfg) for _ in range(3)]
    ratio = {name: statistics.median(rows[name]["x bare"] for rows in rounds) for name in rounds[0]}
    assert ratio["exact"] < 1.6 and ratio["cache"] < 0.8 and not model._forward_pre_hooks
    assert [rounds[0][name]["forwards"] for name in ("exact", "bare forwards", "cache")] == [32] * 3

# --------------------------------------------------------------------------------------------------
# 3. Hints

@pytest.mark.parametrize("ratio, chunks", [(0.5, 3), (0.01, 1), (0.99, 6), (1, 7), (0, 0)])
def test_a_hint_is_whole_chunks_at_their_own_positions(ratio, chunks):
    trace = torch.arange(100, 133)  # 33 tokens in chunks of 5: seven, the last of 3 tokens
    for seed in range(30):
        hint = igpo.make_hint(trace, ratio, gen_length=64, mask_id=0, min_chunk=5, max_chunk=5,
                              generator=igpo.seeded(seed))
        given = hint != 0
        assert hint.shape == (64,) and not given[33:].any()
        assert torch.equal(hint[:33][given[:33]], trace[given[:33]])
        pieces = [given[i: min(i + 5, 33)] for i in range(0, 33, 5)]
        assert all(piece.all() or not piece.any() for piece in pieces)
        assert sum(bool(piece.any()) for piece in pieces) == chunks  # floor(eta N), one at least

def test_a_hint_leaves_room_for_the_answer():
    trace = torch.arange(1, 401)
    hint = igpo.make_hint(trace, 1, gen_length=256, mask_id=0)
    assert hint.tolist() == [*range(1, 227)] + [0] * 30
    hint = igpo.make_hint(trace, 1, gen_length=9, mask_id=0, room=4)
    assert hint.tolist() == [1, 2, 3, 4, 5] + [0] * 4
    assert not igpo.make_hint(trace[:0], 1, gen_length=9, mask_id=0).any()

def test_chunk_lengths_and_choice_are_random_within_bounds():
    hints = [igpo.make_hint(torch.arange(1, 201), 0.3, gen_length=200, mask_id=0, room=0,
                            generator=igpo.seeded(s)) for s in range(200)]
    given = torch.stack(hints) != 0
    assert 0.2 < given.float().mean() < 0.32 and (given.float().mean(0)[:190] > 0.1).all()
    edges = F.pad(given.int(), (1, 1)).diff(dim=1)
    runs = torch.cat([(e == -1).nonzero() - (e == 1).nonzero() for e in edges])
    assert len(runs.unique()) > 8 and (runs < 5).float().mean() < 0.1

@pytest.mark.parametrize("solution, answer, question, trace", [
    ("Half is 24.\nThen 48+24 = 72 clips.\n#### 72", "72", "", "Half is 24.\nThen 48+24 ="),
    ("6-5=$1.00 and 720 + 270 = $990.00", "990", "", "6-5=$1.00 and 720 + 270 ="),
    ("We get 1,200 + 34 = 1,234.\nThe answer is: 1234", "1234", "", "We get 1,200 + 34 ="),
    (r"So $x = \frac{1}{2}$, hence $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", "", "So $x ="),
    (r"It is $\frac{a b}{c + 12}$ or 12.", "12", "", "It is"),  # never inside a command
    ("There are 120 of 12, so 12.", "12", "", "There are 120 of"),
    ("max is the a of it", "a", "", "max is the"),
    ("The sum is -3.\nThe answer is: -3", "-3", "", "The sum is"),
    ("Lyn has 5 apples. 5 + 3 - 3 = 5", "5", "Lyn has 5 apples", "Lyn has 5 apples. 5 + 3 - 3 ="),
    ("Lyn has 5 apples. 2 + 3 = 5", "5", "Lyn has 50 apples", "Lyn has"),
    ("It is seventy-two.\n#### 72", "72", "", None), ("72", "72", "", None), ("any", "", "", None)])
def test_the_answer_is_cut_off_the_trace(solution, answer, question, trace):
    assert igpo.cut_trace(solution, answer, question) == trace

def test_no_hint_holds_the_answer_unless_the_question_does():
    rng = random.Random(0)
    for _ in range(300):
        a, b = rng.randrange(2, 99), rng.randrange(2, 99)
        solution = f"First {a} and then {b}. So {a} + {b} = {a + b}.\nThe answer is: {a + b}"
        trace = igpo.cut_trace(solution, str(a + b), f"{a} and {b}?")
        assert a + b in (a, b) or Decimal(a + b) not in map(Decimal, igpo.NUMBER.findall(trace))
    for problem in igpo.toy_problems(300, 0):
        assert problem.answer not in problem.trace

# --------------------------------------------------------------------------------------------------
# 4. Rewards. The tables hold: reference ¦ content of the box

RIGHT_ANSWERS = r"""
18 ¦ \$18.00
18 ¦ 18\ \text{dollars}
18 ¦ \text{Janet makes 18 dollars}
18 ¦ Answer: 18
18 ¦ x=18 \text{ dollars}
18 ¦ 9 \times 2 = 18
18 ¦ **18**
-10 ¦ \$-10
1234.5 ¦ $1,234.50
1234 ¦ 1 234
12 ¦ 12 \text{ m/s}^2
12 ¦ 12 \mathrm{~cm}
12 ¦ 12 dollars/hour
12.5 ¦ 12.5\%
\frac{1}{10} ¦ 10%
\frac{1}{2} ¦ .5
\frac{1}{2} ¦ 1/2 of a mile
-\frac{3}{8} ¦ \frac{3}{-8}
1\frac{4}{5} ¦ \frac{9}{5}
1\frac{4}{5} ¦ 1 4/5
\frac{270}7\text{ degrees} ¦ \left(\frac{270}{7}\right)^\circ
76^\circ ¦ 76°
.0000672 ¦ 6.72 \times 10^{-5}
1e11 ¦ 10^{11}
58,500 ¦ 58{,}500
11,\! 111,\! 111,\! 100 ¦ 11,111,111,100
15\mbox{ cm}^2 ¦ 15 \text{ square cm}
16 \sqrt{3} ¦ \sqrt{768}
16 \sqrt{3} ¦ 16sqrt(3)
6 - 5i ¦ -5i+6
288 \pi ¦ 288π
3, 5, 7 ¦ \{7, 3, 5\}
1,-2 ¦ x=1 \text{ or } x=-2
3 \pm 2 \sqrt{2} ¦ 3 + 2\sqrt{2}, 3 - 2\sqrt{2}
(5,\infty) ¦ x > 5
x \in [-2,7] ¦ -2 \le x \le 7
\left( 3, \frac{\pi}{2} \right) ¦ (r,\theta) = (3, \frac{\pi}{2})
x=5 ¦ 5
5x - 7y + 11z + 4 = 0 ¦ 10x-14y+22z+8=0
15x - 80 ¦ 5(3x-16)
\cot x ¦ \frac{\cos x}{\sin x}
204_5 ¦ 204
4210_{5} ¦ 4210_5
43 ¦ 43_{10}
\text{(C)} ¦ \textbf{(C)}\ 12
\text{Evelyn} ¦ evelyn
\begin{pmatrix} -18 \\ -49 \end{pmatrix} ¦ \begin{bmatrix} -18 \\ -49 \end{bmatrix}
10 ¦ \boxed{10}
5 ¦ \approx 5
"""
WRONG_ANSWERS = r"""
15 ¦ 18 liters
10 ¦ 4, 6
\frac{1}{3} ¦ 0.333333
\left(\frac{3}{5},\frac{8}{3}\right] ¦ \left(\frac{3}{5},\frac{8}{3}\right)
2516_8 ¦ 2516_7
2516_8 ¦ 1358
1 ¦ \left(-1\right)
5 ¦ 5 hours 30 minutes
530 ¦ 5 30
40 ¦ 4{10}
.5 ¦ 5
2k ¦ 2
12 ¦ 12xy
5x - 7y + 11z + 4 = 0 ¦ 4
y = 2x + 3 ¦ 3
1,-2 ¦ 1
3, 5, 7 ¦ 3, 5, 7, 9
(3,4) ¦ (4,3)
(5,\infty) ¦ [5,\infty)
\text{(C)} ¦ (B)
\text{even} ¦ \text{not even}
\text{Evelyn} ¦ Carla
p - q ¦ q - p
\begin{pmatrix} -18 \\ -49 \end{pmatrix} ¦ \begin{pmatrix} 18 \\ -49 \end{pmatrix}
288 \pi ¦ 288
4.6e-24 ¦ 0
4.5e33 ¦ 4.5
43500 ¦ 43.500
(100,200) ¦ 100200
137 \frac{1}{2} ¦ \frac{137}{2}
7 ¦ ?
10 ¦ 10 or 12
10 ¦ 10:30
50 ¦ 0.5\%
11 ¦ 1 1
1 ¦ \frac{0}{0}
5r^5 ¦ r^5
MR=SRMC ¦ MR = LRMC
"""

def test_the_rules_of_the_grader():
    failures = []
    for table, verdict in (RIGHT_ANSWERS, True), (WRONG_ANSWERS, False):
        for row in table.strip().split("\n"):
            reference, answer = row.split(" ¦ ")
            if igpo.grade(rf"Hence \boxed{{{answer}}}.", reference) != verdict:
                failures.append(row)
    assert not failures, "\n".join(failures)
    for reference in 18, 18.0, "18":
        assert igpo.grade("<answer>\n$18 dollars\n</answer>", reference)
    assert igpo.grade(r"\boxed{1.5}", 1.5) and not igpo.grade("18", "18")

@pytest.mark.parametrize("completion, answer", [
    ("", None), ("The answer is 18.", None),                     # merely mentioned
    (r"\boxed{17} then \boxed{18}", "18"),                       # the last box
    (r"\boxed{18} and \boxed{} and \boxed{...} and \boxed{\ldots} and \boxed{…}", "18"),
    (r"\boxed{18} and \boxed{19", "18"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"} \boxed {18}", "18"), (r"\boxed{...}", None),
    ("<answer>17</answer><answer> 18 </answer><answer></answer>", "18"),
    (r"\boxed{18} <answer>17</answer>", "18"), (r"\boxed{...} <answer>17</answer>", "17"),
    ("<answer>18", None), ("18</answer>", None), ("<answer>...</answer>", None)])
def test_committed_answer(completion, answer):
    assert igpo.committed_answer(completion) == answer

HOSTILE = [
    r"9^{9^{9^9}}", "((10^9)!)!", r"\binom{10^9}{5\cdot10^8}", "1e999999999", "5\0",
    "1e-999999999", r"10^{10^{10}}-10^{10^{10}}", r"\frac{1}{0}", "\ud800+x", "\u202e5+x",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n}", "(a+b+c+d+e+f)^{40}", r"9^{9^9}\%",
    "(" * 10_000 + "1" + ")" * 10_000, "(" * 140 + "x" + ")" * 140, "a+" * 500_000, "," * 290,
    r"\sqrt{" * 40 + "2" + "}" * 40, "0.(" + "9" * 280 + ")", "()" * 140 + "=", "9" * 4301,
    " " * 100_000, r"\boxed{" * 100_000 + "}" * 100_000, "{" * 1_000_000,
    "<answer>" * 120_000, "<answer></answer>" * 60_000, r"\boxed" + " " * 1_000_000]

def test_hostile_answers_and_references_cost_little():
    igpo.grade(r"\boxed{x}", "y")  # the judge's start is not counted
    for text in HOSTILE:
        for completion, reference in (rf"\boxed{{{text}}}", r"\frac{3}{5}"), (r"\boxed{x+1}", text):
            began = time.process_time()
            spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            assert not igpo.grade(completion, reference), text[:40]
            spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - spent
            assert time.process_time() - began + spent < 2, text[:40]
        assert igpo.committed_answer(text + r"\boxed{7}") is not None

def test_answers_that_are_given_up_are_counted_and_harm_nobody():
    before = igpo.GRADE_TIMEOUTS
    assert not igpo.grade(r"\boxed{9^{9^{9^9}}}", "x+1") and igpo.GRADE_TIMEOUTS == before + 1
    assert igpo.grade(r"\boxed{1+x}", "x+1") and igpo.GRADE_TIMEOUTS == before + 1
    igpo.judge.kill()
    igpo.judge.wait()
    assert igpo.grade(r"\boxed{1+x}", "x+1")  # a dead judge is replaced
    os.kill(igpo.judge.pid, signal.SIGSTOP)
    began = time.time()
    assert not igpo.grade(r"\boxed{1+x}", "x+1") and time.time() - began < 8
    assert igpo.GRADE_TIMEOUTS == before + 2 and igpo.grade(r"\boxed{1+x}", "x+1")

def test_format_score_by_hand():
    form = "<reasoning>\n1+1=2\n</reasoning>\n<answer>\n\\boxed{2}\n</answer>"
    assert igpo.format_score(form) == 0.75 and igpo.format_score("") == 0
    assert igpo.format_score(form + "</answer>") == igpo.format_score(form[1:]) == 0.625
    assert igpo.format_score("\\boxed{2} \\boxed{3}") == 0.25
    assert igpo.format_score("<answer>2</answer>") == 0.125  # the opening tags end their lines

# --------------------------------------------------------------------------------------------------
# 5. Elastic roll-out. A response is the number in its first column; 1 is right, all else wrong.

G, L = 8, 6

class Draw:
    """Stands for the sampler: draws given first columns, keeps hints, remembers what was asked."""

    def __init__(self, *batches):
        self.batches, self.calls = list(batches), []

    def __call__(self, prompts, prompt_mask, generators, hints):
        self.calls.append((prompts[:, 0].tolist(), hints))
        assert len(prompts) == len(prompt_mask) == len(generators)
        out = torch.full((len(prompts), G, L), 9)
        out[..., 0] = torch.tensor(self.batches.pop(0))
        if hints is not None:
            out[..., 1:] = torch.where(hints[..., 1:] == MASK, out[..., 1:], hints[..., 1:])
        return out

def roll(draw, N, traces=None, **settings):
    prompts = torch.arange(N)[:, None]
    return igpo.rollout(
        draw, lambda completion, answer: completion[0].item() == answer, prompts, prompts >= 0,
        [1] * N, traces or [torch.arange(10, 10 + L)] * N, [igpo.seeded(n) for n in range(N)],
        mask_id=MASK, **dict(chunk=(2, 2), eta=(0.4, 0.9), room=0) | settings)

def test_hints_are_drawn_for_the_all_wrong_groups_alone():
    draw = Draw([[0] * G, [1] + [0] * 7, [2] * G, [0] * G], [[0] * 5 + [1] * 3, [0] * G])
    out = roll(draw, 4, [torch.arange(10, 16)] * 3 + [None])  # without a trace there is no hint
    assert [rows for rows, _ in draw.calls] == [[0, 1, 2, 3], [0, 2]]
    assert out.first_correct.sum(1).tolist() == [0, 1, 0, 0]
    assert out.correct.sum(1).tolist() == [3, 1, 0, 0]
    assert torch.equal(out.completions[1:], out.first[1:]) and not out.hinted[1:].any()
    hints = draw.calls[1][1]
    assert hints.shape == (2, G, L) and len(hints[0].unique(dim=0)) > 1  # each its own eta, chunks
    for g in range(3):  # the hint mask travels with the response it belongs to
        hint = hints[0, 5 + g]
        assert torch.equal(out.hinted[0, g], hint != MASK)
        kept = torch.where(hint == MASK, 9, hint)[1:]
        assert torch.equal(out.completions[0, g, 1:], kept)

@pytest.mark.parametrize("right, lam, K", [(0, 0.5, 0), (3, 0.5, 3), (4, 0.5, 4), (7, 0.5, 4),
                                           (8, 1.0, 8), (8, 0.3, 2), (8, 0.0, 0)])
def test_K_is_the_smaller_of_right_ones_and_lambda_G(right, lam, K):
    out = roll(Draw([[0] * G], [[0] * (G - right) + [1] * right]), 1, lam=lam)
    assert out.correct.sum() == K == (out.completions[0, :, 0] == 1).sum()
    A, rho = igpo.group_advantages(out.correct), K / G  # Theorem 1
    assert A.square().mean().item() == pytest.approx(rho * (1 - rho))

def test_algorithms():
    draw = Draw([[0] * G])
    assert torch.equal(roll(draw, 1, algo="grpo").completions[0, :, 0], torch.zeros(G).long())
    draw = Draw([[0] * G, [0] * G], [[1] * G])  # sample-matched: the groups that igpo would draw
    out = roll(draw, 2, [None, torch.arange(10, 16)], algo="resample")
    assert draw.calls[1][0] == [1] and (draw.calls[1][1] == MASK).all()
    assert out.correct.sum(1).tolist() == [0, 4] and not out.hinted.any()
    draw = Draw([[0] * G], [[1] * G])
    roll(draw, 1, eta=(1.0, 1.0))
    assert torch.equal(draw.calls[1][1][0], torch.arange(10, 16).expand(G, L))

def test_groups_are_sampled_as_rows_are():
    model, settings = tiny_model(2), dict(gen_length=8, block_length=4, steps=4, temperature=1.0)
    prompts, mask = igpo.pad_left([[1, 2, 3], [4, 5, 6, 7], [8]], END)
    out = igpo.sample_groups(model, prompts, mask, [igpo.seeded(i) for i in range(3)],
                             group_size=2, rows_per_call=4, **settings)
    for i in range(3):
        assert torch.equal(out[i], igpo.sample(
            model, prompts[i].expand(2, -1), prompt_mask=mask[i].expand(2, -1),
            generator=igpo.seeded(i), **settings))

# --------------------------------------------------------------------------------------------------
# 6. Log-probabilities

def row_by_row_logps(model, prompts, mask, completions):
    """What the released code does: each of the N * G rows by itself, here without padding."""
    (N, G, L), logps, entropy = completions.shape, [], []
    for n in range(N):
        for g in range(G):
            canvas = torch.cat([prompts[n][mask[n]], torch.full((L,), MASK)])
            table = model(canvas[None]).logits[0, -L:].log_softmax(-1)
            logps.append(torch.stack([table[k, completions[n, g, k]] for k in range(L)]))
        entropy.append(-(table.exp() * table).sum(-1))
    return torch.stack(logps).view(N, G, L), torch.stack(entropy)

def test_one_forward_for_the_group_has_the_loss_and_gradient_of_row_by_row():
    model = tiny_model(1)
    prompts, mask = igpo.pad_left([[1, 2, 3], [4, 5, 6, 7, 8]], END)
    completions = torch.randint(0, MASK, (2, 4, 7), generator=igpo.seeded(0))
    weights, found = torch.randn(2, 4, 7, generator=igpo.seeded(1)), []
    for logps, entropy in (igpo.completion_logps(model, prompts, completions, prompt_mask=mask),
                           row_by_row_logps(model, prompts, mask, completions)):
        model.zero_grad()
        (logps * weights).sum().backward()
        found.append((logps, entropy, *[p.grad.clone() for p in model.parameters()]))
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-3 * max(b.abs().max().item(), 0.1))
    assert not found[0][1].requires_grad  # the entropy selects; nothing is optimised through it

# --------------------------------------------------------------------------------------------------
# 7. The IGPO objective

def test_advantages_are_centred_and_not_scaled():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [3.75, 0.75, 0.75, 0.75]])
    want = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5],
                         [2.25, -0.75, -0.75, -0.75]])
    assert torch.allclose(igpo.group_advantages(rewards), want)
    assert torch.equal(igpo.group_advantages(rewards[:2].bool()), want[:2])
    assert torch.equal(igpo.group_advantages(rewards[:2].int()), want[:2])
    assert igpo.group_advantages(rewards.double()).dtype == torch.float64

def test_entropy_filter_keeps_the_most_uncertain_hint_tokens():
    entropy = torch.tensor([[0.5, 3.0, 0.1, 2.0, 9.0, 1.0, 0.7, 0.2, 0.3, 0.4]])
    hints = torch.zeros(1, 3, 10, dtype=torch.bool)  # (N = 1, G = 3, L = 10)
    hints[0, 0, [0, 1, 2, 3, 5]] = hints[0, 2] = True
    for keep, some, every in [(1e-5, [1], [4]), (0.2, [1], [1, 4]), (0.4, [1, 3], [1, 3, 4, 5]),
                              (1.0, [0, 1, 2, 3, 5], list(range(10))), (0.0, [], [])]:
        learn = igpo.entropy_filter(entropy, hints, keep)
        assert learn[~hints].all()  # every generated token learns
        assert (learn & hints)[0, 0].nonzero().flatten().tolist() == some
        assert (learn & hints)[0, 2].nonzero().flatten().tolist() == every
    assert torch.equal(igpo.entropy_filter(entropy[0], hints[0, 0], 0.2),
                       igpo.entropy_filter(entropy, hints, 0.2)[0, 0])
    assert igpo.entropy_filter(torch.rand(170), torch.ones(170).bool(), 0.3).sum() == 51

def naive_policy_loss(logps, old, ref, A, mask, epsilon, beta, per_token):
    total, (N, G, L) = 0.0, logps.shape
    for n in range(N):
        for g in range(G):
            places = [k for k in range(L) if mask[n, g, k]]
            ratios = [logps[n, g, k].item() - old[n, g, k].item() for k in places]
            for k, log_ratio in zip(places, ratios):
                rho = math.exp(log_ratio if per_token else sum(ratios) / len(ratios))
                clipped, a = min(max(rho, 1 - epsilon), 1 + epsilon), A[n, g].item()
                d = ref[n, g, k].item() - logps[n, g, k].item()
                kl = math.exp(d) - d - 1
                total += (min(rho * a, clipped * a) - beta * kl) / len(places)
    return -total / (N * G)

@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_policy_loss_is_the_formula(ratio):
    g = igpo.seeded(2)
    logps, old, ref = (-torch.rand(2, 4, 6, generator=g) * 4 for _ in range(3))
    A, mask = torch.randn(2, 4, generator=g), torch.rand(2, 4, 6, generator=g) < 0.7
    mask[1, 3] = False  # a response of which nothing learns adds nothing, and no nan
    settings = dict(epsilon=0.2, beta=0.3, ratio=ratio)
    loss, metrics = igpo.policy_loss(logps, old, ref, A, mask, **settings)
    want = naive_policy_loss(logps, old, ref, A, mask, 0.2, 0.3, ratio == "token")
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert metrics["kl"] > 0 and 0 < metrics["clip_fraction"] < 1
    with pytest.raises(ValueError, match="'sequence' or 'token'"):
        igpo.policy_loss(logps, old, ref, A, mask, ratio="word")

def test_policy_gradient_by_hand():
    """On policy, token k of response i has the gradient -A_i / (G |o_i|); none where masked."""
    logps = torch.zeros(1, 2, 3, requires_grad=True)
    mask = torch.tensor([[[True, True, False], [True, False, False]]])
    A = torch.tensor([[0.5, -0.5]])
    loss, metrics = igpo.policy_loss(logps, torch.zeros(1, 2, 3), None, A, mask, beta=0.0)
    loss.backward()
    assert torch.allclose(logps.grad, torch.tensor([[[-0.125, -0.125, 0], [0.25, 0, 0]]]))
    assert metrics == {"kl": 0.0, "ratio": 1.0, "clip_fraction": 0.0}

@pytest.mark.parametrize("shift, A, moves", [(0.5, 1.0, False), (0.5, -1.0, True),
                                             (-0.5, 1.0, True), (-0.5, -1.0, False)])
def test_the_clip_stops_only_what_went_too_far(shift, A, moves):
    logps, mask = torch.full((1, 1, 4), shift, requires_grad=True), torch.ones(1, 1, 4).bool()
    loss, metrics = igpo.policy_loss(logps, torch.zeros(1, 1, 4), None, torch.tensor([[A]]), mask,
                                     beta=0.0)
    loss.backward()
    assert bool(logps.grad.abs().sum() > 0) == moves and metrics["clip_fraction"] == 1 - moves

def test_the_kl_pulls_towards_the_reference():
    logps, ref = torch.full((1, 1, 2), -1.0, requires_grad=True), torch.tensor([[[-0.5, -2.0]]])
    mask = torch.ones(1, 1, 2).bool()
    loss, metrics = igpo.policy_loss(logps, logps.detach(), ref, torch.zeros(1, 1), mask, beta=1.0)
    assert metrics["kl"] == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-1)) / 2)
    loss.backward()
    assert logps.grad[0, 0, 0] < 0 < logps.grad[0, 0, 1]  # descent raises the one, lowers the other

def test_an_update_makes_right_responses_likelier():
    """The sign of everything at once: model, log-probabilities, advantages, loss, optimizer."""
    model, prompts = tiny_model(1), random_prompts(2, 5)
    completions = torch.randint(0, MASK - 1, (2, 4, 6), generator=igpo.seeded(0))
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0]])
    optimizer = torch.optim.AdamW(model.parameters())
    old, gaps = igpo.completion_logps(model, prompts, completions)[0].detach(), []
    for _ in range(4):
        logps = igpo.completion_logps(model, prompts, completions)[0]
        mean = [logps.sum(-1)[rewards == right].mean().item() for right in (1, 0)]
        gaps.append(mean[0] - mean[1])
        loss, _ = igpo.policy_loss(logps, old, old, igpo.group_advantages(rewards),
                                   torch.ones_like(completions).bool())
        loss.backward()
        assert igpo.optimizer_step(model, optimizer, 1e-3, 1.0) > 0
    assert gaps[-1] > gaps[0] + 0.05

# --------------------------------------------------------------------------------------------------
# 8. The SFT objective

def test_sft_loss_is_the_formula():
    model, B, L = tiny_model(1), 3, 8
    prompts = random_prompts(B, 5)
    completions = torch.cat([random_prompts(B, L - 3, 2), torch.full((B, 3), END)], 1)
    t = torch.tensor([0.3, 0.6, 0.9])
    loss, metrics = igpo.sft_loss(model, prompts, completions, t=t, generator=igpo.seeded(7))
    masked = torch.rand(B, L, generator=igpo.seeded(7)) < t[:, None]
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
    shares = [igpo.sft_loss(model, prompts, completions, generator=igpo.seeded(s))[1]["masked"]
              for s in range(60)]
    assert 0.4 < statistics.mean(shares) < 0.6  # t ~ U(0, 1) where none is given

def test_sft_loss_with_nothing_masked_is_zero_and_finite():
    t = torch.tensor([1e-3])
    loss, metrics = igpo.sft_loss(tiny_model(1), random_prompts(1, 3), random_prompts(1, 4), t=t)
    assert loss.item() == 0 and metrics == {"nll": 0.0, "masked": 0.0}
    loss.backward()

# --------------------------------------------------------------------------------------------------
# Each public function lifts out of igpo.py with the names that it needs, and nothing else.

LIFTS = {"load_model": 170, "sample": 160, "make_hint": 30, "grade": 150, "rollout": 75,
         "completion_logps": 60, "group_advantages": 30, "entropy_filter": 30, "policy_loss": 40,
         "sft_loss": 60}
SOURCE = (HERE / "igpo.py").read_text()

def lifted(name):
    """-> a namespace with this function and what it needs, and the lines that had to be copied"""
    defined, imports = {}, {}
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports |= {(a.asname or a.name).split(".")[0]: node for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.setdefault(node.name, []).append(node)
        else:  # an assignment, or a loop that fills a table
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and (isinstance(node, ast.For)
                                                     or isinstance(target.ctx, ast.Store)):
                    defined.setdefault(target.id, []).append(node)
    wanted, nodes = [name], []
    while wanted:
        need = wanted.pop()
        for node in defined.get(need, [imports.get(need)]):
            if node is not None and node not in nodes:
                nodes.append(node)
                wanted += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    nodes.sort(key=lambda node: node.lineno)
    namespace = {"__name__": "lifted"}
    exec(compile(ast.Module(nodes, []), "lifted", "exec"), namespace)
    copied = [n for n in nodes if not isinstance(n, (ast.Import, ast.ImportFrom))]
    starts = [min([n.lineno] + [d.lineno for d in getattr(n, "decorator_list", [])])
              for n in copied]
    return namespace, sum(n.end_lineno - start + 1 for n, start in zip(copied, starts))

def lift_calls(folder):
    model, ids, tail = tiny_model(2), random_prompts(1, 3), random_prompts(2, 4)
    part, one = torch.zeros(1, 2, 4), torch.ones(1, 2)
    return {
        "load_model": lambda f: f(llada(folder))[0].config.mask_token_id,
        "sample": lambda f: f(model, ids, gen_length=4, block_length=2, steps=4),
        "make_hint": lambda f: f(ids[0], 1, gen_length=40, mask_id=MASK),
        "grade": lambda f: f(r"\boxed{x+1}", "1+x"),
        "rollout": lambda f: f(Draw([[0] * G], [[1] * G]), lambda c, a: c[0] == a, ids, ids > 0,
                               [1], [torch.arange(9)], [igpo.seeded(0)], mask_id=MASK, room=0),
        "completion_logps": lambda f: f(model, ids, tail[None]),
        "group_advantages": lambda f: f(one),
        "entropy_filter": lambda f: f(part[:, 0], part > 0, 0.2),
        "policy_loss": lambda f: f(part, part, part, one, part == 0),
        "sft_loss": lambda f: f(model, ids, tail[:1])}

@pytest.mark.parametrize("name, most", LIFTS.items())
def test_each_public_function_lifts_out(name, most, tmp_path):
    namespace, copied = lifted(name)
    call = lift_calls(tmp_path / "m")[name]
    assert call(namespace[name]) is not None
    print(f"{name}: {copied} lines copied")
    assert copied <= most

# --------------------------------------------------------------------------------------------------
# The recipe (sections 9 to 11): most tests run main() on a LLaDA-format folder with random weights.

def meta(query, response, kind="GSM_AnsAug"):
    return {"type": kind, "query": query, "response": response}

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with m (the model), meta.jsonl (MetaMathQA's columns) and sft.jsonl; the flags."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), tiny_tokenizer()
    special = dict(mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id)
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **special)
    llada_folder(folder / "m", model, tokenizer, eos_token_id=tokenizer.eos_token_id, **special)
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

def lines_of(out, stage="rl"):
    """The lines of one stage in metrics.jsonl, less what depends on the clock."""
    timed = ("seconds", "tokens_per_second", "tflops")
    return [{k: v for k, v in line.items() if not k.startswith(timed)}
            for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if line["stage"] == stage]

def arbitrary(completion, reference):
    """In place of grade: a random model's answers are never right, and IGPO would have no work."""
    return zlib.crc32(completion.encode()) % 8 == 0

def same_runs(a, b):
    for stage in "sft", "rl", "eval":
        assert lines_of(a, stage) == lines_of(b, stage)
    a, b = (load_file(out / "final" / "model.safetensors") for out in (a, b))
    assert all(torch.equal(a[name], b[name]) for name in a)

# Wrong inputs. What to write or do in a copy of the world, the flags, and what the line must say.

def edit_config(**changes):
    def edit(world):
        raw = json.loads((world / "m" / "config.json").read_text()) | changes
        raw = {k: v for k, v in raw.items() if v != "gone"}
        (world / "m" / "config.json").write_text(json.dumps(raw))
    return edit

def edit_weights(change):
    def edit(world):
        weights = load_file(world / "m" / "model.safetensors")
        change(weights)
        save_file(weights, world / "m" / "model.safetensors")
    return edit

def put(name, content):
    """Replace a file; None: remove it; a number: cut it to so many bytes."""
    def edit(world):
        path = world / name
        if content is None:
            path.unlink()
        elif isinstance(content, int):
            path.write_bytes(path.read_bytes()[:content])
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return edit

def data(content, name="data.jsonl", flag="--train_data"):
    """Such a file for --train_data; lists are rows."""
    content = "".join(json.dumps(row) + "\n" for row in content) if isinstance(
        content, list) else content
    return put(name, content), f"{flag} WORLD/{name}"

SFT = "--stage sft --sft_length 8 --sft_data WORLD/sft.jsonl"
REWRITE = "--stage rewrite --rewriter WORLD/m --rewrite_data WORLD/sft.jsonl"
GOOD = meta("1.1=", "The answer is: 5")
WRONG = [
    (None, "--preset nonsense", "no preset 'nonsense'; there are llada, toy"),
    (None, "--preset", "--preset: expected one argument"),
    (None, "--nonsense 1", "unrecognized arguments: --nonsense 1"),
    (None, "--algo ppo", "--algo: invalid choice: 'ppo'"),
    (None, "--stage train", "--stage: invalid choice: 'train'"),
    (None, "--cache all", "--cache: invalid choice"),
    (None, "--ratio both", "--ratio: invalid choice"),
    (None, "--max_steps many", "--max_steps.*invalid int"),
    (None, "--seed 1.5", "--seed.*invalid int"),
    (None, "--resume maybe", "maybe"),
    (None, "--lr 0", r"--lr is within 1e-12..1, not 0"),
    (None, "--tau nan", "--tau is within 0..1, not nan"),
    (None, "--temperature inf", "--temperature"),
    (None, "--group_size 1", "--group_size"),
    (None, "--lora_dropout 1", "--lora_dropout"),
    (None, "--eta_low 0.9", "--eta_low 0.9 is above --eta_high 0.6"),
    (None, "--min_chunk 4", "--min_chunk 4 is above --max_chunk 3"),
    (None, "--gen_length 21", "gen_length 21 .*block_length 8"),
    (None, "--diffusion_steps 3", "steps 3 .* 2 blocks"),
    (None, "--stage sft", "--stage sft needs --sft_data"),
    ("three processes", "", "--prompts_per_step 4 is no multiple of 3 processes"),
    ("three processes", "--prompts_per_step 3 --sft_batch 4", "--sft_batch 4"),
    ("no peft", "--lora_rank 2", "peft.*pip install peft"),
    ("no wandb", "--wandb project", "wandb"),
    (put("file", ""), "--out_dir WORLD/file", "file: Not a directory"),
    (put("file", ""), "--out_dir WORLD/file/run", "file/run: Not a directory"),
    (None, "--out_dir /proc/igpo/run", "/proc/igpo/run"),
    (None, "--out_dir WORLD/m", "WORLD/m is not empty"),
    (None, "--resume", "OUT/config.json: No such file"),
    (None, "--model ./absent", "absent is no folder|no model folder"),
    (None, "--model GSAI-ML/LLaDA-8B-Instruct", "needs GPUs"),
    # data
    (None, "--train_data WORLD/absent.json", "absent.json: No such file"),
    (None, "--train_data WORLD/absent.csv", "absent.csv"),
    (None, "--train_data WORLD/m", "WORLD/m: "),
    (*data(""), "data.jsonl holds no rows"),
    (*data("", "data.json"), r"data.json: Expecting value"),
    (*data("7", "data.json"), "data.json holds no rows"),
    (*data('{"query": "1"}', "data.json"), "data.json holds no rows"),
    (*data("type,query\na,b\n", "data.csv"), r"csv, row 1: no column 'response' \(it has type,"),
    (*data("PAR1", "data.parquet"), "data.parquet"),
    (*data(b"\xff\xfe{}"), "data.jsonl: .*utf-8"),
    (*data('{"type": 1}\n{oops\n'), "data.jsonl, line 2: "),
    (*data([GOOD, None]), "row 2: no column 'type'"),
    (*data([GOOD, 7]), "row 2: no column 'type'"),
    (*data([GOOD, ["type"]]), "row 2: no column 'type'"),
    (*data([{"type": "a", "question": "b"}]), r"no column 'query' \(it has type, question\)"),
    (*data([GOOD, GOOD | {"query": None}]), "row 2: column 'query' is None, not text"),
    (*data([GOOD | {"response": 7}]), "row 1: column 'response' is 7, not text"),
    (*data([GOOD | {"type": ["GSM_AnsAug"]}]), "row 1: column 'type' is .*not text"),
    (*data([GOOD, GOOD | {"query": "\ud800"}]), "row 2, column 'query': .*surrogate"),
    (*data([meta("1", "no answer"), meta("2", "The answer is: 3", "other")]), "no row of type GSM"),
    (*data([meta("1", "The answer is: ")]), "no row of type GSM"),
    (*data([GOOD]), "has 1 problems, no more than --eval_size"),
    (None, "--max_prompt_length 2", "prompts are longer than --max_prompt_length 2"),
    (None, "--gen_length 512 --diffusion_steps 64", "prompt of 4 and .* of 512 .* 128 positions"),
    (None, f"{SFT} --sft_length 2", "all examples exceed"),
    (None, f"{SFT} --sft_length 125", "prompt of 4 and a completion of 125 .* 128 positions"),
    (*data([{"prompt": "1"}], flag=f"{SFT} --sft_data"), r"row 1: no column 'completion' \(it has"),
    (*data([{"prompt": "1", "completion": None}], flag=f"{SFT} --sft_data"), "is None, not text"),
    # the model
    (put("m/config.json", None), "", "config.json: No such file|m: No such file"),
    (put("m/config.json", ""), "", "m: Expecting value"),
    (put("m/config.json", "[]"), "", "m: "),
    (edit_config(n_layers="two"), "", "m: "),
    (edit_config(d_model=None), "", "m: "),
    (edit_config(n_heads=5), "", "m: "),
    (edit_config(max_sequence_length="long"), "", "m: "),
    (edit_config(mlp_hidden_size="gone"), "", "m: .*mlp_hidden_size"),
    (edit_config(mask_token_id=None), "", "m: token None of config.json"),
    (edit_config(mask_token_id=99), "", "m: token 99 of config.json"),
    (edit_config(eos_token_id=None), "", "m: .*eos_token_id"),
    (edit_config(model_type="gpt2"), "", "'gpt2' is not supported"),
    (edit_config(alibi=True), "", "alibi"),
    (put("m/tokenizer.json", None), "", "m has no tokenizer"),
    (put("m/tokenizer.json", 99), "", "m: "),
    (put("m/model.safetensors", None), "", "m: .*model.safetensors"),
    (put("m/model.safetensors", ""), "", "m: "),
    (put("m/model.safetensors", 5000), "", "m: "),
    (edit_weights(lambda w: w.pop("model.transformer.ln_f.weight")), "", "1 missing .*model.norm"),
    (edit_weights(lambda w: w.update(extra=torch.ones(2))), "", "1 unexpected .*, first extra"),
    (edit_weights(lambda w: w.update({"model.transformer.ln_f.weight": torch.ones(7)})), "",
     "1 mismatched weights, first model.norm.weight"),
    (edit_config(weight_tying=True), "", "ties the head .* differs"),
    # rewriting
    (None, f"{REWRITE}", "row 1: no column 'problem'"),
    (*data([{"problem": "1", "answer": "1", "solution": None}], flag=f"{REWRITE} --rewrite_data"),
     "row 1: column 'solution.generations' is None"),
    (*data([{"problem": "1", "answer": "1", "solution": "1"}],
           flag=f"{REWRITE} --rewriter WORLD/absent --rewrite_data"), "absent: "),
]

def test_what_a_user_gets_wrong_is_one_line_that_names_it(world, tmp_path, monkeypatch, capfd):
    failures = []
    for number, (damage, wrong, message) in enumerate(WRONG):
        here, out = tmp_path / f"{number}", tmp_path / f"{number}" / "run"
        shutil.copytree(world, here)
        with monkeypatch.context() as patch:
            if damage == "three processes":
                patch.setattr(igpo, "world", lambda: 3)
            elif isinstance(damage, str):
                patch.setitem(sys.modules, damage.removeprefix("no "), None)
            elif damage:
                damage(here)
            argv = flags(here, out, *wrong.replace("WORLD", str(here)).split(), sft=False)
            before, said = sorted(here.rglob("*")), None
            try:
                igpo.main(argv)
            except igpo.UsageError as error:
                said = str(error)
            except BaseException as error:
                said = f"TRACEBACK {error!r}"
        message = message.replace("WORLD", str(here)).replace("OUT", str(out))
        if not re.search(message, said or "") or "\n" in said or len(said) > 400:
            failures.append(f"{wrong or damage} -> {said!r}, not {message!r}")
        elif sorted(here.rglob("*")) != before:
            failures.append(f"{wrong or damage} left something behind")
    assert not failures, "\n".join(failures)
    assert capfd.readouterr().err == ""

@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_default_preset_without_a_gpu_exits_with_status_2():
    done = subprocess.run([sys.executable, "igpo.py"], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("igpo.py: ") and "python igpo.py --preset toy" in done.stderr

def test_every_number_is_refused_or_within_its_bounds():
    failures, checked = [], 0
    for f in dataclasses.fields(igpo.Config):
        bounds = f.metadata.get("metavar")
        assert bounds or not any(kind in str(f.type) for kind in ("int", "float")), f.name
        for word in ("nan", "inf", "-1", "0", "1e12", "1000000000000") if bounds else ():
            try:
                cfg = igpo.parse(igpo.Config, [f"--{f.name}", word], igpo.PRESETS)
            except igpo.UsageError as error:
                checked += f"--{f.name}" in str(error) and "\n" not in str(error)
                continue
            value, (low, high) = getattr(cfg, f.name), map(float, bounds.split(".."))
            inside = low <= value <= high
            checked += inside and math.isfinite(value) and value == float(word)
            failures += [] if inside else [(f.name, word)]
    assert not failures and checked % 6 == 0 and checked >= 6 * 35

def test_flags_override_the_preset_which_overrides_the_defaults():
    cfg = igpo.parse(igpo.Config, ["--preset", "toy", "--lr", "0.5", "--tau", "1"], igpo.PRESETS)
    assert (cfg.lr, cfg.tau, cfg.model, cfg.group_size) == (0.5, 1, "toy", 8)
    assert igpo.parse(igpo.Config, [], igpo.PRESETS) == igpo.Config()

# Data

@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_metamath_filter_deduplication_answers_and_traces(tmp_path, suffix):
    rows = [meta("What is 2+3?", "It is\n2+3 = 5\n#### 5\nThe answer is: 5"),
            meta("What is 2+3?", "Again 2+3 = 5\nThe answer is: 5"),
            meta("Tell me 2+3", "5\nThe answer is: 5", "GSM_Rephrased"),
            meta("Half?", "Half it. It is $\\frac{1}{2}$.\nThe answer is: \\frac{1}{2}",
                 "MATH_AnsAug"),
            meta("Words?", "Five.\n#### 5\nThe answer is: 5"), meta("None?", "It is 5.")]
    path = tmp_path / f"data{suffix}"
    if suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_jsonl(path, *rows, "")
    first, half, words = igpo.metamath_problems(str(path))
    assert first[:2] == ("What is 2+3?", "5") and first.trace.startswith("It is\n2+3")
    assert "5" not in first.trace and half[:2] == ("Half?", "\\frac{1}{2}")
    assert half.trace.startswith("Half it. It is") and "frac" not in half.trace
    assert words == ("Words?", "5", None)

def test_held_out_problems_are_not_trained_on(tmp_path):
    rows = [meta(f"{a}", f"The answer is: {a}") for a in range(20)]
    path = write_jsonl(tmp_path / "meta.jsonl", *rows)
    cfg = igpo.parse(igpo.Config, ["--train_data", path, "--eval_size", "5"], igpo.PRESETS)
    problems, held_out = igpo.load_problems(cfg)
    assert (len(problems), len(held_out)) == (15, 5) and not set(problems) & set(held_out)
    cfg = igpo.parse(igpo.Config, ["--preset", "toy", "--eval_size", "50"], igpo.PRESETS)
    problems, held_out = igpo.load_problems(cfg)
    assert len(held_out) == 50 and held_out != problems[:50]

def test_prompts_too_long_are_left_out_and_traces_stand_behind_the_opening_tag():
    tokenizer = tiny_tokenizer()
    problems = [igpo.Problem("1" * n, "1", "2" if n == 4 else None) for n in (3, 9, 4, 12)]
    examples = igpo.encode_problems(tokenizer, problems, 8)
    assert [len(e.prompt) for e in examples] == [3, 4] and examples[0].trace is None
    assert tokenizer.decode(examples[1].trace) == "<reasoning>\n2"
    ids, mask = igpo.pad_left([e.prompt for e in examples], 7)
    assert ids[0].tolist() == [7, *examples[0].prompt] and mask.tolist()[0] == [False] + [True] * 3

def test_the_chat_template_asks_for_the_form():
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(igpo.encode_prompt(tokenizer, "26.45=")) == "26.45="
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}{{ m['content'] }}"
                               "{% endfor %}{% if add_generation_prompt %}</answer>{% endif %}")
    ids = igpo.encode_prompt(tokenizer, "26.45=")
    words = tokenizer.convert_ids_to_tokens(ids)
    assert "".join(words[-7:]) == "26.45=</answer>"
    assert {"<reasoning>\n", "<answer>\n", "</answer>", "\\boxed{"} <= set(words)

def test_batches_go_through_each_epoch_once():
    seen = [i for step in range(10) for i in igpo.batch_indices(20, 4, step, 0)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]
    assert len(igpo.batch_indices(3, 7, 0, 0)) == 7
    assert igpo.batch_indices(20, 4, 7, 0) == seen[28:32]  # a function of the step alone
    assert igpo.batch_indices(20, 20, 0, 1) != seen[:20]

def test_the_toy_world():
    toy, tokenizer = igpo.PRESETS["toy"], tiny_tokenizer()
    problems, rows = igpo.toy_problems(200, 1), igpo.toy_sft_rows(200, 1)
    assert problems == igpo.toy_problems(200, 1) != igpo.toy_problems(200, 2)
    assert rows == igpo.toy_sft_rows(200, 1) != igpo.toy_sft_rows(200, 2)
    texts = [text for row in rows for text in (row["prompt"], row["completion"])]
    texts += [text for p in problems for text in (p.question, p.trace, p.answer)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert all(igpo.grade(f"\\boxed{{{p.answer}}}", p.answer) for p in problems[:20])
    assert all(len(tokenizer(row["completion"]).input_ids) < toy["sft_length"] for row in rows)
    assert all(igpo.committed_answer(row["completion"]) for row in rows)

# End to end

CONTRACT = set(
    "reward accuracy accuracy_after all_wrong all_wrong_after rescued hint_tokens hint_tokens_kept "
    "empty_hints kl ratio clip_fraction entropy loss grad_norm skipped lr completion_length cache "
    "threshold tokens_per_second seconds seconds_rollout seconds_update".split())

def test_the_toy_recipe_with_the_fast_sampler(tmp_path, monkeypatch, capsys):
    asked, sample = [], igpo.sample
    monkeypatch.setattr(igpo, "sample", lambda *a, **k: asked.append(k) or sample(*a, **k))
    out = tmp_path / "run"
    igpo.main([*("--preset toy --sft_steps 3 --sft_batch 8 --max_steps 2 --prompts_per_step 4 "
                 "--group_size 4 --eval_size 8 --show_every 1 --cache block --threshold 0.9 "
                 "--out_dir").split(), str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines if line["stage"] != "eval"]
    assert steps == [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1), ("rl", 2)]
    assert CONTRACT <= lines[-2].keys() and lines[-2]["seconds"] > 0
    assert (lines[-2]["cache"], lines[-2]["threshold"]) == ("block", 0.9)
    assert asked and all((k["cache"], k["threshold"]) == ("block", 0.9) for k in asked)
    assert all(math.isfinite(v) for x in lines for v in x.values() if not isinstance(v, str))
    summary = json.loads((out / "summary.json").read_text())
    assert {"accuracy_start", "accuracy_sft", "accuracy_final", "all_wrong", "all_wrong_after",
            "steps", "seconds"} <= summary.keys() and summary["steps"] == 2
    assert json.loads((out / "config.json").read_text())["preset"] == "toy"
    assert "RL 2/2" in capsys.readouterr().out
    sft, final = (load_file(out / name / "model.safetensors") for name in ("sft", "final"))
    assert any(not torch.equal(sft[name], final[name]) for name in sft)
    left = sorted(path.relative_to(out) for path in out.rglob("*"))
    with pytest.raises(igpo.UsageError, match="not empty.*--resume"):
        igpo.main(["--preset", "toy", "--out_dir", str(out)])
    assert left == sorted(path.relative_to(out) for path in out.rglob("*"))

def test_sft_learns(world, tmp_path):
    igpo.main(flags(world, tmp_path / "run", "--stage", "sft", "--sft_steps", 60, "--sft_batch", 24,
                    "--sft_rows_per_forward", 9, "--sft_lr", 1e-2, "--warmup_steps", 9))
    lines = lines_of(tmp_path / "run", "sft")
    losses = [line["loss"] for line in lines]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.3 * sum(losses[:10])
    rates = [line["lr"] for line in lines]
    assert max(rates) == pytest.approx(1e-2) == rates[9] and rates[0] == pytest.approx(1e-3)
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 3e-4  # linear to zero
    assert rates[20] - rates[30] == pytest.approx(rates[40] - rates[50])
    assert igpo.schedule(60, 60, 9) == 0 and igpo.schedule(0, 1, 50) > 0

def test_epochs_give_the_steps_and_max_steps_cuts(world, tmp_path, capsys):
    """Three steps are checked against the LLaDA format, with weights in LLaDA's names again."""
    argv = flags(world, tmp_path / "run", "--epochs", 1, "--diffusion_steps", 2, sft=False)
    at = argv.index("--max_steps")
    igpo.main(argv[:at] + argv[at + 2:])
    assert "RL: 5 steps of 4 prompts" in capsys.readouterr().out  # 20 problems
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert CONTRACT & lines[0].keys() and not (tmp_path / "run" / "sft").exists()
    rates = [line["lr"] / 1e-4 for line in lines]  # of the second of two updates a step
    assert rates == pytest.approx([2 / 3, 7 / 8, 5 / 8, 3 / 8, 1 / 8])
    igpo.main(flags(world, tmp_path / "cut", "--epochs", 9, "--diffusion_steps", 2, sft=False))
    assert "RL: 3 steps" in capsys.readouterr().out and len(lines_of(tmp_path / "cut")) == 3
    final = tmp_path / "cut" / "final"
    assert "model.transformer.wte.weight" in load_file(final / "model.safetensors")
    assert igpo.load_model(final)[0].config.max_position_embeddings == 128
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert (state["stage"], state["step"]) == ("rl", 3)  # the last step is checkpointed

def test_updates_that_are_not_finite_change_nothing_and_end_the_run(world, tmp_path, monkeypatch):
    model = tiny_model()
    before = [p.clone() for p in model.parameters()]
    (model(random_prompts(1, 3)).logits.mean() * math.nan).backward()
    assert math.isnan(igpo.optimizer_step(model, igpo.adamw(model, 1.0), 1.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    loss = igpo.policy_loss
    monkeypatch.setattr(igpo, "policy_loss",
                        lambda *a, **k: (loss(*a, **k)[0] * math.inf, {"kl": 0}))
    with pytest.raises(igpo.UsageError, match="no gradient of this step was finite"):
        igpo.main(flags(world, tmp_path / "run", "--mu", 10, sft=False))
    assert len(lines_of(tmp_path / "run")) == 1 and not (tmp_path / "run" / "state.json").exists()

# Rewriting

def test_rewriting_keeps_what_is_short_in_form_and_right(world, tmp_path, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, eos_token_id=tokenizer.eos_token_id)).save_pretrained(tmp_path / "w")
    tokenizer.save_pretrained(tmp_path / "w")
    data = write_jsonl(tmp_path / "data.jsonl", *[
        {"problem": f"{a}.1=", "answer": str(a - 1)} | ({"generations": [f"6{a}", "x"]} if a % 2
                                                        else {"solution": f"6{a}"})
        for a in range(1, 7)])
    argv = [*"--preset toy --stage rewrite --sft_length 24 --rewrite_batch 2".split(),
            "--rewrite_data", data, "--rewriter", str(tmp_path / "w"), "--out_dir"]
    igpo.main([*argv, str(tmp_path / "useless")])  # the real pipeline, of random weights
    assert "0 of 6 rewritten traces" in capsys.readouterr().out
    assert len((tmp_path / "useless" / "rewritten.0.jsonl").read_text().splitlines()) == 6

    good = "<reasoning>\n1\n</reasoning>\n<answer>\n\\boxed{ANSWER}\n</answer>"
    forms = {3: good.replace("1", "1" * 30), 4: "\\boxed{ANSWER}", 5: good.replace("ANSWER", "6")}
    asked = []

    class Rewriter:
        def __init__(self):
            self.tokenizer = tiny_tokenizer()

        def __call__(self, requests, **options):
            numbers = [int(re.search(r"Problem:\n(\d)\.1=", request)[1]) for request in requests]
            assert all(f"Solution:\n6{a}" in request for a, request in zip(numbers, requests))
            if 5 in numbers and 5 not in asked:
                asked.extend(numbers)
                raise Interrupted
            asked.extend(numbers)
            return [[{"generated_text": forms.get(a, good).replace("ANSWER", str(a - 1))}]
                    for a in numbers]

    monkeypatch.setattr(igpo.transformers, "pipeline", lambda *_, **__: Rewriter())
    out = tmp_path / "run"
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    write_jsonl(Path(data), *rows[:2], *rows[4:], *rows[2:4])  # 3 and 4 come after the interruption
    with pytest.raises(Interrupted):
        igpo.main([*argv, str(out)])
    with open(out / "rewritten.0.jsonl", "a") as file:
        file.write('{"row": 2, "verd')  # a kill left half a line
    igpo.main([*argv, str(out), "--resume"])
    assert asked == [1, 2, 5, 6, 5, 6, 3, 4]
    lines = [json.loads(line) for line in (out / "rewritten.0.jsonl").read_text().splitlines()]
    verdicts = {line["prompt"][0]: line["verdict"] for line in lines}
    assert verdicts == {"1": "kept", "2": "kept", "3": "too long", "4": "bad form",
                        "5": "wrong answer", "6": "kept"} and len(lines) == 6
    kept = igpo.read_rows(out / "traces.jsonl", {"prompt": str, "completion": str})
    assert [row["prompt"] for row in kept] == ["1.1=", "2.1=", "6.1="]
    assert kept[2]["completion"] == good.replace("ANSWER", "5")

# Resuming

class Interrupted(Exception):
    pass

@contextlib.contextmanager
def interrupted(stage, step):
    """Both processes and files are at this step, and then it is not finished."""
    def stop(name, at, function):
        def stopping(*args, **kwargs):
            value = function(*args, **kwargs)
            if args[at] == step and (name != "record" or args[1] == stage == "sft"):
                raise Interrupted
            return value
        return stopping
    with pytest.MonkeyPatch.context() as patch:
        for name, at in [("report", 1)] if stage == "rl" else [("record", 2)]:
            patch.setattr(igpo, name, stop(name, at, getattr(igpo, name)))
        yield

@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(igpo, "grade", arbitrary)
        igpo.main(flags(world, out))
    return out

@pytest.fixture
def arbitrary_grades(monkeypatch):
    monkeypatch.setattr(igpo, "grade", arbitrary)

def broken(argv, stage, step):
    with interrupted(stage, step), pytest.raises(Interrupted):
        igpo.main(argv)

def test_a_resumed_run_is_the_uninterrupted_one(world, whole, tmp_path, arbitrary_grades):
    rl = lines_of(whole)
    assert any(line["all_wrong"] > line["all_wrong_after"] for line in rl), "hints should rescue"
    argv = flags(world, tmp_path / "run", "--sft_save_every", 2)
    broken(argv, "sft", 1)  # nothing is checkpointed yet
    broken([*argv, "--resume"], "sft", 4)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["step"] == 2
    broken([*argv, "--resume"], "rl", 1)  # from sft/ and no checkpoint of this stage
    broken([*argv, "--resume"], "rl", 3)
    igpo.main([*argv, "--resume"])
    same_runs(whole, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-rl-3"]
    shutil.rmtree(tmp_path / "run" / "final")  # as if the disk had been full
    igpo.main([*argv, "--resume"])
    same_runs(whole, tmp_path / "run")
    with pytest.raises(igpo.UsageError, match=r"was started with --mu 2$"):
        igpo.main([*argv, "--resume", "--mu", "1"])

def test_lora_with_dropout_resumes_and_goes_on_from_base_and_adapter(world, tmp_path,
                                                                     arbitrary_grades):
    pytest.importorskip("peft")
    lora = "--lora_rank", 2, "--lora_dropout", 0.2, "--sft_lr", 1e-2, "--lr", 1e-2
    igpo.main(flags(world, tmp_path / "whole", *lora))
    argv = flags(world, tmp_path / "run", *lora, "--sft_save_every", 2)
    broken(argv, "sft", 3)
    broken([*argv, "--resume"], "rl", 1)
    broken([*argv, "--resume"], "rl", 3)
    igpo.main([*argv, "--resume"])
    same_runs(tmp_path / "whole", tmp_path / "run")
    reader = torch.distributed.checkpoint.FileSystemReader(tmp_path / "run" / "checkpoint-rl-3")
    stored = reader.read_metadata().state_dict_metadata
    assert stored and all(".lora_" in name or "param_groups" in name for name in stored)  # no base

    cfg = igpo.parse(igpo.Config, argv, igpo.PRESETS)
    ids, (sft, tokenizer) = random_prompts(2, 9) % 18, igpo.load_model(tmp_path / "run" / "sft")
    policy, _ = igpo.load_lora(cfg, torch.device("cpu"), tmp_path / "run" / "sft" / "adapter")
    policy.eval()
    start = policy(ids).logits
    assert torch.allclose(start, sft(ids).logits, atol=1e-4)
    assert not torch.allclose(start, igpo.load_model(world / "m")[0](ids).logits, atol=1e-2)
    igpo.freeze_reference(policy)
    policy.eval()
    inputs = ids, torch.ones_like(ids, dtype=torch.bool), random_prompts(8, 4).view(2, 4, 4) % 18, 2
    before = igpo.group_logps(policy, *inputs)[0]
    learns = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert learns and all(".lora_" in name and ".default." in name for name in learns)
    optimizer = igpo.adamw(policy, 0.1)
    policy(ids).logits.square().mean().backward()
    igpo.optimizer_step(policy, optimizer, 0.1, 1.0)
    assert torch.equal(igpo.group_logps(policy, *inputs, "reference")[0], before)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == learns
    assert not torch.allclose(igpo.group_logps(policy, *inputs)[0], before, atol=1e-2)
    trained = policy(ids).logits
    igpo.save_model(policy, tokenizer, tmp_path / "merged")
    assert torch.allclose(igpo.load_model(tmp_path / "merged")[0](ids).logits, trained, atol=1e-3)
    merged = igpo.merged_weights(policy.bfloat16())  # not rounded to the base's bfloat16
    assert {weight.dtype for weight in merged.values()} == {torch.float32}

def in_processes(argv, count=1, **limits):
    """main() in forked processes, as torchrun or a shell starts it -> [(status, stderr)]. limits:
    the largest file that can be written, in bytes, as if the disk were full after it."""
    with socket.socket() as port:
        port.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port.getsockname()[1])}
    said, children = [tempfile.TemporaryFile("w+") for _ in range(count)], []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                sys.stdout, sys.stderr, time.sleep = open(os.devnull, "w"), said[rank], id
                os.dup2(said[rank].fileno(), 2)
                if count > 1:
                    os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(count)}
                for size in limits.values():
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                igpo.run_main(lambda: igpo.main(argv), "igpo.py")
                os._exit(0)
            except SystemExit as end:
                said[rank].flush()
                os._exit(end.code)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
    status = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, file.seek(0) or file.read()) for code, file in zip(status, said)]

def nearly_same_runs(a, b):
    for stage in "sft", "rl", "eval":
        assert len(lines_of(a, stage)) == len(lines_of(b, stage))
        for x, y in zip(lines_of(a, stage), lines_of(b, stage)):
            assert x.keys() == y.keys()
            for name in x:
                same = x[name] == (pytest.approx(y[name], rel=1e-5, abs=1e-7)
                                   if isinstance(y[name], float) else y[name])
                assert same, (stage, x["step"], name, x[name], y[name])

def test_two_processes_take_the_steps_of_one_and_resume_each_other(world, whole, tmp_path,
                                                                   arbitrary_grades):
    first, second = flags(world, tmp_path / "a"), flags(world, tmp_path / "b")
    with interrupted("rl", 2):
        (left, _), (right, error) = in_processes(first, 2)
        assert (left, right) == (1, 1) and "Interrupted" in error, error
    igpo.main([*first, "--resume"])
    nearly_same_runs(tmp_path / "a", whole)
    broken(second, "rl", 2)
    assert in_processes([*second, "--resume"], 2) == [(0, "")] * 2
    nearly_same_runs(tmp_path / "b", whole)

def test_tied_weights_and_lopsided_roll_outs_on_two_processes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(igpo, "grade", lambda *_: igpo.rank() == 1)  # rank 0 draws twice, 1 once
    tokenizer = tiny_tokenizer()
    ids = dict(mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.pad_token_id)
    tied = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **ids)
    llada_folder(tmp_path / "m", tied, tokenizer, **ids)
    argv = flags(world, tmp_path / "run", "--model", tmp_path / "m", "--max_steps", 1, sft=False)
    ended = in_processes(argv, 2)
    assert ended == [(0, "")] * 2
    assert [line["all_wrong"] for line in lines_of(tmp_path / "run")] == [0.5]
    final, _ = igpo.load_model(tmp_path / "run" / "final")
    assert final.lm_head.weight is final.get_input_embeddings().weight
    assert not torch.equal(final.lm_head.weight, tied.lm_head.weight)

# Nothing lost

def test_a_full_disk_is_one_line_and_loses_nothing(world, whole, tmp_path, arbitrary_grades):
    out = tmp_path / "run"
    argv = flags(world, out)

    def full(file, limit, *more):
        (status, error), = in_processes([*argv, *more], limit=limit)
        line = error.splitlines()[-1]
        assert status == 2 and "Traceback" not in error and str(out / file) in line, error
        return line.startswith("igpo.py: ") and len(error.splitlines()) == 1

    assert full("config.json", 600)
    full("checkpoint-sft-4", 100_000)  # behind the progress bar of SFT; the folder can be used
    broken([*argv, "--resume"], "rl", 2)
    assert full("checkpoint-rl-2", 100_000, "--resume")
    igpo.main([*argv, "--resume"])
    shutil.rmtree(out / "final")
    assert full("final", 50_000, "--resume") and not (out / "final").exists()
    igpo.main([*argv, "--resume"])
    same_runs(whole, out)

def test_damaged_files_are_named_on_resume(world, whole, tmp_path, arbitrary_grades, capfd):
    base, failures = tmp_path / "base", []
    broken(flags(world, base), "rl", 3)
    state = json.loads((base / "state.json").read_text())
    shard = f"{state['folder']}/__0_0.distcp"
    for number, (damage, message) in enumerate([
            (put("config.json", 100), "config.json: "), (put("config.json", "{}"), "config.json: "),
            (put("config.json", None), "config.json: No such file"),
            (put("state.json", 20), "state.json: "), (put("state.json", "[]"), "state.json: "),
            (put("state.json", json.dumps(state | {"step": 9})), "not among the 3"),
            (put("state.json", json.dumps(state | {"step": -1})), "not among the 3"),
            (put("state.json", json.dumps(state | {"folder": "gone"})), "run/gone"),
            (put("metrics.jsonl", 300), "metrics.jsonl.* is shorter"),
            (put("metrics.jsonl", None), "metrics.jsonl.* is shorter"),
            (put("metrics.jsonl", "7\n" * 5000), "metrics.jsonl: "),
            (put(shard, 1000), state["folder"]), (put(shard, None), state["folder"]),
            (put("sft/tokenizer.json", None), "sft has no tokenizer"),
            (put("sft/model.safetensors", 1000), "run/sft: "),
            (lambda folder: shutil.rmtree(folder / "sft"), "no model folder at .*run/sft")]):
        out = tmp_path / f"{number}" / "run"
        shutil.copytree(base, out)
        damage(out)
        try:
            igpo.main([*flags(world, out), "--resume"])
            failures.append(f"{number} accepted, not {message}")
        except igpo.UsageError as error:
            if not re.search(message, str(error)) or "\n" in str(error):
                failures.append(f"{number} {error}, not {message}")
        except BaseException as error:
            failures.append(f"{number} TRACEBACK {error!r}, not {message}")
    assert not failures, "\n".join(failures)
    assert "Traceback" not in capfd.readouterr().err

@pytest.mark.filterwarnings("ignore")
def test_kills_while_saving_leave_the_checkpoint_before(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    model = tiny_model(hidden_size=128)
    optimizer, step = igpo.adamw(model, 1e-3), 0
    for kill in range(8):
        if (child := os.fork()) == 0:
            while True:
                step += 1
                model.lm_head.weight.data.fill_(step)
                igpo.save_checkpoint(tmp_path, "rl", step, model, optimizer)
                with open(tmp_path / "said", "a") as file:
                    file.write(f"{step}\n")
        time.sleep(random.uniform(0.1, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = igpo.resume_step(tmp_path, "rl", 10**9, model, optimizer)
        said = (tmp_path / "said").read_text().split() if (tmp_path / "said").exists() else [0]
        assert step in (int(said[-1]), int(said[-1]) + 1)
        assert step == 0 or (model.lm_head.weight == step).all()
    assert step > 8

TORCHRUN = """
import sys, time, zlib, igpo
igpo.grade = lambda text, reference: zlib.crc32(text.encode()) % 8 == 0
report = igpo.report
def sleepy(out, step, *rest):
    report(out, step, *rest)
    if step == 2:
        time.sleep(600)
igpo.report = sleepy
igpo.run_main(igpo.main, "igpo.py")
"""

def test_after_a_kill_of_torchrun_its_processes_end_and_the_run_goes_on(world, whole, tmp_path,
                                                                        arbitrary_grades):
    (tmp_path / "sleepy.py").write_text(TORCHRUN)
    argv, log = flags(world, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "sleepy.py"), *argv], env=os.environ | {"PYTHONPATH": str(HERE)},
        stdout=subprocess.DEVNULL, stderr=open(tmp_path / "stderr", "w"))
    try:
        deadline = time.time() + 120
        while not (log.exists() and '"step": 2, "kl"' in log.read_text()):
            assert time.time() < deadline and run.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.1)
        with pytest.raises(igpo.UsageError, match="another process is still writing"):
            igpo.main([*argv, "--resume"])
    finally:
        run.kill()
        run.wait()
    for _ in range(50):  # the orphans end with their parent
        with contextlib.suppress(igpo.UsageError):
            igpo.locked(tmp_path / "run").close()
            break
        time.sleep(0.1)
    igpo.main([*argv, "--resume"])
    nearly_same_runs(tmp_path / "run", whole)

# ------------------------------------------------
# Memory on 8 GPUs, by running the real functions on fake tensors of LLaDA-8B's shape

class LiveStorage(TorchDispatchMode):
    """Adds up the bytes of the storages that are alive, and keeps the peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            tensor = getattr(tensor, "_local_tensor", tensor)  # a DTensor's shard
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.see(tensor)
        return out

    def see(self, tensor, freed=False):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self.forget, storage._cdata)
        size = 0 if freed else storage.nbytes()
        self.now += size - self.sizes.get(storage._cdata, 0)
        self.sizes[storage._cdata], self.peak = size, max(self.peak, self.now)

    def forget(self, data):
        self.now -= self.sizes.pop(data, 0)

def fake_llada(dtype, mesh):
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, vocab_size=126464,
            num_attention_heads=32, is_causal=False, mask_token_id=126336), dtype=dtype)
    bf16 = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=bf16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model

@pytest.mark.filterwarnings("ignore")
def test_memory_of_an_rl_step_on_eight_gpus(monkeypatch, P=200, L=256, N=8, rows_per_call=64):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh, peaks = init_device_mesh("cpu", (8,)), {}
    parameters = sys.modules["torch.distributed.fsdp._fully_shard._fsdp_param"]
    with FakeTensorMode(allow_non_fake_inputs=True), LiveStorage() as live:
        for name in "free_storage", "alloc_storage":  # FSDP resizes storages, which is no operation
            def resize(tensor, name=name, original=getattr(parameters, name)):
                original(tensor)
                live.see(tensor, freed=name == "free_storage")
            monkeypatch.setattr(parameters, name, resize)
        policy, reference = fake_llada(torch.float32, mesh), fake_llada(torch.bfloat16, mesh)
        optimizer, ids = igpo.adamw(policy, 1e-6), torch.zeros(N, P, dtype=torch.long)
        completions = torch.zeros(N, 8, L, dtype=torch.long)
        monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)  # there are no values
        for _ in range(2):  # in the second step Adam's moments are there
            live.peak = live.now
            with igpo.gathered(policy), torch.no_grad():
                canvas = torch.zeros(rows_per_call, P + L, dtype=torch.long)
                logits = igpo.logits_at(policy, canvas, None, torch.arange(P, P + 32)).flatten(0, 1)
                igpo.choose_tokens(logits, 126336, 1.2, torch.zeros(len(logits)))
                del logits
            peaks["roll-out"], live.peak = live.peak / 2**30, live.now
            with torch.no_grad():
                old, ref = (igpo.completion_logps(model, ids, completions)[0]
                            for model in (policy, reference))
            policy.reshard()
            reference.reshard()
            peaks["scoring"], live.peak = live.peak / 2**30, live.now
            logps, _ = igpo.completion_logps(policy.train(), ids, completions)
            loss, _ = igpo.policy_loss(logps, old, ref, torch.zeros(N, 8), completions == 0)
            loss.backward()
            del logps, loss
            igpo.optimizer_step(policy, optimizer, 1e-6, 1.0)
            peaks["update"] = live.peak / 2**30
    torch.distributed.destroy_process_group()
    print("GiB a GPU:", peaks)
    assert 20 < max(peaks.values()) < 40 and peaks["update"] > 13  # weights and moments alone

# ------------------------------------------------
# eval.py

@pytest.mark.parametrize("row, question, answer", [
    ({"question": "2 + 16?", "answer": "2 + 16 = <<18>>18.\n#### 18"}, "2 + 16?", "18"),  # GSM8K
    ({"question": "a lot?", "answer": "Much.\n#### 1,080"}, "a lot?", "1,080"),
    ({"problem": "Half?", "answer": r"\frac{1}{2}"}, "Half?", r"\frac{1}{2}"),  # MATH500
    ({"problem": "Half?", "solution": r"It is \boxed{3}.", "answer": "4"}, "Half?", "4"),
    ({"problem": "x + y?", "answer": 36.0, "url": None}, "x + y?", "36"),  # AMC
    ({"problem": None, "question": "0?", "answer": 0, "solution": r"\boxed{1}"}, "0?", "0"),
    ({"problem": "x?", "answer": 1.5}, "x?", "1.5"),
    ({"problem": "s?", "solution": r"\[s=\boxed{1.6} \mathrm{~cm}\]"}, "s?", "1.6"),  # Minerva
    ({"problem": "s?", "solution": r"\boxed{1}, \boxed{\frac{2}{3}}"}, "s?", r"\frac{2}{3}"),
    ({"question": "s?", "answer": "", "solution": r"\boxed{7}"}, "s?", "7")])
def test_the_four_file_formats(tmp_path, row, question, answer):
    problem = igpo.Problem(question, answer, None)
    assert evaluation.read_problems(write_jsonl(tmp_path / "data.jsonl", row)) == [problem]

def test_hub_names_and_alternatives(monkeypatch):
    asked = []

    def read_rows(source, columns, split, subset):
        asked.append((source, subset, split))
        if source.startswith("AI-MO"):
            raise igpo.UsageError("cannot load it")
        return [{"problem": "1?", "answer": 1.0}] * 3

    monkeypatch.setattr(igpo, "read_rows", read_rows)
    found = evaluation.load_problems(",".join(evaluation.TASKS), "", 2)
    assert {task: source for task, (source, _) in found.items()} == {
        "gsm8k": "openai/gsm8k", "math500": "HuggingFaceH4/MATH-500", "amc": "math-ai/amc23",
        "minerva": "math-ai/minervamath"}
    assert all(problems == [("1?", "1", None)] * 2 for _, problems in found.values())
    assert asked[0] == ("openai/gsm8k", "main", "test") and asked[-1][1:] == (None, "test")
    assert asked[2:4] == [("AI-MO/aimo-validation-amc", None, "train"),
                          ("math-ai/amc23", None, "test")]
    monkeypatch.setitem(evaluation.TASKS, "amc", evaluation.TASKS["amc"][:1])
    with pytest.raises(igpo.UsageError, match="cannot load it"):
        evaluation.load_problems("amc", "", None)

def test_accuracy_and_standard_error_by_hand():
    def results(*verdicts):
        return evaluation.summarise([
            {"task": "amc", "problem": i, "verdict": verdict, "length": 10 + i,
             "extracted": None if verdict else "1", "timed_out": not verdict}
            for i, problem in enumerate(verdicts) for verdict in problem])["amc"]

    # p = 2/5; the variance of the five is (2 * 0.6^2 + 3 * 0.4^2) / 4 = 0.3, of the mean 0.3 / 5
    greedy = results([True], [False], [False], [True], [False])
    assert greedy == {
        "accuracy": pytest.approx(0.4), "standard_error": pytest.approx(0.06 ** 0.5), "n": 5,
        "samples": 5, "no_answer": 0.4, "length": 12, "grade_timeouts": 3}
    # avg@4: means 1, 1/4, 1/4; their variance is (1/4 + 1/16 + 1/16) / 2 = 3/16, a third 1/16
    avg = results([True] * 4, [True] + [False] * 3, [False] * 3 + [True])
    assert avg["accuracy"] == 0.5 and avg["standard_error"] == pytest.approx(0.25)
    assert (avg["n"], avg["samples"]) == (3, 12)
    assert results([True, False])["standard_error"] is None  # one problem says nothing of it

def test_batches_hold_every_sample_once():
    batches = evaluation.batches_of([[0] * n for n in (5, 1, 9, 3, 7)], 3, 4, 0)
    assert sorted(job for jobs in batches for job in jobs) == [
        (i, s) for i in range(5) for s in range(3)]
    assert sorted(map(len, batches)) == [3, 4, 4, 4]
    assert [(1, 0), (1, 1), (1, 2), (3, 0)] in batches  # the shortest prompts

@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A random model, files of two tasks, and an uninterrupted evaluation by one process."""
    folder = tmp_path_factory.mktemp("eval")
    igpo.save_model(*igpo.toy_model(0), folder / "model")
    locks = [(p.question, p.answer) for p in igpo.toy_problems(12, 0)]
    write_jsonl(folder / "gsm8k.jsonl", *[{"question": q[: 3 + i % 7], "answer": f"#### {a}"}
                                    for i, (q, a) in enumerate(locks[:7])])
    write_jsonl(folder / "amc.jsonl", *[{"problem": q, "answer": float(i)}
                                  for i, (q, a) in enumerate(locks[7:])])
    flags = f"""--model {folder}/model --tasks gsm8k,amc --gen_length 8 --diffusion_steps 8
        --data gsm8k={folder}/gsm8k.jsonl,amc={folder}/amc.jsonl --block_length 4 --batch_size 4
        --amc_temperature 2 --amc_samples 6""".split()
    evaluation.main([*flags, "--out_dir", str(folder / "whole")])
    return folder, flags

def outcome(out):
    """What must not depend on how an evaluation was run: the samples, and all but the speed."""
    result = json.loads((out / "results.json").read_text())
    return (out / "samples.jsonl").read_bytes(), result["results"], result["settings"]

def test_what_an_evaluation_leaves_behind(evaluated, capsys):
    folder, flags = evaluated
    out = folder / "whole"
    samples = igpo.read_lines(out / "samples.jsonl")
    assert [(s["task"], s["problem"], s["sample"]) for s in samples] == [
        ("gsm8k", i, 0) for i in range(7)] + [("amc", i, s) for i in range(5) for s in range(6)]
    assert len({s["completion"] for s in samples[-6:]}) > 1
    assert all(s["verdict"] is igpo.grade(s["completion"], s["reference"]) for s in samples)
    assert samples[1]["prompt"] == igpo.read_lines(folder / "gsm8k.jsonl")[1]["question"]
    result = json.loads((out / "results.json").read_text())
    assert [(r["n"], r["samples"]) for r in result["results"].values()] == [(7, 7), (5, 30)]
    assert result["tokens_per_second"] > 0 and "torch" in result["versions"]
    assert result["settings"] == json.loads((out / "settings.json").read_text())
    assert {p.name for p in out.iterdir()} == {
        ".lock", "samples.jsonl", "results.json", "settings.json"}

    before = outcome(out)
    evaluation.main([*flags, "--out_dir", str(out)])  # nothing left to do
    shown = capsys.readouterr().out
    assert "37 of 37 samples are in" in shown and re.search(r"^\| amc .* \| +30 \|", shown, re.M)
    assert outcome(out) == before

def test_igpo_evaluates_by_the_same_code(evaluated, tmp_path, monkeypatch):
    """With a verdict that depends on every character, both have the same accuracy."""
    folder, flags = evaluated
    monkeypatch.setattr(igpo, "grade", lambda text, _: zlib.crc32(text.encode()) % 2 == 0)
    evaluation.main([*flags, "--out_dir", str(tmp_path)])
    model, tokenizer = igpo.load_model(folder / "model")
    problems = evaluation.read_problems(folder / "gsm8k.jsonl")
    examples = igpo.encode_problems(tokenizer, problems, 99)
    cfg = igpo.Config(gen_length=8, diffusion_steps=8, block_length=4, rows_per_call=3)
    igpo.evaluate("accuracy_final", model, tokenizer, examples, cfg, tmp_path)
    accuracy = igpo.read_lines(tmp_path / "metrics.jsonl")[0]["accuracy_final"]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["gsm8k"]["accuracy"] == accuracy and 0 < accuracy < 1

def test_two_processes_have_the_results_of_one(evaluated):
    """They share what one process had not done yet."""
    folder, flags = evaluated
    shutil.copytree(folder / "whole", folder / "two")
    lines = (folder / "two" / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "two" / "samples.jsonl").write_text("".join(lines[:9]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "eval.py", *flags, "--out_dir", str(folder / "two")], cwd=HERE, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("9 of 37") == done.stdout.count("| accuracy") == 1
    assert outcome(folder / "two") == outcome(folder / "whole")

def test_a_killed_evaluation_continues(evaluated):
    """Killed as it writes; then as a kill may leave it, with half a line, and of two processes."""
    folder, flags = evaluated
    out = folder / "killed"
    stored = out / "samples.jsonl"
    process = subprocess.Popen([sys.executable, "eval.py", *flags, "--out_dir", str(out)],
                               cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (stored.exists() and stored.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists()
    evaluation.main([*flags, "--out_dir", str(out)])
    assert outcome(out) == outcome(folder / "whole")

    whole = (folder / "whole" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    stored.write_bytes(b"".join(whole[:3] + whole[20:23]) + whole[9][:-25])
    (out / "samples.rank_1.jsonl").write_bytes(whole[30] + whole[2] + whole[11][:1])
    (out / "results.json").write_text("{")
    evaluation.main([*flags, "--out_dir", str(out)])
    assert outcome(out) == outcome(folder / "whole") and not list(out.glob("*rank*"))

def test_other_settings_data_and_weights_in_the_same_folder_are_noticed(evaluated):
    folder, flags = evaluated
    model, tokenizer = igpo.load_model(folder / "model")
    shutil.copytree(folder / "model", folder / "moving")
    shutil.copy(folder / "amc.jsonl", folder / "data.jsonl")
    flags = [*flags, "--model", f"{folder}/moving", "--tasks", "amc", "--data",
             f"amc={folder}/data.jsonl", "--limit", "1", "--out_dir", f"{folder}/moved"]
    evaluation.main(flags)
    with pytest.raises(igpo.UsageError, match="other settings: seed was 0, now it is 1"):
        evaluation.main([*flags, "--seed", "1"])
    rows = igpo.read_lines(folder / "data.jsonl")
    write_jsonl(folder / "data.jsonl", rows[0] | {"answer": 99.0})
    with pytest.raises(igpo.UsageError, match="other settings: problems was"):
        evaluation.main(flags)
    write_jsonl(folder / "data.jsonl", *rows)
    weight = model.lm_head.weight.data  # swapped rows have the same sum
    weight[:2] = weight[:2].flip(0)
    igpo.save_model(model, tokenizer, folder / "moving")
    with pytest.raises(igpo.UsageError, match="other settings: weights was"):
        evaluation.main(flags)

EVAL_WRONG = [
    ("--tasks gsm8k", "no model: give --model"), ("--model m --tasks aime", "no task 'aime'"),
    ("--model m --tasks ,", "no task ''"), ("--model m --data math=a.jsonl", "no task 'math'"),
    ("--model m --nonsense 1", "unrecognized arguments"),
    ("--model m --tasks amc --data amc=DIR/absent.jsonl", "absent.jsonl"),
    ("--model m --tasks amc --data amc=DIR/broken.jsonl", "broken.jsonl, line 2"),
    ("--model m --tasks amc --data amc=DIR/columns.jsonl", "row 1: no column 'problem.question'"),
    ("--model m --tasks amc --data amc=DIR/null.jsonl", "row 1: column 'answer.solution' is None"),
    ("--model m --tasks amc --data amc=DIR/list.jsonl", r"row 1: column 'problem.question' is \["),
    ("--model m --tasks amc --data amc=DIR/unsolved.jsonl", "row 1: no question, or no answer"),
    ("--model m --tasks amc --data amc=DIR/empty.jsonl", "holds no rows"),
    ("--model m --tasks amc --data amc=DIR/binary.jsonl", "binary.jsonl: .*utf-8"),
    ("--model ./absent --tasks amc --data amc=DIR/good.jsonl", "no model folder at ./absent"),
    ("--model MODEL --tasks amc --data amc=DIR/good.jsonl", "16 positions|64 positions"),
    ("--model m --gen_length 100", "gen_length 100 .* block_length 32"),
    ("--model m --diffusion_steps 100", "steps 100 .* 8 blocks"),
    ("--model m --limit 0", "--limit is"), ("--model m --amc_temperature nan", "--amc_temp"),
    ("--model m --batch_size 1e12", "--batch_size"), ("--model m --threshold 2", "--threshold"),
    ("--rescore DIR/absent.jsonl", "absent.jsonl"), ("--rescore DIR/empty.jsonl", "holds no rows"),
    ("--rescore DIR/broken.jsonl", "line 2"), ("--rescore DIR/null.jsonl", "no column 'task'"),
    ("--compare DIR", "holds no finished run"), ("--compare DIR/absent", "no finished run"),
    ("--ask what? --model ./absent", "no model folder"),
    ("--model MODEL SMALL --out_dir DIR/file", "file: "),
    ("--model MODEL SMALL --out_dir DIR", "is not empty and holds no evaluation"),
    ("--model MODEL SMALL --out_dir DIR/damaged", "settings.json: ")]


def test_what_a_user_of_eval_gets_wrong_is_one_line(evaluated, tmp_path):
    good = {"problem": "ab=", "answer": "1"}
    write_jsonl(tmp_path / "good.jsonl", good)
    write_jsonl(tmp_path / "broken.jsonl", good, "{oops")
    write_jsonl(tmp_path / "columns.jsonl", {"text": "1?", "answer": "1"})
    write_jsonl(tmp_path / "null.jsonl", good | {"answer": None})
    write_jsonl(tmp_path / "list.jsonl", good | {"problem": ["1?"]})
    write_jsonl(tmp_path / "unsolved.jsonl", {"problem": "1?", "solution": "so it is 1"})
    write_jsonl(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "settings.json").write_text('{"model": ')
    small = f"--tasks amc --data amc={tmp_path}/good.jsonl --gen_length 8 --block_length 8 " \
            "--diffusion_steps 8"
    failures = []
    for command, message in EVAL_WRONG:
        words = command.replace("DIR", str(tmp_path)).replace("SMALL", small)
        out, said = tmp_path / "out", None
        words = words.replace("MODEL", str(evaluated[0] / "model")).split()
        try:
            evaluation.main(words if "--out_dir" in words else [*words, "--out_dir", str(out)])
        except igpo.UsageError as error:
            said = str(error)
        if not re.search(message, said or "") or "\n" in said or out.exists():
            failures.append(f"{command} -> {said!r}, not {message!r}")
    assert not failures, "\n".join(failures)
