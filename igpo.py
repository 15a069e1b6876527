"""IGPO: Inpainting-Guided Policy Optimization for diffusion LLMs (arXiv 2509.10396), in one file.

A masked diffusion LLM writes a completion by filling in masks in any order, so it can also fill in around text that
is already there. GRPO learns from the differences within a group of G responses to one prompt; when all of them are
wrong there is no difference and nothing is learned. IGPO then puts random chunks of the reference reasoning (never the
answer) into the masked completion as hints, lets the model inpaint the rest, and swaps responses that come out right
for some of the wrong ones. The sections below follow the paper:

    1  the model             masked diffusion LMs are transformers' own classes without the causal mask
    2  the sampler           one denoising loop for roll-outs, inpainting and evaluation
    3  hints                 Eq. 4: chunks of the reference trace at their own positions
    4  rewards               is the committed answer right, is the form kept
    5  elastic roll-out      hints only for groups that are all wrong
    6  log-probabilities     one forward pass for all G responses of a prompt
    7  the IGPO objective    Eq. 2, 3, 5: advantages, entropy filter, clipped loss
    8  the SFT objective     Eq. 1: masked diffusion on concise reasoning traces
    9  data                  MetaMathQA, any prompt/completion file, rewritten traces, and a toy world made on the spot
    10 processes             the handful of helpers that know about torch.distributed, and checkpoints
    11 the recipe            settings, presets, SFT loop, RL loop, command line

Departures. From the paper: a trace is cut before it first gives its answer away (cut_trace); the SFT loss is divided by
the completion length; one uniform number a position replaces Gumbel noise over the vocabulary, with the same distribution.
From the released code: "all wrong" is tested per prompt and not over a device's batch; hints hold no answer and may have
ratio 0 or 1; one forward pass of [q ; masks] serves all G responses of a prompt. README.md has the full list.

Run it:

    python igpo.py --preset toy                      the whole recipe on a laptop CPU, in minutes
    torchrun --nproc_per_node=8 igpo.py              LLaDA-8B-Instruct with the released runs' settings

Shapes:   B rows   N prompts   G responses a prompt   P prompt length (left-padded)   L completion length   V vocabulary
          a batch of roll-outs has B = N * G rows, the G rows of one prompt next to each other
Symbols:  q prompt   o_i response i   r_i its reward   A_i its advantage   y* reference trace   eta share of its chunks
          given as hints   lambda share of a group that may be replaced   tau share of hint tokens that learn
          mu updates per roll-out   epsilon clip range   beta weight of the KL term
"""

import contextlib
import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import save_torch_state_dict, snapshot_download
from tokenizers import Regex, Tokenizer
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ForCausalLM
from transformers.cache_utils import Cache, DynamicLayer


class UsageError(ValueError):
    """Something the user can put right. The command line prints it as one line and exits with status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. The model. LLaDA is Llama without the causal mask and Dream is Qwen2 without it, so both load into transformers'
#    own classes with is_causal=False: no remote code runs, and attention takes the fast unmasked path.

# LLaDA's parameter names -> Llama's. The left sides are regular expressions; each rule may use only one group.
LLADA_TO_LLAMA = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
} | {
    rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{ours}."
    for theirs, ours in {
        "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
    }.items()
}


def llada_name(name):
    """LLaDA's name for one of Llama's parameters, the inverse of LLADA_TO_LLAMA."""
    for pattern, ours in LLADA_TO_LLAMA.items():
        theirs = pattern.lstrip("^").replace("\\.", ".").replace(r"(\d+)", r"\1")
        name, hit = re.subn("^" + re.escape(ours).replace(r"\\1", r"(\d+)"), theirs, name)
        if hit:
            return name
    return name


def model_config(raw):
    """A checkpoint's config.json as a dict -> (transformers config of its bidirectional twin, rules to rename weights).

    Sets is_causal=False, mask_token_id, and logit_shift: 1 where position i is predicted by the output at i - 1
    (Dream grew out of an autoregressive model), else 0."""
    kind = raw.get("model_type")
    if kind == "llada" and "d_model" in raw:
        unlike_llama = ("alibi", "attention_layer_norm", "include_bias", "include_qkv_bias", "input_emb_norm", "scale_logits")
        if odd := [name for name in unlike_llama if raw.get(name)]:
            raise UsageError(f"a LLaDA variant that is not a Llama ({', '.join(odd)} set in config.json) is not supported")
        config = LlamaConfig(
            hidden_size=raw["d_model"], intermediate_size=raw["mlp_hidden_size"], num_hidden_layers=raw["n_layers"],
            num_attention_heads=raw["n_heads"], num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
            vocab_size=raw.get("embedding_size") or raw["vocab_size"], max_position_embeddings=raw["max_sequence_length"],
            rms_norm_eps=raw["rms_norm_eps"], rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
            tie_word_embeddings=raw["weight_tying"], mask_token_id=raw["mask_token_id"], bos_token_id=None,
            eos_token_id=raw["eos_token_id"], pad_token_id=raw.get("pad_token_id"),
        )
        rules = LLADA_TO_LLAMA
    elif kind == "Dream":
        config, rules = Qwen2Config(**{k: v for k, v in raw.items() if k not in ("model_type", "architectures", "auto_map")}), {}
        config.logit_shift = 1
    elif kind in ("llama", "qwen2", "qwen3") and "mask_token_id" in raw:
        config, rules = AutoConfig.for_model(**raw), {}
    else:
        raise UsageError(f"model_type {kind!r} is not supported: this file loads LLaDA, Dream, and Llama or Qwen checkpoints "
                         "whose config.json has is_causal false and a mask_token_id")
    config.is_causal = False
    config.logit_shift = getattr(config, "logit_shift", 0)
    return config, rules


def load_model(name_or_path, *, dtype=None, device="cpu"):
    """Load a masked diffusion LM and its tokenizer from a folder or the hub, running no code from the checkpoint.

    Takes LLaDA, LLaDA-1.5 and iLLaDA (grouped heads, tied embeddings), Dream, and bidirectional Llama or Qwen
    checkpoints such as this file saves. dtype defaults to float32. Every weight must match: a missing, extra or
    mis-shaped one is a UsageError that names it. model.config.eos_token_id becomes the list of all end tokens."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2:  # a hub name is owner/name
            raise UsageError(f"no model folder at {name_or_path}")
        try:
            folder = Path(snapshot_download(str(name_or_path), ignore_patterns=["*.bin", "*.pt", "*.pth"]))
        except Exception as error:
            raise UsageError(f"cannot get {name_or_path} from the hub ({type(error).__name__}); give a local folder") from error
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json, so it is not a model folder")
    raw = json.loads((folder / "config.json").read_text())
    config, rules = model_config(raw)

    # AutoTokenizer would stop to ask whether to run the checkpoint's code; these classes do not.
    tokenizer_class = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else Qwen2Tokenizer
    tokenizer = tokenizer_class.from_pretrained(folder)
    end_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    turn_ends = [tokenizer.get_vocab()[t] for t in ("<|eot_id|>", "<|im_end|>") if t in tokenizer.get_vocab()]
    config.eos_token_id = list(dict.fromkeys(turn_ends + end_ids))  # the first of them is what SFT ends a turn with
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id[-1]

    model_class = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}[config.model_type]
    if torch.device(device).type == "meta":  # the shapes alone, for a process that is dealt its weights by another
        with torch.device("meta"):
            model = model_class(config).to(dtype or torch.float32)
    else:
        model, report = model_class.from_pretrained(
            folder, config=config, key_mapping=rules or None, dtype=dtype or torch.float32, attn_implementation="sdpa",
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
        for problem in ("missing", "unexpected", "mismatched"):
            if names := sorted(str(name) for name in report[f"{problem}_keys"]):
                raise UsageError(f"{folder}: {len(names)} {problem} weights, the first is {names[0]}; "
                                 "the files and config.json do not belong together")
    model.get_input_embeddings().padding_idx = None  # padding is the end token, which is trained like any other
    model.source_folder, model.source_config = folder, raw
    return model.to(device).eval(), tokenizer


def save_model(model, tokenizer, folder, state_dict=None):
    """Write a folder that load_model reads, and that the family's own code reads too: a LLaDA goes back to LLaDA's
    parameter names and config.json. state_dict: full CPU weights, where the model itself holds only shards."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = merged_weights(model) if state_dict is None else dict(state_dict)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    raw = getattr(model, "source_config", None)
    if raw and raw["model_type"] == "llada":
        weights = {llada_name(name): weight for name, weight in weights.items()}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    if raw:
        (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": str(next(iter(weights.values())).dtype)[6:]}, indent=2))
        for code in model.source_folder.glob("*.py"):  # the family's own loader, for those who use it
            if code.parent.resolve() != folder.resolve():
                shutil.copy(code, folder)
    else:
        model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def add_lora(model, rank):
    """Freeze the model and add trainable float32 adapters of this rank to all its linear layers but the head, in place."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UsageError("--lora_rank needs peft: pip install peft") from error
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def merged_weights(model):
    """The weights of a model, with LoRA adapters merged in where it has any, under the names it has without them."""
    weights = {name.replace(".base_layer", ""): w for name, w in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] = (weights[f"{name}.weight"] + module.get_delta_weight("default")).to(model.dtype)
    return weights


@contextlib.contextmanager
def counted_forwards(model):
    """A list that gets (rows, tokens a row) of every forward pass of the model in this context."""
    passes = []
    hook = model.register_forward_pre_hook(with_kwargs=True, hook=lambda _, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)))
    yield passes
    hook.remove()


@contextlib.contextmanager
def adapters_off(model):
    """Without its adapters a LoRA policy is the initial policy, so the KL needs no second model."""
    model.disable_adapters()
    yield model
    model.enable_adapters()


def logits_at(model, canvas, attention, positions, **cached):
    """Logits that predict the tokens at `positions` of each row: (B, T) ids, (B, T) mask or None, (K,) -> (B, K, V).

    The head runs at these positions alone, which for V = 126,464 is where most of the time would go."""
    return model(input_ids=canvas, attention_mask=attention, use_cache=False,
                 logits_to_keep=positions - getattr(model.config, "logit_shift", 0), **cached).logits


def attention_mask(prompt_mask, gen_length):
    """(B, P) prompt mask -> (B, P + gen_length) attention mask, or None where nothing is padded (the fast path)."""
    if prompt_mask is None or bool(prompt_mask.all()):
        return None
    return F.pad(prompt_mask.bool(), (0, gen_length), value=True)


def ended(completions, end_ids):
    """Which tokens of (..., L) completions end the text: a bool tensor of the same shape. end_ids: an id or a list."""
    return torch.isin(completions, torch.as_tensor(end_ids, device=completions.device))


def counted_tokens(completions, end_ids):
    """Positions up to and including the first end token, bool (..., L). What comes after is padding, not text."""
    end = ended(completions, end_ids).long()
    return end.cumsum(-1) - end == 0


# ---------------------------------------------------------------------------------------------------------------------
# 2. The sampler. A completion starts fully masked (or with hints in it) and is filled in block by block from left to
#    right; within a block each step fills in the positions where the model is most confident.


@torch.no_grad()
def sample(model, prompts, *, gen_length, block_length, steps, temperature=0.0, hints=None, prompt_mask=None,
           generator=None, stop_early=False, cache=None, threshold=None, watch=None):
    """Fill in the masks of [prompt ; completion] and return the completions, (B, L) token ids without a mask id.

    prompts (B, P) ids, left-padded where prompt_mask (B, P) is 0. hints (B, L): a token id where fixed, the mask id
    elsewhere. steps: denoising steps in all, divided evenly over the gen_length / block_length blocks.
    generator: a torch.Generator, or a list of them, each for an equal run of rows, which then get the same noise
    whatever other rows share the batch. stop_early: rows with an end token in a finished block stop, the rest of them
    filled with padding; text before the end token is not changed by it.

    Two approximations, off by default, trade likeness to the exact sampler for speed; they work together.
    cache="block": what lies outside the current block is computed in the block's first step only (see BlockLayer).
    threshold: a probability. In place of the schedule of `steps`, which is then not used, each step fills in one
    position a row, the most confident, and every other one more confident than that; a finished block ends at once.

    watch: called after each step with the (B, L) completions as they then are, masks included.

    At temperature 0 this gives token for token what LLaDA's published sampler gives. Above 0 it draws from the same
    distribution with one uniform number a position, where Gumbel noise takes one for every word of the vocabulary."""
    blocks = gen_length // block_length
    if gen_length % block_length:
        raise UsageError(f"gen_length {gen_length} is not divisible by block_length {block_length}")
    if steps % blocks or steps < blocks:
        raise UsageError(f"steps {steps} is not divisible by the number of blocks {blocks} (= {gen_length} / {block_length})")
    if cache not in (None, "block"):
        raise UsageError(f"cache is None or 'block', not {cache!r}")
    (B, P), K, S, mask_id = prompts.shape, block_length, steps // blocks, model.config.mask_token_id
    if threshold is not None:
        S = K  # the schedule of one token a step; what is above the threshold comes on top
    text = prompts.new_full((B, gen_length), mask_id) if hints is None else hints.to(prompts)
    canvas = torch.cat([prompts, text], dim=1)
    attention = attention_mask(prompt_mask, gen_length)
    noise = uniform_noise((B, blocks, S, K), generator, prompts.device) if temperature > 0 else None
    rows = torch.arange(B, device=prompts.device)  # those still being written

    for block in range(blocks):
        positions = torch.arange(P + block * K, P + (block + 1) * K, device=prompts.device)
        x, seen = canvas[rows], None if attention is None else attention[rows]  # (R, P + L)
        quota = transfer_quota((x[:, positions] == mask_id).sum(1), S)  # (R, S)
        forward = cached_logits(model, positions) if cache else functools.partial(logits_at, model, positions=positions)
        for step in range(S):
            tokens = x[:, positions]  # (R, K)
            masked = (tokens == mask_id).nonzero(as_tuple=True)  # the one time in a step that a GPU is waited for
            if len(masked[0]) == 0:  # hints or the threshold left fewer masks than steps
                break
            u = None if noise is None else noise[rows[masked[0]], block, step, masked[1]]
            confidence = torch.full(tokens.shape, -math.inf, device=x.device)
            tokens[masked], confidence[masked] = choose_tokens(forward(x, seen)[masked], mask_id, temperature, u)
            # The `quota` most confident positions of each row are filled in; they and the hints never change again.
            order = confidence.argsort(dim=1, descending=True, stable=True)
            first = torch.arange(K, device=x.device) < quota[:, step, None]
            chosen = torch.zeros_like(first).scatter_(1, order, first)
            if threshold is not None:
                chosen |= confidence.exp() > threshold
            x[:, positions] = torch.where(chosen, tokens, x[:, positions])
            if watch:
                canvas[rows] = x
                watch(canvas[:, P:])
        canvas[rows] = x
        if stop_early:
            rows = rows[~ended(x[:, P: P + (block + 1) * K], model.config.eos_token_id).any(1)]
            if len(rows) == 0:
                break

    text = canvas[:, P:]
    return torch.where(text == mask_id, model.config.pad_token_id, text) if stop_early else text


def choose_tokens(logits, mask_id, temperature, u):
    """(M, V) logits and (M,) uniform numbers -> (M,) tokens and (M,) confidence, their log-probabilities.

    The mask id is never chosen, yet confidence is measured under the model's full softmax, as in LLaDA."""
    logits = logits.float()
    allowed = logits.index_fill(-1, torch.full((), mask_id, device=logits.device), -math.inf)
    if temperature > 0:
        cdf = (allowed / temperature).softmax(-1).cumsum(-1)  # invert the distribution function at u
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)
    else:
        tokens = allowed.argmax(-1)
    return tokens, logits.gather(-1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


class BlockLayer(DynamicLayer):
    """One layer's keys and values of the whole canvas, of which each further forward pass overwrites those of one block.

    Text outside the block does not change while the block is filled in, and the keys and values it would get from the
    block's new tokens change little (the dual cache of Fast-dLLM): so the passes run over the block alone."""

    def __init__(self, block):
        super().__init__()
        self.block = block  # a slice of the canvas

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:  # the block's first step: all of the canvas
            self.keys, self.values, self.is_initialized = keys, values, True
        else:
            self.keys[:, :, self.block], self.values[:, :, self.block] = keys, values
        return self.keys, self.values

    def get_mask_sizes(self, query_length):  # the block looks at all of the canvas
        return (self.keys.shape[2] if self.is_initialized else query_length), 0


def cached_logits(model, positions):
    """A stand-in for logits_at during one block, at consecutive `positions`: the first call runs over all of the canvas,
    later ones over the block and, where logits are read one position to the left, the token before it."""
    shift = getattr(model.config, "logit_shift", 0)
    start, end = positions[0].item() - shift, positions[-1].item() + 1
    layers = Cache(layers=[BlockLayer(slice(start, end)) for _ in range(model.config.num_hidden_layers)])

    def forward(x, attention):
        at, to = (start, end) if layers.is_initialized else (0, x.shape[1])
        return logits_at(model, x[:, at:to], attention, positions - at, past_key_values=layers,
                         position_ids=torch.arange(at, to, device=x.device)[None])
    return forward


def transfer_quota(masks, steps):
    """How many tokens each row fills in at each step: (R,) numbers of masks -> (R, steps), the first steps the larger."""
    return masks[:, None] // steps + (torch.arange(steps, device=masks.device) < masks[:, None] % steps)


def uniform_noise(shape, generator, device):
    """Uniform numbers in [0, 1), drawn before the first step so that a row's text depends on its own generator alone."""
    if not isinstance(generator, (list, tuple)):
        generator = [generator]
    if shape[0] % len(generator):
        raise UsageError(f"{shape[0]} rows cannot be shared by {len(generator)} generators")
    part = (shape[0] // len(generator), *shape[1:])
    noise = [torch.rand(part, generator=g, device="cpu" if g is None else g.device) for g in generator]
    return torch.cat(noise).clamp(max=1 - 1e-6).to(device)  # so that u times the total never rounds up to the total


# ---------------------------------------------------------------------------------------------------------------------
# 3. Hints (Eq. 4).


def make_hint(trace_ids, ratio, *, gen_length, mask_id, min_chunk=5, max_chunk=10, generator=None):
    """Cut the trace y* into chunks c_1..c_N and put floor(ratio * N) of them, chosen at random, at their own positions
    of an otherwise fully masked completion: (T,) ids -> (L,) ids.

    Chunk lengths ~ U[min_chunk, max_chunk]; the last chunk is what is left. trace_ids must not contain the final
    answer (see cut_trace). A trace longer than the completion is cut. Ratio 0 gives no hint and 1 the whole trace."""
    trace = torch.as_tensor(trace_ids, dtype=torch.long)[:gen_length]
    lengths = torch.randint(min_chunk, max_chunk + 1, (len(trace),), generator=generator).tolist()
    starts = [start for start in itertools.accumulate(lengths, initial=0) if start < len(trace)]
    count = math.floor(ratio * len(starts) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    hint = torch.full((gen_length,), mask_id)
    for i in torch.randperm(len(starts), generator=generator)[:count].tolist():
        chunk = slice(starts[i], starts[i] + lengths[i])
        hint[chunk][: len(trace[chunk])] = trace[chunk]
    return hint


NUMBER = re.compile(r"(?<![\d.])\d[\d,]*(?:\.\d+)?")


def cut_trace(solution, answer):
    """The part of a reference solution before it first gives its answer away, or None where its answer is not found.

    A hint that contains the answer is an invitation to copy it (the released code leaves it in). A number counts as
    the answer wherever it has its value (270.00 is 270), anything else where it stands literally."""
    body = re.split(r"The answer is|####", solution)[0]
    plain = answer.strip().strip("$").lstrip("-")
    if NUMBER.fullmatch(plain):
        value = Decimal(plain.replace(",", ""))
        found = next((m.start() for m in NUMBER.finditer(body) if Decimal(m.group().replace(",", "")) == value), -1)
    else:
        found = body.find(plain) if plain else -1
    if found < 0:
        return None
    return re.split(r"\\boxed", body[:found])[0].rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Rewards. An answer must be committed to; equality is mathematical, and math-verify does the mathematics. What cannot
#    be decided in a second of CPU time is wrong, and counted in GRADE_TIMEOUTS.

LONGEST_ANSWER = 300   # characters; nobody's answer is longer, and regexes and sympy are slow on length
GRADE_TIMEOUTS = 0     # answers that ran out of time so far, in this process

HOLLOW = re.compile(r"\\boxed|\\text|\\[cl]?dots|[\s.…${}()\[\]\\,;!]")    # placeholders are made of these
UNICODE = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
                         "∪": r"\cup ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "²": "^2", "³": "^3",
                         "°": "", "€": "", "£": ""})
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\\(?:text|mbox|math|operatorname)(?:rm|bf|it|sf|tt|normal)?\s*(?=\{)|\\(?:rm|bf)\b", r"\\text"),
    (r"\\text\{([^{}]*\d[^{}]*)\}", r"\1"),                                 # \text{18 dollars}
    (r"^\W*(?:text\W*)?\(([A-E])\).*", r"\1"),                              # (C), \text{(C)}, (C) 12: choice C
    (r"\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|;", ","),                  # 1 and -2: a list
    (r"\\boxed(?:\s*\{\s*\})?|\\displaystyle|\\(?:left|right|[bB]igg?[lr]?)(?![a-z])", ""),
    (r"(?<!\\)\\[][()$%]|[$%]|\s*\\!\s*|\^\s*\{?\s*\\circ\s*\}?|\\degree", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\{,\}", ","),
    (r"(?<!\\)\\[,:> ]|~|\\q?quad|\s+", " "),
    (r"(?<![\\a-zA-Z])(pi|sqrt|sin|cos|tan|cot|csc|arc\w{3}|log|ln|exp)(?![a-zA-Z])", r"\\\1"),
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"_\{(\d+)\}", r"_\1"),
    (r"(?<=\d) ?(?:\\times|\\cdot|\*) ?10\^\{?([-+]?\d+)\}?", r"e\1"),      # 6 \times 10^{-5} = 6e-5
    (r"^ ?10\^\{?([-+]?\d+)\}? ?$", r"1e\1"),
    # 43,500 and 385 000 are numbers; (100,200) and \{100,200\} are not
    (r"(?<![\d.(\[])(?<!\\\{)\d{1,3}(?:[, ]\d{3})+(?!\d)", lambda number: re.sub(r"\D", "", number[0])),
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),                             # 1 4/5 is a mixed number
    (r"(?<![_^])(?<!\\frac)(?<!\\frac )(\d)(?: ?\{| )(?=\d)", r"\1,"),      # neither 4{10} nor 2 5 is a product
]]
# Units and other words: \text{...}, three letters or more that are no function, well-known short units; with exponent.
WORDS = re.compile(r"""(?:(?:\\text\{[^{}]*\}
    | (?<![\\a-zA-Z]) (?!(?:[pbvB]?matrix|array|cases|[a-cx-z]+)\b)[a-zA-Z]{3,}
    | (?<![\\a-zA-Z]) (?:[cmk]m|kg|m[lLg]|ft|lbs?|oz|hrs?|[ap]m|of|in|is|to|at|by|an?(?=\ [a-z]{3}))\b
    ) (?:\.|'s?)? (?:\^\{?\d\}?)? (?:\ ?/\ ?[a-zA-Z]+\b)? [ /]*)+""", re.X)
BASE = re.compile(r"(\w+)_(\d+)")


def committed_answer(completion: str) -> str | None:
    r"""What the completion stands by: the last well-formed \boxed{...}, else the last <answer> block, else None.

    Empty ones and placeholders ("...") do not count. A number that is merely mentioned is no answer.
    """
    boxes, open_braces = [], []     # boxes: where each begins and ends
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", completion, re.S):   # one pass: linear, whatever the input
        if token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                boxes.append((start, token.start()))
        elif token[0] == "{" or token[0].startswith(r"\boxed"):
            open_braces.append(None if token[0] == "{" else token.end())
    blocks = (piece.rpartition("<answer>") for piece in reversed(completion.split("</answer>")[:-1]))
    answers = itertools.chain((completion[start:end] for start, end in sorted(boxes, reverse=True)),
                              (block for _, tag, block in blocks if tag))
    return next((answer.strip() for answer in answers
                 if len(answer) > LONGEST_ANSWER or HOLLOW.sub("", answer)), None)


def grade(completion: str, reference: str) -> bool:
    """Whether the completion commits to an answer that is mathematically equal to the reference.

    Units, words, currency and thousands separators are ignored; 60% may stand for 60 as well as for 0.6;
    a number base may be left out, but not contradicted; of 8 + 8 + 15 = 31 the last side counts.
    """
    answer = committed_answer(completion)
    if answer is None or len(answer) > LONGEST_ANSWER:
        return False
    said, gold = simplified(answer), simplified(reference)
    if "=" not in gold:     # 8 + 8 + 15 = 31; x = 1, x = -2; (x, y) = (1, 2)
        said = re.sub(r"(?:\([^()]*\)|[^,=()])*(?<![<>!])=\s*", "", said)
        said = said.removesuffix("_10") if "_" not in gold else said
    if "_" not in said:     # 2516 for 2516_8
        gold = re.sub(r"^(\d+)_\d+$", r"\1", gold)
    readings = said.split(r"\approx")       # \frac{100}{3} \approx 33 claims both
    if "%" in answer and "%" not in reference:
        readings += [f"({said})/100"]
    verdicts = {reading: settle(reading, gold) for reading in readings}
    undecided = [reading for reading, verdict in verdicts.items() if verdict is None]
    return True in verdicts.values() or bool(undecided) and ask_judge(undecided, gold)


def simplified(text):
    """Text without what carries no mathematics: layout, currency, units. If words are all there is, the words."""
    text = text.translate(UNICODE)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    bare = re.sub(r"(?: ?(?:,|\{[ ,]*\}) ?)+", ", ", WORDS.sub(",", text)).lstrip(" ,:*").rstrip(" ,:*.")
    if WORDS.search(text) and not re.search(r"[\d\\]", bare):
        return re.sub(r"\\text|\W", "", text).casefold()
    return re.sub(r"(?<![a-zA-Z,]) |(?<!,) (?![a-zA-Z])", "", bare)


def settle(said, gold):
    """Whether simplified answers are equal, as far as strings and exact numbers can tell, else None."""
    if said == gold:
        return True
    if BASE.fullmatch(said) or BASE.fullmatch(gold) or re.fullmatch("[a-z]{3,}", gold):
        return False        # another base or another word; math-verify would look at digits and letters only
    x, y = as_number(said), as_number(gold)
    return None if x is None or y is None else x == y


def as_number(text):
    """The exact value of a plain decimal or fraction, else None. No long exponents: 1e999999999 has as many digits."""
    text = re.sub(r"(?<!\d)\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    plain = re.fullmatch(r"\(?([-+]?(?:\d+/0*[1-9]\d*|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?))\)?", text)
    return Fraction(plain[1]) if plain else None


def judge():
    """The judge's process: reads [answers, reference] lines, prints 1 (equal), 0 (not) or a negative number (killed).

    Each line is judged in a fork of its own under kernel limits: nothing else stops big-integer C code, and no
    line can affect the next.
    """
    import json, os, resource, signal, sys
    import math_verify.parser
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import I, Symbol, nan, zoo

    math_verify.parser.should_treat_as_complex = lambda latex: False    # it would make "x" and "x + i" differ in x
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    i = Symbol("i", real=True)

    def same(*pair):
        said, gold = [[expression.subs(i, I) if expression.has(i) else expression for expression in
                       parse(rf"\boxed{{{text}}}", config, "no_fallback", "first_match", parsing_timeout=None)
                       if not expression.has(nan, zoo)]
                      for text in pair]
        return verify(gold, said, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None)

    for pair in [(r"\sqrt{2}\pi", r"\frac{3}{2}+i"), (r"\sin x^2", r"\frac{1}{2}x"), ("y=2x+1", "y=x+3"),
                 ("(3,4]", r"(3,\pi]"), ("1,2", "1,3"), (r"1 \le x \le 2", "[1,3]")]:
        same(*pair)     # fills the caches of parser and sympy once, for all forks
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (1, 1))                     # seconds of CPU time
            resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))      # bytes
            signal.alarm(30)        # seconds on the wall, should it ever sleep
            try:
                answers, reference = json.loads(line)
                os._exit(any(same(answer, reference) for answer in answers))
            except BaseException:
                os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


JUDGE_SOURCE = inspect.getsource(judge) + "\njudge()"   # read now: the file may be edited during a run


def start_judge():
    """A fresh interpreter, sharing neither threads nor CUDA with this one; it ends when its stdin is closed."""
    process = subprocess.Popen([sys.executable, "-c", JUDGE_SOURCE], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               start_new_session=True,      # Ctrl-C is for us
                               env={**os.environ, "PYTHONHASHSEED": "0"})   # sympy orders by hash
    if process.stdout.readline() != "ready\n":
        raise RuntimeError("the judge of answers does not start; is math-verify installed?")
    return process


def ask_judge(answers, reference):
    """Whether one of the answers equals the reference, to the judge (started at the first need: sympy imports slowly)."""
    global GRADE_TIMEOUTS, _judge
    with _judge_lock:
        alive = _judge and _judge.poll() is None
        process, _judge = _judge if alive else start_judge(), None      # if interrupted, leave no stale verdict
        try:
            print(json.dumps([answers, reference]), file=process.stdin, flush=True)
            verdict = process.stdout.readline()
        except OSError:
            verdict = ""
        if verdict:     # else something killed the judge
            _judge = process
        GRADE_TIMEOUTS += int(verdict or -1) < 0
        return verdict == "1\n"


def _forget_judge():
    global _judge, _judge_lock
    _judge, _judge_lock = None, threading.Lock()


_forget_judge()
os.register_at_fork(after_in_child=_forget_judge)   # a forked process must not share its parent's pipes


def format_score(completion):
    """How well the form <reasoning>...</reasoning> <answer>\\boxed{...}</answer> is kept: 0, 1/3, 2/3 or 1."""
    reasoning = re.search(r"^\s*<reasoning>.+?</reasoning>", completion, re.S)
    answer = re.search(r"<answer>(.+?)</answer>\s*$", completion, re.S)
    return (bool(reasoning) + bool(answer) + bool(answer and "\\boxed{" in answer[1])) / 3


# ---------------------------------------------------------------------------------------------------------------------
# 5. Elastic roll-out: G responses a prompt, and G inpainted ones for the prompts whose responses are all wrong.


class Rollout(NamedTuple):
    completions: torch.Tensor  # (N, G, L) token ids, after injection
    hinted: torch.Tensor       # (N, G, L) bool, the positions that were given as hints
    correct: torch.Tensor      # (N, G) bool, after injection
    first: torch.Tensor        # (N, G, L) token ids, the policy's own draw
    first_correct: torch.Tensor  # (N, G) bool
    replaced: torch.Tensor     # (N, G) bool, the responses that were replaced


def rollout(draw, is_correct, traces, generators, *, algo="igpo", lam=0.5, eta=(0.2, 0.6), chunk=(5, 10), mask_id):
    """The augmented groups of N prompts (section 3.2 of the paper).

    draw(rows, hints) -> (len(rows), G, L) completions of the prompts in the list `rows`; hints is None or
    (len(rows), G, L). is_correct(n, completion) -> bool. traces: N tensors of trace ids, None where there is no usable one.
    generators: N torch.Generators, from which a prompt's hints are drawn.
    algo: "igpo"; "grpo" never draws again; "resample" draws again without hints (sample-matched GRPO).
    eta (low, high): each inpainted response has its own injection ratio ~ U[low, high] and its own chunking."""
    everyone = list(range(len(traces)))
    first = draw(everyone, None)
    N, G, L = first.shape
    first_correct = torch.tensor([[is_correct(n, first[n, g]) for g in range(G)] for n in everyone])
    completions, correct = first.clone(), first_correct.clone()
    hinted, replaced = torch.zeros_like(first, dtype=torch.bool), torch.zeros_like(correct)

    # The trigger looks at one prompt's group and at correctness alone: all wrong means all advantages are zero.
    stuck = [n for n in everyone if not first_correct[n].any() and (traces[n] is not None or algo == "resample")]
    if stuck and algo != "grpo":
        hints = None
        if algo == "igpo":
            def hint(n):
                ratio = eta[0] + (eta[1] - eta[0]) * torch.rand((), generator=generators[n]).item()
                return make_hint(traces[n], ratio, gen_length=L, mask_id=mask_id, min_chunk=chunk[0], max_chunk=chunk[1],
                                 generator=generators[n])
            hints = torch.stack([torch.stack([hint(n) for _ in range(G)]) for n in stuck]).to(first.device)
        second = draw(stuck, hints)
        for i, n in enumerate(stuck):
            winners = [g for g in range(G) if is_correct(n, second[i, g])]
            # K = min(#correct, floor(lambda G)): at least (1 - lambda) G of the policy's own responses stay.
            for g, winner in enumerate(winners[: math.floor(lam * G + 1e-9)]):
                completions[n, g], correct[n, g], replaced[n, g] = second[i, winner], True, True
                if hints is not None:
                    hinted[n, g] = hints[i, winner] != mask_id
    return Rollout(completions, hinted, correct, first, first_correct, replaced)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Log-probabilities: the mean-field estimate of diffu-GRPO, which reads log f at every position of one forward pass
#    over [q ; M M ... M]. That input is the same for all G responses of a prompt, so one row serves the whole group.


def completion_logps(model, prompts, completions, *, prompt_mask=None):
    """Log-probability of each completion token, (N, G, L), and the policy's entropy at each position, (N, L), in nats.

    prompts (N, P), completions (N, G, L), prompt_mask (N, P). The entropy carries no gradient: it selects tokens and is
    no part of the objective. Loss and gradient are those of N * G separate rows at 1/G of the work."""
    (N, P), L = prompts.shape, completions.shape[-1]
    canvas = F.pad(prompts, (0, L), value=model.config.mask_token_id)
    where = F.pad(torch.ones_like(completions[:, 0], dtype=torch.bool), (P, 0))  # (N, P + L), the completion
    logps, entropy = token_logps(model, canvas, attention_mask(prompt_mask, L), where, completions.transpose(1, 2).flatten(0, 1))
    return logps.view(N, L, -1).transpose(1, 2), entropy.view(N, L)


def token_logps(model, canvas, attention, where, tokens, chunk=2**26):
    """Log-probabilities of `tokens` (M, G) at the M True places of `where` (B, T), and the entropy at each, (M,).

    Head and softmax run over so many places at a time that a table of logits has at most `chunk` numbers, and run again
    in the backward pass: for LLaDA-8B the tables of a single prompt would else be a gigabyte. They run in the place of
    the head, inside the model's own forward, because that is where FSDP has its parameters gathered."""
    head, where = model.lm_head.forward, where.roll(-getattr(model.config, "logit_shift", 0), 1)

    def part(hidden, tokens):
        table = head(hidden).float().log_softmax(-1)  # (chunk / V, V)
        with torch.no_grad():
            entropy = -(table.exp() * table).sum(-1)
        return table.gather(1, tokens), entropy  # no (M, G, V) copy

    def in_chunks(hidden):
        size = max(chunk // model.config.vocab_size, 1)
        pairs = list(zip(hidden[where].split(size), tokens.split(size)))
        if len(pairs) == 1:
            return part(*pairs[0])
        return tuple(map(torch.cat, zip(*(checkpoint(part, h, t, use_reentrant=False) for h, t in pairs))))

    model.lm_head.forward = in_chunks
    try:
        return model(input_ids=canvas, attention_mask=attention, use_cache=False).logits
    finally:
        del model.lm_head.forward  # the class's own shows again


def flops(config, rows, length, head_tokens, queries=None, backward=False):
    """Floating-point operations of a forward pass over `rows` rows of `length` tokens, padding included.

    A multiply-add is 2. With D the width, H query heads of size d, H_kv key/value heads, M the MLP's width, V words, n
    layers and T = `length`, a token costs n * (2 D H d * 2 [query, output] + 2 D H_kv d * 2 [key, value]
    + 2 H d T * 2 [scores, weighted sum: no causal mask, so all T] + 2 D M * 3 [gate, up, down]), and each of the
    `head_tokens` positions a row 2 D V. queries: the tokens a row that are computed where the rest is cached. A
    backward pass costs twice its forward; what gradient checkpointing computes again does not count, by convention."""
    D, M, n, H = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads
    d = getattr(config, "head_dim", None) or D // H
    token = n * (4 * D * H * d + 4 * D * config.num_key_value_heads * d + 4 * H * d * length + 6 * D * M)
    forward = rows * ((length if queries is None else queries) * token + head_tokens * 2 * D * config.vocab_size)
    return forward * 3 if backward else forward


def memory_gib(config, gpus=1, lora_rank=0, kl=True):
    """GiB a GPU holds for weights, gradients and optimizer of one RL run, at its largest; activations come on top.

    With n GPUs and P parameters, all weights: 16 P / n bytes (float32 weights, gradients, two Adam moments) + 2 P / n for
    the bf16 reference + 2 P for the bf16 weights gathered for the roll-out. LoRA: 2 P bf16 + 16 bytes an adapter weight."""
    D, M, n, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    d = getattr(config, "head_dim", None) or D // config.num_attention_heads
    shapes = [(D, config.num_attention_heads * d)] * 2 + [(D, config.num_key_value_heads * d)] * 2 + [(D, M)] * 3
    P = n * sum(a * b for a, b in shapes) + V * D * (1 if config.tie_word_embeddings else 2)
    if lora_rank:
        return (2 * P + 16 * n * lora_rank * sum(a + b for a, b in shapes)) / 2**30
    return (16 * P / gpus + (2 * P / gpus if kl else 0) + 2 * P) / 2**30


# Dense bf16 FLOP/s by the data sheets (without sparsity). The first name that is a word of the device's name holds.
GPU_PEAK = {"B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
            "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "MI300X": 1307e12}


def peak_flops(device_name):
    """bf16 FLOP/s of the GPU that torch.cuda.get_device_name() names, or None where it is not known."""
    return next((peak for name, peak in GPU_PEAK.items() if re.search(rf"\b{name}\b", device_name)), None)


# ---------------------------------------------------------------------------------------------------------------------
# 7. The IGPO objective.


def group_advantages(rewards):
    """Eq. 2: A_i = r_i - mean_j r_j, not divided by the standard deviation. (N, G) -> (N, G).

    With rewards in {0, 1} and a share rho of them 1, the mean of A^2 is rho (1 - rho): zero for a group that is all
    wrong, and positive once inpainted responses have been swapped in (Theorem 1)."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def entropy_filter(entropy, hint_positions, keep):
    """Of each row's hint tokens, which learn: the ceil(keep * H) of its H hint tokens with the highest entropy.

    entropy (N, L), or of the shape of hint_positions (..., L) bool. Returns a bool mask of that shape, True at these
    hint tokens and at every position that is no hint. A confident policy that is forced to change at a hint token
    takes a large and destabilising step; where it is uncertain it can be taught. keep -> 0+ leaves one token, 0 none."""
    if entropy.dim() < hint_positions.dim():
        entropy = entropy.unsqueeze(-2).expand(hint_positions.shape)
    by_entropy = entropy.masked_fill(~hint_positions, -math.inf).argsort(dim=-1, descending=True, stable=True)
    rank = by_entropy.argsort(dim=-1)  # 0 for the most uncertain hint token
    kept = (hint_positions.sum(-1, keepdim=True).double() * keep - 1e-6).ceil()
    return ~hint_positions | (rank < kept)


def policy_loss(logps, old_logps, ref_logps, advantages, token_mask, *, epsilon=0.2, beta=0.01, ratio="sequence"):
    """Eq. 3 and 5: minus the clipped objective of the (augmented) groups, plus beta times the KL to the reference policy.

    logps, old_logps, ref_logps (N, G, L): under the policy, the policy that drew the responses, the initial policy
    (None if beta is 0). advantages (N, G). token_mask (N, G, L): the tokens that learn. -> (loss, metrics)"""
    mask = token_mask.to(logps.dtype)
    def over_tokens(x):  # (1/|o_i|) sum_k x_ik -> (N, G)
        return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)

    log_ratio = logps - old_logps
    if ratio == "sequence":  # rho_i = exp(mean_k log-ratio), one ratio for all tokens of a response
        log_ratio = over_tokens(log_ratio)[..., None].expand_as(logps)
    elif ratio != "token":
        raise UsageError(f"ratio is 'sequence' or 'token', not {ratio!r}")
    rho, A = log_ratio.exp(), advantages[..., None]
    clipped = rho.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(rho * A, clipped * A)  # (N, G, L)
    kl = torch.zeros_like(logps)
    if beta:  # k3 (Schulman): unbiased, never negative
        delta = ref_logps - logps
        kl = delta.exp() - delta - 1
    loss = -(over_tokens(objective) - beta * over_tokens(kl)).mean()
    metrics = {"kl": over_tokens(kl).mean(), "ratio": over_tokens(rho).mean(),
               "clip_fraction": over_tokens((clipped * A < rho * A).to(logps.dtype)).mean()}
    return loss, {name: value.item() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 8. The SFT objective.


def sft_loss(model, prompts, completions, *, prompt_mask=None, generator=None):
    """Eq. 1: E_t [ 1/t * sum over masked k of -log f(x0_k | x_t) ], t ~ U(0, 1), here divided by L, a mean over tokens.

    prompts (B, P) are never masked; completions (B, L) are padded with the end token, which is trained like any other
    token: it is how the model learns where to stop. The t of the rows are spread evenly over (0, 1), each still uniform,
    because 1/t makes the loss of independent ones noisy. -> (loss, metrics)"""
    (B, P), L = prompts.shape, completions.shape[1]
    device = "cpu" if generator is None else generator.device
    t = (torch.rand(1, generator=generator, device=device) + torch.arange(B, device=device) / B) % 1
    t = t.clamp(min=1e-3)[:, None].to(prompts.device)  # (B, 1)
    masked = torch.rand(B, L, generator=generator, device=device).to(prompts.device) < t
    canvas = torch.cat([prompts, completions.masked_fill(masked, model.config.mask_token_id)], dim=1)
    logps, _ = token_logps(model, canvas, attention_mask(prompt_mask, L), F.pad(masked, (P, 0)), completions[masked][:, None])
    nll = -logps.squeeze(1)
    loss = (nll / t.expand(B, L)[masked]).sum() / (B * L)
    return loss, {"nll": nll.sum().item() / max(len(nll), 1), "masked": masked.float().mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# 9. Data.


class Problem(NamedTuple):
    question: str
    answer: str
    trace: str | None  # the reference reasoning up to its answer; None: hints cannot be made of it


INSTRUCTION = ("Solve the problem step by step. First write your reasoning between <reasoning> and </reasoning>, then only "
               "the final answer, as \\boxed{...}, between <answer> and </answer>.")


def read_rows(source, columns, split="train", subset=None):
    """Rows of a local .json or .jsonl file, or of a hub data set, as dicts that have at least the given columns.

    A column "a|b" is there if a or b is."""
    path = Path(source)
    if path.suffix in (".json", ".jsonl") or path.exists():
        if not path.is_file():
            raise UsageError(f"no data file at {source}")
        text = path.read_text(encoding="utf-8")
        try:
            rows = json.loads(text) if text.lstrip().startswith("[") else None
        except json.JSONDecodeError as error:
            raise UsageError(f"{source}, line {error.lineno}: not JSON ({error.msg})") from error
        if rows is None:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except json.JSONDecodeError as error:
                    raise UsageError(f"{source}, line {number}: not JSON ({error.msg})") from error
    else:
        import datasets  # slow to import, and needed here alone
        try:
            rows = list(datasets.load_dataset(str(source), subset, split=split))
        except Exception as error:
            raise UsageError(f"cannot load the data set {source} ({type(error).__name__}); give a local .jsonl file") from error
    if not rows:
        raise UsageError(f"{source} holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or (absent := [c for c in columns if not row.keys() & c.split("|")]):
            have = ", ".join(row) if isinstance(row, dict) else "no columns at all"
            raise UsageError(f"{source}, row {number}: no column {absent[0] if isinstance(row, dict) else columns[0]!r} (it has {have})")
    return rows


def metamath_problems(source):
    """MetaMathQA as the released runs use it: answer-augmented rows alone, one per query, the answer after its marker."""
    problems = {}
    for row in read_rows(source, ("type", "query", "response")):
        if row["type"] in ("GSM_AnsAug", "MATH_AnsAug") and row["query"] not in problems:
            _, marker, answer = row["response"].rpartition("The answer is:")
            if marker and answer.strip():
                problems[row["query"]] = Problem(row["query"], answer.strip(), cut_trace(row["response"], answer))
    if not problems:
        raise UsageError(f"{source} has no row of type GSM_AnsAug or MATH_AnsAug that states its answer")
    return list(problems.values())


REWRITE = """Rewrite the solution below so that it is concise, structured and mathematically rigorous: only the steps that lead
to the answer, each stated once, without reflection, doubts, detours or repetition. Use exactly this form:

<reasoning>
(the steps)
</reasoning>
<answer>
\\boxed{{(the final answer)}}
</answer>

Problem:
{problem}

Solution:
{solution}"""


def rewrite_verdict(text, answer, length, max_tokens):
    """Whether a rewritten trace is "kept", and if not, why: it must be short, in the RL format, and right."""
    if length > max_tokens:
        return "too long"
    if format_score(text) < 1:
        return "bad format"
    return "kept" if grade(text, answer) else "wrong answer"


def rewrite_traces(rows, rewrite, tokenizer, part, *, max_tokens, batch_size, done=()):
    """Rewrite the solutions of this process's rows, appending a line a row to the file `part`. -> tokens written

    rows: (index, row) pairs with columns problem, answer, and solution or generations (a list). rewrite: list of requests
    -> list of texts. tokenizer: the policy's, in whose tokens the length is measured. done: indices to leave out."""
    rows, tokens = [(i, row) for i, row in rows if i not in done], 0
    bar = tqdm(total=len(rows), desc="rewriting", unit=" traces", disable=rank() > 0, mininterval=1)
    with open(part, "a") as file:
        file.write("\n")  # ends a line that a kill left half-written
        for at in range(0, len(rows), batch_size):
            batch = rows[at: at + batch_size]
            solutions = [row.get("solution") or row["generations"][0] for _, row in batch]
            began = time.time()
            texts = rewrite([REWRITE.format(problem=row["problem"], solution=s) for (_, row), s in zip(batch, solutions)])
            lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
            for (i, row), text, length in zip(batch, texts, lengths):
                verdict = rewrite_verdict(text.strip(), str(row["answer"]), length, max_tokens)
                file.write(json.dumps({"row": i, "verdict": verdict, "prompt": row["problem"], "completion": text.strip()}) + "\n")
            file.flush()
            tokens += sum(lengths)
            bar.set_postfix(tokens_per_second=f"{world() * sum(lengths) / (time.time() - began):.0f}", refresh=False)
            bar.update(len(batch))
    return tokens


def collect_traces(out):
    """The parts that the processes wrote -> (rows kept, counts by verdict). A line that a kill left half-written is none."""
    lines = []
    for part in sorted(out.glob("rewritten.*.jsonl")):
        for line in part.read_text().split("\n"):
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    lines = {line["row"]: line for line in lines if isinstance(line, dict)}
    counts = {}
    for line in lines.values():
        counts[line["verdict"]] = counts.get(line["verdict"], 0) + 1
    kept = [{"prompt": line["prompt"], "completion": line["completion"]} for _, line in sorted(lines.items()) if line["verdict"] == "kept"]
    return kept, counts, lines.keys()


def load_rewriter(name, device, max_new_tokens):
    """An instruction-tuned causal LM as a function: list of requests -> list of answers, greedy. A single process spreads
    a model over all its GPUs (which needs pip install accelerate); under torchrun each process holds a whole one."""
    spread = {"device_map": "auto"} if device.type == "cuda" and world() == 1 else {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **spread).eval()
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--rewriter {name} cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    if not spread:
        model.to(device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.no_grad()
    def rewrite(requests):
        if tokenizer.chat_template is not None:
            requests = [tokenizer.apply_chat_template([{"role": "user", "content": request}], add_generation_prompt=True,
                                                      tokenize=False) for request in requests]
        inputs = tokenizer(requests, return_tensors="pt", padding=True, add_special_tokens=tokenizer.chat_template is None)
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        written = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    return rewrite


def encode_prompt(tokenizer, question):
    """Token ids of a question, inside the model's chat template and with the format asked for where it has one."""
    if tokenizer.chat_template is not None:
        question = tokenizer.apply_chat_template([{"role": "user", "content": f"{INSTRUCTION}\n\n{question}"}],
                                                 add_generation_prompt=True, tokenize=False)
    return tokenizer(question, add_special_tokens=False).input_ids


def encode_trace(tokenizer, trace):
    """Token ids of a trace where it stands in a completion, that is behind the opening tag; None stays None."""
    return None if trace is None else torch.tensor(tokenizer(f"<reasoning>\n{trace}", add_special_tokens=False).input_ids)


def pad_left(prompts, pad_id, device="cpu"):
    """Lists of ids -> (N, P) ids and (N, P) mask. Padding is on the left, so that every completion starts at column P."""
    P = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (P - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


def decode(tokenizer, completion, end_ids):
    """The text of an (L,) completion, up to its first end token."""
    return tokenizer.decode(completion[counted_tokens(completion, end_ids)], skip_special_tokens=True)


def batch_indices(size, batch, step, seed):
    """Which of `size` examples make up a step's batch: slices of one shuffle an epoch, a function of the step alone."""
    places = [divmod(position, size) for position in range(step * batch, (step + 1) * batch)]
    shuffles = {epoch: torch.randperm(size, generator=seeded(seed, "epoch", epoch)).tolist() for epoch, _ in places}
    return [shuffles[epoch][i] for epoch, i in places]


def seeded(*key):
    """A generator of its own for whatever the key names, for instance (seed, step, prompt)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()) << 16)


# The toy world, a miniature of the paper's situation. A lock has four wheels with the digits 0 to 6; each shows a and is
# turned back by b, so that it then shows (a - b) mod 7. The SFT traces come from people who take the smaller digit from
# the larger wherever a < b, six times out of seven. SFT therefore teaches the form, the easy wheels and a misconception.
# In seven of ten RL problems three wheels or more pass zero: sampling rarely gets all of them right, a hint lets it. The
# trace spells the answer out, so eta_high is set such that of its six one-token chunks never more than three are given.

FACES, WHEELS = 7, 4
TOY_WORDS = [*map(str, range(FACES)), "-", "=", "\n", "}", "\\boxed{", "<reasoning>", "</reasoning>", "<answer>", "</answer>",
             "<unknown>", "<end>", "<mask>"]


def toy_lock(rng, passing_zero, right):
    """-> question, trace and answer of a random lock: "2603-4512=", "5161", "5161".

    passing_zero: how many of its wheels may have a < b; right: the probability of a right result on these."""
    wheels = []
    while not wheels or sum(a < b for a, b in wheels) not in passing_zero:
        wheels = [(rng.randrange(FACES), rng.randrange(FACES)) for _ in range(WHEELS)]
    results = [str((a - b) % FACES if a >= b or rng.random() < right else b - a) for a, b in wheels]
    question = "".join(str(a) for a, _ in wheels) + "-" + "".join(str(b) for _, b in wheels) + "="
    return question, "".join(results), "".join(results)


def toy_problems(count, seed):
    """RL problems, with right traces and answers: in 70% of them three wheels or four pass zero, in the others none."""
    rng = random.Random(f"rl {seed}")
    locks = [toy_lock(rng, [3, 4] if rng.random() < 0.7 else [0], right=1.0) for _ in range(count)]
    return [Problem(question, answer, trace) for question, trace, answer in locks]


def toy_sft_rows(count, seed, right=0.15):
    """SFT rows (prompt, completion) over all kinds of locks."""
    rng = random.Random(f"sft {seed}")
    locks = [toy_lock(rng, range(WHEELS + 1), right) for _ in range(count)]
    return [{"prompt": question, "completion": f"<reasoning>\n{trace}</reasoning><answer>\\boxed{{{answer}}}</answer>"}
            for question, trace, answer in locks]


def toy_model(seed):
    """A small bidirectional Llama with random weights, and its tokenizer: a digit, a sign or a tag is a token."""
    words = Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(TOY_WORDS)}, "<unknown>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(Regex(r"</?\w+>|\\boxed\{|[\s\S]"), "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", mask_token="<mask>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOY_WORDS), hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, is_causal=False, mask_token_id=tokenizer.mask_token_id, bos_token_id=None,
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id))
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# 10. Processes and checkpoints. The method above and the loops below read as if there were one process; what knows better
#     is here.


def setup():
    """Join the processes that torchrun started, if it did, and return this one's device.

    A single GPU is a group of one, because sharding is also what gives bf16 compute over float32 weights."""
    local_rank, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and not dist.is_initialized():
        # Ranks may be far apart: one reads the weights for all, and one may have much more to rewrite than the others.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12))
    elif cuda and not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, **kwargs):
    if rank() == 0:
        print(*args, flush=True, **kwargs)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def mean_across_ranks(metrics, device="cpu"):
    """The mean over all processes of a dict of numbers."""
    if world() == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(metrics, (values / world()).tolist()))


def load_sharded(name_or_path, device, *, dtype=torch.float32):
    """load_model for every process: whole on one CPU process, else rank 0 reads it and the shards are dealt out (FSDP2).

    The other processes build the model on the meta device, so the host holds one copy however many GPUs there are."""
    if not dist.is_initialized():
        return load_model(name_or_path, dtype=dtype, device=device)
    model, tokenizer = load_model(name_or_path, dtype=dtype, device="cpu" if rank() == 0 else "meta")
    weights = model.state_dict() if rank() == 0 else {}
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = dict(mesh=init_device_mesh(device.type, (world(),)),
                   mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32))
    model.to("meta").tie_weights()
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its buffers are in no file
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model, tokenizer


def load_policy(name_or_path, device, *, lora_rank=0, gradient_checkpointing=False, compile=False, seed=0):
    """The model that is trained: sharded, or with LoRA whole on every process, a frozen base and trainable adapters."""
    if lora_rank:
        model, tokenizer = load_model(name_or_path, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        torch.manual_seed(seed)  # the same adapters on every process
        add_lora(model, lora_rank)
    else:
        model, tokenizer = load_sharded(name_or_path, device)
    if gradient_checkpointing:
        recompute_activations(model)
    if compile:
        for layer in model.model.layers:  # one layer compiles in seconds, and serves for all
            layer.compile(dynamic=True)
    return model, tokenizer


def recompute_activations(model):
    """Keep one activation a decoder layer and recompute the others in the backward pass, while the model is in train mode."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its old name
    enable({"use_reentrant": False})


@contextlib.contextmanager
def gathered(model):
    """Hold the whole parameters for the length of a roll-out phase. A rank with more stuck groups runs more forward
    passes than the others, and would wait for them for ever if each pass had to gather parameters."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def save_full(model, tokenizer, folder):
    """save_model by rank 0, of weights gathered from all ranks. The folder appears only when it is complete."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options) if isinstance(model, FSDPModule) else None
    if rank() == 0:
        unfinished = Path(f"{folder}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        save_model(model, tokenizer, unfinished, weights and {name: weight.clone() for name, weight in weights.items()})
        if getattr(model, "peft_config", None):
            model.save_pretrained(unfinished / "adapter")  # the adapter alone
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    barrier()


def checkpoint_state(model, optimizer):
    """-> (flat dict of all tensors of model and optimizer, and the two state dicts whose tensors they are)."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=FLAT)
    tensors = {f"model.{name}": tensor for name, tensor in model_state.items()}
    tensors |= {f"optimizer.{name}": x for name, x in optimizer_state.items() if isinstance(x, torch.Tensor)}
    return tensors, model_state, optimizer_state


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_checkpoint(out, stage, step, model, optimizer, keep):
    """Write out/checkpoints/STAGE-STEP, each rank its shards as safetensors (no pickle), and drop all but the last `keep`.

    Everything random is a function of (seed, step, ...), so model, optimizer and step are the whole state of a run. The
    folder gets its name when it is complete: whatever happens in between, the one before stays the newest."""
    folder = out / "checkpoints" / f"{stage}-{step:06d}"
    unfinished = folder.with_suffix(".unfinished")
    try:
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        barrier()
        with warnings.catch_warnings(action="ignore"):  # that a single process is a single process
            dcp.save(checkpoint_state(model, optimizer)[0], no_dist=not dist.is_initialized(),
                     storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True))
        if rank() == 0:
            size = (out / "metrics.jsonl").stat().st_size
            (unfinished / "state.json").write_text(json.dumps({"stage": stage, "step": step, "metrics_bytes": size}))
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
            for old in checkpoints(out)[:-keep]:
                shutil.rmtree(old)
        barrier()
    except (Exception, dcp.CheckpointException) as error:  # a full disk, a read-only folder
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(f"cannot write {folder} ({reason}); the checkpoint before it can be resumed from") from error


def checkpoints(out):
    """The complete checkpoints of a run, the oldest first."""
    folders = [path for path in (out / "checkpoints").glob("*-*") if path.suffix != ".unfinished"]
    return sorted(folders, key=lambda path: (path.name.startswith("rl"), path.name))


def damaged(folder, error):
    return UsageError(f"{folder} is damaged ({type(error).__name__}); delete it to resume from the one before")


def checkpoint_info(folder):
    """The stage, the step and the length of metrics.jsonl that a checkpoint was written with."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error


def load_checkpoint(folder, model, optimizer):
    """Fill model and optimizer from a checkpoint, written by any number of processes, and return its step."""
    tensors, model_state, optimizer_state = checkpoint_state(model, optimizer)
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, no_dist=not dist.is_initialized(), storage_reader=HuggingFaceStorageReader(str(folder)))
    except (Exception, dcp.CheckpointException) as error:
        raise damaged(folder, error) from error
    model_state = {name: tensors[f"model.{name}"] for name in model_state}
    optimizer_state |= {name: tensors[f"optimizer.{name}"] for name in optimizer_state if f"optimizer.{name}" in tensors}
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=FLAT)
    return checkpoint_info(folder)["step"]


SIGTERM_RECEIVED = threading.Event()  # a scheduler's warning: the loops then save a checkpoint and end


# ---------------------------------------------------------------------------------------------------------------------
# 11. The recipe.


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting, every one a flag. The defaults are the preset `llada`: the released runs' for LLaDA-8B-Instruct."""
    preset: str = flag("llada", "defaults for all that follows: llada or toy")
    stage: Literal["rewrite", "sft", "rl", "all"] = flag(
        "all", "all: rewriting where --rewrite_data is given, SFT where there are SFT examples, then RL")
    algo: Literal["igpo", "grpo", "resample"] = flag("igpo", "resample: all-wrong groups are drawn again as in igpo, but without hints")
    model: str = flag("GSAI-ML/LLaDA-8B-Instruct", "model folder or hub name; toy: a small one made on the spot")
    train_data: str = flag("meta-math/MetaMathQA", "RL problems: MetaMathQA, or a .json/.jsonl file with its columns; or toy")
    sft_data: str | None = flag(None, "SFT examples: a hub data set or .jsonl file with columns prompt and completion; or toy")
    eval_data: str | None = flag(None, "held-out problems, as train_data; default: the first eval_size problems of train_data")
    out_dir: str | None = flag(None, "run folder; default: runs/PRESET-DATE-TIME")
    seed: int = flag(0, "seed of everything random")
    resume: bool = flag(False, "continue the run in out_dir from its newest checkpoint; give the same flags again")
    overwrite: bool = flag(False, "delete the run in out_dir first")
    # sampler
    gen_length: int = flag(256, "completion length L, tokens")
    diffusion_steps: int = flag(128, "denoising steps for a completion")
    block_length: int = flag(32, "tokens in a semi-autoregressive block")
    temperature: float = flag(1.2, "sampling temperature of the roll-outs")
    rows_per_call: int = flag(64, "responses sampled in one batch; whole groups, so at least one of them")
    max_prompt_length: int = flag(512, "prompts of more tokens are left out")
    # groups and hints
    prompts_per_step: int = flag(64, "prompts in an update, over all processes")
    group_size: int = flag(8, "G, responses to a prompt")
    eta_low: float = flag(0.2, "share of a trace's chunks given as hints: eta ~ U[eta_low, eta_high]")
    eta_high: float = flag(0.6, "see eta_low")
    min_chunk: int = flag(5, "shortest chunk, tokens")
    max_chunk: int = flag(10, "longest chunk, tokens")
    lam: float = flag(0.5, "lambda, the share of a group that may be replaced")
    trace_noise: float = flag(0.0, "ablation: share of trace tokens replaced by other traces' tokens")
    reward_correct: float = flag(3.0, "reward of a correct answer")
    reward_format: float = flag(0.75, "reward of the full format")
    # RL objective
    tau: float = flag(0.2, "share of a response's hint tokens that learn, the most uncertain ones")
    mu: int = flag(4, "updates per roll-out")
    epsilon: float = flag(0.2, "clip range of the ratio")
    beta: float = flag(0.01, "weight of the KL to the initial policy")
    ratio: Literal["sequence", "token"] = flag("sequence", "one importance ratio a response, or one a token")
    # RL optimisation
    max_steps: int = flag(500, "RL steps, each one roll-out and mu updates")
    lr: float = flag(5e-7, "learning rate")
    adam_beta1: float = flag(0.9, "AdamW, also for SFT")
    adam_beta2: float = flag(0.99, "AdamW, also for SFT")
    weight_decay: float = flag(0.1, "AdamW, also for SFT")
    max_grad_norm: float = flag(0.2, "gradients are scaled down to this norm")
    lr_decay: bool = flag(False, "after the warm-up, linear to zero at max_steps")
    warmup_steps: int = flag(50, "updates of linear learning-rate warm-up")
    prompts_per_forward: int = flag(1, "prompts in one forward and backward pass of an update")
    lora_rank: int = flag(0, "train LoRA adapters of this rank instead of all weights (needs pip install peft); 0: all weights")
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass")
    compile: bool = flag(False, "torch.compile the decoder layers")
    # SFT
    sft_steps: int = flag(2000, "SFT updates")
    sft_batch: int = flag(64, "examples in an SFT update, over all processes")
    sft_rows_per_forward: int = flag(1, "examples in one forward and backward pass")
    sft_length: int = flag(1024, "completion length in SFT, tokens; longer examples are left out")
    sft_lr: float = flag(1e-5, "SFT learning rate, linear to zero after its warm-up")
    sft_max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm")
    # rewriting traces for SFT
    rewrite_data: str | None = flag(None, "columns problem, answer, and solution or generations; --stage rewrite: OpenR1-Math-220k")
    rewriter: str = flag("meta-llama/Llama-4-Maverick-17B-128E-Instruct", "instruction-tuned causal LM, folder or hub name")
    rewrite_max_tokens: int = flag(1024, "longest trace that is kept, tokens of the policy")
    rewrite_batch: int = flag(16, "traces rewritten in one batch")
    # evaluation and reports
    eval_size: int = flag(256, "held-out problems, answered greedily before and after")
    eval_every: int = flag(0, "RL steps between evaluations; 0: only before and after")
    show_every: int = flag(25, "RL steps between groups shown as text; 0: never")
    show: bool = flag(False, "in a terminal, also show such a response being inpainted step by step")
    save_every: int = flag(50, "steps between checkpoints that --resume continues from; 0: never")
    keep: int = flag(2, "checkpoints kept")
    wandb: str | None = flag(None, "project to send the lines of metrics.jsonl to (needs pip install wandb)")


PRESETS = {"llada": {}, "toy": dict(
    model="toy", train_data="toy", sft_data="toy", eval_data="toy", gen_length=16, diffusion_steps=8, block_length=8,
    rows_per_call=512, prompts_per_step=16, eta_low=0.4, eta_high=0.66, min_chunk=1, max_chunk=1, reward_correct=1.0,
    reward_format=0.0, beta=0.03, max_steps=120, lr=1e-4, lr_decay=True, warmup_steps=20, prompts_per_forward=16,
    gradient_checkpointing=False, sft_steps=600, sft_batch=128, sft_rows_per_forward=128, sft_length=16, sft_lr=3e-3, show=True,
)}


class Example(NamedTuple):
    """A Problem in token ids."""
    prompt: list
    answer: str
    trace: torch.Tensor | None


def encode_problems(tokenizer, problems, max_prompt_length):
    """Problems -> (examples that fit, number left out because their prompt is too long)."""
    examples = [Example(encode_prompt(tokenizer, p.question), p.answer, encode_trace(tokenizer, p.trace)) for p in problems]
    fit = [e for e in examples if len(e.prompt) <= max_prompt_length]
    if not fit:
        raise UsageError(f"all {len(examples)} prompts are longer than --max_prompt_length {max_prompt_length}")
    return fit, len(examples) - len(fit)


def add_trace_noise(examples, share, generator):
    """Replace a share of all trace tokens by tokens drawn from all traces, for the ablation on noisy traces."""
    pool = torch.cat([torch.tensor([], dtype=torch.long), *(e.trace for e in examples if e.trace is not None)])
    def noisy(trace):
        other = pool[torch.randint(len(pool), trace.shape, generator=generator)]
        return torch.where(torch.rand(trace.shape, generator=generator) < share, other, trace)
    return [e if e.trace is None else e._replace(trace=noisy(e.trace)) for e in examples]


def answer_examples(model, tokenizer, examples, *, batch_size, jobs=None, seed=0, **sampling):
    """Sample completions: yields (example index, sample index, text, number of tokens) for each job, in order.

    jobs: the (example index, sample index) pairs to do, each with its own random numbers; default: each example once."""
    device, end_ids = next(model.parameters()).device, model.config.eos_token_id
    jobs = [(i, 0) for i in range(len(examples))] if jobs is None else jobs
    for at in range(0, len(jobs), batch_size):
        part = jobs[at: at + batch_size]
        prompts, prompt_mask = pad_left([examples[i].prompt for i, _ in part], model.config.pad_token_id, device)
        completions = sample(model, prompts, prompt_mask=prompt_mask, stop_early=True,
                             generator=[seeded(seed, "answer", i, s) for i, s in part], **sampling)
        for (i, s), completion, length in zip(part, completions, counted_tokens(completions, end_ids).sum(1).tolist()):
            yield i, s, decode(tokenizer, completion, end_ids), length


def evaluate(model, tokenizer, examples, cfg):
    """Greedy accuracy on examples, shared out over the processes."""
    mine = examples[rank():: world()]
    sampling = dict(gen_length=cfg.gen_length, block_length=cfg.block_length, steps=cfg.diffusion_steps)
    with gathered(model):
        right = sum(grade(text, mine[i].answer) for i, _, text, _ in
                    answer_examples(model, tokenizer, mine, batch_size=cfg.rows_per_call, **sampling))
    return mean_across_ranks({"right": right}, next(model.parameters()).device)["right"] * world() / len(examples)


def schedule(update, updates, warmup, decay):
    """Share of the learning rate at an update: linear warm-up, then constant or linear to zero."""
    left = (updates - update) / max(updates - warmup, 1) if decay else 1.0
    return min((update + 1) / (warmup + 1), left, 1.0)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def adamw(model, lr, cfg):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay)


def update(model, optimizer, losses, count, max_grad_norm):
    """One optimizer step on the mean of `count` (loss, metrics) pairs -> the mean metrics, with loss, grad_norm, skipped.

    `losses` is a generator: each is backpropagated before the next is made, so memory holds one forward pass at a time.
    A loss or gradient that is not finite changes nothing and is reported as skipped = 1."""
    total = {}
    for loss, metrics in losses:
        (loss / count).backward()
        for name, value in (metrics | {"loss": loss.item()}).items():
            total[name] = total.get(name, 0.0) + value / count
    if world() > 1 and not isinstance(model, FSDPModule):  # FSDP has done this already
        for parameter in (p for p in model.parameters() if p.grad is not None):
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    finite = math.isfinite(norm + mean_across_ranks({"loss": total["loss"]}, next(model.parameters()).device)["loss"])
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return total | {"grad_norm": norm, "skipped": float(not finite)}


def give_up(skipped):
    """Ends a run whose last ten updates were all skipped."""
    if skipped >= 10:
        raise UsageError("the last 10 updates had a loss or gradient that is not finite; lower the learning rate")


def log(out, record):
    """Append a line to metrics.jsonl, and send it to wandb where --wandb has started a run."""
    if rank() == 0:
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if getattr(sys.modules.get("wandb"), "run", None):
            sys.modules["wandb"].log(record)


def read_log(out):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def resumed_step(out, stage, model, optimizer):
    """The step to go on from: that of the newest checkpoint if it is of this stage, which is then loaded, else 0."""
    newest = checkpoints(out)[-1:]
    return load_checkpoint(newest[0], model, optimizer) if newest and newest[0].name.startswith(stage) else 0


def checkpoint_if_due(out, stage, step, model, optimizer, cfg, due):
    stop = mean_across_ranks({"stop": float(SIGTERM_RECEIVED.is_set())}, next(model.parameters()).device)["stop"] > 0
    if due or stop:
        save_checkpoint(out, stage, step, model, optimizer, cfg.keep)
    if stop:
        print0(f"\nSIGTERM: saved {stage} step {step}; continue with --out_dir {out} --resume")
        sys.exit(0)


def train_sft(model, tokenizer, rows, cfg, device, out):
    """Section 8 as a loop over rows with columns prompt and completion."""
    end, pad = model.config.eos_token_id[0], model.config.pad_token_id
    pairs = [(encode_prompt(tokenizer, row["prompt"]),
              tokenizer(row["completion"], add_special_tokens=False).input_ids + [end]) for row in rows]
    fit = [(p, c) for p, c in pairs if len(p) <= cfg.max_prompt_length and len(c) <= cfg.sft_length]
    if not fit:
        raise UsageError(f"{cfg.sft_data}: all {len(pairs)} examples are longer than --max_prompt_length or --sft_length")
    if len(fit) < len(pairs):
        print0(f"SFT: {len(pairs) - len(fit)} of {len(pairs)} examples left out, longer than --max_prompt_length or --sft_length")
    optimizer = adamw(model, cfg.sft_lr, cfg)
    start, skipped = resumed_step(out, "sft", model, optimizer), 0
    model.train()
    bar = tqdm(range(start, cfg.sft_steps), "SFT", total=cfg.sft_steps, initial=start, disable=rank() > 0, mininterval=1)
    for step in bar:
        began = time.time()
        set_lr(optimizer, cfg.sft_lr * schedule(step, cfg.sft_steps, cfg.warmup_steps, decay=True))
        mine = batch_indices(len(fit), cfg.sft_batch, step, cfg.seed)[rank():: world()]
        generator = seeded(cfg.seed, "sft", step, rank())

        def losses():
            for at in range(0, len(mine), cfg.sft_rows_per_forward):
                part = [fit[i] for i in mine[at: at + cfg.sft_rows_per_forward]]
                prompts, prompt_mask = pad_left([p for p, _ in part], pad, device)
                completions = torch.tensor([c + [pad] * (cfg.sft_length - len(c)) for _, c in part], device=device)
                yield sft_loss(model, prompts, completions, prompt_mask=prompt_mask, generator=generator)

        count = math.ceil(len(mine) / cfg.sft_rows_per_forward)
        metrics = mean_across_ranks(update(model, optimizer, losses(), count, cfg.sft_max_grad_norm), device)
        skipped = skipped + 1 if metrics["skipped"] else 0
        give_up(skipped)
        log(out, {"stage": "sft", "step": step + 1, **metrics, "lr": optimizer.param_groups[0]["lr"], "seconds": time.time() - began})
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        due = cfg.save_every and ((step + 1) % cfg.save_every == 0 or step + 1 == cfg.sft_steps)
        checkpoint_if_due(out, "sft", step + 1, model, optimizer, cfg, due)
    model.eval()


def train_rl(policy, reference, tokenizer, examples, held_out, cfg, device, out):
    """Sections 5 to 7 as a loop: roll out, then mu updates on the augmented groups."""
    config, G, L = policy.config, cfg.group_size, cfg.gen_length
    optimizer = adamw(policy, cfg.lr, cfg)
    sampling = dict(gen_length=L, block_length=cfg.block_length, steps=cfg.diffusion_steps, temperature=cfg.temperature)
    start, skipped = resumed_step(out, "rl", policy, optimizer), 0
    for step in range(start, cfg.max_steps):
        began = time.time()
        indices = batch_indices(len(examples), cfg.prompts_per_step, step, cfg.seed)[rank():: world()]
        batch = [examples[i] for i in indices]
        prompts, prompt_mask = pad_left([e.prompt for e in batch], config.pad_token_id, device)
        generators = [seeded(cfg.seed, "rollout", step, i) for i in indices]  # the same on any number of processes
        N, tokens = len(batch), 0

        def draw(rows, hints):
            nonlocal tokens
            drawn, per_call = [], max(cfg.rows_per_call // G, 1)
            for at in range(0, len(rows), per_call):
                part = rows[at: at + per_call]
                drawn.append(sample(policy, prompts[part].repeat_interleave(G, 0), **sampling, stop_early=True,
                                    prompt_mask=prompt_mask[part].repeat_interleave(G, 0),
                                    hints=None if hints is None else hints[at: at + per_call].flatten(0, 1),
                                    generator=[generators[n] for n in part]).view(len(part), G, L))
            tokens += sum(counted_tokens(d, config.eos_token_id).sum().item() for d in drawn)
            return torch.cat(drawn)

        def is_correct(n, completion):
            return grade(decode(tokenizer, completion, config.eos_token_id), batch[n].answer)

        def per_forward(*tensors):  # the same prompts of each (N, ...) tensor, as many as go through the model at once
            return zip(*(t.split(cfg.prompts_per_forward) for t in tensors))

        policy.eval()
        with gathered(policy), counted_forwards(policy) as passes:
            roll = rollout(draw, is_correct, [e.trace for e in batch], generators, algo=cfg.algo, lam=cfg.lam,
                           eta=(cfg.eta_low, cfg.eta_high), chunk=(cfg.min_chunk, cfg.max_chunk), mask_id=config.mask_token_id)
        rollout_seconds = time.time() - began

        def rewards_of(completions, correct):
            form = torch.tensor([[format_score(decode(tokenizer, c, config.eos_token_id)) for c in group] for group in completions])
            return (cfg.reward_correct * correct + cfg.reward_format * form).to(device)  # (N, G)

        advantages = group_advantages(rewards_of(roll.completions, roll.correct))
        with torch.no_grad():
            parts = list(per_forward(prompts, roll.completions, prompt_mask))
            old_logps, entropy = map(torch.cat, zip(*(completion_logps(policy, q, o, prompt_mask=m) for q, o, m in parts)))
            ref_logps = old_logps
            if cfg.beta:
                with adapters_off(policy) if cfg.lora_rank else contextlib.nullcontext(reference) as initial:
                    ref_logps = torch.cat([completion_logps(initial, q, o, prompt_mask=m)[0] for q, o, m in parts])
                    if isinstance(initial, FSDPModule):
                        initial.reshard()  # FSDP keeps the root for a backward pass that never comes
        counted = counted_tokens(roll.completions, config.eos_token_id)
        hinted = roll.hinted & counted
        learning = counted & entropy_filter(entropy, hinted, cfg.tau)  # (N, G, L)

        policy.train()
        updates = []
        for inner in range(cfg.mu):
            set_lr(optimizer, cfg.lr * schedule(step * cfg.mu + inner, cfg.max_steps * cfg.mu, cfg.warmup_steps, cfg.lr_decay))
            everything = per_forward(prompts, prompt_mask, roll.completions, old_logps, ref_logps, advantages, learning)
            losses = (policy_loss(completion_logps(policy, q, o, prompt_mask=m)[0], old, ref, A, learn,
                                  epsilon=cfg.epsilon, beta=cfg.beta, ratio=cfg.ratio)
                      for q, m, o, old, ref, A, learn in everything)
            updates.append(update(policy, optimizer, losses, math.ceil(N / cfg.prompts_per_forward), cfg.max_grad_norm))
            skipped = skipped + 1 if updates[-1]["skipped"] else 0
            give_up(skipped)

        seconds = time.time() - began
        own = counted_tokens(roll.first, config.eos_token_id)
        metrics = mean_across_ranks({
            "reward": rewards_of(roll.first, roll.first_correct).mean().item(),
            "accuracy": roll.first_correct.float().mean().item(),
            "accuracy_after": roll.correct.float().mean().item(),
            "all_wrong": (~roll.first_correct.any(1)).float().mean().item(),
            "all_wrong_after": (~roll.correct.any(1)).float().mean().item(),
            "replaced": roll.replaced.float().mean().item(),
            "hint_tokens": hinted.sum().item() / N / G,
            "hint_tokens_kept": (hinted & learning).sum().item() / N / G,
            "entropy": (entropy[:, None] * own).sum().item() / own.sum().item(),
            "completion_length": own.sum().item() / N / G,
            **{name: sum(u[name] for u in updates) / cfg.mu for name in updates[0]},
            "tokens_per_second": world() * tokens / rollout_seconds, "forwards": len(passes),
            "flops_rollout": sum(flops(config, rows, length, cfg.block_length) for rows, length in passes) / rollout_seconds,
            "flops_update": cfg.mu * flops(config, N, prompts.shape[1] + L, L, backward=True) / (seconds - rollout_seconds),
            "seconds": seconds, "seconds_rollout": rollout_seconds, "seconds_update": seconds - rollout_seconds,
        }, device)
        metrics["rescued"] = 1 - metrics["all_wrong_after"] / metrics["all_wrong"] if metrics["all_wrong"] else 0.0
        if device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name())):
            metrics |= {f"peak_share_{part}": metrics[f"flops_{part}"] / peak for part in ("rollout", "update")}
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        print0("RL {:>{w}}/{}  accuracy {accuracy:.2f} -> {accuracy_after:.2f}  all wrong {all_wrong:.2f} -> {all_wrong_after:.2f}"
               "  kl {kl:.4f}  length {completion_length:.0f}  {seconds:.1f} s".format(
                   step + 1, cfg.max_steps, w=len(str(cfg.max_steps)), **metrics))
        if cfg.show_every and step % cfg.show_every == 0:
            print0(show_group(tokenizer, roll, learning, config))
            if cfg.show and sys.stdout.isatty() and world() == 1 and rescued_response(roll):
                n, g = rescued_response(roll)
                hint = torch.where(roll.hinted[n, g], roll.completions[n, g], config.mask_token_id)
                show_denoising(policy, tokenizer, prompts[n][prompt_mask[n]], hint, learning[n, g], sampling)
        if held_out and cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.max_steps:
            metrics["eval_accuracy"] = evaluate(policy, tokenizer, held_out, cfg)
            print0(f"  held-out accuracy {metrics['eval_accuracy']:.3f}")
        log(out, {"stage": "rl", "step": step + 1, **metrics})
        due = cfg.save_every and (step + 1) % cfg.save_every == 0 and step + 1 < cfg.max_steps
        checkpoint_if_due(out, "rl", step + 1, policy, optimizer, cfg, due)
    policy.eval()


def rescued_response(roll):
    """(n, g) of the first response that was inpainted around a hint, or None."""
    return next(((n, g) for n, g in roll.replaced.nonzero().tolist() if roll.hinted[n, g].any()), None)


def show_group(tokenizer, roll, learning, config):
    """One rescued group as text: a wrong response, the hint, what was inpainted around it, and which hint tokens learn."""
    if rescued_response(roll) is None:
        return "  (no group was rescued in this step)"
    n, g = rescued_response(roll)
    counted = counted_tokens(roll.completions[n, g], config.eos_token_id)
    def plain(tokens):
        return [tokenizer.decode(token).replace("\n", "\\n") for token in tokens]
    words, hint, learn = plain(roll.completions[n, g][counted]), roll.hinted[n, g][counted].tolist(), learning[n, g][counted].tolist()
    wrong = roll.first[n, g][counted_tokens(roll.first[n, g], config.eos_token_id)]
    return "\n".join([
        "  wrong      " + " ".join(plain(wrong)),
        "  hint       " + " ".join(w if h else "_" * len(w) for w, h in zip(words, hint)),
        "  inpainted  " + " ".join(words),
        "  learns     " + " ".join(("^" if h and l else "." if h else " ") * len(w) for w, h, l in zip(words, hint, learn)).rstrip()
        + "   (of the hint tokens ^ learn and . do not; all others learn)"])


def show_denoising(model, tokenizer, prompt, hint, learn, sampling, seconds=0.15):
    """Inpaint one response again, in place in a terminal: masks grey, hint tokens yellow, generated ones green, and
    those that learn underlined. prompt (P,) without padding, hint (L,), learn (L,) bool."""
    mask_id = model.config.mask_token_id

    def paint(completions):
        words = []
        for token, given, learns in zip(completions[0].tolist(), (hint != mask_id).tolist(), learn.tolist()):
            colour = "90" if token == mask_id else "33" if given else "32"
            word = "_" if token == mask_id else tokenizer.decode([token]).replace("\n", "\\n")
            words.append(f"\033[{colour}{';4' if learns and token != mask_id else ''}m{word}\033[0m")
        print("\r\033[2K  " + " ".join(words), end="", flush=True)
        time.sleep(seconds)

    paint(hint[None])
    sample(model, prompt[None], hints=hint[None], watch=paint, **sampling)
    print()


def check_split(total, per_forward, name, per_forward_name):
    """A batch is the same whatever the number of processes: each takes an equal share, in equal passes."""
    share, rest = divmod(total, world())
    if rest:
        divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise UsageError(f"{name} {total} cannot be split over {world()} processes, but over {divisors}")
    if share % min(per_forward, share):
        divisors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise UsageError(f"a process's share of {name} is {share}, so {per_forward_name} can be {divisors}, not {per_forward}")


def check(cfg):
    """What can be known to be wrong before anything is loaded."""
    for name in ("gen_length", "block_length", "diffusion_steps", "rows_per_call", "max_prompt_length", "prompts_per_step", "mu", "keep",
                 "prompts_per_forward", "max_steps", "sft_steps", "sft_batch", "sft_rows_per_forward", "sft_length", "rewrite_batch"):
        if getattr(cfg, name) < 1:
            raise UsageError(f"--{name} is at least 1, not {getattr(cfg, name)}")
    blocks = cfg.gen_length // cfg.block_length
    for condition, message in [
        (cfg.gen_length % cfg.block_length == 0, f"--gen_length {cfg.gen_length} is not divisible by --block_length {cfg.block_length}"),
        (cfg.diffusion_steps % max(blocks, 1) == 0, f"--diffusion_steps {cfg.diffusion_steps} is not divisible by the number of blocks, {blocks}"),
        (cfg.group_size > 1, f"--group_size {cfg.group_size}: a group needs at least 2 responses to differ"),
        (0 <= cfg.eta_low <= cfg.eta_high <= 1, f"--eta_low {cfg.eta_low} and --eta_high {cfg.eta_high} are not 0 <= low <= high <= 1"),
        (0 <= cfg.tau <= 1 and 0 <= cfg.lam <= 1, f"--tau {cfg.tau} and --lam {cfg.lam} are shares, from 0 to 1"),
        (not (cfg.resume and cfg.overwrite), "--resume and --overwrite are opposites"),
        (1 <= cfg.min_chunk <= cfg.max_chunk, f"--min_chunk {cfg.min_chunk} and --max_chunk {cfg.max_chunk} are not 1 <= min <= max"),
    ]:
        if not condition:
            raise UsageError(message)
    if cfg.stage in ("rl", "all"):
        check_split(cfg.prompts_per_step, cfg.prompts_per_forward, "--prompts_per_step", "--prompts_per_forward")
    if cfg.stage in ("sft", "all") and (cfg.sft_data or cfg.rewrite_data):
        check_split(cfg.sft_batch, cfg.sft_rows_per_forward, "--sft_batch", "--sft_rows_per_forward")
    if not torch.cuda.is_available() and cfg.stage != "rewrite" and cfg.model != "toy" and not Path(cfg.model).is_dir():
        raise UsageError(f"{cfg.model} needs GPUs (8 x 80 GB for the defaults); on a CPU try: python igpo.py --preset toy")


FREE_TO_CHANGE = {"out_dir", "resume", "overwrite", "save_every", "keep", "show_every", "show", "wandb"}  # between save and resume


def open_run(cfg):
    """The run folder, with config.json in it: a new one, or with --resume one that holds a run of the same settings."""
    out = [cfg.out_dir or f"runs/{cfg.preset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"]
    if dist.is_initialized():
        dist.broadcast_object_list(out)  # the clocks of two processes may differ
    out = Path(out[0])
    if rank() == 0:
        config, saved = dataclasses.asdict(cfg), out / "config.json"
        if cfg.overwrite and saved.exists():  # only ever a folder that holds a run
            shutil.rmtree(out)
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out_dir {out} is a file")
        if cfg.resume:
            if not saved.exists():
                raise UsageError(f"--resume: {out} holds no run")
            before = json.loads(saved.read_text())
            changed = [name for name in config if name not in FREE_TO_CHANGE and config[name] != before.get(name)]
            if changed:
                raise UsageError(f"--resume: {out} was started with " + ", ".join(f"--{n} {before.get(n)}" for n in changed))
            newest = checkpoints(out)[-1:]
            (out / "metrics.jsonl").touch()  # the steps after the checkpoint are taken again
            os.truncate(out / "metrics.jsonl", checkpoint_info(newest[0])["metrics_bytes"] if newest else 0)
        elif saved.exists():
            raise UsageError(f"{out} already holds a run: --resume continues it, --overwrite deletes it, or give another --out_dir")
        else:
            out.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(config, indent=2))
    barrier()
    return out


def load_problems(source, cfg):
    """-> (training problems, held-out problems or none). A hub name or file, or the toy world; see eval_data."""
    if source == "toy":
        return toy_problems(4000, cfg.seed), toy_problems(cfg.eval_size, "held out")
    problems = metamath_problems(source)
    if cfg.eval_data is not None:
        return problems, []
    if len(problems) <= cfg.eval_size:
        raise UsageError(f"{source} has {len(problems)} problems, not more than --eval_size {cfg.eval_size}")
    return problems[cfg.eval_size:], problems[: cfg.eval_size]


def run_rewrite(cfg, out, device):
    """The stage before SFT: out/traces.jsonl, with the columns that SFT reads. What was rewritten before is not done again."""
    source = cfg.rewrite_data or "open-r1/OpenR1-Math-220k"
    rows = list(enumerate(read_rows(source, ("problem", "answer", "solution|generations"))))
    _, tokenizer = load_model(cfg.model, device="meta") if cfg.model != "toy" else toy_model(cfg.seed)
    _, _, done = collect_traces(out)
    barrier()
    if len(done) < len(rows):
        rewrite = load_rewriter(cfg.rewriter, device, cfg.rewrite_max_tokens + 64)
        rewrite_traces(rows[rank():: world()], rewrite, tokenizer, out / f"rewritten.{rank()}.jsonl",
                       max_tokens=cfg.rewrite_max_tokens, batch_size=cfg.rewrite_batch, done=done)
    barrier()
    if rank() == 0:
        kept, counts, _ = collect_traces(out)
        (out / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        print0(f"{out / 'traces.jsonl'}: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
        if not kept:
            raise UsageError(f"none of {len(rows)} rewritten traces can be used; see rewritten.*.jsonl in {out}")
    barrier()
    return out / "traces.jsonl"


def main(argv=None):
    cfg = parse(argv)
    device = setup()
    check(cfg)
    transformers.utils.logging.disable_progress_bar()
    out, began = open_run(cfg), time.time()
    if cfg.wandb and rank() == 0:
        try:
            import wandb
        except ImportError as error:
            raise UsageError("--wandb needs wandb: pip install wandb") from error
        wandb.init(project=cfg.wandb, config=dataclasses.asdict(cfg), name=out.name)

    if cfg.stage == "rewrite" or cfg.stage == "all" and cfg.rewrite_data:
        cfg.sft_data = str(run_rewrite(cfg, out, device))
        if cfg.stage == "rewrite":
            return

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: SIGTERM_RECEIVED.set())

    # Data first: what is wrong with a file should not wait for a model to load.
    sft_rows, examples, held_out = [], [], []
    if cfg.stage == "sft" and not cfg.sft_data:
        raise UsageError("--stage sft needs --sft_data, a data set with columns prompt and completion")
    if cfg.stage != "rl" and cfg.sft_data:
        sft_rows = toy_sft_rows(8000, cfg.seed) if cfg.sft_data == "toy" else read_rows(cfg.sft_data, ("prompt", "completion"))
    if cfg.stage != "sft":
        examples, held_out = load_problems(cfg.train_data, cfg)
    if cfg.eval_data:
        held_out = load_problems(cfg.eval_data, cfg)[1] if cfg.eval_data == "toy" else metamath_problems(cfg.eval_data)[: cfg.eval_size]

    folder = cfg.model
    if folder == "toy":
        folder = out / "start"
        if rank() == 0:
            save_model(*toy_model(cfg.seed), folder)
        barrier()
    trainable = dict(lora_rank=cfg.lora_rank, gradient_checkpointing=cfg.gradient_checkpointing, compile=cfg.compile, seed=cfg.seed)
    model, tokenizer = load_policy(folder, device, **trainable)
    print0(f"{cfg.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, run folder {out}")
    if examples:
        examples, too_long = encode_problems(tokenizer, examples, cfg.max_prompt_length)
        print0(f"RL: {len(examples)} problems; {too_long} left out, longer than --max_prompt_length; "
               f"{sum(e.trace is None for e in examples)} used without hints, as their traces do not show the answer")
        if cfg.trace_noise:
            examples = add_trace_noise(examples, cfg.trace_noise, seeded(cfg.seed, "noise"))
    if held_out:
        held_out, _ = encode_problems(tokenizer, held_out, cfg.max_prompt_length)

    def score(name):
        if held_out and not any(name in line for line in read_log(out)):  # a resumed run has it already
            accuracy = evaluate(model, tokenizer, held_out, cfg)
            log(out, {"stage": "eval", "step": 0, name: accuracy})
            print0(f"{name}: {accuracy:.3f} on {len(held_out)} held-out problems")

    score("accuracy_start")
    if sft_rows:
        if not any(path.name.startswith("rl") for path in checkpoints(out)[-1:]):  # else a resumed run is past this
            train_sft(model, tokenizer, sft_rows, cfg, device, out)
            save_full(model, tokenizer, out / "sft")
            score("accuracy_sft")
        folder = out / "sft"
    if examples:
        if sft_rows:
            model, tokenizer = load_policy(folder, device, **trainable)
        reference = None
        if cfg.beta and not cfg.lora_rank:
            reference = load_sharded(folder, device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)[0]
        train_rl(model, reference, tokenizer, examples, held_out, cfg, device, out)
        save_full(model, tokenizer, out / "final")
        score("accuracy_final")

    if rank() == 0:
        lines = read_log(out)
        summary = {key: value for line in lines if line["stage"] == "eval" for key, value in line.items() if key not in ("stage", "step")}
        rl = [line for line in lines if line["stage"] == "rl"]
        if rl:
            summary |= {name: sum(line[name] for line in rl) / len(rl) for name in ("all_wrong", "all_wrong_after")}
        summary |= {"steps": len(rl), "seconds": time.time() - began, "grade_timeouts": GRADE_TIMEOUTS}
        (out / "summary.json").write_text(json.dumps(summary, indent=2))
        print0("\n" + "\n".join(f"{name:18} {value:8.3f}" for name, value in summary.items()))
    barrier()  # nobody leaves the group while another is in it


class Parser(transformers.HfArgumentParser):
    def error(self, message):  # argparse would print the usage of all flags first
        raise UsageError(f"{message}; python {self.prog} --help lists the flags")


def parse(argv=None):
    """Command line -> Config: the preset's defaults, overridden by whatever flags are given."""
    parser = Parser(Config, allow_abbrev=False)
    preset = parser.parse_known_args(argv)[0].preset
    if preset not in PRESETS:
        raise UsageError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    parser.set_defaults(preset=preset, **PRESETS[preset])
    return Config(**vars(parser.parse_args(argv)))


def run_main(main, name):
    """Run a command line; what the user can put right is one line and status 2. Also eval.py's."""
    try:
        main()
    except UsageError as error:
        if int(os.environ.get("RANK", 0)) > 0:  # mostly rank 0 says the same, and then torchrun ends this process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        if world() > 1:
            os._exit(2)  # without a farewell to processes that wait for this one
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main, "igpo.py")
