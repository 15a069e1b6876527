"""The tests of igpo.py and eval.py, in their order: each formula on numbers worked out by hand or
against a plain loop, each promise once, what a user gets wrong in tables. Run: pytest"""

import ast
import contextlib
import csv
import dataclasses
import dis
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
import weakref
import zlib
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
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

import eval as evaluation
import igpo

HERE = Path(__file__).parent
torch.set_num_threads(1)

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

def padded(prompts):
    """The second prompt without its first token, the third without two: -> (N, P) ids and mask."""
    return igpo.pad_left([prompt[i % 4:].tolist() for i, prompt in enumerate(prompts)], END)

def write_jsonl(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)

# ------------------------------------------------
# 1. The model

def llada_folder(folder, **changes):
    """Write a tiny Llama as a LLaDA checkpoint, whose names are spelled out once more by hand."""
    model = tiny_model(**changes)
    c, weights = model.config, model.state_dict()
    names = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    for i in range(c.num_hidden_layers):
        for theirs, ours in {
                "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
                "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
                "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
                "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
                "ff_out": "mlp.down_proj"}.items():
            names[f"blocks.{i}.{theirs}"] = f"model.layers.{i}.{ours}"
    if c.tie_word_embeddings:
        del names["ff_out"]
    tiny_tokenizer().save_pretrained(folder)
    save_file({f"model.transformer.{theirs}.weight": weights[f"{ours}.weight"].clone()
               for theirs, ours in names.items()}, folder / "model.safetensors")
    grouped = c.num_key_value_heads != c.num_attention_heads
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="llada", auto_map={"AutoConfig": "configuration_llada.LLaDAConfig"},
        d_model=c.hidden_size, n_layers=c.num_hidden_layers, n_heads=c.num_attention_heads,
        n_kv_heads=c.num_key_value_heads if grouped else None, max_sequence_length=128,
        mlp_hidden_size=c.intermediate_size, vocab_size=c.vocab_size, embedding_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_parameters["rope_theta"],
        weight_tying=c.tie_word_embeddings, mask_token_id=MASK, eos_token_id=END,
        pad_token_id=END)))
    (folder / "configuration_llada.py").write_text("raise SystemExit('remote code was run')")
    return model

@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
def test_a_llada_is_loaded_and_saved_exactly(tmp_path, shape):
    rope, ids = {"rope_type": "default", "rope_theta": 5e5}, random_prompts(2, 9)
    ids[0, 3] = END
    original = llada_folder(tmp_path / "in", rope_parameters=rope, rms_norm_eps=1e-3, **shape)
    words = tmp_path / "in" / "tokenizer.json"
    words.write_text(words.read_text().replace('"a"', '"<|eot_id|>"'))
    model, tokenizer = igpo.load_model(tmp_path / "in")
    logits = model(ids).logits
    assert torch.equal(logits, original(ids).logits)
    assert not torch.allclose(logits[:, :4], model(ids[:, :4]).logits)  # not causal
    assert model.config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|eot_id|>"), END]
    logits.square().mean().backward()  # transformers gives the padding id no gradient
    assert model.get_input_embeddings().weight.grad[END].any()  # but here it is the end token

    igpo.save_model(model, tokenizer, tmp_path / "out")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("in", "out"))
    assert before | {"torch_dtype": "float32"} == after
    assert (tmp_path / "out" / "configuration_llada.py").exists()  # for LLaDA's own loader

def test_dream_is_read_one_to_the_left(tmp_path):
    original, ids = tiny_model(2, Qwen2ForCausalLM), random_prompts(2, 9)
    igpo.save_model(original, tiny_tokenizer(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "Dream"}
    del raw["is_causal"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model, _ = igpo.load_model(tmp_path)
    logits = igpo.logits_at(model, ids, None, torch.arange(4, 7))
    assert torch.allclose(logits, original(ids).logits[:, 3:6], atol=1e-5)

def test_lora_is_merged_in_float32():
    LoraConfig = pytest.importorskip("peft").LoraConfig
    model, name = tiny_model().to(torch.bfloat16), "model.layers.0.mlp.up_proj"
    base = {key: weight.clone() for key, weight in model.state_dict().items()}
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"]))
    B, A = (model.get_submodule(name).get_submodule(f"lora_{x}.default").weight for x in "BA")
    B.data.fill_(1e-3)  # too little for bfloat16
    merged = igpo.merged_weights(model)
    change = merged[f"{name}.weight"] - base[f"{name}.weight"].float()
    assert torch.allclose(change, 2 * (B @ A).float(), atol=1e-5) and merged.keys() == base.keys()

def test_counted_tokens_include_the_first_end_token():
    ids = torch.tensor([[1, 2, END, 3, END], [END, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    assert igpo.counted_tokens(ids, END).int().tolist() == [
        [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert igpo.counted_tokens(ids, [END, 2]).sum(1).tolist() == [2, 1, 2]

# ------------------------------------------------
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
            p = model(input_ids=x[None]).logits[0].double().softmax(-1)
            words = [v for v in range(V) if v != MASK]
            best = {i: max(words, key=lambda v: p[i, v].item()) for i in masks}
            count = total // S + (step < total % S) if threshold is None else 1
            order = sorted(masks, key=lambda i: -p[i, best[i]].item())
            for i in order:
                if i in order[:count] or threshold is not None and p[i, best[i]] > threshold:
                    x[i] = best[i]
    return x[P:]

@pytest.mark.parametrize("K, steps, share, threshold", [
    (12, 5, 0.0, None), (4, 6, 0.5, None), (4, 3, 0.3, 0.0), (4, 3, 0.3, 0.4), (4, 3, 0.3, 1.0)])
def test_greedy_sampling_is_the_published_sampler(K, steps, share, threshold):
    model, (prompts, mask) = tiny_model(2), padded(random_prompts(3, 5))
    given = torch.rand(3, 12, generator=igpo.seeded(4)) < share
    hints = torch.where(given, random_prompts(3, 12, 5), MASK)
    seen = []
    out = igpo.sample(model, prompts, gen_length=12, block_length=K, steps=steps,
                      hints=hints if share else None, prompt_mask=mask, threshold=threshold,
                      watch=lambda completions: seen.append(completions.clone()))
    assert len(seen) <= (12 if threshold else steps) and torch.equal(seen[-1], out)
    assert (~mask).sum(1).tolist() == [0, 1, 2]
    for prompt, real, hint, row in zip(prompts, mask, hints, out):
        assert torch.equal(row, published_sampler(model, prompt[real], hint, K, steps, threshold))

def test_the_draw_has_the_softmax_distribution():
    """The mask id is never chosen, even far ahead, yet it counts in the confidence."""
    logits = torch.randn(1, 128, generator=igpo.seeded(0)) * 2
    logits[0, 5], logits[0, -3:] = 30.0, -200.0
    allowed = logits.clone()
    allowed[0, 5] = -math.inf
    u = torch.cat([(torch.arange(19999) + 0.5) / 20000, torch.tensor([1 - 1e-6])])
    tokens, confidence = igpo.choose_tokens(logits.expand(20000, 128), 5, 0.7, u)
    share = tokens.bincount(minlength=128) / 20000
    assert torch.allclose(share, (allowed[0] / 0.7).softmax(-1), atol=1e-3)
    assert torch.allclose(confidence, logits[0].log_softmax(-1)[tokens], rtol=1e-4)
    assert igpo.choose_tokens(logits, 5, 0.0, None)[0] == allowed.argmax()

def test_groups_are_sampled_as_each_prompt_by_itself():
    """A prompt's responses depend on its own generator, and on nothing else in the batch."""
    model, (prompts, mask) = tiny_model(2), padded(random_prompts(3, 5))
    settings = dict(gen_length=8, block_length=4, steps=4, temperature=1.0)
    hints = random_prompts(3, 16).view(3, 2, 8).where(torch.arange(8) == 2, MASK)
    out = igpo.sample_groups(model, prompts, mask, [igpo.seeded(i) for i in range(3)], hints,
                             group_size=2, rows_per_call=4, **settings)
    for i in range(3):
        assert torch.equal(out[i], igpo.sample(
            model, prompts[[i, i]], prompt_mask=mask[[i, i]], hints=hints[i],
            generator=igpo.seeded(i), **settings))

def test_rows_that_have_ended_leave_the_batch():
    model, (prompts, mask) = tiny_model(2), padded(random_prompts(32, 5))
    model.lm_head.weight.data[END] *= 2  # so that rows end at different places
    full, early = (igpo.sample(model, prompts, prompt_mask=mask, gen_length=24, block_length=4,
                               steps=24, temperature=0.5, generator=igpo.seeded(0), stop_early=stop)
                   for stop in (False, True))
    blocks = (igpo.counted_tokens(full, END).sum(1, keepdim=True) + 3) // 4
    assert len(blocks.unique()) > 3  # a row is written up to the block of its end token
    assert torch.equal(early, torch.where(torch.arange(24) < 4 * blocks, full, END))

@pytest.mark.parametrize("cls, shift", [(LlamaForCausalLM, 0), (Qwen2ForCausalLM, 1)])
def test_the_cache_computes_the_block_alone(cls, shift):
    """With one layer, keys and values depend on their own token alone, so that the cache is exact.
    Where logits are read one position to the left, it computes the token before the block too."""
    model, shapes = tiny_model(2, cls, num_hidden_layers=1, logit_shift=shift), []
    model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    prompts, mask = padded(random_prompts(2, 5))
    settings = dict(gen_length=12, block_length=4, steps=12, prompt_mask=mask)
    exact = igpo.sample(model, prompts, **settings)
    shapes.clear()
    assert torch.equal(igpo.sample(model, prompts, cache="block", **settings), exact)
    assert shapes == [(2, 5 + 12), *[(2, 4 + shift)] * 3] * 3

def test_an_unknown_cache_is_refused():
    with pytest.raises(ValueError, match="cache is None or 'block', not 'dual'"):
        igpo.sample(tiny_model(), random_prompts(1, 3), gen_length=4, block_length=4, steps=4,
                    cache="dual")

def test_the_sampler_costs_what_its_forwards_cost():
    """Bounds far from what is measured (1.1 and 0.5), since others may use the machine."""
    model = tiny_model(hidden_size=128, intermediate_size=344, vocab_size=2048,
                       pad_token_id=None, eos_token_id=None)  # as --model random has none
    cfg = evaluation.Config(gen_length=128, diffusion_steps=32, batch_size=2, threshold=1e-9)
    rounds = [evaluation.time_sampler(model, cfg) for _ in range(3)]
    assert min(rows["exact"]["x bare"] for rows in rounds) < 1.6
    assert min(rows["cache"]["x bare"] for rows in rounds) < 0.8
    assert rounds[0]["exact"]["forwards"] == rounds[0]["bare forwards"]["forwards"] == 32

# ------------------------------------------------
# 3. Hints

@pytest.mark.parametrize("ratio, chunks", [(0, 0), (0.001, 1), (0.29, 29), (0.999, 99), (1, 100)])
def test_a_hint_is_floor_eta_N_chunks_in_their_places(ratio, chunks):
    trace = torch.arange(1, 499)  # 100 chunks, the last of 3 tokens
    hint, again = (igpo.make_hint(trace, ratio, gen_length=600, mask_id=0, min_chunk=5, max_chunk=5,
                                  generator=igpo.seeded(1)) for _ in range(2))
    given = hint[:498] != 0
    assert torch.equal(hint, again) and torch.equal(hint, F.pad(trace * given, (0, 102)))
    assert sum(piece.all().item() for piece in given.split(5)) == chunks  # one at least
    assert sum(piece.any().item() for piece in given.split(5)) == chunks  # and whole ones

def test_a_hint_leaves_room_for_the_answer():
    trace = torch.arange(1, 401)
    assert igpo.make_hint(trace, 1, gen_length=32, mask_id=0).tolist() == [1, 2] + [0] * 30
    assert igpo.make_hint(trace, 1, gen_length=4, mask_id=0, room=1).tolist() == [1, 2, 3, 0]
    assert igpo.make_hint(trace, 1, gen_length=2, mask_id=0).tolist() == [0, 0]

def test_chunks_have_any_length_within_the_bounds():
    lengths, places = set(), set()
    for seed in range(300):
        hint = igpo.make_hint(torch.arange(40), 1e-9, gen_length=40, mask_id=99, room=0,
                              generator=igpo.seeded(seed))  # a single chunk
        chunk = hint[hint != 99].tolist()
        places |= set(chunk)
        lengths |= {len(chunk)} if chunk[-1] < 39 else set()  # the last may be shorter
    assert lengths == {5, 6, 7, 8, 9, 10} and places == set(range(40))

@pytest.mark.parametrize("solution, answer, question, trace", [
    ("6-5=$1.00 and 720 + 270 = $990.00", "990", "", "6-5=$1.00 and 720 + 270 ="),
    ("We get 1,200 + 34 = 1,234.\nThe answer is: 1234", "1234", "", "We get 1,200 + 34 ="),
    (r"So $x = \frac{1}{2}$, hence $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", "", "So $x ="),
    (r"It is $\frac{a b}{c + 12}$ or 12.", "12", "", "It is"),  # never inside a command
    ("There are 120 of 12, so 12.", "12", "", "There are 120 of"),
    ("max is the a of it", "a", "", "max is the"),
    ("The sum is -3.\n#### -3", "-3", "", "The sum is"),
    ("Lyn has 5 apples. 5 + 3 - 3 = 5", "5", "Lyn has 5 apples", "Lyn has 5 apples. 5 + 3 - 3 ="),
    ("Lyn has 5 apples. 2 + 3 = 5", "5", "Lyn has 50 apples", "Lyn has"),
    ("Seventy-two.\n#### 72", "72", "", None), ("72", "72", "", None), ("any", "", "", None)])
def test_the_answer_is_cut_off_the_trace(solution, answer, question, trace):
    assert igpo.cut_trace(solution, answer, question) == trace

def test_no_toy_trace_holds_its_answer():
    assert all(p.answer not in p.trace for p in igpo.toy_problems(300, 0))

# ------------------------------------------------
# 4. Rewards. The tables hold, a row for each rule: reference ¦ content of the box

RIGHT_ANSWERS = r"""
18 ¦ \$18.00
18 ¦ 18\ \text{dollars}
18 ¦ \text{Janet makes 18 dollars}
18 ¦ Answer: 18
18 ¦ **18**
12 ¦ 12~\mathrm {cm}
15\mbox{ cm}^2 ¦ 15 \text{ square cm}
60 ¦ 60 km/h
3, 5 ¦ 3 books; 5 pens
\frac{1}{2} ¦ 1/2 of a mile
\frac{1}{2} ¦ \frac1{2}
\frac{1}{2} ¦ \frac 1 2
1\frac{4}{5} ¦ \frac{9}{5}
1\frac{4}{5} ¦ 1 4/5
12.5 ¦ 12.5\%
\frac{1}{10} ¦ 10%
-5 ¦ –5
5\sqrt{2} ¦ 5√2
16\sqrt{3} ¦ 16sqrt(3)
76^\circ ¦ 76°
76^\circ ¦ 76\degree
.0000672 ¦ 6.72 × 10^{-5}
4.5e33 ¦ 4.5 \times 10^{33}
1e11 ¦ 10^{11}
1234 ¦ 1 234
58,500 ¦ 58{,}500
11,\! 111,\! 100 ¦ 11,111,100
\pi ¦ about \pi
5 ¦ \approx 5
3\pi ¦ 3\pi \approx 9.42
101 ¦ \boxed{}101
(1,2) ¦ \bigl(1,2\bigr)
1,-2 ¦ x=1 \text{ or } x=-2
(3, \frac{\pi}{2}) ¦ (r,\theta) = (3, \frac{\pi}{2})
10 ¦ Total = 10 pens
5x - 7y + 11z + 4 = 0 ¦ 10x-14y+22z+8=0
(5,\infty) ¦ x > 5
204_5 ¦ 204
4210_{5} ¦ 4210_5
43 ¦ 43_{10}
\text{(C)} ¦ \textbf{(C)}\ 12
\text{Evelyn} ¦ evelyn!
\begin{pmatrix} 1 \\ 2 \end{pmatrix} ¦ \left(\begin{array}{c} 1 \\ 2 \end{array}\right)
"""
WRONG_ANSWERS = r"""
15 ¦ 18 liters
50 ¦ 0.5\%
\pi ¦ 3.14159265
5 ¦ x <= 5
1 ¦ \frac{0}{0}
530 ¦ 5 30
3,1234 ¦ 31234
1.5000 ¦ 1.5,000
(100,200) ¦ 100200
[100,200] ¦ 100200
\{100,200\} ¦ 100200
2516_8 ¦ 2516_7
204_5 ¦ 204_10
11 ¦ 11_8
3xyz ¦ 3
p - q ¦ q - p
odd ¦ ddo
\text{even} ¦ \text{not even}
"""

def test_the_rules_of_the_grader():
    failures = []
    for table, verdict in (RIGHT_ANSWERS, True), (WRONG_ANSWERS, False):
        for row in table.strip().split("\n"):
            reference, answer = row.split(" ¦ ")
            if igpo.grade(rf"Hence \boxed{{{answer}}}.", reference) != verdict:
                failures.append(row)
    assert not failures, "\n".join(failures)
    assert igpo.grade("<answer>\n$18 dollars\n</answer>", 18.0) and not igpo.grade("18", 18)

@pytest.mark.parametrize("completion, answer", [
    ("", None), ("The answer is 18.", None), ("<answer>18", None),  # merely mentioned
    (r"\boxed{17} then \boxed{18} and \boxed{19", "18"),            # the last that is closed
    (r"\boxed{18} and \boxed{\text{}} and \boxed{\ldots} and \boxed{_}", "18"),
    (r"\boxed{\{1, \frac{1}{2}\}}", r"\{1, \frac{1}{2}\}"), (r"} \boxed {1\}}", r"1\}"),
    ("<answer>17</answer><answer> 18 </answer><answer></answer>", "18"),
    (r"\boxed{18} <answer>17</answer>", "18"), (r"\boxed{...} <answer>17</answer>", "17")])
def test_committed_answer(completion, answer):
    assert igpo.committed_answer(completion) == answer

HOSTILE = [
    r"9^{9^{9^9}}", "(a+b+c+d+e+f)^{40}", "1e999999999", "9" * 4301, "5\0", "\ud800+x", "," * 290,
    "()" * 140 + "=", "(" * 140 + "x" + ")" * 140, r"\boxed{" * 100_000 + "}" * 100_000,
    "{" * 1_000_000, "<answer>" * 120_000, r"\boxed" + " " * 1_000_000]

def test_hostile_answers_and_references_cost_little():
    assert igpo.grade(r"\boxed{1+x}", "x+1")
    judge = igpo.judge.pid
    for text in HOSTILE:
        began = time.process_time()
        assert not igpo.grade(rf"\boxed{{{text}}}", r"\frac{3}{5}")
        assert not igpo.grade(r"\boxed{x+1}", text)
        assert igpo.committed_answer(text + r"\boxed{7}") == "7"
        assert time.process_time() - began < 2, text[:40]
    assert igpo.judge.pid == judge  # it gave up in time by itself

def test_answers_that_are_given_up_are_counted():
    before = igpo.GRADE_TIMEOUTS
    assert not igpo.grade(r"\boxed{9^{9^{9^9}}}", "x+1") and igpo.GRADE_TIMEOUTS == before + 1
    assert not igpo.grade(r"\boxed{2+x}", "x+1") and igpo.GRADE_TIMEOUTS == before + 1
    igpo.judge.kill()
    igpo.judge.wait()
    assert igpo.grade(r"\boxed{1+x}", "x+1")  # a dead judge is replaced, a stuck one given up
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

# ------------------------------------------------
# 5. Elastic roll-out. A response is the number in its first column; 1 is right, all else wrong.

G, L = 8, 6

class Draw:
    """Stands for the sampler: draws given first columns, keeps hints, remembers what was asked."""

    def __init__(self, *batches):
        self.batches, self.calls = list(batches), []

    def __call__(self, prompts, prompt_mask, generators, hints):
        self.calls.append((prompts[:, 0].tolist(), hints))
        assert [g.initial_seed() for g in generators] == prompts[:, 0].tolist()
        out = torch.full((len(prompts), G, L), 9)
        if hints is not None:
            out = torch.where(hints == MASK, out, hints)
        out[..., 0] = torch.tensor(self.batches.pop(0))
        return out

def roll(draw, N, traces=None, **settings):
    """Roll out N prompts; prompt n is the token n and has the generator of seed n."""
    prompts = torch.arange(N)[:, None]
    return igpo.rollout(
        draw, lambda completion, answer: completion[0].item() == answer, prompts, prompts >= 0,
        [1] * N, traces or [torch.arange(10, 10 + L)] * N,
        [torch.Generator().manual_seed(n) for n in range(N)],
        mask_id=MASK, **dict(chunk=(1, 1), eta=(0.4, 0.9), room=0) | settings)

def test_hints_are_for_all_wrong_groups_alone():
    draw = Draw([[0] * G, [1] + [0] * 7, [2] * G, [0] * G], [[0] * 5 + [1] * 3, [0] * G])
    out = roll(draw, 4, [torch.arange(10, 16)] * 3 + [None])  # without a trace there is no hint
    assert [prompts for prompts, _ in draw.calls] == [[0, 1, 2, 3], [0, 2]]
    assert out.first_correct.sum(1).tolist() == [0, 1, 0, 0]
    assert out.correct.sum(1).tolist() == [3, 1, 0, 0]
    assert torch.equal(out.completions[1:], out.first[1:]) and not out.hinted[1:].any()
    hints = draw.calls[1][1]
    assert set((hints != MASK).sum(-1).flatten().tolist()) == {2, 3, 4, 5}  # each its own eta
    for g in range(3):  # the hint mask travels with the response it belongs to
        assert torch.equal(out.completions[0, g], out.second[0, 5 + g])
        assert torch.equal(out.hinted[0, g], hints[0, 5 + g] != MASK)

@pytest.mark.parametrize("right, lam, K", [(3, 0.5, 3), (7, 0.5, 4), (8, 1.0, 8), (8, 0.3, 2)])
def test_K_responses_are_replaced(right, lam, K):
    out = roll(Draw([[0] * G], [[0] * (G - right) + [1] * right]), 1, lam=lam)
    assert out.correct.sum() == K == (out.completions[0, :, 0] == 1).sum()
    A, rho = igpo.group_advantages(out.correct), K / G  # Theorem 1
    assert A.square().mean().item() == pytest.approx(rho * (1 - rho))

def test_algorithms():
    draw = Draw([[0] * G])
    assert not roll(draw, 1, algo="grpo").correct.any() and len(draw.calls) == 1
    draw = Draw([[0] * G, [0] * G], [[1] * G])  # sample-matched: the groups that igpo would draw
    out = roll(draw, 2, [None, torch.arange(10, 16)], algo="resample")
    assert draw.calls[1][0] == [1] and (draw.calls[1][1] == MASK).all()
    assert out.correct.sum(1).tolist() == [0, 4] and not out.hinted.any()
    draw = Draw([[0] * G], [[1] * G])
    roll(draw, 1, eta=(1.0, 1.0))
    assert torch.equal(draw.calls[1][1][0], torch.arange(10, 16).expand(G, L))

# ------------------------------------------------
# 6. Log-probabilities

def test_one_forward_serves_the_group():
    """The released code runs each of the N * G rows by itself; here also without padding."""
    model, (prompts, mask) = tiny_model(1), padded(random_prompts(2, 5))
    completions = torch.randint(0, V, (2, 3, 7), generator=igpo.seeded(0))
    logps, entropy = igpo.completion_logps(model, prompts, completions, prompt_mask=mask)
    for n in range(2):
        for g in range(3):
            canvas = torch.cat([prompts[n][mask[n]], torch.full((7,), MASK)])
            table = model(canvas[None]).logits[0, -7:].log_softmax(-1)
            assert torch.allclose(logps[n, g], table[range(7), completions[n, g]], atol=1e-4)
            assert torch.allclose(entropy[n], -(table.exp() * table).sum(-1), atol=1e-4)
    assert logps.requires_grad and not entropy.requires_grad  # the entropy selects, no more

# ------------------------------------------------
# 7. The IGPO objective

def test_advantages_are_centred_not_scaled():
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    want = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0]])
    for kind in torch.bool, torch.int64, torch.float32:
        assert torch.equal(igpo.group_advantages(rewards.to(kind)), want)

def test_entropy_filter_keeps_the_most_uncertain():
    entropy = torch.tensor([[0.5, 3.0, 0.1, 2.0, 9.0, 1.0]])
    hints = torch.tensor([[[1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1]]]).bool()  # (N = 1, G = 2, L)
    for keep, first, second in [
            (0, [4], [0, 1, 2, 3]), (1e-5, [1, 4], [0, 1, 2, 3, 4]),
            (0.4, [1, 3, 4], [0, 1, 2, 3, 4]), (0.5, [1, 3, 4, 5], [0, 1, 2, 3, 4]),
            (1, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])]:
        learn = igpo.entropy_filter(entropy, hints, keep)
        assert [row.nonzero().flatten().tolist() for row in learn[0]] == [first, second]
    # 0.3 * 170 is 51, also in floating point
    assert igpo.entropy_filter(torch.rand(170), torch.ones(170).bool(), 0.3).sum() == 51

@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_policy_loss_is_the_formula(ratio):
    g = igpo.seeded(2)
    logps, old, ref = (-torch.rand(2, 4, 6, generator=g) * 4 for _ in range(3))
    A, mask = torch.randn(2, 4, generator=g), torch.rand(2, 4, 6, generator=g) < 0.7
    mask[1, 3] = False  # a response of which nothing learns adds nothing, and no nan
    want = 0.0
    for n in range(2):
        for i in range(4):
            places = mask[n, i].nonzero().flatten().tolist()
            for k in places:
                d = (logps - old)[n, i, [k] if ratio == "token" else places].mean().item()
                rho, a = math.exp(d), A[n, i].item()
                clipped = min(max(rho, 0.8), 1.2)
                d = (ref - logps)[n, i, k].item()
                kl = math.exp(d) - d - 1
                want -= (min(rho * a, clipped * a) - 0.3 * kl) / len(places) / 8
    loss, _ = igpo.policy_loss(logps, old, ref, A, mask, epsilon=0.2, beta=0.3, ratio=ratio)
    assert loss.item() == pytest.approx(want, rel=1e-5)

def test_policy_loss_by_hand():
    """Clipped is what went too far its own way: a right response (A = 1) now 1.5 times as likely,
    a wrong one half as likely. Else token k of o_i has the gradient -rho_i A_i / (G |o_i|)."""
    rho, A = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    logps, zeros = rho.log().expand(1, 2, 4).mT.clone().requires_grad_(), torch.zeros(1, 4, 2)
    mask = torch.tensor([[[1, 1], [1, 1], [1, 0], [1, 1]]])
    loss, metrics = igpo.policy_loss(logps, zeros, None, A, mask, epsilon=0.2, beta=0)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert torch.allclose(logps.grad, torch.tensor(
        [[[0, 0], [1.5 / 8, 1.5 / 8], [-0.5 / 4, 0], [0, 0]]]))
    assert metrics == pytest.approx({"kl": 0, "ratio": 1, "clip_fraction": 0.5})
    # The KL is estimated by k3 = x - 1 - log x for x = pi_ref / pi.
    _, metrics = igpo.policy_loss(logps, logps, zeros, A, mask)
    want = (1 / 1.5 - 1 + math.log(1.5) + 1 / 0.5 - 1 + math.log(0.5)) / 2
    assert metrics["kl"] == pytest.approx(want)

def test_an_update_makes_right_responses_likelier():
    """The sign of everything at once: model, log-probabilities, advantages, loss, optimizer."""
    model, prompts = tiny_model(1), random_prompts(2, 5)
    completions = torch.randint(0, V, (2, 4, 6), generator=igpo.seeded(0))
    right = torch.tensor([[True, False, False, False], [False, True, True, False]])
    optimizer, gaps, old = torch.optim.AdamW(model.parameters()), [], None
    for _ in range(4):
        logps, _ = igpo.completion_logps(model, prompts, completions)
        old = logps.detach() if old is None else old
        gaps.append((logps[right].mean() - logps[~right].mean()).item())
        igpo.policy_loss(logps, old, old, igpo.group_advantages(right),
                         torch.ones_like(completions))[0].backward()
        igpo.optimizer_step(model, optimizer, 1e-3, 1.0)
    assert gaps[-1] > gaps[0] + 0.1

# ------------------------------------------------
# 8. The SFT objective

def test_sft_loss_is_the_formula():
    model, (prompts, mask) = tiny_model(1), padded(random_prompts(3, 5))
    completions = F.pad(random_prompts(3, 5, 2), (0, 3), value=END)  # (3, 8), padding included
    t, want, nll = torch.tensor([0.3, 0.6, 0.9]), 0.0, 0.0
    loss, metrics = igpo.sft_loss(model, prompts, completions, prompt_mask=mask, t=t,
                                  generator=igpo.seeded(7))
    masked = igpo.uniform_noise((3, 8), igpo.seeded(7), "cpu") < t[:, None]
    for b in range(3):
        canvas = torch.cat([prompts[b][mask[b]], torch.where(masked[b], MASK, completions[b])])
        logp = model(canvas[None]).logits[0, -8:].log_softmax(-1)
        for k in masked[b].nonzero().flatten().tolist():
            want -= logp[k, completions[b, k]].item() / t[b].item() / (3 * 8)
            nll -= logp[k, completions[b, k]].item() / masked.sum().item()
    assert loss.item() == pytest.approx(want, rel=1e-4)
    assert metrics["nll"] == pytest.approx(nll, rel=1e-4)

def test_sft_loss_draws_t_uniformly_and_may_mask_nothing():
    inputs = tiny_model(1), random_prompts(400, 1), random_prompts(400, 9)
    _, metrics = igpo.sft_loss(*inputs, generator=igpo.seeded(0))
    assert 0.45 < metrics["masked"] < 0.55
    loss, metrics = igpo.sft_loss(*inputs, t=torch.full((400,), 1e-9))
    assert loss.item() == 0 and metrics == {"nll": 0.0, "masked": 0.0}

# ------------------------------------------------
# Each public function lifts out of igpo.py with the names that it needs, and nothing else.

LIFTS = [  # the lines to copy, at most, and a test that the copy passes too
    ("load_model", 97, test_dream_is_read_one_to_the_left),
    ("sample", 100, test_rows_that_have_ended_leave_the_batch),
    ("make_hint", 30, test_a_hint_leaves_room_for_the_answer),
    ("grade", 120, test_the_rules_of_the_grader), ("rollout", 70, test_algorithms),
    ("completion_logps", 40, test_one_forward_serves_the_group),
    ("group_advantages", 30, test_advantages_are_centred_not_scaled),
    ("entropy_filter", 30, test_entropy_filter_keeps_the_most_uncertain),
    ("policy_loss", 30, test_policy_loss_by_hand), ("sft_loss", 40, test_sft_loss_is_the_formula)]

def names(code, kinds, inside=True):
    """The names that instructions of these kinds hold, in compiled code and the functions in it."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in kinds}
    inner = [const for const in code.co_consts if inside and isinstance(const, types.CodeType)]
    return found.union(*(names(const, kinds) for const in inner))

def lifted(name):
    """-> the function, compiled with nothing but what it needs, and the lines copied for that."""
    defined, reads, wanted, nodes = {}, {}, [name], []
    for node in ast.parse((HERE / "igpo.py").read_text()).body:
        code = compile(ast.Module([node], []), "igpo.py", "exec")
        reads[node] = names(code, ("LOAD_NAME", "LOAD_GLOBAL"))  # no local variables
        fills_a_table = reads[node] if isinstance(node, ast.For) else set()
        for bound in names(code, ("STORE_NAME",), inside=False) | fills_a_table:
            defined.setdefault(bound, []).append(node)
    while wanted:
        for node in defined.get(wanted.pop(), []):
            if node not in nodes:
                nodes.append(node)
                wanted += reads[node] - {"block_cache"}  # the exact sampler does without
    nodes.sort(key=lambda node: node.lineno)
    namespace, lines = {"__name__": "lifted"}, 0
    exec(compile(ast.Module(nodes, []), "lifted", "exec"), namespace)
    for node in nodes:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            decorators = getattr(node, "decorator_list", [])
            lines += node.end_lineno + 1 - min(n.lineno for n in [node, *decorators])
    return namespace[name], lines

@pytest.mark.parametrize("name, most, check", LIFTS)
def test_each_public_function_lifts_out(name, most, check, monkeypatch, tmp_path):
    function, lines = lifted(name)
    print(f"{name}: {lines} lines copied")
    monkeypatch.setattr(igpo, name, function)
    check(*[tmp_path] * check.__code__.co_argcount)
    assert lines <= most

# ------------------------------------------------
# The recipe (sections 9 to 11): most tests run main() on a LLaDA-format folder with random weights.

def meta(query, response, kind="GSM_AnsAug"):
    return {"type": kind, "query": query, "response": response}

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

def lines_of(out, stage="rl"):
    """The lines of one stage in metrics.jsonl, less what depends on the clock."""
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_", "tflops"))}
            for line in igpo.read_lines(out / "metrics.jsonl") if line["stage"] == stage]

def arbitrary(completion, reference):
    """In place of grade: a random model's answers are never right, and IGPO would have no work."""
    return zlib.crc32(completion.encode()) % 8 == 0

def same_runs(a, b):
    for stage in "sft", "rl", "eval":
        assert lines_of(a, stage) == lines_of(b, stage)
    a, b = (load_file(out / "final" / "model.safetensors") for out in (a, b))
    assert all(torch.equal(a[name], b[name]) for name in a)

# Wrong inputs: what to do to a copy of the world, the flags, and what the line must say.

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

def config(**changes):
    def edit(world):
        path = world / "m" / "config.json"
        raw = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v != "gone"}))
    return edit

def weights(change):
    def edit(world):
        tensors = load_file(world / "m" / "model.safetensors")
        change(tensors)
        save_file(tensors, world / "m" / "model.safetensors")
    return edit

def data(content, name="data.jsonl", flag="--train_data"):
    """Such a file for --train_data; lists are rows."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    return put(name, content), f"{flag} WORLD/{name}"

SFT = "--stage sft --sft_length 8 --sft_data WORLD/sft.jsonl"
REWRITE = "--stage rewrite --rewriter WORLD/m --rewrite_data WORLD/sft.jsonl"
GOOD = meta("1.1=", "The answer is: 5")
NORM = "model.transformer.ln_f.weight"
WRONG = [
    (None, "--preset nonsense", "no preset 'nonsense'; there are llada, toy"),
    (None, "--nonsense 1", "unrecognized arguments: --nonsense 1"),
    (None, "--algo ppo", "--algo: invalid choice: 'ppo'"),
    (None, "--max_steps many", "--max_steps.*invalid int"),
    (None, "--lr 0", r"--lr is within 1e-12..1, not 0"),
    (None, "--tau nan", "--tau is within 0..1, not nan"),
    (None, "--eta_low 0.9", "--eta_low 0.9 is above --eta_high 0.6"),
    (None, "--min_chunk 4", "--min_chunk 4 is above --max_chunk 3"),
    (None, "--gen_length 21", "gen_length 21 .*block_length 8"),
    (None, "--diffusion_steps 3", "diffusion_steps 3 of the number of blocks"),
    (None, "--stage sft", "--stage sft needs --sft_data"),
    ("three processes", "", "--prompts_per_step 4 is no multiple of 3 processes"),
    ("three processes", "--prompts_per_step 3 --sft_batch 4", "--sft_batch 4"),
    ("no peft", "--lora_rank 2", "--lora_rank needs peft: pip install peft"),
    ("no wandb", "--wandb project", "--wandb needs wandb: pip install wandb"),
    (put("file", ""), "--out_dir WORLD/file", "file: Not a directory"),
    (None, "--out_dir /proc/igpo/run", "/proc/igpo/run"),
    (None, "--out_dir WORLD/m", "WORLD/m is not empty"),
    (None, "--resume", "OUT/config.json: No such file"),
    (None, "--model GSAI-ML/LLaDA-8B-Instruct", "needs GPUs"),
    # data
    (None, "--train_data WORLD/absent.jsonl", "absent.jsonl: No such file"),
    (None, "--train_data WORLD/absent.csv", "absent.csv"),
    (*data(""), "data.jsonl holds no rows"),
    (*data("7", "data.json"), "data.json"),
    (*data("type,query\na,b\n", "data.csv"), "csv, row 1, column 'response': None is no text"),
    (*data("PAR1", "data.parquet"), "data.parquet"),
    (*data(b"\xff\xfe{}"), "data.jsonl: .*utf-8"),
    (*data('{"type": 1}\n{oops\n'), "data.jsonl, line 2: "),
    (*data([GOOD, 7]), "row 2, column 'type'"),
    (*data([GOOD, GOOD | {"query": None}]), "row 2, column 'query': None is no text"),
    (*data([GOOD | {"response": 7}]), "row 1, column 'response': 7 is no text"),
    (*data([GOOD, GOOD | {"query": "\ud800"}]), "row 2, column 'query': .*surrogate"),
    (*data([meta("1", "no answer"), meta("2", "The answer is: 3", "other")]), "no row of type GSM"),
    (*data([GOOD]), "has 1 problems, no more than --eval_size"),
    (None, "--max_prompt_length 2", "prompts are longer than --max_prompt_length 2"),
    (None, "--gen_length 512 --diffusion_steps 64", "prompt of 4 and .* of 512 .* 128 positions"),
    (None, f"{SFT} --sft_length 2", "all examples exceed"),
    (None, f"{SFT} --sft_length 125", "prompt of 4 and a completion of 125 .* 128 positions"),
    (*data([{"prompt": "1"}], flag=f"{SFT} --sft_data"), "row 1, column 'completion': None"),
    # the model
    (put("m/config.json", None), "", "m: No such file"),
    (put("m/config.json", ""), "", "m: Expecting value"),
    (put("m/config.json", "[]"), "", "m: "),
    (config(n_layers="two"), "", "m: "), (config(n_heads=5), "", "m: "),
    (config(mlp_hidden_size="gone"), "", "m: .*mlp_hidden_size"),
    (config(mask_token_id=99), "", "m: token 99 is not among the"),
    (config(eos_token_id=None), "", "m: .*eos_token_id"),
    (config(model_type="gpt2"), "", "'gpt2' is not supported"), (config(alibi=True), "", "alibi"),
    (config(weight_tying=True), "", "ties head and embedding"),
    (put("m/tokenizer.json", None), "", "m has no tokenizer"),
    (put("m/tokenizer.json", 99), "", "m: "),
    (put("m/model.safetensors", None), "", "m: .*model.safetensors"),
    (put("m/model.safetensors", ""), "", "m: "), (put("m/model.safetensors", 5000), "", "m: "),
    (weights(lambda w: w.pop(NORM)), "", "missing_keys model.norm"),
    (weights(lambda w: w.update(extra=torch.ones(2))), "", "unexpected_keys extra"),
    (weights(lambda w: w.update({NORM: torch.ones(7)})), "", "mismatched_keys .*model.norm"),
    # rewriting
    (None, REWRITE, "row 1, column 'problem': None is no text"),
    (*data([{"problem": "1", "answer": "1", "solution": "1"}],
           flag=f"{REWRITE} --rewriter WORLD/absent --rewrite_data"), "absent: ")]

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
    failures = []
    for f in dataclasses.fields(igpo.Config):
        bounds = f.metadata.get("metavar")
        assert bounds or not any(kind in str(f.type) for kind in ("int", "float")), f.name
        for word in ("nan", "inf", "-1", "0", "1e12", "1000000000000") if bounds else ():
            try:
                cfg = igpo.parse(igpo.Config, [f"--{f.name}", word], igpo.PRESETS)
            except igpo.UsageError as error:
                assert f"--{f.name}" in str(error) and "\n" not in str(error)
                continue
            low, high = map(float, bounds.split(".."))
            if not low <= getattr(cfg, f.name) <= high:
                failures.append((f.name, word))
    assert not failures
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
    assert igpo.metamath_problems(str(path)) == [
        ("What is 2+3?", "5", "It is\n2+3 ="), ("Half?", "\\frac{1}{2}", "Half it. It is"),
        ("Words?", "5", None)]

def test_problems_are_held_out_encoded_and_batched(tmp_path):
    rows = [meta(f"{a}", f"The answer is: {a}") for a in range(9)]
    path = write_jsonl(tmp_path / "meta.jsonl", *rows)
    cfg = igpo.parse(igpo.Config, ["--train_data", path, "--eval_size", "2"], igpo.PRESETS)
    problems, held_out, _ = igpo.load_data(cfg)
    assert (len(problems), len(held_out)) == (7, 2) and not set(problems) & set(held_out)

    tokenizer = tiny_tokenizer()
    problems = [igpo.Problem("1" * n, "1", "2" if n == 4 else None) for n in (3, 9, 4, 12)]
    examples = igpo.encode_problems(tokenizer, problems, 8)  # the longer ones are left out
    assert [len(e.prompt) for e in examples] == [3, 4] and examples[0].trace is None
    assert tokenizer.decode(examples[1].trace) == "<reasoning>\n2"
    ids, mask = igpo.pad_left([e.prompt for e in examples], 7)
    assert ids[0].tolist() == [7, *examples[0].prompt] and mask.tolist()[0] == [False] + [True] * 3

    seen = [i for step in range(10) for i in igpo.batch_indices(20, 4, step, 0)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]
    assert igpo.batch_indices(20, 4, 7, 0) == seen[28:32]  # a function of the step alone

def test_the_chat_template_asks_for_the_form():
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(igpo.encode_prompt(tokenizer, "26.45=")) == "26.45="
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}{{ m['content'] }}"
                               "{% endfor %}{% if add_generation_prompt %}</answer>{% endif %}")
    words = tokenizer.convert_ids_to_tokens(igpo.encode_prompt(tokenizer, "26.45="))
    assert "".join(words[-7:]) == "26.45=</answer>"
    assert {"<reasoning>\n", "<answer>\n", "</answer>", "\\boxed{"} <= set(words)

def test_the_toy_world():
    tokenizer = tiny_tokenizer()
    problems, rows = igpo.toy_problems(200, 1), igpo.toy_sft_rows(200, 1)
    assert problems == igpo.toy_problems(200, 1) != igpo.toy_problems(200, 2)
    for text in [text for row in (*rows, *map(igpo.Problem._asdict, problems))
                 for text in row.values()]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    for problem in problems:
        assert problem.answer not in problem.trace
    assert all(len(tokenizer(row["completion"]).input_ids) < 20 for row in rows)

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
    lines = igpo.read_lines(out / "metrics.jsonl")
    steps = [(line["stage"], line["step"]) for line in lines if line["stage"] != "eval"]
    assert steps == [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1), ("rl", 2)]
    assert CONTRACT <= lines[-2].keys() and lines[-2]["seconds"] > 0
    assert (lines[-2]["cache"], lines[-2]["threshold"]) == ("block", 0.9)
    assert asked and all((k["cache"], k["threshold"]) == ("block", 0.9) for k in asked)
    assert all(math.isfinite(v) for x in lines for v in x.values() if not isinstance(v, str))
    summary = json.loads((out / "summary.json").read_text())
    assert {"accuracy_start", "accuracy_sft", "accuracy_final", "all_wrong", "all_wrong_after",
            "steps", "seconds"} <= summary.keys() and summary["steps"] == 2
    assert "RL 2/2" in capsys.readouterr().out
    sft, final = (load_file(out / name / "model.safetensors") for name in ("sft", "final"))
    assert any(not torch.equal(sft[name], final[name]) for name in sft)
    with pytest.raises(igpo.UsageError, match="not empty.*--resume"):
        igpo.main(["--preset", "toy", "--out_dir", str(out)])

def test_sft_learns_with_a_linear_schedule(world, tmp_path):
    igpo.main(flags(world, tmp_path / "run", "--stage", "sft", "--sft_steps", 60, "--sft_batch", 24,
                    "--sft_rows_per_forward", 9, "--sft_lr", 1e-2, "--warmup_steps", 9))
    lines = lines_of(tmp_path / "run", "sft")
    losses, rates = ([line[name] for line in lines] for name in ("loss", "lr"))
    assert len(losses) == 60 and sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert max(rates) == pytest.approx(1e-2) == rates[9] and rates[0] == pytest.approx(1e-3)
    assert rates[20] - rates[30] == pytest.approx(rates[40] - rates[50]) and rates[-1] < 3e-4

def test_epochs_give_the_steps(world, tmp_path, capsys):
    argv = flags(world, tmp_path / "run", "--epochs", 1, "--diffusion_steps", 2, sft=False)
    at = argv.index("--max_steps")
    igpo.main(argv[:at] + argv[at + 2:])
    assert "RL: 5 steps of 4 prompts" in capsys.readouterr().out  # 20 problems
    lines = lines_of(tmp_path / "run")
    rates = [line["lr"] / 1e-4 for line in lines]  # of the second of two updates a step
    assert rates == pytest.approx([2 / 3, 7 / 8, 5 / 8, 3 / 8, 1 / 8])
    final = tmp_path / "run" / "final"  # in LLaDA's format again
    assert "model.transformer.wte.weight" in load_file(final / "model.safetensors")
    assert igpo.load_model(final)[0].config.max_position_embeddings == 128
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["stage"], state["step"]) == ("rl", 5)  # the last step is checkpointed

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

class Interrupted(Exception):
    pass

def test_rewriting_keeps_what_is_short_in_form_and_right(world, tmp_path, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, eos_token_id=tokenizer.eos_token_id)).save_pretrained(tmp_path / "w")
    tokenizer.save_pretrained(tmp_path / "w")
    data = write_jsonl(tmp_path / "data.jsonl", *[  # 3 and 4 come after the interruption
        {"problem": f"{a}.1=", "answer": str(a - 1), "solution": f"6{a}"}
        for a in (1, 2, 5, 6, 3, 4)])
    argv = [*"--preset toy --stage rewrite --sft_length 24 --rewrite_batch 2".split(),
            "--rewrite_data", data, "--rewriter", str(tmp_path / "w"), "--out_dir"]
    igpo.main([*argv, str(tmp_path / "useless")])  # the real pipeline, of random weights
    assert "0 of 6 rewritten traces" in capsys.readouterr().out

    good = "<reasoning>\n1\n</reasoning>\n<answer>\n\\boxed{ANSWER}\n</answer>"
    forms = {3: good.replace("1", "1" * 30), 4: "\\boxed{ANSWER}", 5: good.replace("ANSWER", "6")}
    asked = []

    class Rewriter:
        def __init__(self):
            self.tokenizer = tiny_tokenizer()

        def __call__(self, requests, **options):
            numbers = [int(re.search(r"Problem:\n(\d)\.1=", request)[1]) for request in requests]
            assert all(f"Solution:\n6{a}" in request for a, request in zip(numbers, requests))
            interrupt = 5 in numbers and 5 not in asked
            asked.extend(numbers)
            if interrupt:
                raise Interrupted
            return [[{"generated_text": forms.get(a, good).replace("ANSWER", str(a - 1))}]
                    for a in numbers]

    monkeypatch.setattr(igpo.transformers, "pipeline", lambda *_, **__: Rewriter())
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        igpo.main([*argv, str(out)])
    with open(out / "rewritten.0.jsonl", "a") as file:
        file.write('{"row": 2, "verd')  # a kill left half a line
    igpo.main([*argv, str(out), "--resume"])
    assert asked == [1, 2, 5, 6, 5, 6, 3, 4]
    verdicts = {line["prompt"][0]: line["verdict"]
                for line in igpo.read_lines(out / "rewritten.0.jsonl")}
    assert verdicts == {"1": "kept", "2": "kept", "3": "too long", "4": "bad form",
                        "5": "wrong answer", "6": "kept"}
    kept = igpo.read_rows(out / "traces.jsonl", ["prompt", "completion"])
    assert [row["prompt"] for row in kept] == ["1.1=", "2.1=", "6.1="]
    assert kept[2]["completion"] == good.replace("ANSWER", "5")

# Resuming

@contextlib.contextmanager
def interrupted(stage, step):
    """Both processes and files are at this step, and then it is not finished."""
    name, at = ("report", 1) if stage == "rl" else ("record", 2)
    function = getattr(igpo, name)

    def stopping(*args, **kwargs):
        function(*args, **kwargs)
        if args[at] == step and (stage == "rl" or args[1] == "sft"):
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(igpo, name, stopping)
        yield

@pytest.fixture
def arbitrary_grades(monkeypatch):
    monkeypatch.setattr(igpo, "grade", arbitrary)

@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(igpo, "grade", arbitrary)
        igpo.main(flags(world, out))
    return out

def broken(argv, stage, step):
    with interrupted(stage, step), pytest.raises(Interrupted):
        igpo.main(argv)

def test_a_resumed_run_is_the_uninterrupted_one(world, whole, tmp_path, arbitrary_grades):
    assert any(line["all_wrong"] > line["all_wrong_after"] for line in lines_of(whole))
    argv = flags(world, tmp_path / "run", "--sft_save_every", 2)
    broken(argv, "sft", 1)  # nothing is checkpointed yet
    broken([*argv, "--resume"], "sft", 4)
    assert igpo.read_state(tmp_path / "run")[:2] == ("sft", 2)
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

def test_the_kl_is_to_the_initial_policy(world, tmp_path, monkeypatch):
    """The first ratio is 1 and the first KL 0, the scored reference stays the same later."""
    scored, group_logps = [], igpo.group_logps
    fixed = random_prompts(2, 9)
    seen = fixed > -1, random_prompts(8, 4).view(2, 4, 4), 2

    def spy(model, *inputs):
        scored.append(group_logps(model, fixed, *seen)[0])
        return group_logps(model, *inputs)

    monkeypatch.setattr(igpo, "group_logps", spy)
    monkeypatch.setattr(igpo, "grade", arbitrary)
    igpo.main(flags(world, tmp_path / "run", "--lr", "1e-2", "--mu", "1", sft=False))
    old, reference = scored[0::2], scored[1::2]
    assert all(torch.equal(reference[0], x) for x in (old[0], *reference))
    assert not torch.allclose(old[1], old[0], atol=1e-2)
    kls = [line["kl"] for line in lines_of(tmp_path / "run")]
    assert kls[0] == 0 < kls[1]

def test_lora_resumes_and_goes_on_from_base_and_adapter(world, tmp_path, arbitrary_grades):
    pytest.importorskip("peft")
    lora = "--lora_rank", 2, "--lora_dropout", 0.2, "--sft_lr", 1e-2, "--lr", 1e-2
    igpo.main(flags(world, tmp_path / "whole", *lora))
    argv, out = flags(world, tmp_path / "run", *lora, "--sft_save_every", 2), tmp_path / "run"
    broken(argv, "sft", 3)
    broken([*argv, "--resume"], "rl", 1)
    broken([*argv, "--resume"], "rl", 3)
    igpo.main([*argv, "--resume"])
    same_runs(tmp_path / "whole", out)
    reader = torch.distributed.checkpoint.FileSystemReader(out / "checkpoint-rl-3")
    stored = reader.read_metadata().state_dict_metadata
    assert stored and all(".lora_" in name or "param_groups" in name for name in stored)  # no base

    cfg = igpo.parse(igpo.Config, argv, igpo.PRESETS)
    ids, cpu = random_prompts(2, 9), torch.device("cpu")
    for name in "sft", "final":  # the merged model is base and adapter
        policy, _ = igpo.load_policy(cfg, cpu, out / name)
        merged, _ = igpo.load_model(out / name)
        assert torch.allclose(policy.eval()(ids).logits, merged(ids).logits, atol=1e-3)
        assert not torch.allclose(policy(ids).logits, igpo.load_model(world / "m")[0](ids).logits,
                                  atol=1e-2)
    learns = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert learns and all(".lora_" in name for name in learns)
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
    tied = llada_folder(tmp_path / "m", tie_word_embeddings=True)
    argv = flags(world, tmp_path / "run", "--model", tmp_path / "m", "--max_steps", 1, sft=False)
    assert in_processes(argv, 2) == [(0, "")] * 2
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
    full("checkpoint-sft-4", 100_000)  # behind SFT's progress bar; the folder can be used
    broken([*argv, "--resume"], "rl", 2)
    assert full("checkpoint-rl-2", 100_000, "--resume")
    igpo.main([*argv, "--resume"])
    shutil.rmtree(out / "final")
    assert full("final", 50_000, "--resume") and not (out / "final").exists()
    igpo.main([*argv, "--resume"])
    same_runs(whole, out)

def test_damaged_files_are_named_on_resume(world, tmp_path, arbitrary_grades, capfd):
    base, failures = tmp_path / "base", []
    broken(flags(world, base), "rl", 3)
    state, shard = json.loads((base / "state.json").read_text()), "checkpoint-rl-2/__0_0.distcp"
    for number, (damage, message) in enumerate([
            (put("config.json", 100), "config.json: "), (put("config.json", "{}"), "config.json: "),
            (put("config.json", None), "config.json: No such file"),
            (put("state.json", 20), "state.json: "), (put("state.json", "[]"), "state.json: "),
            (put("state.json", json.dumps(state | {"step": 9})), "not among the 3"),
            (put("state.json", json.dumps(state | {"step": -1})), "not among the 3"),
            (put("state.json", json.dumps(state | {"step": 1})), "checkpoint-rl-1"),
            (put("metrics.jsonl", 300), "metrics.jsonl.* is shorter"),
            (put("metrics.jsonl", None), "metrics.jsonl.* is shorter"),
            (put("metrics.jsonl", "7\n" * 5000), "metrics.jsonl: "),
            (put(shard, 1000), "checkpoint-rl-2"), (put(shard, None), "checkpoint-rl-2"),
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
import time, zlib, igpo
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
        while not (log.exists() and '"stage": "rl", "step": 2' in log.read_text()):
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

@pytest.mark.filterwarnings("ignore")
def test_memory_of_an_rl_step_on_eight_gpus(monkeypatch, P=200, L=256, N=8, rows_per_call=64):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh, peaks = init_device_mesh("cpu", (8,)), {}
    bf16 = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parameters = sys.modules["torch.distributed.fsdp._fully_shard._fsdp_param"]
    with FakeTensorMode(allow_non_fake_inputs=True), LiveStorage() as live:
        for name in "free_storage", "alloc_storage":  # FSDP resizes storages, which is no operation
            def resize(tensor, name=name, original=getattr(parameters, name)):
                original(tensor)
                live.see(tensor, freed=name == "free_storage")
            monkeypatch.setattr(parameters, name, resize)
        monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)  # there are no values
        with torch.device("meta"):
            policy = LlamaForCausalLM(LlamaConfig(
                hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, is_causal=False,
                vocab_size=126464, num_attention_heads=32, mask_token_id=126336))
        for module in (*policy.model.layers, policy):
            fsdp.fully_shard(module, mesh=mesh, mp_policy=bf16)
        policy.to_empty(device="cpu")
        policy.model.rotary_emb = type(policy.model.rotary_emb)(policy.config)
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, ids = igpo.adamw(policy, 1e-6), torch.zeros(N, P, dtype=torch.long)
        initial = [parameter.detach().clone() for parameter in igpo.trained(policy)]
        completions = torch.zeros(N, 8, L, dtype=torch.long)
        for _ in range(2):  # in the second step Adam's moments are there
            live.peak = live.now
            with igpo.gathered(policy), torch.no_grad():
                canvas = torch.zeros(rows_per_call, P + L, dtype=torch.long)
                logits = igpo.logits_at(policy, canvas, None, torch.arange(P, P + 32)).flatten(0, 1)
                igpo.choose_tokens(logits, 126336, 1.2, torch.zeros(len(logits)))
                del logits
            peaks["roll-out"], live.peak = live.peak / 2**30, live.now
            for _ in range(2):  # the policy, and the initial one that takes its place
                with torch.no_grad():
                    old, _ = igpo.completion_logps(policy, ids, completions)
                policy.reshard()
                igpo.swap(igpo.trained(policy), initial)
            peaks["scoring"], live.peak = live.peak / 2**30, live.now
            logps, _ = igpo.completion_logps(policy.train(), ids, completions)
            loss, _ = igpo.policy_loss(logps, old, old, torch.zeros(N, 8), completions == 0)
            loss.backward()
            del logps, loss
            igpo.optimizer_step(policy, optimizer, 1e-6, 1.0)
            peaks["update"] = live.peak / 2**30
    torch.distributed.destroy_process_group()
    print("GiB a GPU:", peaks)
    assert 20 < max(peaks.values()) < 40 and peaks["update"] > 13  # weights and moments alone

# ------------------------------------------------
# eval.py

@pytest.mark.parametrize("row, answer", [
    ({"question": "1?", "answer": "2 + 16 = <<18>>18.\n#### 1,080"}, "1,080"),  # GSM8K
    ({"problem": "1?", "answer": r"\frac{1}{2}", "solution": r"\boxed{3}"}, r"\frac{1}{2}"),  # MATH
    ({"problem": "1?", "answer": 36.0, "url": None}, "36"),  # AMC
    ({"problem": "1?", "solution": r"\boxed{3} \[\boxed{1.6} \mathrm{~cm}\]"}, "1.6"),  # Minerva
    ({"problem": None, "question": "1?", "answer": 0}, "0"),
    ({"problem": "1?", "answer": r"It is \boxed{5}."}, "5"),
    ({"problem": "1?", "answer": math.nan, "solution": r"\boxed{7}"}, "7")])
def test_the_four_file_formats(tmp_path, row, answer):
    path = write_jsonl(tmp_path / "data.jsonl", row)
    assert evaluation.read_problems(path) == [igpo.Problem("1?", answer, None)]

def test_what_is_in_no_file_comes_from_the_hub(monkeypatch):
    asked, rows = [], [{"problem": "1?", "answer": 1}] * 3
    monkeypatch.setattr(igpo, "read_rows", lambda source, split, subset: asked.append(
        (source, subset, split)) or rows)
    found = evaluation.load_problems(",".join(evaluation.TASKS), "math500=me/mine", 2)
    assert found == dict.fromkeys(evaluation.TASKS, [("1?", "1", None)] * 2)
    assert asked == [
        ("openai/gsm8k", "main", "test"), ("me/mine", None, "test"),
        ("AI-MO/aimo-validation-amc", None, "train"), ("math-ai/minervamath", None, "test")]

def test_accuracy_and_standard_error_by_hand():
    """avg@4: means 1, 1/4, 1/4; their variance is (1/4 + 1/16 + 1/16) / 2 = 3/16, a third 1/16"""
    samples = [{"task": "amc", "problem": i, "verdict": v == "1", "length": 10 + i,
                "extracted": None if i else "1", "timed_out": v == "0"}
               for i, verdicts in enumerate(["1111", "1000", "0001"]) for v in verdicts]
    assert evaluation.summarise(samples)["amc"] == {
        "accuracy": 0.5, "standard_error": pytest.approx(0.25), "n": 3, "samples": 12,
        "no_answer": 2 / 3, "length": 11, "grade_timeouts": 6}
    assert evaluation.summarise(samples[:4])["amc"]["standard_error"] is None  # of one problem

def test_prompts_of_like_length_share_a_batch():
    batches = evaluation.batches_of([[0] * n for n in (5, 1, 9, 3)], 2, 3, 0)
    assert sorted(batches) == [[(1, 0), (1, 1), (3, 0)], [(2, 0), (2, 1)], [(3, 1), (0, 0), (0, 1)]]

@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A random model, files of two tasks, and an uninterrupted evaluation by one process."""
    folder = tmp_path_factory.mktemp("eval")
    igpo.save_model(*igpo.toy_model(0), folder / "model")
    rows = [{"problem": p.question[i % 3:], "answer": p.answer}
            for i, p in enumerate(igpo.toy_problems(12, 0))]
    write_jsonl(folder / "gsm8k.jsonl", *rows[:7])
    write_jsonl(folder / "amc.jsonl", *rows[7:])
    flags = f"""--model {folder}/model --tasks gsm8k,amc --gen_length 8 --diffusion_steps 8
        --data gsm8k={folder}/gsm8k.jsonl,amc={folder}/amc.jsonl --block_length 4 --batch_size 4
        --amc_temperature 2 --amc_samples 6 --seed 5""".split()
    evaluation.main([*flags, "--out_dir", str(folder / "whole")])
    return folder, flags

def outcome(out):
    """What does not depend on how an evaluation was run."""
    result = json.loads((out / "results.json").read_text())
    return igpo.read_lines(out / "samples.jsonl"), result["results"], result["settings"]

def test_what_an_evaluation_leaves_behind(evaluated, capsys, monkeypatch):
    folder, flags = evaluated
    samples, _, _ = before = outcome(folder / "whole")
    assert [(s["task"], s["problem"], s["sample"]) for s in samples] == [
        ("gsm8k", i, 0) for i in range(7)] + [("amc", i, s) for i in range(5) for s in range(6)]
    model, tokenizer = igpo.load_model(folder / "model")
    for task, options in ("gsm8k", {}), ("amc", {"temperature": 2.0, "seed": (5, "amc")}):
        problems = evaluation.read_problems(folder / f"{task}.jsonl")
        own = {(s["problem"], s["sample"]): s["completion"] for s in samples if s["task"] == task}
        alone = igpo.answer_examples(  # no sample depends on its batch, each has its own noise
            model, tokenizer, igpo.encode_problems(tokenizer, problems, 99), jobs=list(own),
            batch_size=1, gen_length=8, steps=8, block_length=4, **options)
        assert {(i, s): text for i, s, text, _ in alone} == own
    monkeypatch.setattr(igpo, "answer_examples", None)  # nothing is left to do
    evaluation.main([*flags, "--out_dir", str(folder / "whole")])
    shown = capsys.readouterr().out
    assert "37 of 37 samples are in" in shown and re.search(r"^\| amc .* \| +30 \|", shown, re.M)
    assert outcome(folder / "whole") == before

def test_a_killed_evaluation_goes_on(evaluated, monkeypatch):
    """On one process or two, from what a kill of one or two may leave, half a line in each file."""
    folder, flags = evaluated
    out, command = folder / "killed", [*flags, "--out_dir", str(folder / "killed")]
    whole = (folder / "whole" / "samples.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(folder / "whole", out)
    (out / "samples.jsonl").write_text("".join(whole[20:24]) + whole[9][:-25])
    grade, graded = igpo.grade, []
    monkeypatch.setattr(igpo, "grade", lambda *pair: graded.append(pair) or grade(*pair))
    evaluation.main(command)
    assert len(graded) == 37 - 4 and outcome(out) == outcome(folder / "whole")

    (out / "samples.jsonl").write_text("".join(whole[:7]) + whole[9][:-25])
    (out / "samples.rank_1.jsonl").write_text(whole[30] + whole[12] + whole[2] + whole[11][:1])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "eval.py", *command], cwd=HERE, capture_output=True, text=True, timeout=200)
    assert done.stdout.count("9 of 37") == done.stdout.count("| accuracy") == 1, done.stderr
    assert outcome(out) == outcome(folder / "whole") and not list(out.glob("*rank*"))

def test_a_folder_is_for_one_setting(evaluated):
    folder, flags = evaluated
    rows, data = igpo.read_lines(folder / "amc.jsonl"), folder / "data.jsonl"
    flags = [*flags, "--tasks", "amc", "--data", f"amc={data}", "--out_dir", f"{folder}/other",
             "--limit", "1", "--model", f"{folder}/moved"]

    def refused(reason, *more):
        with pytest.raises(igpo.UsageError, match=rf"\({reason} was \d+, now it is \d+"):
            evaluation.main([*flags, *more])

    model, tokenizer = igpo.load_model(folder / "model")
    igpo.save_model(model, tokenizer, folder / "moved")
    write_jsonl(data, *rows)
    evaluation.main(flags)
    refused("seed", "--seed", "1")
    write_jsonl(data, rows[0] | {"answer": "99"})
    refused("problems")
    write_jsonl(data, rows[0])  # the limit is 1
    model.lm_head.weight.data = model.lm_head.weight.flip(0)  # of the same sum
    igpo.save_model(model, tokenizer, folder / "moved")
    refused("weights")

def test_rescore_and_ask(evaluated, tmp_path, capsys):
    folder, flags = evaluated
    samples = igpo.read_lines(folder / "whole" / "samples.jsonl")
    for i in 8, 9:
        samples[i] |= {"completion": r"\boxed{0.5}", "reference": "1/2", "verdict": i == 9}
    evaluation.main(["--rescore", write_jsonl(tmp_path / "samples.jsonl", *samples)])
    shown = capsys.readouterr().out
    assert shown.startswith("amc problem 0 sample 1: '0.5' for '1/2' is now True\n")
    assert shown.endswith("   0 |\n1 of 37 verdicts changed\n") and "|    0.067 |" in shown
    evaluation.main([*flags, "--ask", "ab="])
    shown = capsys.readouterr().out.splitlines()
    assert [line.count("_") for line in shown[:8]] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert shown[-1] == "answer: None"

def test_compare_by_hand(tmp_path, capsys):
    def run(name, shift, *points):
        lines = [{"stage": "rl", "all_wrong": float(i < 15), "all_wrong_after": 0.25,
                  "grad_norm": 2.0, "kl": i / 10} for i in range(20)]
        lines += [{"stage": "eval", "step": step, which: x + shift} for step, which, x in points]
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").touch()
        write_jsonl(tmp_path / name / "metrics.jsonl", *lines)
        return str(tmp_path / name)

    points = [(0, "accuracy_sft", 0.2), (10, "eval_accuracy", 0.4), (0, "accuracy_final", 0.5)]
    runs = run("a-0", 0.0, *points), run("a-1", 0.2, *points)
    evaluation.main(["--compare", *runs])
    shown = capsys.readouterr().out
    means = re.findall(r"(\d\.\d+) ± (\d\.\d+)", shown)
    assert means == [("0.300", "0.100"), ("0.600", "0.100")] + [
        (mean, "0.000") for mean in ("1.000", "0.000", "0.250", "2.000", "1.850")]
    assert '"held-out accuracy: a"' in shown and re.findall(r"(?:line|step\") (.*)", shown) == [
        "[0, 10, 20]", "[0.3, 0.5, 0.6]", "[10, 20]", "[1.0, 0.5]"]
    with pytest.raises(igpo.UsageError, match="different steps"):
        evaluation.main(["--compare", runs[0], run("b", 0.0, points[0], points[2])])

GOOD = {"problem": "ab=", "answer": "1"}
EVAL_WRONG = [  # command, message, rows of FILE
    ("--tasks amc", "no model: give --model"), ("--model m --tasks amc,aime", "no task 'aime'"),
    ("--model m --data math=a.jsonl", "no task 'math'"), ("--limit 0", "--limit is within"),
    ("--model m --gen_length 100", "gen_length 100 .* block_length 32"),
    ("DATA", "jsonl holds no rows"), ("DATA", "row 2: needs", GOOD, GOOD | {"problem": " "}),
    ("DATA", "row 1: needs a text problem", {"problem": ["1?"], "answer": "1"}),
    ("DATA", "row 1: needs .* solution with", {"problem": "1?", "solution": "so it is 1"}),
    ("DATA", "row 1: ", 5), ("DATA", "row 1: .*surrogates", GOOD | {"problem": "\ud800"}),
    ("DATA --model MODEL", "do not fit the model's 64 positions", GOOD),
    ("SMALL --out_dir FILE", "data.jsonl: File exists", GOOD),
    ("SMALL --out_dir DIR", "holds no evaluation; give another --out_dir: No such file", GOOD),
    ("SMALL --out_dir DIR/damaged", "holds no evaluation; give another --out_dir: Expect", GOOD),
    ("--rescore FILE", "row 1, column 'task'", GOOD), ("--compare DIR", "no finished run"),
    ("--rescore FILE", ": 'verdict'", {"task": "amc", "completion": "1", "reference": "1"})]

def test_what_a_user_of_eval_gets_wrong_is_one_line(evaluated, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "settings.json").write_text('{"model": ')
    failures, out = [], tmp_path / "out"
    for command, message, *rows in EVAL_WRONG:
        said, words = "", f"--out_dir {out} {command}"
        for name, text in [
                ("SMALL", "DATA --model MODEL --gen_length 8 --block_length 8 --diffusion_steps 8"),
                ("DATA", "--model m --tasks amc --data amc=FILE"),
                ("FILE", write_jsonl(tmp_path / "data.jsonl", *rows)), ("DIR", str(tmp_path)),
                ("MODEL", f"{evaluated[0]}/model")]:
            words = words.replace(name, text)
        try:
            evaluation.main(words.split())
        except igpo.UsageError as error:
            said = str(error)
        if not re.search(message, said) or "\n" in said or out.exists():
            failures.append(f"{command} -> {said!r}, not {message!r}")
    assert not failures, "\n".join(failures)
