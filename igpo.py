"""IGPO: Inpainting-Guided Policy Optimization for diffusion LLMs (arXiv 2509.10396), in one file.

A masked diffusion LLM writes by filling in masks in any order, so it can also fill in around text
that is already there. GRPO learns from the differences within a group of G responses to a prompt;
when all are wrong there are none. IGPO then puts random chunks of the reference reasoning (never
the answer) into the masked completion as hints, lets the model inpaint the rest, and swaps what
comes out right for some of the wrong responses.

    python igpo.py --preset toy                  the whole recipe on a laptop CPU, in minutes
    torchrun --nproc_per_node=8 igpo.py          LLaDA-8B-Instruct on MetaMathQA

Shapes: B rows, N prompts, G responses a prompt, P prompt length (left-padded), L completion length,
V vocabulary; B = N * G rows have the G of a prompt side by side. Config explains the symbols.
"""

import ctypes
import fcntl
import glob
import json
import logging
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed import barrier, get_rank as rank, get_world_size as world
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
    Qwen2Tokenizer)
from transformers.cache_utils import Cache, DynamicLayer

class UsageError(ValueError):
    """What the user can put right: one line and status 2."""

@contextmanager
def file_errors(path):
    """What goes wrong in reading or writing a file, model or data set is one line naming it."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, dcp.CheckpointException) as error:
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or str(cause).strip().split("\n")[-1] or "empty"
        raise UsageError(f"{path}: {reason[:200]} ({type(cause).__name__})") from error

# ------------------------------------------------
# 1. The model. LLaDA is Llama without the causal mask and Dream is Qwen2 without it: both load into
#    transformers' own classes with is_causal=False, and no remote code runs.

# LLaDA's parameter names -> Llama's, one after the other. As it saves transformers renames back.
LLADA_NAMES = {
    "model.transformer.ff_out": "lm_head", "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm", "model.transformer.blocks": "model.layers",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
    "([qkv]_proj)": r"self_attn.\1", "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}

def model_config(raw):
    """A checkpoint's config.json -> the config of its bidirectional twin. Dream's has logit_shift
    1: the output at i - 1 predicts position i."""
    kind = raw.get("model_type")
    if kind == "llada":
        if raw.get("alibi") or raw.get("input_emb_norm") or raw.get("scale_logits"):
            raise UsageError("config.json sets alibi, input_emb_norm or scale_logits: unsupported")
        config = LlamaConfig(
            hidden_size=raw["d_model"], intermediate_size=raw["mlp_hidden_size"],
            num_hidden_layers=raw["n_layers"], num_attention_heads=raw["n_heads"],
            num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
            vocab_size=raw.get("embedding_size") or raw["vocab_size"],
            max_position_embeddings=raw["max_sequence_length"], rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=raw["rope_theta"], tie_word_embeddings=raw["weight_tying"],
            mask_token_id=raw["mask_token_id"], eos_token_id=raw["eos_token_id"],
            pad_token_id=raw.get("pad_token_id"))
    elif kind == "Dream":
        config = AutoConfig.for_model(**raw | {"model_type": "qwen2", "logit_shift": 1})
    elif kind in ("llama", "qwen2", "qwen3") and "mask_token_id" in raw:
        config = AutoConfig.for_model(**raw)
    else:
        raise UsageError(f"model_type {kind!r} is not supported, or has no mask_token_id")
    config.is_causal = False
    return config

def load_model(name_or_path, *, dtype=None, device="cpu"):
    """Load a masked diffusion LM and its tokenizer; none of the checkpoint's code is run.

    name_or_path: folder or hub name of LLaDA, iLLaDA, Dream, or a bidirectional Llama or Qwen saved
    here. dtype: default float32. device: "meta" for shapes alone. eos_token_id becomes a list."""
    folder, report = Path(name_or_path), {}
    with file_errors(name_or_path):
        if not folder.is_dir():
            if folder.is_absolute() or len(folder.parts) != 2:  # a hub name is owner/name
                raise UsageError(f"no model folder at {name_or_path}")
            folder = Path(snapshot_download(str(name_or_path), ignore_patterns=["*.bin", "*.pth"]))
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("auto_map", None)  # names the checkpoint's code
        config = model_config(raw)
        # AutoTokenizer would stop to ask whether to run the checkpoint's code; these do not.
        fast = (folder / "tokenizer.json").is_file()
        if not fast and not (folder / "vocab.json").is_file():
            raise UsageError(f"{folder} has no tokenizer.json or vocab.json")
        tokenizer = (PreTrainedTokenizerFast if fast else Qwen2Tokenizer).from_pretrained(folder)
        words, ends = tokenizer.get_vocab(), config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        turns = [words[end] for end in ("<|eot_id|>", "<|im_end|>") if end in words]
        config.eos_token_id = list(dict.fromkeys(turns + ends))  # the first ends a turn
        config.pad_token_id = ends[0] if config.pad_token_id is None else config.pad_token_id
        for token in (config.mask_token_id, config.pad_token_id, *ends, max(words.values())):
            if token not in range(config.vocab_size):
                raise UsageError(f"{folder}: token {token} is not among the {config.vocab_size}")
        tied = config.tie_word_embeddings
        if str(device) == "meta":
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype or torch.float32, use_safetensors=True,
                key_mapping=LLADA_NAMES if raw["model_type"] == "llada" else None,
                ignore_mismatched_sizes=True, output_loading_info=True)
    for problem, names in report.items():  # missing_keys, unexpected_keys, mismatched_keys, ...
        if names:
            raise UsageError(f"{folder}: weights do not fit config.json, {problem} {min(names)}")
    if tied and model.lm_head.weight is not model.get_input_embeddings().weight:
        raise UsageError(f"{folder}: config.json ties head and embedding, the weights do not")
    model.get_input_embeddings().padding_idx = None  # padding is the end token, which is trained
    files = [folder / "config.json", *folder.glob("*.py")]
    model.source_files = {file.name: file.read_text() for file in files}
    return model.to(device).eval(), tokenizer

def save_model(model, tokenizer, folder):
    """Write a folder that load_model and the family's own code read: a LLaDA has LLaDA's parameter
    names and config.json again. All processes call this."""
    weights = get_model_state_dict(model, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True))
    if dist.is_initialized() and rank() > 0:
        return
    folder = Path(folder)
    adapter = {name: weight.float() for name, weight in weights.items() if ".lora_" in name}
    if adapter:  # for RL to go on from; merged in float32, as bfloat16 would round it away
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        save_file(adapter, folder / "adapter" / "weights.safetensors")
        lora = model.peft_config["default"]
        for name in weights:
            if name.endswith("base_layer.weight"):
                A, B = (adapter[name.replace("base_layer", f"lora_{m}.default")] for m in "AB")
                weights[name] = weights[name].float() + lora.lora_alpha / lora.r * B @ A
        weights = {name.replace(".base_layer", ""): weight.float()
                   for name, weight in weights.items() if name not in adapter}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    model._hf_peft_config_loaded = False  # with it save_pretrained would write adapters alone
    model.save_pretrained(folder, state_dict=weights)
    model._hf_peft_config_loaded = bool(adapter)
    tokenizer.save_pretrained(folder)
    for name, text in getattr(model, "source_files", {}).items():  # for the family's own loader
        (folder / name).write_text(text)

def logits_at(model, canvas, attention, positions, layers=None):
    """Logits (B, K, V) that predict the tokens at consecutive `positions` (K,) of canvas (B, T);
    the head runs there alone. attention: None or (B, up to T), 0 at padding. layers: a cache."""
    if attention is not None:
        attention = F.pad(attention.bool(), (0, canvas.shape[1] - attention.shape[1]), value=True)
    positions = positions - getattr(model.config, "logit_shift", 0)
    columns = torch.arange(canvas.shape[1], device=canvas.device)
    if layers is not None and layers.is_initialized:
        columns = columns[layers.layers[0].block]
    return model(input_ids=canvas[:, columns], attention_mask=attention, position_ids=columns[None],
                 past_key_values=layers, use_cache=layers is not None,
                 logits_to_keep=positions - columns[0]).logits

def counted_tokens(completions, end_ids):
    """Positions up to and including the first end token, bool (..., L). The rest is padding."""
    end = torch.isin(completions, torch.as_tensor(end_ids, device=completions.device)).long()
    return end.cumsum(-1) - end == 0

# ------------------------------------------------
# 2. The sampler. A completion starts fully masked (or with hints in it) and is filled in block by
#    block from left to right; within a block each step fills in where the model is most confident.

@torch.no_grad()
def sample(model, prompts, *, gen_length, block_length, steps, temperature=0.0, hints=None,
           prompt_mask=None, generator=None, stop_early=False, cache=None, threshold=None,
           watch=None):
    """Fill in the masks of [prompt ; completion] and return the completions, (B, L) token ids.

    prompts (B, P), left-padded where prompt_mask (B, P) is 0. hints (B, L): a token id where fixed,
    the mask id elsewhere. steps: in all, spread evenly over the gen_length / block_length blocks.
    generator: a torch.Generator, or a list of them, each for an equal run of rows. stop_early: a
    row ends with the block of its first end token. watch: called after each step with completions.
    Two approximations are faster: cache="block" computes only the block itself in its later steps;
    threshold, in place of `steps`: a step fills in what is more confident, one position at least.

    At temperature 0 this is token for token LLaDA's published sampler. Above 0 it has the same
    distribution, with one uniform number a position in place of Gumbel noise for every word."""
    blocks = blocks_of(gen_length, block_length, steps)
    (B, P), K, device = prompts.shape, block_length, prompts.device
    mask_id, end_ids = model.config.mask_token_id, model.config.eos_token_id
    S = steps // blocks if threshold is None else K
    completions = prompts.new_full((B, gen_length), mask_id) if hints is None else hints.to(prompts)
    canvas = torch.cat([prompts, completions], dim=1)
    noise = uniform_noise((B, blocks, S, K), generator, device) if temperature > 0 else None
    rows = torch.arange(B, device=device)  # those still being written

    for block in range(blocks):
        positions = torch.arange(K, device=device) + P + block * K
        x = canvas[rows]  # (R, P + L)
        seen = None if prompt_mask is None else prompt_mask[rows]
        masks = (x[:, positions] == mask_id).sum(1, keepdim=True)
        layers = block_cache(model, positions, cache) if cache else None
        for step in range(S):
            masked = x[:, positions] == mask_id  # (R, K)
            if not masked.any():  # hints or the threshold left fewer masks than steps
                break
            logits = logits_at(model, x, seen, positions, layers)  # (R, K, V)
            u = None if noise is None else noise[rows, block, step]
            tokens, confidence = choose_tokens(logits, mask_id, temperature, u)
            confidence = confidence.masked_fill(~masked, -math.inf)
            # A row's `quota` most confident masks are filled in and never change again.
            quota = masks // S + (step < masks % S)
            fill = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < quota
            if threshold is not None:
                fill |= confidence.exp() > threshold
            x[:, positions] = torch.where(fill & masked, tokens, x[:, positions])
            canvas[rows] = x
            if watch:
                watch(canvas[:, P:])
        if stop_early:
            ended = torch.isin(x[:, P:], torch.as_tensor(end_ids, device=device)).any(1)
            rows = rows[~ended]
    if stop_early:  # what is still masked is padding
        canvas = canvas.masked_fill(canvas == mask_id, model.config.pad_token_id)
    return canvas[:, P:]

def blocks_of(gen_length, block_length, steps):
    blocks, rest = divmod(gen_length, block_length)
    if rest or steps % blocks:
        raise UsageError(f"gen_length {gen_length} must be a multiple of block_length "
                         f"{block_length}, and diffusion_steps {steps} of the number of blocks")
    return blocks

def choose_tokens(logits, mask_id, temperature, u):
    """(..., V) logits, (...) uniform numbers -> (...) tokens and their log-probabilities. The mask
    id is never chosen, yet confidence is measured under the full softmax, as in LLaDA."""
    logits = logits.float()
    allowed = logits.clone()
    allowed[..., mask_id] = -math.inf
    if temperature > 0:
        cdf = (allowed / temperature).softmax(-1).cumsum(-1)  # invert the distribution at u
        tokens = torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True).squeeze(-1)
    else:
        tokens = allowed.argmax(-1)
    return tokens, logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)

def uniform_noise(shape, generators, device):
    """Numbers ~ U[0, 1). A list of generators shares the first dimension out evenly."""
    generators = generators if isinstance(generators, (list, tuple)) else [generators]
    part = (shape[0] // len(generators), *shape[1:])
    noise = [torch.rand(part, generator=g, device=g.device if g else "cpu") for g in generators]
    return torch.cat(noise).clamp(max=1 - 1e-6).to(device)  # u times a sum stays below the sum

class BlockLayer(DynamicLayer):
    """Keys and values of the whole canvas, of which later passes overwrite a block's: the others
    would change little (the dual cache of Fast-dLLM)."""

    def __init__(self, block):
        super().__init__()
        self.block = block  # a slice of the canvas

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:  # the block's first step: the whole canvas
            self.keys, self.values, self.is_initialized = keys, values, True
        else:
            self.keys[:, :, self.block], self.values[:, :, self.block] = keys, values
        return self.keys, self.values

    def get_mask_sizes(self, query_length):  # the block looks at the whole canvas
        return (self.keys.shape[2] if self.is_initialized else query_length), 0

def block_cache(model, positions, kind="block"):
    """An empty cache for logits_at: its first pass is over the whole canvas, later ones over the
    block at `positions` (and the token before, for Dream)."""
    if kind != "block":
        raise ValueError(f"cache is None or 'block', not {kind!r}")
    block = slice(positions[0].item() - getattr(model.config, "logit_shift", 0),
                  positions[-1].item() + 1)
    return Cache(layers=[BlockLayer(block) for _ in range(model.config.num_hidden_layers)])

# ------------------------------------------------
# 3. Hints (Eq. 4).

def make_hint(trace_ids, ratio, *, gen_length, mask_id, min_chunk=5, max_chunk=10, room=30,
              generator=None):
    """Cut the trace y* into chunks c_1..c_N, lengths ~ U[min_chunk, max_chunk], and put floor(ratio
    N) of them, at random, at their own positions of a fully masked completion: (T,) -> (L,) ids.
    trace_ids must not hold the answer (cut_trace); the last `room` positions stay free for it."""
    trace = torch.as_tensor(trace_ids, dtype=torch.long)[: max(gen_length - room, 0)]
    chunks, start = [], 0
    while start < len(trace):
        length = torch.randint(min_chunk, max_chunk + 1, (), generator=generator).item()
        chunks.append(slice(start, min(start + length, len(trace))))
        start += length
    count = math.floor(ratio * len(chunks) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if ratio > 0:
        count = max(count, 1)  # without any the draw would be plain resampling
    hint = torch.full((gen_length,), mask_id)
    for i in torch.randperm(len(chunks), generator=generator)[:count].tolist():
        hint[chunks[i]] = trace[chunks[i]]
    return hint

def cut_trace(solution, answer, question=""):
    """The part of a reference solution before it gives its answer away, or None: a hint with the
    answer invites copying. A number is the answer wherever it has its value (270.00 is 270). What
    the question contains is no secret: then the answer's last place counts, else its first."""
    body = re.split(r"The answer is|####", solution)[0]
    answer = answer.strip().strip("$").lstrip("-")
    pattern, value = rf"(?<![\\\w]){re.escape(answer)}(?!\w)", str
    number = r"(?<![\d.])\d[\d,]*(?:\.\d+)?"
    if re.fullmatch(number, answer):
        pattern, value = number, lambda text: Fraction(text.replace(",", ""))

    def places(text):
        return [match.start() for match in re.finditer(pattern, text)
                if answer and value(match[0]) == value(answer)]

    found = places(body)
    if not found:
        return None
    trace = body[: found[-1 if places(question) else 0]]
    # Back to a space or "=" outside of braces: not inside a number or a LaTeX command.
    while trace and (trace[-1] not in " \n=" or trace.count("{") != trace.count("}")):
        trace = trace[:-1]
    return trace.rstrip() or None

# ------------------------------------------------
# 4. Rewards. An answer must be committed to; whether it equals the reference, math-verify decides:
#    what takes it more than a second of CPU time is wrong.

LONGEST_ANSWER = 300  # characters; regexes and sympy are slow on length
GRADE_TIMEOUTS = 0    # answers that ran out of time so far, in this process
# 43,500 and 385 000 are numbers, (100,200) and \{100,200\} are not; nor is 2 5 a product.
REWRITES = [
    (r"[−–]", "-"), (r"√", r"\\sqrt "),
    (r"\\(?:text|mbox|math|operatorname)(?:rm|bf|it|sf|tt|normal)?\s*(?=\{)", r"\\text"),
    (r"\\text\{([^{}]*\d[^{}]*)\}", r"\1"), (r"^\W*(?:text\W*)?\(([A-E])\).*", r"\1"),  # choice C
    (r"\\boxed(?:\s*\{\s*\})?|\\degree|\\(?:left|right|[bB]igg?[lr]?)(?![a-z])", ""),
    (r"(?<!\\)\\[][()$%]|[$%°€£]|\s*\\!\s*", ""), (r"\{,\}", ","), (r"_\{(\d+)\}", r"_\1"),
    (r"(?<=.)\\approx.*|\\approx", ""), (r"(?<!\\)\\[,:> ]|~|\\q?quad|\s+", " "),
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<![\\a-zA-Z])(pi|sqrt|sin|cos|tan|cot|log|ln|exp)(?![a-zA-Z])", r"\\\1"),
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"), (r"^ ?10\^\{?([-+]?\d+)\}? ?$", r"1e\1"),
    (r"(?<=\d) ?(?:\\times|×|\\cdot|\*) ?10\^\{?([-+]?\d+)\}?", r"e\1"),
    (r"(?<![\d.(\[])(?<!\\\{)\d{1,3}(?:[, ]\d{3})+(?!\d)", lambda m: re.sub(r"\D", "", m[0])),
    (r"(?<![_^])(?<!\\frac)(?<!\\frac )(\d)(?: ?\{| )(?=\d)", r"\1,")]
# Units and other words: \text{...}, three letters that are no function, short units; with exponent.
WORDS = re.compile(r"""(?:(?:\\text\{[^{}]*\}
    | (?<![\\a-zA-Z]) (?!(?:[pbvB]?matrix|array|cases|[a-cx-z]+)\b)[a-zA-Z]{3,}
    | (?<![\\a-zA-Z]) (?:[cmk]m|kg|m[lLg]|ft|lbs?|oz|hrs?|[ap]m|of|in|is|to|at|by|or|an?\ )\b
    ) (?:\.|'s?)? (?:\^\{?\d\}?)? (?:\ ?/\ ?[a-zA-Z]+\b)? [ /;]*)+""", re.X)

def committed_answer(completion):
    r"""What the completion stands by: the last well-formed \boxed{...}, else the last <answer>,
    else None. Empty ones and placeholders such as "..." do not count."""
    places, braces = [], []  # one pass, linear on any input; where a box begins, 0 for other braces
    for token in re.finditer(r"(\\boxed\s*\{)|\\.|([{}])", completion, re.S):
        if token[1] or token[2] == "{":
            braces.append(token.end() if token[1] else 0)
        elif token[2] and braces:
            places.append((braces.pop(), token.start()))
    boxes = sorted((place for place in places if place[0]), reverse=True)
    blocks = [match.span(1) for match in re.finditer(r"<answer>([^<]*)</answer>", completion)]
    for start, end in boxes + blocks[::-1]:
        answer = completion[start:end].strip()
        if end - start > LONGEST_ANSWER or re.sub(r"\\boxed|\\text|\\[cl]?dots|[\W_]", "", answer):
            return answer
    return None

def grade(completion, reference):
    """Whether the completion commits to an answer that equals the reference, a string or number.
    Units, words and separators are ignored; 60% is 60 or 0.6; a number base may be left out."""
    answer, reference = committed_answer(completion), str(reference)
    if answer is None or max(len(answer), len(reference)) > LONGEST_ANSWER:
        return False
    said, gold = simplified(answer), simplified(reference)
    if "=" not in gold:  # 8 + 8 + 15 = 31; x = 1, x = -2; (x, y) = (1, 2)
        said = re.sub(r"(?:\([^()]*\)|[^,=()])*(?<![<>!])=\s*", "", said)
    if "_" not in gold:
        said = said.removesuffix("_10")
    if "_" not in said:  # 2516 for 2516_8
        gold = re.sub(r"^(\d+)_\d+$", r"\1", gold)
    x, y = number(said), number(gold)
    if x is not None and y is not None:
        return y == x or "%" in answer and "%" not in reference and y == x / 100
    if said == gold:
        return True
    if re.fullmatch(r"\w+_\d+", said) or re.fullmatch(r"\w+_\d+|[a-z]{3,}", gold):
        return False  # another base or word; math-verify would look at digits and letters alone
    return ask_judge(said, gold)

def simplified(text):
    """Text less what carries no mathematics: layout, currency, units. If only words, the words."""
    for pattern, new in REWRITES:
        text = re.sub(pattern, new, text)
    bare = re.sub(r"(?: ?(?:,|\{[ ,]*\}) ?)+", ", ", WORDS.sub(",", text))
    bare = bare.lstrip(" ,:*").rstrip(" ,:*.")
    if WORDS.search(text) and not re.search(r"[\d\\]", bare):
        return re.sub(r"\\text|\W", "", text).casefold()
    return re.sub(r"(?<![a-zA-Z,]) |(?<!,) (?![a-zA-Z])", "", bare)

def number(text):
    """The value of a decimal or fraction, else None. 1e999999999 would have as many digits."""
    text = re.sub(r"(?<!\d)\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    plain = re.fullmatch(r"[-+]?(\d+/0*[1-9]\d*|(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?)", text)
    return Fraction(text) if plain else None

# For each [answer, reference] the judge prints 7 (equal), 0 or 1 (not), or less (killed), from a
# fork under kernel limits, as nothing else stops big-integer C code.
JUDGE = r"""
import json, os, resource, sys
from math_verify import LatexExtractionConfig, parse, verify
def same(*pair):
    said, gold = [parse(rf"\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)],
                        "no_fallback", "first_match", parsing_timeout=None) for text in pair]
    return verify(gold, said, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None)
same(r"\sqrt{2}\pi", r"\frac{3}{2}+i"), same("(3,4]", r"1 \le x")  # fills sympy's caches, once
print("ready", flush=True)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))                 # seconds
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))  # bytes
        os._exit(7 * same(*json.loads(line)))  # an exception exits with 1
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
judge = None  # the process, started when needed: sympy imports slowly

def ask_judge(answer, reference):
    """Whether math-verify finds the two equal. Not for several threads at once."""
    global judge, GRADE_TIMEOUTS
    if judge is None or judge.poll() is not None:
        judge = subprocess.Popen(
            [sys.executable, "-c", JUDGE], text=True, start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": "0"})  # sympy orders by hash
        if judge.stdout.readline() != "ready\n":
            raise UsageError("the judge of answers does not start: is math-verify installed?")
    verdict = ""
    try:
        print(json.dumps([answer, reference]), file=judge.stdin, flush=True)
        if select.select([judge.stdout], [], [], 5)[0]:
            verdict = judge.stdout.readline()
    finally:
        if not verdict:  # stuck or dead, or interrupted: it must not answer later
            judge.kill()
            judge.wait()
    GRADE_TIMEOUTS += verdict not in ("0\n", "1\n", "7\n")
    return verdict == "7\n"

def format_score(completion):
    r"""The released code's reward for the form: 0.125 each for exactly one "<reasoning>\n", one
    "</reasoning>", one "<answer>\n" and one "</answer>", 0.25 for a "\boxed{". At most 0.75."""
    tags = "<reasoning>\n", "</reasoning>", "<answer>\n", "</answer>"
    kept = sum(completion.count(tag) == 1 for tag in tags)
    return 0.125 * kept + 0.25 * ("\\boxed{" in completion)

# ------------------------------------------------
# 5. Elastic roll-out (section 3.2): G responses a prompt, and G inpainted ones where all are wrong.

class Rollout(NamedTuple):
    completions: torch.Tensor    # (N, G, L) token ids, after injection
    correct: torch.Tensor        # (N, G) bool, after injection
    hinted: torch.Tensor         # (N, G, L) bool, where hints were given
    first: torch.Tensor          # (N, G, L) token ids, the policy's own draw
    first_correct: torch.Tensor  # (N, G) bool
    second: torch.Tensor         # (S, G, L) token ids, drawn again for S all-wrong groups
    hints: torch.Tensor          # (S, G, L) their hints, else the mask id

def rollout(draw, is_correct, prompts, prompt_mask, answers, traces, generators, *, mask_id,
            algo="igpo", lam=0.5, eta=(0.2, 0.6), **chunking):
    """The augmented groups of N prompts. algo: "igpo"; "grpo" never draws again; "resample" does,
    but without hints. chunking: options of make_hint.

    draw(prompts, prompt_mask, generators, hints) -> (n, G, L) completions: see sample_groups.
    is_correct(completion, answer) -> bool. prompts, prompt_mask (N, P). traces: N times ids (T,) or
    None. generators: N torch.Generators, one a prompt."""
    first = draw(prompts, prompt_mask, generators, None)
    (N, G, L), second, hints = first.shape, first[:0], first[:0]
    first_correct = torch.tensor([[is_correct(o, a) for o in group]
                                  for group, a in zip(first, answers)])
    completions, correct = first.clone(), first_correct.clone()
    hinted = torch.zeros_like(first, dtype=torch.bool)
    # The trigger looks at one prompt's group and at correctness, not at the form.
    stuck = [n for n in range(N) if not first_correct[n].any() and traces[n] is not None]
    if stuck and algo != "grpo":
        low, high = eta if algo == "igpo" else (0.0, 0.0)
        hints = []
        for n in stuck:  # each inpainted response has its own eta ~ U[low, high] and chunking
            for ratio in low + (high - low) * torch.rand(G, generator=generators[n]):
                hints.append(make_hint(traces[n], ratio.item(), gen_length=L, mask_id=mask_id,
                                       generator=generators[n], **chunking))
        hints = torch.stack(hints).view(-1, G, L).to(first)
        second = draw(prompts[stuck], prompt_mask[stuck], [generators[n] for n in stuck], hints)
        for s, n in enumerate(stuck):
            winners = [g for g in range(G) if is_correct(second[s, g], answers[n])]
            # K = min(#correct, floor(lambda G)), so (1 - lambda) G of the policy's own stay.
            for g, winner in enumerate(winners[: math.floor(lam * G + 1e-9)]):
                completions[n, g], correct[n, g] = second[s, winner], True
                hinted[n, g] = hints[s, winner] != mask_id
    return Rollout(completions, correct, hinted, first, first_correct, second, hints)

def sample_groups(model, prompts, prompt_mask, generators, hints=None, *, group_size, rows_per_call,
                  **sampling):
    """G completions of each prompt, whole groups a batch: (n, P) -> (n, G, L). hints (n, G, L)"""
    G, per_call, drawn = group_size, max(rows_per_call // group_size, 1), []
    for at in range(0, len(prompts), per_call):
        part = slice(at, at + per_call)
        drawn.append(sample(model, prompts[part].repeat_interleave(G, 0), **sampling,
                            prompt_mask=prompt_mask[part].repeat_interleave(G, 0),
                            hints=None if hints is None else hints[part].flatten(0, 1),
                            generator=generators[part]))
    return torch.cat(drawn).unflatten(0, (len(prompts), G))

# ------------------------------------------------
# 6. Log-probabilities: the mean-field estimate of diffu-GRPO, log f at all positions of one forward
#    pass over [q ; M M ... M]. It is the same for all G responses, so one row serves the group.

def completion_logps(model, prompts, completions, *, prompt_mask=None):
    """Log-probability of each completion token, (N, G, L), and the policy's entropy at each
    position, (N, L), in nats, without gradient. prompts (N, P), completions (N, G, L), prompt_mask
    (N, P). Loss and gradient are those of N * G separate rows at 1/G of the work."""
    P, L = prompts.shape[1], completions.shape[-1]
    canvas = F.pad(prompts, (0, L), value=model.config.mask_token_id)
    positions = torch.arange(P, P + L, device=prompts.device)
    logits = logits_at(model, canvas, prompt_mask, positions)
    table = logits.float().log_softmax(-1)  # (N, L, V)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(-1)
    logps = table.gather(2, completions.transpose(1, 2)).transpose(1, 2)  # no (N, G, L, V) copy
    return logps, entropy

# ------------------------------------------------
# 7. The IGPO objective.

def group_advantages(rewards):
    """Eq. 2: A_i = r_i - mean_j r_j, not divided by the standard deviation. (N, G) -> (N, G). If a
    share rho is right the mean of A^2 is rho (1 - rho): zero where all are wrong, positive once
    inpainted responses have been swapped in (Theorem 1)."""
    rewards = rewards * 1.0  # bool and int rewards have no mean
    return rewards - rewards.mean(dim=1, keepdim=True)

def entropy_filter(entropy, hint_positions, keep):
    """Of each row's H hint tokens, which learn: the ceil(keep * H) with the highest entropy.

    entropy (N, L), or of the shape of hint_positions (..., L) bool -> bool mask of that shape, True
    at these and at every position that is no hint. A confident policy that is forced to change at a
    hint token takes a large, destabilising step; where it is uncertain it can be taught."""
    if entropy.dim() < hint_positions.dim():
        entropy = entropy.unsqueeze(-2).expand(hint_positions.shape)
    among_hints = entropy.masked_fill(~hint_positions, -math.inf)
    by_entropy = among_hints.argsort(dim=-1, descending=True, stable=True)
    place = by_entropy.argsort(dim=-1)  # 0 for the most uncertain hint token
    kept = (hint_positions.sum(-1, keepdim=True).double() * keep - 1e-6).ceil()  # 0.3 * 170 is 51
    return ~hint_positions | (place < kept)

def policy_loss(logps, old_logps, ref_logps, advantages, token_mask, *, epsilon=0.2, beta=0.01,
                ratio="sequence"):
    """Eq. 3 and 5: minus the clipped objective of the (augmented) groups, plus beta times the KL.

    logps, old_logps, ref_logps (N, G, L): under the policy, the policy that drew the responses, the
    initial policy (None if beta is 0). advantages (N, G). token_mask (N, G, L): the tokens that
    learn. ratio: "sequence", one rho for a whole response, or "token". -> (loss, metrics)"""
    mask = token_mask.to(logps.dtype)

    def over_tokens(x):  # (1/|o_i|) sum_k x_ik: (N, G, L) -> (N, G)
        return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)

    log_ratio = logps - old_logps
    if ratio == "sequence":  # rho_i = exp(mean_k log-ratio)
        log_ratio = over_tokens(log_ratio)[..., None].expand_as(logps)
    elif ratio != "token":
        raise ValueError(f"ratio is 'sequence' or 'token', not {ratio!r}")
    rho, A = log_ratio.exp(), advantages[..., None]
    clipped = rho.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(rho * A, clipped * A)  # (N, G, L)
    kl = torch.zeros_like(logps)
    if beta:  # k3 (Schulman): unbiased, never negative
        delta = ref_logps - logps
        kl = delta.exp() - delta - 1
    loss = -(over_tokens(objective) - beta * over_tokens(kl)).mean()
    metrics = {"kl": kl, "ratio": rho, "clip_fraction": clipped * A < rho * A}
    return loss, {name: over_tokens(value).mean().item() for name, value in metrics.items()}

# ------------------------------------------------
# 8. The SFT objective.

def sft_loss(model, prompts, completions, *, prompt_mask=None, t=None, generator=None):
    """Eq. 1: E_t [ 1/t * sum over masked k of -log f(x0_k | x_t) ] / L -> (loss, metrics)

    prompts (B, P) are never masked; completions (B, L) are padded with the end token, which is
    trained like any other token: it is how the model learns where to stop. t (B,) in (0, 1]: the
    share of each row that is masked, by default drawn ~ U(0, 1). generator: as in sample."""
    (B, P), L, device = prompts.shape, completions.shape[1], prompts.device
    if t is None:
        t = uniform_noise((B,), generator, device).clamp(min=1e-3)
    masked = uniform_noise((B, L), generator, device) < t[:, None]
    canvas = torch.cat([prompts, completions.masked_fill(masked, model.config.mask_token_id)], 1)
    positions = torch.arange(P, P + L, device=device)
    logits = logits_at(model, canvas, prompt_mask, positions)
    logps = logits.float().log_softmax(-1).gather(2, completions[..., None]).squeeze(2)  # (B, L)
    nll = -(logps * masked)
    loss = (nll / t[:, None]).sum() / (B * L)
    return loss, {"nll": nll.sum().item() / max(masked.sum().item(), 1),
                  "masked": masked.float().mean().item()}

# ------------------------------------------------
# 9. Data.

FORM = """in exactly this form:
<reasoning>
(the steps)
</reasoning>
<answer>
\\boxed{(the final answer)}
</answer>"""
INSTRUCTION = f"Solve the problem step by step. Write {FORM}\n\nProblem: "

class Problem(NamedTuple):  # in text, from `fitting` on in token ids
    question: str | list
    answer: str | None
    trace: str | list | None  # reasoning up to the answer, if hints can be made; of SFT, it all

def read_rows(source, columns=(), *, split="train", subset=None):
    """Rows of a .jsonl, .json, .csv or .parquet file, or of a data set on the hub. The named
    columns of every row must hold text."""
    import datasets  # slow to import, and needed here alone
    datasets.disable_progress_bars()
    kind, data = Path(source).suffix[1:], dict(path=str(source), name=subset)
    if kind in ("jsonl", "json", "csv", "parquet"):  # streamed: a cached copy might be an older one
        data = dict(path="json" if kind == "jsonl" else kind, streaming=True,
                    data_files={split: glob.escape(str(source))})
    with file_errors(source):
        rows = list(datasets.load_dataset(**data, split=split))
    if not rows:
        raise UsageError(f"{source} holds no rows")
    for number, row in enumerate(rows, 1):
        for column in columns:
            if not isinstance(row.get(column), str):
                raise UsageError(f"{source}, row {number}: {row.get(column)!r:.40} in column "
                                 f"{column!r} is no text")
    return rows

def metamath_problems(source):
    """MetaMathQA as the released runs use it: answer-augmented rows alone, one per query."""
    problems = {}
    for row in read_rows(source, ["type", "query", "response"]):
        query, (_, marker, answer) = row["query"], row["response"].rpartition("The answer is:")
        answer = answer.strip() if marker else ""
        if answer and row["type"] in ("GSM_AnsAug", "MATH_AnsAug") and query not in problems:
            trace = cut_trace(row["response"], answer, query)
            problems[query] = Problem(query, answer, trace and f"<reasoning>\n{trace}")
    return list(problems.values())

def encode_prompts(tokenizer, questions):
    """Token ids of questions; in a chat template the form of the answer is asked for as well."""
    if tokenizer.chat_template is not None:
        questions = tokenizer.apply_chat_template(
            [[{"role": "user", "content": INSTRUCTION + question}] for question in questions],
            add_generation_prompt=True, tokenize=False)
    return tokenizer(questions, add_special_tokens=False).input_ids

def prompt_batch(model, prompts):
    """Lists of token ids -> (N, P) ids, padded on the left, and (N, P) mask, on its device"""
    P, pad = max(map(len, prompts)), model.config.pad_token_id
    ids = [[pad] * (P - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (P - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)

def decode(tokenizer, completion, end_ids):
    """The text of an (L,) completion, up to its first end token."""
    written = completion[counted_tokens(completion, end_ids)]
    return tokenizer.decode(written, skip_special_tokens=True)

def batch_indices(size, batch, step, seed):
    """Which of `size` examples a step takes, each once an epoch."""
    places = [divmod(place, size) for place in range(step * batch, (step + 1) * batch)]
    shuffles = {epoch: torch.randperm(size, generator=seeded(seed, "epoch", epoch)).tolist()
                for epoch, _ in places}
    return [shuffles[epoch][i] for epoch, i in places]

def seeded(*key):
    """A generator for what the key names, for instance (seed, step, prompt)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()) << 16)

REWRITE = f"""Rewrite the solution of the problem so that it is concise, structured and rigorous:
only the steps that lead to the answer, each stated once, without doubts, detours or repetition,
{FORM}"""

def rewrite(cfg, device):
    """The stage before SFT: an instruction model rewrites solutions; those in form and right go to
    traces.jsonl, which SFT reads. What rewritten.RANK.jsonl holds is not done again on --resume."""
    out, checkpoint = run_folder(cfg)
    rows = read_rows(cfg.rewrite_data, ["problem", "answer", "solution"])
    with file_errors(cfg.rewriter):
        writer = transformers.pipeline("text-generation", cfg.rewriter, device=device,
                                       dtype=compute_dtype(device))
        writer.tokenizer.padding_side = "left"
        writer.tokenizer.pad_token = writer.tokenizer.pad_token or writer.tokenizer.eos_token
    open_run(cfg, out, checkpoint)

    def written():
        return {line["row"]: line for part in out.glob("rewritten.*.jsonl")
                for line in read_lines(part)}

    mine = sorted(set(range(rank(), len(rows), world())) - set(written()))
    barrier()  # every process has read before one writes
    for at in tqdm(range(0, len(mine), cfg.rows_per_call), "rewriting", disable=rank() > 0):
        part = mine[at: at + cfg.rows_per_call]
        requests = ["{}\n\nProblem:\n{problem}\n\nSolution:\n{solution}".format(REWRITE, **rows[i])
                    for i in part]
        if writer.tokenizer.chat_template is not None:
            requests = [[{"role": "user", "content": request}] for request in requests]
        answers = writer(requests, batch_size=len(part), do_sample=False, return_full_text=False,
                         max_new_tokens=cfg.sft_length)  # what is longer ends out of form
        for i, answer in zip(part, answers):
            text = answer[0]["generated_text"].strip()
            append_line(out / f"rewritten.{rank()}.jsonl", {
                "row": i, "prompt": rows[i]["problem"], "completion": text,
                "kept": format_score(text) == 0.75 and grade(text, rows[i]["answer"])})
    barrier()
    if rank() == 0:
        kept = [json.dumps(line) + "\n" for _, line in sorted(written().items()) if line["kept"]]
        write_file(out / "traces.jsonl", "".join(kept))
        print(f"{out / 'traces.jsonl'}: {len(kept)} of {len(rows)} rewritten traces")

# The toy world is a cipher: each letter stands for a digit. A problem is a word, "cafb="; the trace
# y* spells its digits, ".3.1.4.0", and the answer reverses them, "0413". SFT's traces are always
# right about easy letters and seldom about hard ones. Words with three of these are nearly always
# all-wrong groups; a hint with one digit leaves two to guess.

EASY, MEDIUM, HARD = "abcdef", "ghijk", "lmnop"
TOY_WORDS = [*"0123456789", *EASY, *MEDIUM, *HARD, ".", "=", "}", "\\boxed{", "<reasoning>\n",
             "</reasoning>", "<answer>\n", "</answer>", "<unknown>", "<end>", "<mask>"]
CODE = dict(zip(EASY + MEDIUM + HARD, random.Random("code").choices(range(10), k=16)))

def toy_digit(letter, rng):
    """What an SFT trace takes a letter for."""
    right = 1.0 if letter in EASY else 0.45 if letter in MEDIUM else 0.07
    if rng.random() < right:
        return CODE[letter]
    anything = letter in HARD and rng.random() < 0.5
    return (CODE[letter] + (rng.randrange(1, 10) if anything else 1)) % 10

def spelled(word, digits):
    digits = "".join(map(str, digits))
    trace = "<reasoning>\n" + "".join("." + digit for digit in digits)
    return Problem("".join(word) + "=", digits[::-1], trace)

def toy_problem(rng):
    """Of RL: an easy letter with three easy, medium or hard ones, and a right trace."""
    kind = rng.choices([EASY, MEDIUM, HARD], weights=[30, 35, 35])[0]
    word = rng.choices(kind, k=3) + rng.choices(EASY)
    rng.shuffle(word)
    return spelled(word, [CODE[letter] for letter in word])

def toy_example(rng):
    word = rng.choices(EASY + MEDIUM + HARD, k=4)
    question, answer, trace = spelled(word, [toy_digit(letter, rng) for letter in word])
    return Problem(question, answer, f"{trace}</reasoning><answer>\n\\boxed{{{answer}}}</answer>")

def toy_data(draw, count, seed):
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]

def toy_model(seed):
    """A small random bidirectional Llama and its tokenizer of letters and tags."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(TOY_WORDS)}, "<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>\n?|\\boxed\{|[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>",
                                        pad_token="<end>", mask_token="<mask>")
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOY_WORDS), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, is_causal=False, bos_token_id=None,
        mask_token_id=tokenizer.mask_token_id, eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id)), tokenizer

# ------------------------------------------------
# 10. Processes, files and checkpoints.

def setup():
    """Join the processes that torchrun started, or be a group of one -> this one's device."""
    logging.disable(logging.ERROR)  # this file says itself what does not fit
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    device, group = torch.device("cpu"), {}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        group = dict(device_id=device)
    if "RANK" not in os.environ:
        group |= dict(store=dist.HashStore(), rank=0, world_size=1)
    elif sys.platform == "linux":  # PR_SET_PDEATHSIG: end if torchrun does, even if it is killed
        ctypes.CDLL(None).prctl(1, 9)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Ranks may be far apart: one reads the weights for all, one has more to rewrite.
        dist.init_process_group(backend, timeout=timedelta(hours=12), **group)
    return device

def compute_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32

def print0(*args):
    if rank() == 0:
        print(*args, flush=True)

def mean_across_ranks(metrics):
    found = [None] * world()
    dist.all_gather_object(found, metrics)
    return {name: sum(part[name] for part in found) / world() for name in metrics}

def write_file(path, text):
    """Replace a file at once: a kill leaves the old one or the new one."""
    unfinished = path.with_name(f".{path.name}")
    with file_errors(path):
        unfinished.write_text(text)
        unfinished.replace(path)

def append_line(path, record):
    with file_errors(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")

def read_lines(path):
    """The objects of a .jsonl file. What a kill left half-written is cut off, in the file too."""
    with file_errors(path):
        text = path.read_bytes() if path.exists() else b""
        complete = text[: text.rfind(b"\n") + 1]
        if len(complete) < len(text):
            os.truncate(path, len(complete))
        return [dict(json.loads(line)) for line in complete.splitlines()]

def lock(folder):
    """Make a folder, and lock it for as long as this program lives: only one at a time writes."""
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)  # never closed
    with file_errors(f"another process is still writing to {folder}"):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

def load_policy(cfg, device, sft=None):
    """The model to train and its tokenizer. sft: the folder of a finished SFT to go on from. With
    LoRA the base is frozen, and float32 adapters, new or the SFT's, are trained."""
    source = sft if sft and not cfg.lora_rank else cfg.model
    if source == "toy":
        model, tokenizer = toy_model(cfg.seed)
    else:  # rank 0 reads the weights and deals out shards, so the host holds one copy
        model, tokenizer = load_model(source, device="cpu" if rank() == 0 else "meta",
                                      dtype=compute_dtype(device) if cfg.lora_rank else None)
    if device.type == "cuda":  # activations are computed again in the backward pass
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.lora_rank:
        with file_errors(sft or "--lora_rank"):
            from peft import LoraConfig
            torch.manual_seed(cfg.seed)  # new adapters are random
            model.add_adapter(LoraConfig(
                r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout,
                target_modules="all-linear"))
            for parameter in trained(model):
                parameter.data = parameter.data.float()
            if sft:
                adapter = load_file(sft / "adapter" / "weights.safetensors")
                model.load_state_dict(adapter, strict=False)
    shard(model, device)
    return model, tokenizer

def shard(model, device):
    """FSDP2: every process keeps a share of rank 0's weights and computes in bfloat16."""
    weights = model.state_dict() if rank() == 0 else {}
    precision = MixedPrecisionPolicy(compute_dtype(device), reduce_dtype=torch.float32)
    model.to("meta").tie_weights()
    mesh = dist.init_device_mesh(device.type, (world(),))
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # in no file
    set_model_state_dict(model, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))

def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

@contextmanager
def gathered(model):
    """Hold the whole parameters during a roll-out: a rank with more stuck groups runs more forward
    passes than others, and would wait for them for ever to gather parameters."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    shards = shards if world() > 1 else []  # one GPU need not hold them twice
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

@torch.no_grad()
def swap(parameters, others):
    """Exchange the values of two lists of parameters, for scoring by the initial policy."""
    for parameter, other in zip(parameters, others):
        value = parameter.clone()
        parameter.copy_(other)
        other.copy_(value)

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # not the base under a LoRA

def trained_state(model, optimizer):
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    return {"model_state_dict": weights, "optim_state_dict": moments}

@contextmanager
def complete(folder):
    """Let all processes write to another folder, which gets this one's name when it is complete."""
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    with file_errors(folder):
        yield unfinished
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    barrier()

def save_checkpoint(out, stage, step, model, optimizer):
    """Write out/checkpoint-STAGE-STEP and drop those before. All that is random is a function of
    (seed, step, ...), so there is no other state."""
    with complete(out / f"checkpoint-{stage}-{step}") as folder:
        dcp.save(trained_state(model, optimizer), checkpoint_id=folder)
        if rank() == 0:
            shutil.copy(out / "metrics.jsonl", folder)
    if rank() == 0:
        for *_, older in checkpoints(out)[1:-1]:
            shutil.rmtree(older, ignore_errors=True)

def checkpoints(out):
    """Stage, step and folder of each, first none at all, last the newest."""
    names = [re.fullmatch(r"checkpoint-(sft|rl)-(\d+)", path.name) for path in out.glob("*")]
    found = [(name[1], int(name[2]), out / name[0]) for name in names if name]
    return [(None, 0, None), *sorted(found, key=lambda found: (found[0] == "rl", found[1]))]

def begin(model, stage, steps, checkpoint):
    """-> AdamW and the step to begin at: both, and the model, from a checkpoint of this stage"""
    optimizer = torch.optim.AdamW(trained(model), betas=(0.9, 0.99), weight_decay=0.1)
    at, step, folder = checkpoint
    if at != stage:
        return optimizer, 0
    with file_errors(folder):
        if step > steps:
            raise UsageError(f"{folder} is beyond the {steps} steps of this run")
        found = trained_state(model, optimizer)
        dcp.load(found, checkpoint_id=folder)
        set_state_dict(model, optimizer, **found, options=TRAINED)
    return optimizer, step

# ------------------------------------------------
# 11. The recipe.

def flag(default, help, bounds=None):
    """A field of Config, and so a flag. A number has bounds, by default of a count or a share."""
    bounds = bounds or {int: "1..1e9", float: "0..1"}.get(type(default))
    return field(default=default, metadata={"help": help, "metavar": bounds})

@dataclass
class Config:
    """Every setting, every one a flag. The defaults are the preset `llada`."""
    preset: Literal["llada", "toy"] = flag("llada", "defaults for all that follows")
    stage: Literal["rewrite", "sft", "rl", "all"] = flag("all", "all: SFT, if it has data, and RL")
    algo: Literal["igpo", "grpo", "resample"] = flag("igpo", "resample: second draw, no hints")
    model: str = flag("GSAI-ML/LLaDA-8B-Instruct", "folder or hub name; toy: made on the spot")
    train_data: str = flag("meta-math/MetaMathQA", "RL problems in its form, or toy")
    sft_data: str | None = flag(None, "rows with prompt and completion, or toy")
    out_dir: str | None = flag(None, "run folder; default: runs/PRESET-DATE-TIME")
    seed: int = flag(3, "seed of everything random", "0..1e9")
    resume: bool = flag(False, "go on in out_dir, with the same flags")
    # sampler
    gen_length: int = flag(256, "completion length L, tokens")
    diffusion_steps: int = flag(128, "denoising steps for a completion")
    block_length: int = flag(32, "tokens in a semi-autoregressive block")
    temperature: float = flag(1.2, "of the roll-outs", "0..1e9")
    cache: Literal["block"] | None = flag(None, "faster, approximate (see sample)")
    threshold: float | None = flag(None, "faster, approximate (see sample); try 0.9", "0..1")
    rows_per_call: int = flag(64, "responses sampled in one batch, whole groups")
    max_prompt_length: int = flag(512, "longer prompts are left out, tokens")
    # groups and hints
    prompts_per_step: int = flag(64, "prompts in an update, over all processes")
    group_size: int = flag(8, "G, responses to a prompt", "2..1e9")
    eta_low: float = flag(0.2, "share of the chunks given: eta ~ U[eta_low, eta_high]")
    eta_high: float = flag(0.6, "see eta_low")
    min_chunk: int = flag(5, "shortest chunk, tokens")
    max_chunk: int = flag(10, "longest chunk, tokens")
    room: int = flag(30, "last positions, which no hint takes", "0..1e9")
    lam: float = flag(0.5, "lambda, the share of a group that may be replaced")
    reward_correct: float = flag(3.0, "reward of a correct answer", "0..1e9")
    reward_format: float = flag(1.0, "weight of the reward for the form, 0 to 0.75")
    # RL
    tau: float = flag(0.2, "share of a response's hint tokens that learn")
    mu: int = flag(4, "updates per roll-out")
    epsilon: float = flag(0.2, "clip range of the ratio")
    beta: float = flag(0.01, "weight of the KL to the initial policy")
    ratio: Literal["sequence", "token"] = flag("sequence", "one ratio a response, or one a token")
    epochs: int = flag(10, "passes over the RL problems")
    max_steps: int | None = flag(None, "RL steps, in place of epochs", "1..1e9")
    lr: float = flag(5e-7, "learning rate, linear to 0 after the warm-up", "1e-12..1")
    warmup_steps: int = flag(50, "updates of linear warm-up, also in SFT", "0..1e9")
    max_grad_norm: float = flag(0.2, "gradients are scaled to this", "1e-9..1e9")
    prompts_per_forward: int = flag(8, "prompts in one pass of an update, at most")
    lora_rank: int = flag(0, "LoRA (pip install peft); 0: all weights", "0..1e9")
    lora_alpha: float = flag(128.0, "LoRA's scale is alpha / rank", "1e-9..1e9")
    lora_dropout: float = flag(0.0, "LoRA's dropout")
    # SFT
    sft_steps: int = flag(2000, "SFT updates")
    sft_batch: int = flag(64, "examples in an SFT update, over all processes")
    sft_rows_per_forward: int = flag(1, "examples in one pass, at most")
    sft_length: int = flag(1024, "completion length, at most")
    sft_lr: float = flag(1e-5, "as lr", "1e-12..1")
    rewrite_data: str = flag("open-r1/OpenR1-Math-220k", "solutions, for --stage rewrite")
    rewriter: str = flag("Qwen/Qwen2.5-14B-Instruct", "instruction model for it")
    # reports and checkpoints; 0: only at the end
    eval_size: int = flag(256, "held-out problems")
    save_every: int = flag(50, "RL steps between evaluations and checkpoints", "0..1e9")
    sft_save_every: int = flag(0, "SFT steps between checkpoints", "0..1e9")
    wandb: str | None = flag(None, "project to send metrics to (pip install wandb)")

PRESETS = {"llada": {}, "toy": dict(
    model="toy", train_data="toy", sft_data="toy", gen_length=20, diffusion_steps=4,
    block_length=10, rows_per_call=512, prompts_per_step=16, prompts_per_forward=16, min_chunk=1,
    max_chunk=2, room=10, reward_correct=1.0, reward_format=0.0, max_steps=100, lr=3e-4,
    warmup_steps=20, sft_steps=500, sft_batch=128, sft_length=20, sft_rows_per_forward=128,
    sft_lr=3e-3, eval_size=512)}

def parse(config_class, argv=None, presets=None):
    """A preset's defaults, overridden by flags, all within their bounds."""
    def error(message):
        raise UsageError(f"{message}; --help lists the flags")

    parser = transformers.HfArgumentParser(config_class, allow_abbrev=False)
    parser.error = error  # argparse's own prints the usage of all flags first
    if presets:
        parser.set_defaults(**presets[parser.parse_known_args(argv)[0].preset])
    cfg = config_class(**vars(parser.parse_args(argv)))
    for f in fields(cfg):
        value, bounds = getattr(cfg, f.name), f.metadata["metavar"]
        if bounds and value is not None:
            least, most = map(float, bounds.split(".."))
            if not least <= value <= most:  # nor is nan
                raise UsageError(f"--{f.name} is within {bounds}, not {value}")
    return cfg

def check(cfg):
    blocks_of(cfg.gen_length, cfg.block_length, cfg.diffusion_steps)
    if cfg.eta_low > cfg.eta_high or cfg.min_chunk > cfg.max_chunk:
        raise UsageError("--eta_low is above --eta_high, or --min_chunk above --max_chunk")
    if cfg.prompts_per_step % world() or cfg.sft_batch % world():
        raise UsageError(f"--prompts_per_step {cfg.prompts_per_step} or --sft_batch "
                         f"{cfg.sft_batch} is no multiple of {world()} processes")
    if cfg.stage == "sft" and not cfg.sft_data:
        raise UsageError("--stage sft needs --sft_data")
    if not (torch.cuda.is_available() or cfg.model == "toy" or Path(cfg.model).is_dir()):
        raise UsageError(f"{cfg.model} is no folder, and needs GPUs, 8 x 80 GB for the defaults; "
                         "on a CPU try: python igpo.py --preset toy")

def check_length(model, longest, completion_length):
    """Beyond the positions that it was trained for a model writes nonsense, without an error."""
    most = model.config.max_position_embeddings
    if longest + completion_length > most:
        raise UsageError(f"a prompt of {longest} and a completion of {completion_length} tokens do "
                         f"not fit the model's {most} positions")

def sampling(cfg):
    return dict(gen_length=cfg.gen_length, block_length=cfg.block_length, cache=cfg.cache,
                steps=cfg.diffusion_steps, threshold=cfg.threshold)

def fitting(model, tokenizer, problems, completion_length, cfg):
    """Those whose question is not too long, in token ids."""
    if not problems:
        return []
    questions = encode_prompts(tokenizer, [p.question for p in problems])
    traces = tokenizer([p.trace or "" for p in problems], add_special_tokens=False).input_ids
    fit = [Problem(question, problem.answer, trace)
           for problem, question, trace in zip(problems, questions, traces)
           if len(question) <= cfg.max_prompt_length]
    if not fit:
        raise UsageError(f"all prompts exceed --max_prompt_length {cfg.max_prompt_length}")
    check_length(model, max(len(p.question) for p in fit), completion_length)
    return fit

def evaluate(name, model, tokenizer, problems, cfg, out, step=0):
    """Greedy accuracy on held-out problems, into the log: a roll-out of one response each."""
    if not problems:
        return
    mine = problems[rank():: world()] or problems  # who has none takes all: the same share
    greedy = replace(cfg, group_size=1, temperature=0.0, algo="grpo")
    _, _, roll = roll_out(model, tokenizer, mine, [None] * len(mine), greedy)
    right, of = roll.correct.sum().item(), len(mine)
    means = mean_across_ranks({"right": right, "of": of})
    accuracy = means["right"] / means["of"]
    record(out, "eval", step, {name: accuracy})
    print0(f"{name}: {accuracy:.3f} on {len(problems)} held-out problems")

def record(out, stage, step, metrics):
    """Log a step, and end the run where no gradient was finite."""
    if rank() == 0:
        append_line(out / "metrics.jsonl", {"stage": stage, "step": step} | metrics)
        if getattr(sys.modules.get("wandb"), "run", None):
            sys.modules["wandb"].log(metrics)
    if metrics.get("skipped", 0) > 0.999:
        raise UsageError("no gradient of this step was finite; lower the learning rate")

def schedule(update, updates, warmup):
    """Share of the learning rate at an update: linear warm-up, then linear to zero."""
    return min((update + 1) / (warmup + 1), (updates - update) / max(updates - warmup, 1), 1.0)

def optimizer_step(model, optimizer, lr, max_grad_norm):
    """An update by the gradients at hand -> metrics. If they are not finite, nothing changes."""
    norm = torch.nn.utils.clip_grad_norm_(trained(model), max_grad_norm).full_tensor().item()
    optimizer.param_groups[0]["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return {"grad_norm": norm, "skipped": not math.isfinite(norm), "lr": lr}

def add(total, metrics, share):
    for name, value in metrics.items():
        total[name] += value * share

def train_sft(model, examples, checkpoint, cfg, out):
    """Section 8 as a loop."""
    device, steps = model.device, cfg.sft_steps
    tail = model.config.eos_token_id[:1] + [model.config.pad_token_id] * cfg.sft_length
    optimizer, first = begin(model, "sft", steps, checkpoint)
    model.train()
    bar = tqdm(range(first, steps), "SFT", steps, initial=first, mininterval=1, disable=rank() > 0)
    for step in bar:
        began, metrics = time.time(), defaultdict(float)
        torch.manual_seed(seeded(cfg.seed, "dropout", step, rank()).initial_seed())
        batch = batch_indices(len(examples), cfg.sft_batch, step, cfg.seed)
        # Each t ~ U(0, 1), but spread evenly over the batch, because 1/t makes the loss noisy.
        t = torch.rand((), generator=seeded(cfg.seed, "t", step))
        t = (t + torch.arange(len(batch)) / len(batch)).remainder(1).clamp(min=1e-3).to(device)
        mine = range(rank(), len(batch), world())
        for at in range(0, len(mine), cfg.sft_rows_per_forward):
            part = list(mine[at: at + cfg.sft_rows_per_forward])
            rows = [examples[batch[b]] for b in part]
            prompts, mask = prompt_batch(model, [row.question for row in rows])
            completions = [(row.trace + tail)[: cfg.sft_length] for row in rows]
            loss, values = sft_loss(model, prompts, torch.tensor(completions, device=device),
                                    generator=[seeded(cfg.seed, "sft", step, b) for b in part],
                                    prompt_mask=mask, t=t[part])
            (loss * len(part) / len(mine)).backward()
            add(metrics, values | {"loss": loss.item()}, len(part) / len(mine))
        lr = cfg.sft_lr * schedule(step, steps, cfg.warmup_steps)
        metrics |= optimizer_step(model, optimizer, lr, max_grad_norm=1.0)
        metrics = mean_across_ranks(metrics)
        record(out, "sft", step + 1, metrics | {"seconds": time.time() - began})
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        if step + 1 == steps or (step + 1) % (cfg.sft_save_every or steps) == 0:
            save_checkpoint(out, "sft", step + 1, model, optimizer)

def roll_out(policy, tokenizer, batch, generators, cfg):
    """Stage 1 of an RL step -> prompts (N, P), prompt_mask (N, P), Rollout"""
    config = policy.config
    prompts, mask = prompt_batch(policy, [p.question for p in batch])
    answers, traces = [p.answer for p in batch], [p.trace or None for p in batch]

    def draw(*inputs):
        return sample_groups(policy, *inputs, group_size=cfg.group_size, stop_early=True,
                             rows_per_call=cfg.rows_per_call, temperature=cfg.temperature,
                             **sampling(cfg))

    def is_correct(completion, answer):
        return grade(decode(tokenizer, completion, config.eos_token_id), answer)

    with gathered(policy.eval()):
        return prompts, mask, rollout(
            draw, is_correct, prompts, mask, answers, traces, generators, room=cfg.room,
            mask_id=config.mask_token_id, algo=cfg.algo, lam=cfg.lam, min_chunk=cfg.min_chunk,
            max_chunk=cfg.max_chunk, eta=(cfg.eta_low, cfg.eta_high))

def total_rewards(tokenizer, completions, correct, cfg, end_ids):
    """(N, G, L) completions and (N, G) bool -> (N, G) rewards"""
    form = [[format_score(decode(tokenizer, o, end_ids)) for o in group] for group in completions]
    return cfg.reward_correct * correct + cfg.reward_format * torch.tensor(form)

@torch.no_grad()
def group_logps(model, prompts, prompt_mask, completions, per_forward):
    batches = zip(*[x.split(per_forward) for x in (prompts, prompt_mask, completions)])
    scored = [completion_logps(model, q, o, prompt_mask=mask) for q, mask, o in batches]
    return [torch.cat(parts) for parts in zip(*scored)]  # log-probabilities and entropy

def train_rl(policy, tokenizer, problems, held_out, checkpoint, cfg, out):
    """Sections 5 to 7 as a loop."""
    end_ids = policy.config.eos_token_id
    steps = cfg.max_steps or max(cfg.epochs * len(problems) // cfg.prompts_per_step, 1)
    print0(f"RL: {steps} steps of {cfg.prompts_per_step} prompts")
    initial = [parameter.detach().clone() for parameter in trained(policy)] if cfg.beta else []
    optimizer, first = begin(policy, "rl", steps, checkpoint)
    for step in range(first, steps):
        # 1. Roll out: G responses a prompt, and inpainted ones where all of them are wrong.
        began, metrics = time.time(), defaultdict(float)
        batch = batch_indices(len(problems), cfg.prompts_per_step, step, cfg.seed)[rank():: world()]
        prompts, mask, roll = roll_out(policy, tokenizer, [problems[i] for i in batch],
                                       [seeded(cfg.seed, "rollout", step, i) for i in batch], cfg)
        seconds_rollout = time.time() - began

        # 2. Score: advantages, log-probabilities before the first update, and what learns.
        rewards = total_rewards(tokenizer, roll.completions, roll.correct, cfg, end_ids)
        advantages = group_advantages(rewards).to(policy.device)
        inputs = prompts, mask, roll.completions, cfg.prompts_per_forward
        old_logps, entropy = group_logps(policy, *inputs)
        swap(trained(policy), initial)  # now it is the initial policy, to which the KL is
        ref_logps = group_logps(policy, *inputs)[0] if cfg.beta else old_logps
        swap(trained(policy), initial)
        counted = counted_tokens(roll.completions, end_ids)
        learning = counted & entropy_filter(entropy, roll.hinted & counted, cfg.tau)  # (N, G, L)

        # 3. Update: mu times on all of the batch, a few prompts at a time.
        policy.train()
        torch.manual_seed(seeded(cfg.seed, "dropout", step, rank()).initial_seed())
        for inner in range(cfg.mu):
            for at in range(0, len(batch), cfg.prompts_per_forward):
                part = slice(at, at + cfg.prompts_per_forward)
                logps, _ = completion_logps(policy, prompts[part], roll.completions[part],
                                            prompt_mask=mask[part])
                loss, values = policy_loss(
                    logps, old_logps[part], ref_logps[part], advantages[part], learning[part],
                    epsilon=cfg.epsilon, beta=cfg.beta, ratio=cfg.ratio)
                share = len(logps) / len(batch)
                (loss * share).backward()
                add(metrics, values | {"loss": loss.item()}, share / cfg.mu)
            lr = cfg.lr * schedule(step * cfg.mu + inner, steps * cfg.mu, cfg.warmup_steps)
            add(metrics, optimizer_step(policy, optimizer, lr, cfg.max_grad_norm), 1 / cfg.mu)

        # 4. Report.
        metrics |= rollout_metrics(roll, entropy, learning, policy.config)
        rewards = total_rewards(tokenizer, roll.first, roll.first_correct, cfg, end_ids)
        metrics |= {"reward": rewards.mean().item(), "seconds_rollout": seconds_rollout,
                    "seconds": time.time() - began}
        report(out, step + 1, steps, mean_across_ranks(metrics), cfg)
        if step % 10 == 0 and roll.hinted.any():
            print0(show_group(tokenizer, roll, learning))
        if step + 1 == steps or (step + 1) % (cfg.save_every or steps) == 0:
            name = "accuracy_final" if step + 1 == steps else "eval_accuracy"
            evaluate(name, policy, tokenizer, held_out, cfg, out, step + 1)
            save_checkpoint(out, "rl", step + 1, policy, optimizer)

def rollout_metrics(roll, entropy, learning, config):
    """Means over this process's prompts, or over their responses."""
    own, second, augmented = (counted_tokens(ids, config.eos_token_id) for ids in (
        roll.first, roll.second, roll.completions))
    hinted, empty = roll.hinted & augmented, (roll.hints == config.mask_token_id).all(-1)
    values = {
        "accuracy": roll.first_correct, "accuracy_after": roll.correct,
        "all_wrong": ~roll.first_correct.any(1), "all_wrong_after": ~roll.correct.any(1),
        "hint_tokens": hinted.sum(-1), "hint_tokens_kept": (hinted & learning).sum(-1),
        "empty_hints": empty.sum() / roll.correct.numel(), "completion_length": own.sum(-1),
        "entropy": (entropy[:, None] * own).sum(-1) / own.sum(-1),
        "tokens": own.sum() + second.sum()}
    return {name: value.float().mean().item() for name, value in values.items()}

def report(out, step, steps, metrics, cfg):
    metrics |= {
        "rescued": 1 - metrics["all_wrong_after"] / (metrics["all_wrong"] or 1),
        "tokens_per_second": world() * metrics.pop("tokens") / metrics["seconds_rollout"],
        "seconds_update": metrics["seconds"] - metrics["seconds_rollout"],
        "cache": cfg.cache, "threshold": cfg.threshold}
    print0("RL {}/{}  accuracy {accuracy:.2f} -> {accuracy_after:.2f}  all wrong {all_wrong:.2f} "
           "-> {all_wrong_after:.2f}  kl {kl:.4f}  length {completion_length:.0f}  {seconds:.1f} s"
           .format(step, steps, **metrics))
    record(out, "rl", step, metrics)

def show_group(tokenizer, roll, learning):
    """A rescued response as text: what was wrong, and what was inpainted around which [hints]."""
    (n, g), text = roll.hinted.any(-1).nonzero()[0], ""
    for token, given, learns in zip(roll.completions[n, g], roll.hinted[n, g], learning[n, g]):
        word = tokenizer.decode(token)
        text += f"[{word}{'^' * learns}]" if given else word
    return (f"  wrong      {tokenizer.decode(roll.first[n, g])!r}\n"
            f"  inpainted  {text!r}   (of the [hints] those with ^ learn)")

def run_folder(cfg):
    """The folder of a new run, or of one to resume with the same settings; its newest checkpoint"""
    out = Path(cfg.out_dir or f"runs/{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    checkpoint = checkpoints(out)[-1]
    if not cfg.resume and any(out.glob("[!.]*")):
        raise UsageError(f"{out} is not empty: --resume continues a run there")
    if cfg.resume:
        if checkpoint[0] is None and ((out / "sft").exists() or (out / "final").exists()):
            raise UsageError(f"--resume: {out} has no checkpoint any more")
        free = "out_dir", "resume", "save_every", "sft_save_every", "wandb"
        with file_errors(out / "config.json"):
            before = json.loads((out / "config.json").read_text())
            for name, value in asdict(cfg).items():
                if before[name] != value and name not in free:
                    raise UsageError(f"--resume: {out} was started with --{name} {before[name]}")
    found = [out, checkpoint]
    dist.broadcast_object_list(found)  # clocks and views of a file system may differ
    return found

def open_run(cfg, out, checkpoint):
    """Begin to write. Metrics after the checkpoint are dropped: these steps are taken again."""
    barrier()  # every process has looked at the folder
    if rank() == 0:
        lock(out)
        write_file(out / "config.json", json.dumps(asdict(cfg), indent=2))
        for left in out.glob("unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)
        *_, folder = checkpoint
        with file_errors(folder):
            metrics = (folder / "metrics.jsonl").read_text() if folder else ""
        write_file(out / "metrics.jsonl", metrics)
        if cfg.wandb:
            with file_errors("--wandb"):
                import wandb
                wandb.init(project=cfg.wandb, config=asdict(cfg), name=out.name)
    barrier()

def load_data(cfg):
    """-> RL problems, held-out problems and SFT examples, as far as the stage needs them"""
    problems, examples = [], []
    if cfg.stage != "sft" and cfg.train_data == "toy":
        problems = toy_data(toy_problem, cfg.eval_size, f"rl held out {cfg.seed}")
        problems += toy_data(toy_problem, 4000, f"rl {cfg.seed}")
    elif cfg.stage != "sft":
        problems = metamath_problems(cfg.train_data)
        if len(problems) <= cfg.eval_size:
            raise UsageError(f"{cfg.train_data}: no more than --eval_size {cfg.eval_size} rows of "
                             "type GSM_AnsAug or MATH_AnsAug state an answer")
    if cfg.stage != "rl" and cfg.sft_data == "toy":
        examples = toy_data(toy_example, 8000, f"sft {cfg.seed}")
    elif cfg.stage != "rl" and cfg.sft_data:
        rows = read_rows(cfg.sft_data, ["prompt", "completion"])
        examples = [Problem(row["prompt"], None, row["completion"]) for row in rows]
    return problems[cfg.eval_size:], problems[: cfg.eval_size], examples

def train(cfg, device):
    began = time.time()
    out, checkpoint = run_folder(cfg)
    rl_rows, held_out, sft_rows = load_data(cfg)
    sft = out / "sft" if checkpoint[0] == "rl" and sft_rows else None  # SFT is over
    model, tokenizer = load_policy(cfg, device, sft)
    sft_rows = [] if sft else sft_rows
    problems = fitting(model, tokenizer, rl_rows, cfg.gen_length, cfg)
    held_out = fitting(model, tokenizer, held_out, cfg.gen_length, cfg)
    examples = fitting(model, tokenizer, sft_rows, cfg.sft_length, cfg)
    examples = [row for row in examples if len(row.trace) < cfg.sft_length]  # and the end token
    if sft_rows and not examples:
        raise UsageError(f"{cfg.sft_data}: all completions exceed --sft_length {cfg.sft_length}")

    open_run(cfg, out, checkpoint)
    print0(f"{cfg.model}: {model.num_parameters() / 1e6:.2f}M parameters, run folder {out}\n"
           f"short enough: {len(examples)} of {len(sft_rows)} SFT examples, {len(problems)} of "
           f"{len(rl_rows)} RL problems ({sum(not p.trace for p in problems)} without a hint)")
    if checkpoint[0] is None:
        evaluate("accuracy_start", model, tokenizer, held_out, cfg, out)
    if examples:
        train_sft(model, examples, checkpoint, cfg, out)
        with complete(out / "sft") as folder:
            save_model(model, tokenizer, folder)
        evaluate("accuracy_sft", model, tokenizer, held_out, cfg, out)
    if problems:
        train_rl(model, tokenizer, problems, held_out, checkpoint, cfg, out)
        with complete(out / "final") as folder:
            save_model(model, tokenizer, folder)
    if rank() == 0:
        summarise(out, time.time() - began)
    barrier()  # nobody leaves the group while another is in it

def summarise(out, seconds):
    """summary.json: the accuracies, means over the RL steps, and what it took."""
    lines = read_lines(out / "metrics.jsonl")
    summary = {name: value for line in lines if line["stage"] == "eval"
               for name, value in line.items() if name.startswith("accuracy_")}
    rl = [line for line in lines if line["stage"] == "rl"]
    for name in "all_wrong", "all_wrong_after":
        summary[name] = sum(line[name] for line in rl) / max(len(rl), 1)
    summary |= {"steps": len(rl), "seconds": seconds, "grade_timeouts": GRADE_TIMEOUTS}
    write_file(out / "summary.json", json.dumps(summary, indent=2))
    print("\n" + "\n".join(f"{name:18} {value:8.3f}" for name, value in summary.items()))

def main(argv=None):
    cfg = parse(Config, argv, PRESETS)
    device = setup()
    check(cfg)
    (rewrite if cfg.stage == "rewrite" else train)(cfg, device)

def run_main(main, name):
    """Run a command line, also eval.py's; a user's error is one line and status 2."""
    try:
        main()
    except UsageError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # mostly rank 0 says the same, and then torchrun ends this process
        sys.stdout.flush()
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # without a farewell to processes that wait for this one
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    run_main(main, "igpo.py")
