"""The tests of igpo.py and eval.py, in their order: each formula on numbers worked out by hand or
against a plain loop, each promise once, what a user gets wrong in tables. Run: pytest"""

import ast
import contextlib
import dataclasses
import dis
import gc
import json
import math
import os
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
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import fsdp
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

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
    return igpo.prompt_batch(tiny_model(), [p[i % 4:] for i, p in enumerate(prompts)])

def write_jsonl(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "latin-1")
    return str(path)

# --- 1. The model

LLADA = [  # Llama's names and its own, spelled out once more by hand
    ("model.layers", "blocks"), ("lm_head", "ff_out"), ("model.embed_tokens", "wte"),
    ("model.norm", "ln_f"), ("input_layernorm", "attn_norm"), ("self_attn.o_proj", "attn_out"),
    ("post_attention_layernorm", "ff_norm"), ("mlp.gate_proj", "ff_proj"),
    ("mlp.down_proj", "ff_out"), ("self_attn.", ""), ("mlp.", "")]  # q, k, v and up keep theirs

def llada_folder(folder, **changes):
    """A tiny Llama as a LLaDA checkpoint."""
    rope, weights = {"rope_type": "default", "rope_theta": 5e5}, {}
    model = tiny_model(rope_parameters=rope, rms_norm_eps=1e-3, **changes)
    for name, weight in model.state_dict().items():
        for ours, theirs in LLADA:
            name = name.replace(ours, theirs)
        weights[f"model.transformer.{name}"] = weight.clone()
    if model.config.tie_word_embeddings:
        del weights["model.transformer.ff_out.weight"]
    tiny_tokenizer().save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")
    write_jsonl(folder / "config.json", dict(
        model_type="llada", auto_map={"AutoConfig": "configuration_llada.LLaDAConfig"},
        d_model=32, mlp_hidden_size=48, n_layers=2, n_heads=4, rms_norm_eps=1e-3, rope_theta=5e5,
        n_kv_heads=changes.get("num_key_value_heads"), max_sequence_length=128, vocab_size=V,
        embedding_size=V, weight_tying=model.config.tie_word_embeddings, mask_token_id=MASK,
        eos_token_id=END, pad_token_id=END))
    (folder / "configuration_llada.py").write_text("raise SystemExit('remote code was run')")
    return model

@pytest.mark.parametrize("shape", [{"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
def test_a_llada_is_loaded_and_saved_exactly(tmp_path, shape):
    ids, folder, copy = random_prompts(2, 9), tmp_path / "in", tmp_path / "out"
    ids[0, 3] = END
    original, words = llada_folder(folder, **shape), folder / "tokenizer.json"
    words.write_text(words.read_text().replace('"a"', '"<|eot_id|>"'))
    model, tokenizer = igpo.load_model(folder)
    logits = model(ids).logits
    assert torch.equal(logits, original(ids).logits)
    assert not torch.allclose(logits[:, :4], model(ids[:, :4]).logits)  # not causal
    assert model.config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|eot_id|>"), END]
    logits.square().mean().backward()
    assert model.get_input_embeddings().weight.grad[END].any()  # padding as well

    igpo.save_model(model, tokenizer, copy)
    before, after = (load_file(f / "model.safetensors") for f in (folder, copy))
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, copy))
    assert before == after
    assert (copy / "configuration_llada.py").exists()  # for LLaDA's own loader

def test_dream_is_read_one_to_the_left(tmp_path):
    original, ids = tiny_model(2, Qwen2ForCausalLM), random_prompts(2, 9)
    igpo.save_model(original, tiny_tokenizer(), tmp_path)
    raw = original.config.to_dict() | {"model_type": "Dream", "is_causal": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model, _ = igpo.load_model(tmp_path)
    logits = igpo.logits_at(model, ids, None, torch.arange(4, 7))
    assert torch.allclose(logits, original(ids).logits[:, 3:6], atol=1e-5)

def test_lora_is_merged_in_float32(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model(tie_word_embeddings=True).to(torch.bfloat16)
    want = {name: weight.float() + 2 ** -10 * ("up_proj" in name)  # too little for bfloat16
            for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"]))
    for name, weight in model.named_parameters():
        if "lora" in name:
            weight.data.fill_(2 ** -6)  # alpha / r times B A is 2 * (2 * 2 ** -12)
    igpo.save_model(model, tiny_tokenizer(), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6, check_dtype=False)

def test_the_first_end_token_is_counted():
    ids = torch.tensor([[1, 3, END, 3, END], [2, 1, 1, 1, 1], [1, 3, 3, 4, 5]])
    assert igpo.counted_tokens(ids, [END, 2]).sum(1).tolist() == [3, 1, 5]

# --- 2. The sampler

@torch.no_grad()
def published_sampler(model, prompt, hints, K, steps, threshold):
    """LLaDA's at temperature 0, for one unpadded row. Above a threshold all are filled in."""
    x, P = torch.cat([prompt, hints]), len(prompt)
    S = steps * K // len(hints) if threshold is None else K
    for start in range(P, len(x), K):
        total = (x[start: start + K] == MASK).sum().item()
        for step in range(S):
            p = model(input_ids=x[None]).logits[0].double().softmax(-1)
            p[:, MASK] = -1
            sure, best = p.max(-1)
            count = total // S + (step < total % S)
            masks = [i for i in range(start, start + K) if x[i] == MASK]
            for place, i in enumerate(sorted(masks, key=lambda i: -sure[i])):
                if place < count or threshold is not None and sure[i] > threshold:
                    x[i] = best[i]
    return x[P:]

@pytest.mark.parametrize("K, steps, threshold", [
    (12, 5, None), (4, 6, None), (4, 3, 0.0), (4, 3, 0.4)])
def test_greedy_sampling_is_the_published_sampler(K, steps, threshold):
    model, (prompts, mask) = tiny_model(2), padded(3)
    given, seen = torch.rand(3, 12, generator=igpo.seeded(4)) < 0.3, []
    hints = torch.where(given, random_prompts(3, 12, 5), MASK)
    out = igpo.sample(model, prompts, gen_length=12, block_length=K, steps=steps,
                      hints=hints, prompt_mask=mask, threshold=threshold,
                      watch=lambda x: seen.append(x.clone()))
    assert torch.equal(seen[-1], out)
    for prompt, real, hint, row in zip(prompts, mask, hints, out):
        assert torch.equal(row, published_sampler(model, prompt[real], hint, K, steps, threshold))

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

def test_the_sampler_costs_what_its_forwards_cost():
    model = tiny_model(hidden_size=256, eos_token_id=None, pad_token_id=None)
    cfg = evaluation.Config(gen_length=128, diffusion_steps=32, batch_size=2)
    rounds = [evaluation.time_sampler(model, cfg) for _ in range(3)]
    for name, most in ("exact", 1.6), ("cache", 0.8):  # 1.0, 0.4
        assert min(rows[name]["x bare"] for rows in rounds) < most

# --- 3. Hints

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

def test_chunks_have_any_length_within_bounds():
    hints = [igpo.make_hint(torch.arange(40), 1e-9, gen_length=70, mask_id=99,
                            generator=igpo.seeded(seed)) for seed in range(300)]
    chunks = [hint[hint != 99].tolist() for hint in hints]  # one of each
    assert set().union(*chunks) == set(range(40))
    assert {len(c) for c in chunks if c[-1] < 39} == {5, 6, 7, 8, 9, 10}  # the last may be shorter

@pytest.mark.parametrize("solution, answer, question", [  # the trace ends at the |
    ("6-5=$1.00 and 720+270=|$990.00", "990", ""), ("max is the| a of it", "a", ""),
    ("We get 1,200 + 34 =| 1,234.\nThe answer is: 1234", "1234", ""),
    (r"So $x =| \frac{1}{2}$, hence $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", ""),
    (r"It is| $\frac{a b}{c + 12}$ or 12.", "12", ""),  # not in a command
    ("There are 120 of| 12, so 12.", "12", ""), ("The sum is| -3.\n#### -3", "-3", ""),
    ("Lyn has 5 apples. 5 + 3 - 3 =| 5", "5", "Lyn has 5 apples"),
    ("Lyn has| 5 apples. 2 + 3 = 5", "5", "Lyn has 50 apples"),
    ("|Seventy-two.\n#### 72", "72", ""), ("|72", "72", ""), ("|any", "", "")])
def test_no_trace_holds_its_answer(solution, answer, question):
    trace = solution.split("|")[0] or None
    assert igpo.cut_trace(solution.replace("|", ""), answer, question) == trace
    assert all(p.answer not in p.trace for p in igpo.toy_data(igpo.toy_problem, 300, 0))

# --- 4. Rewards. A row for each rule: reference | a right answer, or reference ≠ a wrong one

ANSWERS = r"""
18 | \$18.00
18 | 18\ \text{dollars}
18 | \text{Janet makes 18 dollars}
18 | Answer: 18
18 | **18**
12 | 12~\mathrm {cm}
15\mbox{ cm}^2 | 15 \text{ square cm}
60 | 60 km/h
3, 5 | 3 books; 5 pens
\frac{1}{2} | 1/2 of a mile
\frac{1}{2} | \frac1{2}
\frac{1}{2} | \frac 1 2
1\frac{4}{5} | \frac{9}{5}
1\frac{4}{5} | 1 4/5
12.5 | 12.5\%
\frac{1}{10} | 10%
-5 | –5
5\sqrt{2} | 5√2
16\sqrt{3} | 16sqrt(3)
76^\circ | 76°
76^\circ | 76\degree
1.6e-19 ≠ 1.7 × 10^{-19}
4.5e33 | 4.5 \times 10^{33}
1e11 | 10^{11}
1234 | 1 234
58,500 | 58{,}500
11,\! 111,\! 100 | 11,111,100
\pi | about \pi
5 | \approx 5
3\pi | 3\pi \approx 9.42
101 | \boxed{}101
(1,2) | \bigl(1,2\bigr)
1,-2 | x=1 \text{ or } x=-2
(3, \frac{\pi}{2}) | (r,\theta) = (3, \frac{\pi}{2})
10 | Total = 10 pens
5x - 7y + 11z + 4 = 0 | 10x-14y+22z+8=0
(5,\infty) | x > 5
204_5 | 204
4210_{5} | 4210_5
43 | 43_{10}
\text{(C)} | \textbf{(C)}\ 12
\text{Evelyn} | evelyn!
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \left(\begin{array}{c} 1 \\ 2 \end{array}\right)
15 ≠ 18 liters
50 ≠ 0.5\%
\pi ≠ 3.14159265
5 ≠ x <= 5
1 ≠ \frac{0}{0}
530 ≠ 5 30
3,1234 ≠ 31234
1.5000 ≠ 1.5,000
(100,200) ≠ 100200
[100,200] ≠ 100200
\{100,200\} ≠ 100200
2516_8 ≠ 2516_7
204_5 ≠ 204_10
11 ≠ 11_8
3xyz ≠ 3
p - q ≠ q - p
odd ≠ ddo
\text{even} ≠ \text{not even}
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
    (r"\boxed{18} <answer>17</answer>", "18"), (r"\boxed{...} <answer>17</answer>", "17")])
def test_committed_answer(completion, answer):
    assert igpo.committed_answer(completion) == answer

HOSTILE = [
    r"9^{9^{9^9}}", "(a+b+c+d+e+f)^{40}", "1e999999999", "9" * 4301, "5\0", "\ud800+x", "," * 290,
    "()" * 140 + "=", "(" * 140 + "x" + ")" * 140, r"\boxed{" * 100_000 + "}" * 100_000,
    "{" * 1_000_000, "<answer>" * 120_000, r"\boxed" + " " * 1_000_000]

def test_hostile_answers_are_given_up_and_counted():
    right = r"\boxed{1+x}", "x+1"
    assert igpo.grade(*right)
    judge = igpo.judge.pid
    for text in HOSTILE:
        began = time.process_time()
        assert not igpo.grade(rf"\boxed{{{text}}}", r"\frac{3}{5}")
        assert not igpo.grade(r"\boxed{x+1}", text)
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
    assert not igpo.grade(*right) and time.time() - began < 8
    assert igpo.GRADE_TIMEOUTS == before + 2 and igpo.grade(*right)

def test_format_score_by_hand():
    form = "<reasoning>\n1+1=2\n</reasoning>\n<answer>\n\\boxed{2}\n</answer>"
    assert igpo.format_score(form) == 0.75
    assert igpo.format_score(form + "</answer>") == igpo.format_score(form[1:]) == 0.625
    assert igpo.format_score("\\boxed{2} \\boxed{3}") == 0.25
    assert igpo.format_score("<answer>2</answer>") == 0.125  # the opening tags end their lines

# --- 5. Elastic roll-out

G, L, TRACE = 8, 6, torch.arange(10, 16)

def test_all_wrong_groups_are_augmented():
    """Prompt n is the token n and has the generator of seed n. A response is right if it begins
    with a 1: one of prompt 1's; in the second draw three of prompt 0's and all of prompt 2's."""
    first = torch.tensor([[0] * G, [1] + [0] * 7, [2] * G, [0] * G])
    again = torch.tensor([[0] * 5 + [1] * 3, [1] * G])
    prompts, traces = torch.arange(4)[:, None], [TRACE] * 3 + [None]  # without a trace no hint

    def draw(prompts, prompt_mask, generators, hints):
        draws.append((prompts[:, 0].tolist(), hints))
        assert [g.initial_seed() for g in generators] == draws[-1][0]
        out = torch.randint(99, (len(prompts), G, L))
        out[..., 0] = first if hints is None else again
        return out

    for algo, lam, *replaced in [("grpo", 0.5), ("resample", 0.5, 3, 4), ("igpo", 0.3, 2, 2),
                                 ("igpo", 0.5, 3, 4), ("igpo", 1.0, 3, 8)]:
        draws = []
        out = igpo.rollout(
            draw, lambda o, answer: o[0].item() == answer, prompts, prompts >= 0, [1] * 4, traces,
            [torch.Generator().manual_seed(n) for n in range(4)], mask_id=MASK, algo=algo,
            lam=lam, eta=(0.4, 0.9), min_chunk=1, max_chunk=1, room=0)
        assert torch.equal(out.first_correct, first == 1)
        assert torch.equal(out.correct, out.completions[..., 0] == 1)
        want, hinted = out.first.clone(), torch.zeros(4, G, L).bool()
        if algo != "grpo":  # resample is sample-matched: it draws what igpo would
            asked, hints = draws[1]
            given = hints != MASK
            assert asked == [0, 2] and torch.equal(hints, torch.where(given, TRACE, MASK))
            counts = set(given.sum(-1).flatten().tolist())  # each response has its own eta
            assert counts == ({2, 3, 4, 5} if algo == "igpo" else {0})
            for s, n, K in zip([0, 1], [0, 2], replaced):  # a hint mask goes with its response
                winners = again[s].nonzero().flatten()[:K]
                want[n, :K], hinted[n, :K] = out.second[s, winners], given[s, winners]
        assert torch.equal(out.completions, want) and torch.equal(out.hinted, hinted)
        assert len(draws) == 1 + (algo != "grpo")

# --- 6. Log-probabilities

def test_one_forward_serves_the_group():
    """Here each row runs by itself, and without padding."""
    model, (prompts, mask) = tiny_model(1), padded(2)
    completions = torch.randint(0, V, (2, 3, 7), generator=igpo.seeded(0))
    logps, entropy = igpo.completion_logps(model, prompts, completions, prompt_mask=mask)
    for n in range(2):
        canvas = torch.cat([prompts[n][mask[n]], torch.full((7,), MASK)])
        table = model(canvas[None]).logits[0, -7:].log_softmax(-1)
        assert torch.allclose(logps[n], table[range(7), completions[n]], atol=1e-4)
        assert torch.allclose(entropy[n], -(table.exp() * table).sum(-1), atol=1e-4)
    assert logps.requires_grad and not entropy.requires_grad  # the entropy selects, no more

# --- 7. The IGPO objective

def test_advantages_are_centred_not_scaled():
    rewards = torch.tensor([[True, False, False, False], [True, True, False, False]])
    want = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    assert torch.equal(igpo.group_advantages(rewards), want)

def test_the_most_uncertain_hints_learn():
    entropy = torch.tensor([[0.5, 3.0, 0.1, 2.0, 9.0, 1.0]])
    hints = torch.tensor([[[1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1]]]).bool()
    for keep, first, second in [
            (0, [4], [0, 1, 2, 3]), (1e-5, [1, 4], [0, 1, 2, 3, 4]),
            (0.5, [1, 3, 4, 5], [0, 1, 2, 3, 4])]:
        learn = igpo.entropy_filter(entropy, hints, keep)
        assert [row.nonzero().flatten().tolist() for row in learn[0]] == [first, second]
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
    assert igpo.policy_loss(logps, old, None, A, mask, beta=0)[1]["kl"] == 0

# --- 8. The SFT objective

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
    loss, metrics = igpo.sft_loss(model, prompts, completions, t=torch.full((3,), 1e-9))
    assert loss.item() == 0 and metrics == {"nll": 0.0, "masked": 0.0}
    _, metrics = igpo.sft_loss(model, random_prompts(400, 1), random_prompts(400, 9))
    assert 0.4 < metrics["masked"] < 0.6  # t is uniform

# --- Each public function lifts out of igpo.py with the names that it needs, and nothing else.

LIFTS = [  # the lines to copy, at most, and a test that the copy passes too
    ("load_model", 90, test_dream_is_read_one_to_the_left),
    ("sample", 100, test_each_prompt_is_sampled_by_itself),
    ("make_hint", 30, test_a_hint_is_floor_eta_N_chunks),
    ("grade", 110, test_the_rules_of_the_grader),
    ("rollout", 70, test_all_wrong_groups_are_augmented),
    ("completion_logps", 40, test_one_forward_serves_the_group),
    ("group_advantages", 30, test_advantages_are_centred_not_scaled),
    ("entropy_filter", 30, test_the_most_uncertain_hints_learn),
    ("policy_loss", 30, test_the_policy_loss),
    ("sft_loss", 40, test_the_sft_loss)]

@pytest.mark.parametrize("name, most, check", LIFTS)
def test_each_public_function_lifts_out(name, most, check, monkeypatch, tmp_path):
    binds, reads, needed, before = {}, {}, {name}, None
    for node in ast.parse((HERE / "igpo.py").read_text()).body:
        codes = [compile(ast.Module([node], []), "igpo.py", "exec")]
        for code in codes:  # functions
            codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        steps = [step for code in codes for step in dis.get_instructions(code)]
        binds[node] = {step.argval for step in steps if step.opname == "STORE_NAME"}
        reads[node] = {step.argval for step in steps if step.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
    while needed != before:
        before, nodes = needed, [node for node in binds if binds[node] & needed]
        needed = needed.union(*map(reads.get, nodes)) - {"block_cache"}  # the exact one has none
    copy = {"__name__": "copy"}
    exec(compile(ast.Module(nodes, []), "copy", "exec"), copy)
    monkeypatch.setattr(igpo, name, copy[name])
    check(*[tmp_path] * check.__code__.co_argcount)
    copied = [node for node in nodes if not isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = sum(node.end_lineno - node.lineno + 1 + len(getattr(node, "decorator_list", []))
                for node in copied)
    print(f"{name}: {lines} lines copied")
    assert lines <= most

# --- The recipe (sections 9 to 11): most run main() on a LLaDA-format folder with random weights.

@pytest.fixture(autouse=True)
def group_of_one():
    igpo.setup()

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
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_"))}
            for line in igpo.read_lines(out / "metrics.jsonl") if line["stage"] == stage]

def arbitrary(completion, reference):
    """In place of grade: a random model's answers are never right, and IGPO would have no work."""
    return zlib.crc32(completion.encode()) % 8 == 0

@pytest.fixture
def arbitrary_grades(monkeypatch):
    monkeypatch.setattr(igpo, "grade", arbitrary)

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
GOOD = meta("1.1=", "The answer is: 5")
SHARD = "run/checkpoint-rl-2/__0_0.distcp"
WRONG = [
    (None, "--preset nonsense", "--preset: invalid choice: 'nonsense'"),
    (None, "--tau nan", "--tau is within 0..1, not nan"),
    (None, "--eta_low 0.9", "--eta_low is above --eta_high"),
    (None, "--gen_length 21", "gen_length 21 .*block_length 8"),
    (None, "--stage sft", "--stage sft needs --sft_data"),
    ("three processes", "", "--prompts_per_step 4 .* 3 processes"),
    (None, "--out_dir m", "m is not empty: --resume"),
    (None, "--out_dir absent --resume", "absent/config.json: No such"),
    (None, "--model GSAI-ML/LLaDA-8B-Instruct", "needs GPUs.* --preset toy"),
    # data
    (*data(), "data.jsonl: empty"), (*data(GOOD, 7), "data.jsonl: .* row "),
    (*data("type,query", "a,b", name="d.csv"), "d.csv, row 1: None in column 'response'"),
    (*data("PAR1", name="d.parquet"), "d.parquet: "), (*data("\xff"), "data.jsonl: .*Invalid"),
    (*data(GOOD, GOOD | {"query": None}), "row 2: None in column 'query' is no text"),
    (*data(GOOD, GOOD | {"query": "\ud800"}), "data.jsonl: .*surrogate"),
    (*data(GOOD, meta("2", "no answer"), meta("3", "The answer is: 3", "other")),
     "no more than --eval_size 4 rows of type GSM_AnsAug"),
    (None, "--max_prompt_length 2", "all prompts exceed --max_prompt_length 2"),
    (None, "--gen_length 512 --diffusion_steps 64", "prompt of 4 and .* of 512 .* 128 positions"),
    (None, f"{SFT} --sft_length 2", "all completions exceed --sft_length 2"),
    (None, REWRITE, "row 1: None in column 'problem'"),
    (*data({"problem": "1", "answer": "1", "solution": "1"},
           flag=f"{REWRITE} --rewriter /absent --rewrite_data"), "/absent: "),
    # the model
    (remove("m/config.json"), "", "m: No such file"),
    (cut("m/config.json", 0), "", "m: Expecting value"), (config(n_heads=5), "", "m: "),
    (config(mask_token_id=99), "", "m: token 99 is not among the"),
    (config(eos_token_id=None), "", "m: .*eos_token_id"),
    (config(model_type="gpt2"), "", "'gpt2' is not supported"), (config(alibi=True), "", "alibi"),
    (config(weight_tying=True), "", "ties head and embedding"),
    (remove("m/tokenizer.json"), "", "m has no tokenizer"),
    (remove("m/model.safetensors"), "", "m: .*model.safetensors"),
    (cut("m/model.safetensors", 5000), "", "m: "),
    (without_norm, "", "missing_keys model.norm"),
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
    elif damage:
        damage()
    before, resumes = sorted(Path().rglob("*")), wrong == "--resume"
    with pytest.raises(igpo.UsageError) as error:
        igpo.main(flags(Path(), "run" if resumes else "out", *wrong.split(), sft=resumes))
    assert re.fullmatch(f".*{message}.*", str(error.value)) and len(str(error.value)) < 400
    assert sorted(Path().rglob("*")) == before and capfd.readouterr().err == ""

def test_every_number_is_refused_or_within_its_bounds():
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
            assert low <= getattr(cfg, f.name) <= high, (f.name, word)
    cfg = igpo.parse(igpo.Config, ["--preset", "toy", "--lr", "0.5", "--tau", "1"], igpo.PRESETS)
    assert (cfg.lr, cfg.tau, cfg.model, cfg.group_size) == (0.5, 1, "toy", 8)

def test_metamath_is_filtered_and_its_answers_cut(tmp_path):
    rows = [meta("What is 2+3?", "It is\n2+3 = 5\n#### 5\nThe answer is: 5"),
            meta("What is 2+3?", "Again 2+3 = 5\nThe answer is: 5"),
            meta("Tell me 2+3", "5\nThe answer is: 5", "GSM_Rephrased"),
            meta("Half?", "It is $\\frac{1}{2}$.\nThe answer is: \\frac{1}{2}", "MATH_AnsAug"),
            meta("Words?", "Five.\n#### 5\nThe answer is: 5"), meta("None?", "It is 5.")]
    assert igpo.metamath_problems(write_jsonl(tmp_path / "[1].jsonl", *rows)) == [
        ("What is 2+3?", "5", "<reasoning>\nIt is\n2+3 ="),
        ("Half?", "\\frac{1}{2}", "<reasoning>\nIt is"),
        ("Words?", "5", None)]

def test_problems_are_held_out_filtered_and_batched(tmp_path):
    rows = [meta(f"{a}" * (a + 1), f"The answer is: {a}") for a in range(9)]
    path = write_jsonl(tmp_path / "meta.jsonl", *rows)
    cfg = igpo.Config(train_data=path, eval_size=2, max_prompt_length=5)
    problems, held_out, _ = igpo.load_data(cfg)
    assert (len(problems), len(held_out)) == (7, 2) and not set(problems) & set(held_out)
    fit = igpo.fitting(tiny_model(), tiny_tokenizer(), problems, 16, cfg)
    assert [p.answer for p in fit] == ["2", "3", "4"]  # the longer ones are left out
    seen = [i for step in range(10) for i in igpo.batch_indices(20, 4, step, 0)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]
    assert igpo.batch_indices(20, 4, 7, 0) == seen[28:32]  # a function of the step alone

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
    "empty_hints kl ratio clip_fraction entropy loss grad_norm skipped lr completion_length "
    "cache threshold tokens_per_second seconds seconds_rollout seconds_update".split())

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
    assert all(math.isfinite(v) for x in lines for v in x.values() if not isinstance(v, str))
    summary = json.loads((out / "summary.json").read_text())
    assert set("accuracy_start accuracy_sft accuracy_final all_wrong all_wrong_after steps seconds"
               .split()) <= summary.keys() and summary["steps"] == 2

def test_the_view_of_a_rescued_response():
    tokenizer = tiny_tokenizer()
    wrong, right = (torch.tensor([tokenizer(text).input_ids]) for text in ("1.2=", "1.3="))
    hinted = torch.tensor([[False, True, True, False]])
    learning = torch.tensor([[True, True, False, True]])
    roll = igpo.Rollout(right[None], None, hinted[None], wrong[None], *[None] * 3)
    shown = igpo.show_group(tokenizer, roll, learning[None])
    assert "wrong      '1.2='\n" in shown and "inpainted  '1[.^][3]='" in shown

def test_sft_learns_with_a_linear_schedule(world, tmp_path):
    igpo.main(flags(world, tmp_path / "run", "--stage", "sft", "--sft_steps", 60, "--sft_batch", 24,
                    "--sft_rows_per_forward", 9, "--sft_lr", 1e-2, "--warmup_steps", 9))
    lines = lines_of(tmp_path / "run", "sft")
    losses, rates = ([line[name] for line in lines] for name in ("loss", "lr"))
    assert len(losses) == 60 and sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert max(rates) == pytest.approx(1e-2) == rates[9] and rates[0] == pytest.approx(1e-3)

def test_epochs_give_the_steps(world, tmp_path, capsys):
    argv = flags(world, tmp_path / "run", "--epochs", 1, "--diffusion_steps", 2, sft=False)
    at = argv.index("--max_steps")
    igpo.main(argv[:at] + argv[at + 2:])
    assert "RL: 5 steps of 4 prompts" in capsys.readouterr().out  # 20 problems
    rates = [line["lr"] / 1e-4 for line in lines_of(tmp_path / "run")]  # means over two updates
    assert rates == pytest.approx([3 / 6, 15 / 16, 11 / 16, 7 / 16, 3 / 16])

def test_updates_that_are_not_finite_end_the_run(world, tmp_path, monkeypatch):
    model = tiny_model()
    igpo.shard(model, torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    (model(random_prompts(1, 3)).logits.mean() * math.nan).backward()
    optimizer, _ = igpo.begin(model, "rl", 1, (None, 0, None))
    found = igpo.optimizer_step(model, optimizer, 1.0, 1.0)
    assert math.isnan(found["grad_norm"]) and found["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    loss = igpo.policy_loss
    monkeypatch.setattr(igpo, "policy_loss",
                        lambda *a, **k: (loss(*a, **k)[0] * math.inf, {"kl": 0}))
    with pytest.raises(igpo.UsageError, match="no gradient of this step was finite"):
        igpo.main(flags(world, tmp_path / "run", "--mu", 10, sft=False))
    assert len(lines_of(tmp_path / "run")) == 1

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
    kept = igpo.read_rows(str(out / "traces.jsonl"), ["prompt", "completion"])
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
    assert igpo.checkpoints(out)[-1][:2] == ("sft", 2)
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
    with pytest.raises(igpo.UsageError, match=r"was started with --mu 2$"):
        igpo.main([*argv, "--resume", "--mu", "1"])

def test_the_kl_is_to_the_initial_policy(world, tmp_path, monkeypatch, arbitrary_grades):
    """The first ratio is 1 and the first KL 0, the scored reference stays the same later."""
    scored, group_logps = [], igpo.group_logps
    fixed = random_prompts(2, 9)
    seen = fixed > -1, random_prompts(8, 4).view(2, 4, 4), 2

    def spy(model, *inputs):
        scored.append(group_logps(model, fixed, *seen)[0])
        return group_logps(model, *inputs)

    monkeypatch.setattr(igpo, "group_logps", spy)
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
    argv, out = flags(world, tmp_path / "run", *lora, "--sft_save_every", 1), tmp_path / "run"
    broken(argv, "sft", 3)
    broken([*argv, "--resume"], "rl", 1)
    broken([*argv, "--resume"], "rl", 3)
    igpo.main([*argv, "--resume"])
    same_runs(tmp_path / "whole", out)
    reader = torch.distributed.checkpoint.FileSystemReader(out / "checkpoint-rl-3")
    stored = reader.read_metadata().state_dict_metadata
    assert stored and all(".lora_" in name or "param_groups" in name for name in stored)  # no base

    cfg = igpo.parse(igpo.Config, argv, igpo.PRESETS)
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
    return [(code, file.seek(0) or file.read()) for code, file in zip(status, said)]

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
    monkeypatch.setattr(igpo, "grade", lambda *_: igpo.rank() == 1)  # rank 0 draws twice, 1 once
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

# Memory on 8 GPUs, by running the real functions on fake tensors of LLaDA-8B's shape

@pytest.mark.filterwarnings("ignore")
def test_memory_of_an_rl_step_on_eight_gpus(monkeypatch, P=200, L=256, N=8, rows_per_call=64):
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh, peaks = init_device_mesh("cpu", (8,)), {}
    bf16 = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def peak(phase):
        """Since the last call."""
        peaks[phase] = live._peak_mem.pop(torch.device("cpu")) / 2**30

    for hook in "_pre_fw_hook", "_post_fw_hook", "_pre_bw_hook", "_post_bw_hook":
        monkeypatch.setattr(MemTracker, hook, lambda *_: None)  # of modules we ask nothing
    with FakeTensorMode(allow_non_fake_inputs=True), MemTracker() as live:
        monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)  # there are no values
        with torch.device("meta"):
            policy = LlamaForCausalLM(LlamaConfig(
                hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, is_causal=False,
                vocab_size=126464, num_attention_heads=32, mask_token_id=126336))
        for module in (*policy.model.layers, policy):
            fsdp.fully_shard(module, mesh=mesh, mp_policy=bf16, reshard_after_forward=True)
        policy.to_empty(device="cpu")
        policy.model.rotary_emb = type(policy.model.rotary_emb)(policy.config)
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, _ = igpo.begin(policy, "rl", 1, (None, 0, None))
        ids = torch.zeros(N, P, dtype=torch.long)
        initial = [parameter.detach().clone() for parameter in igpo.trained(policy)]
        completions = torch.zeros(N, 8, L, dtype=torch.long)
        for _ in range(2):  # in the second step Adam's moments are there
            with igpo.gathered(policy), torch.no_grad():
                canvas = torch.zeros(rows_per_call, P + L, dtype=torch.long)
                logits = igpo.logits_at(policy, canvas, None, torch.arange(P, P + 32)).flatten(0, 1)
                igpo.choose_tokens(logits, 126336, 1.2, torch.zeros(len(logits)))
                del logits
            peak("roll-out")
            for _ in range(2):  # the policy, and the initial one that takes its place
                with torch.no_grad():
                    old, _ = igpo.completion_logps(policy, ids, completions)
                igpo.swap(igpo.trained(policy), initial)
            peak("scoring")
            logps, _ = igpo.completion_logps(policy.train(), ids, completions)
            loss, _ = igpo.policy_loss(logps, old, old, torch.zeros(N, 8), completions == 0)
            loss.backward()
            del logps, loss
            igpo.optimizer_step(policy, optimizer, 1e-6, 1.0)
            peak("update")
    torch.distributed.destroy_process_group()
    print("GiB a GPU:", peaks)
    assert 13 < min(peaks.values()) < max(peaks.values()) < 40  # 13: weights and moments

# --- eval.py

def test_the_four_formats_and_hub_names(monkeypatch):
    rows = {
        "openai/gsm8k main test": {"question": "1?", "answer": "18.\n#### 1,080"},
        "me/mine None test": {"problem": "1?", "answer": r"\frac{1}{2}", "solution": r"\boxed{3}"},
        "AI-MO/aimo-validation-amc None train": {"problem": None, "question": "1?", "answer": 0.0},
        "math-ai/minervamath None test": {
            "problem": "1?", "answer": math.nan, "solution": r"\boxed{3} or $\boxed{1.6}$ m"}}
    monkeypatch.setattr(igpo, "read_rows", lambda source, split, subset: [
        rows[f"{source} {subset} {split}"]] * 3)
    found = evaluation.load_problems(",".join(evaluation.TASKS), "math500=me/mine", 2)
    answers = {"gsm8k": "1,080", "math500": r"\frac{1}{2}", "amc": "0", "minerva": "1.6"}
    assert found == {task: [("1?", answer, None)] * 2 for task, answer in answers.items()}

def test_rescore_by_hand(tmp_path, monkeypatch, capsys):
    """avg@4: means 1, 1/4, 1/4; variance (1/4 + 1/16 + 1/16) / 2 = 3/16, a third 1/16"""
    monkeypatch.setattr(igpo.select, "select", lambda *_: ([], [], []))  # too slow for x
    texts = {"1": r"\boxed{0.5}", "x": r"\boxed{x}", "-": "0.5"}
    problems = ("amc", 0, "1111"), ("amc", 1, "1x--"), ("amc", 2, "---1"), ("gsm8k", 0, "-")
    samples = [{"task": task, "problem": i, "sample": s, "completion": texts[kind],
                "reference": "1/2", "verdict": kind == "1", "length": i}
               for task, i, kinds in problems for s, kind in enumerate(kinds)]
    samples[4]["verdict"] = False
    path = write_jsonl(tmp_path / "samples.jsonl", *samples)
    os.truncate(path, os.path.getsize(path) - 1)  # of no loss
    evaluation.main(["--rescore", path])
    shown = re.sub(" +", " ", capsys.readouterr().out).splitlines()
    assert shown[:1] + shown[3:] == [
        "amc problem 1 sample 0: '0.5' for '1/2' is now True",
        "| amc | 0.500 | 0.250 | 3 | 12 | 0.417 | 1.000 | 1 |",
        "| gsm8k | 0.000 | None | 1 | 1 | 1.000 | 0.000 | 0 |", "1 of 13 verdicts changed"]

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
    monkeypatch.setattr(evaluation, "answer", None)  # nothing is left to do
    evaluation.main(FLAGS)
    assert igpo.read_lines(Path("out/samples.jsonl")) == samples
    results = json.loads(Path("out/results.json").read_text())
    assert results["results"] == evaluation.summarise(samples)

@pytest.mark.parametrize("processes, files, kept", [(1, 1, 7), (1, 2, 10), (2, 2, 10)])
def test_a_killed_evaluation_goes_on(samples, capfd, processes, files, kept):
    """From what one process or two left, half a line at each end."""
    lines = [json.dumps(sample | {"kept": 1}) + "\n" for sample in samples]
    shutil.copytree("out", "killed")
    left = {"samples": lines[:7], "samples.rank_1": lines[30:2:-9]}
    for name in [*left][:files]:
        Path(f"killed/{name}.jsonl").write_text("".join(left[name]) + lines[9][:-25])
    command = [*FLAGS, "--out_dir", "killed"]
    if processes == 1:
        evaluation.main(command)
    else:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                        "--standalone", HERE / "eval.py", *command], check=True, timeout=200)
    after = igpo.read_lines(Path("killed/samples.jsonl"))
    assert sum(sample.pop("kept", 0) for sample in after) == kept and after == samples
    assert capfd.readouterr().out.count("| accuracy") == 1 and not [*Path("killed").glob("*rank*")]

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

def test_compare_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rl = [{"stage": "rl", "all_wrong": i < 15, "all_wrong_after": 0.25, "grad_norm": 2,
           "kl": i / 10} for i in range(20)]
    for name, shift, half in ("a-0", 0.0, 10), ("a-1", 0.2, 10), ("b-0", 0.0, 5):
        Path(name).mkdir()
        Path(name, "summary.json").touch()
        points = (0, "accuracy_sft", 0.2), (half, "eval_accuracy", 0.4), (0, "accuracy_final", 0.5)
        write_jsonl(Path(name, "metrics.jsonl"), *rl, *[
            {"stage": "eval", "step": step, what: x + shift} for step, what, x in points])
    evaluation.main(["--compare", "a-0", "a-1"])
    assert re.findall(r"\d\.\d+ ± \d\.\d+|\[.*\]", capsys.readouterr().out) == [
        "0.300 ± 0.100", "0.600 ± 0.100", "1.000 ± 0.000", "0.000 ± 0.000", "0.250 ± 0.000",
        "2.000 ± 0.000", "1.850 ± 0.000", "[0, 10, 20]", "[0.3, 0.5, 0.6]", "[10, 20]",
        "[1.0, 0.5]"]
    with pytest.raises(igpo.UsageError, match="different"):
        evaluation.main(["--compare", "a-0", "b-0"])

EVAL_WRONG = [  # flags, message, amc.jsonl from then on
    ("--model=", "no model"), ("--tasks amc,aime", "no task 'aime'"),
    ("--data math=a.jsonl", "no task 'math'"), ("--limit 0", "limit is"),
    ("--gen_length 64 --diffusion_steps 16", "64 positions"),
    ("--out_dir amc.jsonl", "amc.jsonl: File"), ("--compare out", "no finished run"),
    ("--out_dir model", "model holds no evaluation.*No such file"),
    ("--out_dir .", "no evaluation.*Expecting"),
    ("", "amc.jsonl holds no rows", ""), ("", "amc.jsonl: .*row", 5),
    ("", "jsonl: .*surrogate", {"problem": "\ud800"}), ("--data amc", "TASK=SOURCE"),
    ("", "row 2: needs", *[{"problem": text, "answer": 1} for text in ("1?", " ")]),
    ("", "row 1: needs", {"problem": ["1?"], "answer": 1}),
    ("", "row 1: needs", {"problem": "1?", "solution": "1"}),
    ("", "must be text", {"problem": "1?", "answer": 10**30}),
    ("--rescore absent.jsonl", "absent.jsonl: Unable to find"),
    ("--rescore amc.jsonl", ": 'verdict'", {"task": "", "completion": "", "reference": ""})]

def test_errors_of_eval_are_one_line(samples):
    Path("settings.json").write_text('{"model": ')  # damaged
    for flags, message, *rows in EVAL_WRONG:
        if rows:
            write_jsonl(Path("amc.jsonl"), *rows)
        with pytest.raises(igpo.UsageError) as error:
            evaluation.main([*FLAGS, "--out_dir", "new", *flags.split()])
        assert re.fullmatch(f".*{message}.*", str(error.value)), message
        assert not Path("new").exists()
