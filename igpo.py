"""IGPO: Inpainting-Guided Policy Optimization for diffusion language models (arXiv 2509.10396).

A masked diffusion LLM such as LLaDA starts with a completion of masks and fills them in, in any
order. So it can also write around text that is already there: it can inpaint.

GRPO draws a group of G responses to a prompt and learns from the differences between their rewards.
If all of them are wrong, the rewards differ at most by a small bonus for the form of the answer.
Then the group teaches nothing about the problem. IGPO draws G more. In these, some random chunks of
the reference reasoning (never the answer) are fixed as a hint, and the model inpaints the rest. Up
to K of those that come out right replace wrong ones:

    reference     a b | c d e | f g h            the reasoning, cut into chunks of random length
    hint          M M   c d e   M M M   M M M    one chunk is shown, all else is a mask M
    inpainted     x y   c d e   z u v   = 4 2    the model filled in the masks; 42 is its answer

    before        wrong   wrong   wrong   wrong      advantages     0     0     0     0
    after         right*  right*  wrong   wrong      advantages  +1/2  +1/2  -1/2  -1/2
                  (* inpainted)

Of the hint tokens, only those are trained on where the policy is most uncertain. Before RL, the
model is fine-tuned (SFT) on solutions that another model rewrote to be concise.

    python igpo.py --preset toy                  the whole recipe on a laptop CPU, in minutes
    torchrun --nproc_per_node=8 igpo.py          RL of LLaDA-8B-Instruct on MetaMathQA; with
                                                 --sft_data FILE, SFT before it

Symbols of the paper, and in brackets their names in the code where they differ
    q, o_i     a prompt, and response i of its group (prompts, completions)
    G          responses in a group (group_size)
    A_i        advantage of response i: its reward less the mean of the group (advantages)
    eta        share of the chunks that a hint shows (ratio in make_hint)
    lambda     share of a group that may be replaced (lam)
    K          responses of a group that are replaced
    tau        share of a response's hint tokens that are trained on (keep in entropy_filter)
    rho        importance ratio, new over old probability
    mu         updates for each roll-out
    epsilon    clip range of rho
    beta       weight of the KL divergence to the initial policy

Shapes
    N prompts (n: some of them) with G responses each, S prompts that are drawn again, B rows;
    P prompt length, L completion length (gen_length), W tokens in a block, V vocabulary size.
    Prompts are padded on the left. Where B = N * G, the G rows of a prompt stand side by side.

The method comes first: 1 denoising sampler (section 2 of the paper), 2 hints (Eq. 4), 3 elastic
roll-out (section 3), 4 log-probabilities, 5 advantages, entropy filter and loss (Eq. 2, 3, 5),
6 SFT loss (Eq. 1), 7 SFT loop, 8 RL loop. Then comes what makes it run, from rewards to flags.
"""

import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed import get_rank as rank, get_world_size as world
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

class UsageError(ValueError):
    """An error that the user can fix. It is printed as one line, and the exit status is 2."""

# =================================================================================================
# 1. Denoising sampler. The completion is written block by block from left to right. Within a block,
#    each step predicts all masks at once and keeps the predictions the model is most confident of.

@torch.no_grad()
def sample(
        model, prompts, *, gen_length, block_length, steps,
        temperature=0.0, hints=None, prompt_mask=None, generator=None,
        stop_early=False, cache=None, threshold=None, watch=None):
    """Fill in the masks of [prompt ; completion] and return the completions, (B, L) token ids.

        M M M M  ->  M 4 M M  ->  7 4 M M  ->  7 4 M E  ->  7 4 2 E       W = 2, 4 steps in all
        M 1 M M  ->  5 1 M M  ->  5 1 M M  ->  5 1 E M  ->  5 1 E E       1 is a hint, E the end

    model         a transformers model whose attention looks in both directions: see load_model
    prompts       (B, P) token ids
    gen_length    L, the length of a completion; a multiple of block_length
    block_length  W, the tokens in a block; with W = L there is one block
    steps         denoising steps for a whole completion; a multiple of the number of blocks
    temperature   0 takes the most probable token; above 0 tokens are drawn at random
    hints         (B, L): a token id where the text is fixed, the mask id elsewhere; or None
    prompt_mask   (B, P), False at padding; or None if there is none
    generator     a torch.Generator, or a list of n, each for B / n consecutive rows; or None
    stop_early    end a row with the block of its first end token; the masks left become padding
    cache         None, or "block": faster and approximate, see make_block_cache
    threshold     None, or a probability: faster and approximate. Each step keeps the most confident
                  prediction and all that are more probable than this, however many steps it takes
    watch         a function that is called with the completions so far, (B, L), after each step

    At temperature 0 the tokens are those of LLaDA's published sampler, but the mask token itself is
    never drawn. Above 0 the distribution is the same, but a position takes one random number in
    place of noise for the whole vocabulary.
    """
    blocks = count_blocks(gen_length, block_length, steps)
    B, P = prompts.shape
    device = prompts.device
    mask_id = model.config.mask_token_id
    end_ids = torch.tensor(model.config.eos_token_id or [], device=device)
    steps_per_block = steps // blocks
    if threshold is not None:
        steps_per_block = block_length  # enough, since each step fills in at least one mask

    if hints is None:
        hints = torch.full((B, gen_length), mask_id)
    canvas = torch.cat([prompts, hints.to(prompts)], dim=1)  # (B, P + L)

    # All noise is drawn before the first step. So a prompt with a generator of its own gets the
    # same response whatever other rows are in the batch, and whenever those end.
    noise = None
    if temperature > 0:
        noise = uniform_noise((B, blocks, steps_per_block, block_length), generator, device)

    rows = torch.arange(B, device=device)  # the R rows that are still being written
    for block in range(blocks):
        if len(rows) == 0:
            break
        start = P + block * block_length
        end = start + block_length
        positions = torch.arange(start, end, device=device)  # (W,)
        x = canvas[rows]  # (R, P + L)
        real = None if prompt_mask is None else prompt_mask[rows]  # (R, P)
        masks_at_first = (x[:, start:end] == mask_id).sum(dim=1, keepdim=True)  # (R, 1)
        kv_cache = None if cache is None else make_block_cache(model, start, end, cache)

        for step in range(steps_per_block):
            masked = x[:, start:end] == mask_id  # (R, W)
            if not masked.any():  # hints or the threshold left fewer masks than steps
                break

            if kv_cache is None:
                logits = logits_at(model, x, real, positions)  # (R, W, V)
            else:
                logits = cached_logits_at(model, x, real, positions, kv_cache)
            u = None if noise is None else noise[rows, block, step]  # (R, W)
            tokens, confidence = choose_tokens(logits, mask_id, temperature, u)

            places = descending_places(confidence.masked_fill(~masked, -math.inf))
            if threshold is None:
                # Each step fills in an equal share of a row's masks. If they do not divide evenly,
                # the first steps take one more.
                quota = masks_at_first // steps_per_block
                quota = quota + (step < masks_at_first % steps_per_block)
                fill = places < quota
            else:
                fill = (places < 1) | (confidence.exp() > threshold)

            # What is filled in never changes again. Hints were never masked, so they stay.
            x[:, start:end] = torch.where(fill & masked, tokens, x[:, start:end])
            if watch is not None:
                canvas[rows] = x
                watch(canvas[:, P:])

        canvas[rows] = x
        if stop_early:
            has_end = torch.isin(x[:, P:end], end_ids).any(dim=1)
            rows = rows[~has_end]

    if stop_early:
        canvas = canvas.masked_fill(canvas == mask_id, model.config.pad_token_id)
    return canvas[:, P:]

def count_blocks(gen_length, block_length, steps):
    """How many blocks a completion has, if the lengths and steps divide evenly."""
    blocks = gen_length // block_length
    if gen_length % block_length or steps % blocks:
        raise UsageError(f"gen_length {gen_length} must be a multiple of block_length "
                         f"{block_length}, and diffusion_steps {steps} of the number of blocks")
    return blocks

def logits_at(model, canvas, prompt_mask, positions):
    """Logits that predict the tokens at `positions` (W,) of a canvas (B, P + L) -> (B, W, V)

    prompt_mask is None or (B, P), False at padding. The large matrix product with the vocabulary is
    computed at these positions alone.
    """
    # LLaDA predicts a token at its own position. Dream, another diffusion LLM, predicts it one
    # position to the left: its logit_shift is 1.
    shift = getattr(model.config, "logit_shift", 0)
    output = model(
        input_ids=canvas,
        attention_mask=extend_mask(prompt_mask, canvas),
        logits_to_keep=positions - shift,  # transformers takes an index tensor
        use_cache=False,
    )
    return output.logits

def extend_mask(prompt_mask, canvas):
    """The prompt's mask, (B, P) or None, made as long as the canvas: the rest is not padding."""
    if prompt_mask is None:
        return None
    missing = canvas.shape[1] - prompt_mask.shape[1]
    return F.pad(prompt_mask.bool(), (0, missing), value=True)

def choose_tokens(logits, mask_id, temperature, u):
    """Choose a token at each position: (..., V) logits -> (...) ids and their log-probabilities.

    u holds a uniform random number for each position, (...). At temperature 0 it is not read.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1)
    if not total.isfinite().all():  # with nan, any token might be chosen
        raise UsageError("the model's logits are not finite: its weights hold nan or inf, or its "
                         "activations overflow")

    # The mask id is never chosen. Yet the confidence is a log-probability over the whole
    # vocabulary, mask id included, at temperature 1: by that LLaDA's sampler orders the unmasking.
    allowed = logits.clone()
    allowed[..., mask_id] = -math.inf
    if temperature > 0:
        # Take the first token whose cumulative probability exceeds u. The largest logit is
        # subtracted first, since dividing by a very small temperature would overflow. The bound is
        # for a GPU, which multiplies by the reciprocal.
        allowed = allowed - allowed.amax(dim=-1, keepdim=True)
        allowed = allowed / max(temperature, 1e-30)
        cumulative = allowed.softmax(dim=-1).cumsum(dim=-1)
        target = u[..., None] * cumulative[..., -1:]  # the sum is not exactly 1 in float32
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    else:
        tokens = allowed.argmax(dim=-1)
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return tokens, chosen - total

def descending_places(values):
    """The place of each value in descending order, along the last dimension.

        [0.2  0.9  0.5]  ->  [2  0  1]

    argsort lists the positions from the largest value to the smallest. The argsort of that list
    says where each position stands in it. Equal values keep their order.
    """
    order = values.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)

def uniform_noise(shape, generator, device):
    """Uniform random numbers in [0, 1). Of a list of n generators, each fills 1 / n of the rows."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    part = (shape[0] // len(generators), *shape[1:])
    noise = []
    for g in generators:
        home = "cpu" if g is None else g.device
        noise.append(torch.rand(part, generator=g, device=home).to(device))
    # Just below 1: u times the sum of the probabilities must not be rounded up to that sum, or
    # choose_tokens would look for a token past the last one.
    return torch.cat(noise).clamp(max=1 - 1e-6)

def counted_tokens(completions, end_ids):
    """Positions up to and including the first end token, bool (..., L). The others do not count.

        end token E:   a b E c E   ->   True True True False False
    """
    end_ids = torch.tensor(end_ids, device=completions.device)
    is_end = torch.isin(completions, end_ids).long()
    ends_before = is_end.cumsum(dim=-1) - is_end
    return ends_before == 0

# ---- Faster, approximate sampling. A first reading can skip to the hints.

class BlockCacheLayer(DynamicLayer):
    """Keys and values of one layer for the whole canvas, (B, heads, P + L, head size). The first
    pass computes all of them; later passes overwrite those of the block."""

    def __init__(self, block):
        super().__init__()
        self.block = block  # a slice of the canvas

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:  # the first pass computes the whole canvas
            self.keys = keys
            self.values = values
            self.is_initialized = True
        else:
            self.keys[:, :, self.block] = keys
            self.values[:, :, self.block] = values
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        """transformers asks how many keys the queries look at: the whole canvas, from 0 on."""
        length = self.keys.shape[2] if self.is_initialized else query_length
        return length, 0

def make_block_cache(model, start, end, kind):
    """An empty cache for denoising positions start to end (the dual cache of Fast-dLLM).

    The first step of a block computes the whole canvas. Later steps compute the block alone and
    reuse the keys and values of the rest, as if these did not depend on what the block now holds.
    """
    if kind != "block":
        raise ValueError(f"cache is None or 'block', not {kind!r}")
    # For Dream the block begins one position earlier, where its first token is predicted.
    block = slice(start - getattr(model.config, "logit_shift", 0), end)
    layers = [BlockCacheLayer(block) for _ in range(model.config.num_hidden_layers)]
    return Cache(layers=layers)

def cached_logits_at(model, canvas, prompt_mask, positions, kv_cache):
    """logits_at with a cache from make_block_cache."""
    columns = torch.arange(canvas.shape[1], device=canvas.device)
    if kv_cache.is_initialized:
        columns = columns[kv_cache.layers[0].block]
    shift = getattr(model.config, "logit_shift", 0)
    output = model(
        input_ids=canvas[:, columns],
        attention_mask=extend_mask(prompt_mask, canvas),
        position_ids=columns[None],
        logits_to_keep=positions - shift - columns[0],  # counted from the first column
        past_key_values=kv_cache,
        use_cache=True,
    )
    return output.logits

# =================================================================================================
# 2. Hints (Eq. 4).

def make_hint(trace_ids, ratio, *, gen_length, mask_id, min_chunk=5, max_chunk=10, room=30,
              generator=None):
    """Show random chunks of the reference reasoning in a completion of masks: (T,) -> (L,) ids.

    The trace is cut into chunks of random length. floor(ratio * number of chunks) of them, and at
    least one if ratio is above 0, are put at their own positions. All else holds the mask.

        trace 1 2 | 3 4 5 | 6 7, ratio 0.4, gen_length 9, room 2, chunks of 2 or 3
        ->  M M 3 4 5 M M M M

    trace_ids    token ids of the reasoning without its answer (cut_trace makes such text)
    ratio        eta, the share of the chunks to show; 0 shows none, 1 shows all that fit
    gen_length   L, the length of the completion
    min_chunk, max_chunk   a chunk's length is uniform between them; the last may be shorter
    room         how many of the last positions stay free, so that an answer fits in
    generator    makes the cuts and the choice reproducible
    """
    trace = torch.as_tensor(trace_ids, dtype=torch.long)
    trace = trace[: max(gen_length - room, 0)]
    chunks = []
    start = 0
    while start < len(trace):
        length = torch.randint(min_chunk, max_chunk + 1, (), generator=generator).item()
        end = min(start + length, len(trace))
        chunks.append((start, end))
        start = end

    count = math.floor(ratio * len(chunks) + 1e-9)  # in floats 0.29 * 100 is 28.999999999999996
    if ratio > 0:
        count = max(count, 1)  # without any chunk the second draw would be plain resampling
    hint = torch.full((gen_length,), mask_id)
    chosen = torch.randperm(len(chunks), generator=generator)[:count]
    for i in chosen.tolist():
        start, end = chunks[i]
        hint[start:end] = trace[start:end]
    return hint

# =================================================================================================
# 3. Elastic roll-out (section 3): G responses to each prompt, and G inpainted ones where all of
#    them are wrong.

class Groups(NamedTuple):
    """The groups of N prompts. S of them were all wrong and were drawn a second time."""
    completions: torch.Tensor     # (N, G, L) token ids, after the replacement
    correct: torch.Tensor         # (N, G) bool, after the replacement
    hinted: torch.Tensor          # (N, G, L) bool, True where `completions` holds a hint token
    own: torch.Tensor             # (N, G, L) token ids, what the policy drew by itself
    own_correct: torch.Tensor     # (N, G) bool
    stuck: list                   # S indices of prompts, those of the second draw
    etas: torch.Tensor            # (S, G) the hint ratio of each response of the second draw
    hints: torch.Tensor           # (S, G, L) token ids, the mask id where nothing is shown
    second: torch.Tensor          # (S, G, L) token ids, the inpainted responses
    second_correct: torch.Tensor  # (S, G) bool

def elastic_rollout(draw, is_correct, prompts, prompt_mask, answers, traces, generators, *,
                    mask_id, algo="igpo", lam=0.5, eta_range=(0.2, 0.6), **chunking):
    """Draw G responses to each of N prompts, and rescue the groups that are all wrong -> Groups

    For G = 4 and lam = 1/2, a prompt with the answer 42 and responses that end in

        own            17     9     4      24       all wrong, so four more are drawn with hints
        second         42     8     42     42       three of them are right
        completions    42     42    4      24       K = min(3, floor(lam * G)) = 2 are taken over

    draw         a function (prompts, prompt_mask, generators, hints or None) -> (n, G, L), such as
                 sample_groups with its model and settings filled in
    is_correct   a function (completion (L,), answer) -> bool
    prompts      (N, P) token ids, and prompt_mask (N, P), False at padding
    answers      N reference answers
    traces       N lists of token ids of reference reasoning, or None where there is none
    generators   N torch.Generators on the CPU, one a prompt. Both draws and the hints take their
                 random numbers from it, one after the other
    algo         "igpo"; "grpo" draws once; "resample" draws the second time without hints
    lam          lambda, the share of a group that may be replaced
    eta_range    (low, high): each inpainted response draws its eta uniformly between them
    chunking     min_chunk, max_chunk and room of make_hint
    """
    def judge_groups(completions, references):  # (n, G, L) -> (n, G)
        verdicts = torch.zeros(completions.shape[:2], dtype=torch.bool)
        for i, reference in enumerate(references):
            for g, completion in enumerate(completions[i].cpu()):
                verdicts[i, g] = is_correct(completion, reference)
        return verdicts

    own = draw(prompts, prompt_mask, generators, None)
    N, G, L = own.shape
    own_correct = judge_groups(own, answers)

    # The trigger. It looks at correctness alone, not at the reward for the form.
    stuck = []
    if algo != "grpo":
        stuck = [n for n in range(N) if not own_correct[n].any() and traces[n] is not None]

    # Each inpainted response has its own eta ~ U[low, high] and its own chunks. For "resample" eta
    # is 0: these hints show nothing.
    low, high = eta_range if algo == "igpo" else (0.0, 0.0)
    etas = torch.zeros(len(stuck), G, dtype=torch.float64)
    hints = torch.full((len(stuck), G, L), mask_id)
    for s, n in enumerate(stuck):
        etas[s] = low + (high - low) * torch.rand(G, generator=generators[n]).double()
        for g in range(G):
            hints[s, g] = make_hint(
                traces[n],
                etas[s, g].item(),
                gen_length=L,
                mask_id=mask_id,
                generator=generators[n],
                **chunking,
            )

    # draw is called even if no group here is stuck: among several processes all must take part.
    second = own[:0]  # (0, G, L)
    if algo != "grpo":
        streams = [generators[n] for n in stuck]
        second = draw(prompts[stuck], prompt_mask[stuck], streams, hints)
    second_correct = judge_groups(second, [answers[n] for n in stuck])

    completions = own.clone()
    correct = own_correct.clone()
    hinted = torch.zeros_like(own, dtype=torch.bool)
    for s, n in enumerate(stuck):
        # Every response of this group is wrong, so any slot may be overwritten: the first K are.
        # The others stay, so at least (1 - lambda) G of the group is what the policy wrote alone.
        right = [g for g in range(G) if second_correct[s, g]]
        K = min(len(right), math.floor(lam * G + 1e-9))
        for slot, g in enumerate(right[:K]):
            completions[n, slot] = second[s, g]
            correct[n, slot] = True
            hinted[n, slot] = hints[s, g] != mask_id  # a hint's positions go with its response
    return Groups(
        completions=completions, correct=correct, hinted=hinted, own=own, own_correct=own_correct,
        stuck=stuck, etas=etas, hints=hints, second=second, second_correct=second_correct)

def slices(size, step):
    """The slices 0 to step, step to 2 * step, ... of a sequence of this size."""
    return [slice(at, at + step) for at in range(0, size, step)]

def sample_groups(model, prompts, prompt_mask, generators, hints=None, *, group_size,
                  rows_per_call, **sampling):
    """Draw G completions of each prompt, (n, P) -> (n, G, L). hints, if given: (n, G, L)

    At most rows_per_call responses are sampled at once, but at least one whole group. Prompts of
    similar length share a call, cut to the longest of them, so that little padding is computed. Up
    to rounding the tokens stay the same: a prompt's noise comes from its own generator, padding is
    not attended to, and the model's positions are relative. `sampling`: other arguments of sample
    """
    G = group_size
    prompts_per_call = max(rows_per_call // G, 1)
    lengths = prompt_mask.sum(dim=1)
    by_length = lengths.argsort(stable=True)
    completions = prompts.new_empty(len(prompts), G, sampling["gen_length"])
    for call in slices(len(prompts), prompts_per_call):
        part = by_length[call]
        longest = lengths[part].max().item()
        drawn = sample(
            model,
            prompts[part, -longest:].repeat_interleave(G, dim=0),
            prompt_mask=prompt_mask[part, -longest:].repeat_interleave(G, dim=0),
            hints=None if hints is None else hints[part.to(hints.device)].flatten(0, 1),
            generator=[generators[i] for i in part.tolist()],
            **sampling,
        )
        completions[part] = drawn.unflatten(0, (len(part), G))
    return completions

# =================================================================================================
# 4. Log-probabilities: the mean-field estimate of diffu-GRPO. A diffusion LLM has no cheap exact
#    likelihood. So a token's log-probability is read off one forward pass over the prompt and a
#    completion of masks alone, [q ; M M ... M], as if the tokens did not depend on each other.
#    As in the paper, and unlike in diffu-GRPO, no prompt token is masked.

def completion_logps(model, prompts, completions, *, prompt_mask=None):
    """Log-probabilities of the completion tokens, (N, G, L), and the policy's entropy, (N, L).

    Both are in nats. The entropy has no gradient.

    prompts       (N, P) token ids, padded on the left
    completions   (N, G, L) token ids
    prompt_mask   (N, P), False at padding
    """
    P = prompts.shape[1]
    L = completions.shape[2]
    # The input [q ; M ... M] is the same for all G responses to a prompt. So each prompt is one
    # row, and its (L, V) table of log-probabilities is read G times. Loss and gradient are those
    # of N * G separate rows, at 1 / G of the work.
    canvas = F.pad(prompts, (0, L), value=model.config.mask_token_id)
    positions = torch.arange(P, P + L, device=prompts.device)
    logits = logits_at(model, canvas, prompt_mask, positions)
    table = logits.float().log_softmax(dim=-1)  # (N, L, V)
    with torch.no_grad():
        entropy = torch.special.entr(table.exp()).sum(dim=-1)  # -p log p, and 0 where p is 0
    # gather reads table[n, l, completions[n, g, l]] for all g, without a copy for each response.
    logps = table.gather(2, completions.transpose(1, 2))  # (N, L, G)
    return logps.transpose(1, 2), entropy

# =================================================================================================
# 5. Advantages (Eq. 2), entropy filter, and the loss (Eq. 3 and 5).

def group_advantages(rewards):
    """Eq. 2: A_i = r_i - mean_j r_j, not divided by the standard deviation. (N, G) -> (N, G)

        rewards  1 0 0 0   ->   advantages  3/4 -1/4 -1/4 -1/4

    If the reward is 1 for a share p of the group and else 0, the mean of A^2 is p (1 - p): zero
    where all are wrong, and positive once some right responses have been swapped in (Theorem 1).
    """
    rewards = rewards.float()  # bool and int have no mean
    return rewards - rewards.mean(dim=1, keepdim=True)

def entropy_filter(entropy, hint_positions, keep):
    """Keep, per response, the ceil(keep * H) of its H hint tokens with the highest entropy.

        entropy  0.5  3.0  0.1  2.0  9.0         keep 1/2: two of the four hint tokens
        hint     yes  yes  yes  yes  no
        trained  no   yes  no   yes  yes

    entropy          (N, L), or of the shape of hint_positions
    hint_positions   (N, G, L) bool
    keep             tau, the share of the hint tokens that are trained on
    returns          a bool mask, True at these hint tokens and at every position without a hint
    """
    # A hint is not the policy's own text. Where a confident policy is pulled towards another word,
    # the updates are large and unstable. Where it is uncertain, it can be taught.
    if entropy.dim() < hint_positions.dim():
        entropy = entropy.unsqueeze(-2).expand(hint_positions.shape)
    places = descending_places(entropy.masked_fill(~hint_positions, -math.inf))
    hint_count = hint_positions.sum(dim=-1, keepdim=True).double()
    kept = (hint_count * keep - 1e-6).ceil()  # in floats 0.07 * 100 is 7.000000000000001
    return ~hint_positions | (places < kept)

def policy_loss(logps, old_logps, ref_logps, advantages, token_mask, *, epsilon=0.2, beta=0.01,
                ratio="sequence"):
    """Eq. 3 and 5: minus the clipped objective of the groups, plus beta times the KL divergence.

    logps        (N, G, L) under the policy that is trained
    old_logps    (N, G, L) under the policy that drew the responses
    ref_logps    (N, G, L) under the initial policy; not read if beta is 0
    advantages   (N, G)
    token_mask   (N, G, L) bool, the tokens that are trained on
    ratio        "sequence", as in the paper: one rho for a response, the exponential of its mean
                 log-ratio; "token": one for each token
    returns      the loss, and a dict of numbers for the log
    """
    # Eq. 3 divides by |o_i|. Here the mean is over the tokens of o_i that are trained on, so that
    # leaving out hint tokens does not shrink the weight of the others.
    def mean_over_tokens(x):  # (N, G, L) or (N, G, 1) -> (N, G)
        total = torch.where(token_mask, x, 0.0).sum(dim=-1)
        return total / token_mask.sum(dim=-1).clamp(min=1)

    # The other tokens are set to 0 before any exp: exp could overflow there, and in the gradient 0
    # times infinity is nan.
    log_ratio = (logps - old_logps).masked_fill(~token_mask, 0.0)
    if ratio == "sequence":
        # One value a response. mean_over_tokens below spreads it out, and so gives it back.
        log_ratio = mean_over_tokens(log_ratio)[..., None]  # (N, G, 1)
    elif ratio != "token":
        raise ValueError(f"ratio is 'sequence' or 'token', not {ratio!r}")
    rho = log_ratio.exp()
    A = advantages[..., None]
    clipped = rho.clamp(1 - epsilon, 1 + epsilon)
    objective = torch.minimum(rho * A, clipped * A)

    kl = torch.zeros_like(logps)
    if beta:
        # Schulman's estimator k3. It is never negative; for tokens that the policy drew, unbiased.
        delta = (ref_logps - logps).masked_fill(~token_mask, 0.0)
        kl = delta.exp() - delta - 1

    loss = -(mean_over_tokens(objective) - beta * mean_over_tokens(kl)).mean()
    is_clipped = (clipped * A < rho * A).float()
    metrics = {
        "kl": mean_over_tokens(kl).mean().item(),
        "ratio": mean_over_tokens(rho).mean().item(),
        "clip_fraction": mean_over_tokens(is_clipped).mean().item(),
    }
    return loss, metrics

# =================================================================================================
# 6. SFT loss (Eq. 1).

def sft_loss(model, prompts, completions, *, prompt_mask=None, t=None, generator=None):
    """Eq. 1: E_t [ 1/t * sum over masked k of -log f(x0_k | q, x_t) ], divided by L.

    x0 is the completion; in x_t each of its tokens is masked with probability t; f is the model.

    prompts       (B, P) token ids, never masked
    completions   (B, L) token ids. The text is followed by an end token and padding, which are
                  trained like any other token: this is how the model learns where to stop
    prompt_mask   (B, P), False at padding
    t             (B,) in (0, 1], by default drawn from U(0, 1)
    generator     as in sample
    returns       the loss, and a dict of numbers for the log
    """
    B, P = prompts.shape
    L = completions.shape[1]
    if t is None:
        t = uniform_noise((B,), generator, prompts.device).clamp(min=1e-3)
    t = t.to(prompts.device)
    masked = uniform_noise((B, L), generator, prompts.device) < t[:, None]
    noised = completions.masked_fill(masked, model.config.mask_token_id)
    canvas = torch.cat([prompts, noised], dim=1)
    positions = torch.arange(P, P + L, device=prompts.device)
    logits = logits_at(model, canvas, prompt_mask, positions)
    table = logits.float().log_softmax(dim=-1)  # (B, L, V)
    logps = table.gather(2, completions[..., None]).squeeze(2)  # (B, L)
    nll = -logps.masked_fill(~masked, 0.0)  # not logps * masked: -inf * 0 is nan
    # 1/t makes up for there being fewer masks at a small t. Divided by L, the loss has the same
    # size for every length.
    loss = (nll / t[:, None]).sum() / (B * L)
    metrics = {
        "nll": nll.sum().item() / max(masked.sum().item(), 1),
        "masked": masked.float().mean().item(),
    }
    return loss, metrics

# =================================================================================================
# 7. The SFT loop. Functions that are not defined yet are in the second part. The model is sharded
#    over the processes of torchrun by FSDP: rank() is this process, world() is their number.

def schedule(update, updates, warmup):
    """The factor on the learning rate at an update, counted from 0: it rises linearly to 1 over the
    warm-up, and then falls linearly towards 0."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return (updates - update) / (updates - warmup)

def train_sft(model, examples, checkpoint, cfg, out):
    """Fine-tune by sft_loss.

    examples     Examples: each has prompt, the token ids of a question, and target, here those of
                 the completion to learn
    checkpoint   the newest Checkpoint of the run; its stage is "start" if there is none
    cfg          the settings, a Config
    out          the folder of the run, for the log and checkpoints
    """
    device = model.device
    steps = cfg.sft_steps
    optimizer, first_step = begin_stage(model, "sft", steps, checkpoint)
    model.train()
    # The text of a completion is followed by the token that ends a turn, and then by padding.
    tail = model.config.eos_token_id[:1] + [model.config.pad_token_id] * cfg.sft_length

    bar = tqdm(
        range(first_step, steps),
        desc="SFT",
        total=steps,
        initial=first_step,
        mininterval=1,
        disable=rank() > 0,
    )
    for step in bar:
        started = time.time()
        totals = {}  # {name: [sum, weight]}, by add_values; mean_across_ranks divides
        indices = batch_indices(len(examples), cfg.sft_batch, step, cfg.seed)
        # LoRA may have dropout. This seed makes it differ between processes, and makes a resumed
        # run repeat it.
        torch.manual_seed(seeded(cfg.seed, "dropout", step, rank()).initial_seed())

        # The masking rates t are stratified, because 1/t makes the loss noisy: a random offset,
        # then steps of 1/n, wrapped around at 1. Each t by itself is uniform on (0, 1).
        offset = torch.rand((), generator=seeded(cfg.seed, "t", step))
        t = (offset + torch.arange(len(indices)) / len(indices)) % 1
        t = t.clamp(min=1e-3).to(device)  # 1/t is at most 1000

        # The batch is dealt out to the processes, the same number of examples to each. FSDP takes
        # the mean of their gradients.
        mine = list(range(rank(), len(indices), world()))
        for part in slices(len(mine), cfg.sft_rows_per_forward):
            places = mine[part]
            rows = [examples[indices[place]] for place in places]
            prompts, prompt_mask = pad_prompts([row.prompt for row in rows], model)
            completions = [(row.target + tail)[: cfg.sft_length] for row in rows]
            loss, values = sft_loss(
                model,
                prompts,
                torch.tensor(completions, device=device),
                prompt_mask=prompt_mask,
                t=t[places],
                generator=[seeded(cfg.seed, "sft", step, place) for place in places],
            )
            share = len(places) / len(mine)
            (loss * share).backward()
            add_values(totals, {"loss": loss.item(), "masked": values["masked"]}, share)
            # nll is a mean over masked tokens, and so is weighted by their number.
            add_values(totals, {"nll": values["nll"]}, share * values["masked"])

        lr = cfg.sft_lr * schedule(step, steps, cfg.warmup_steps)
        add_values(totals, optimizer_step(model, optimizer, lr, max_grad_norm=1.0))
        add_values(totals, {"seconds": time.time() - started})
        metrics = mean_across_ranks(totals)
        log_metrics(out, "sft", step + 1, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)

        is_last = step + 1 == steps
        if is_last or (cfg.sft_save_every and (step + 1) % cfg.sft_save_every == 0):
            save_checkpoint(out, "sft", step + 1, model, optimizer)

# =================================================================================================
# 8. The RL loop.

@torch.no_grad()
def score_groups(model, prompts, prompt_mask, completions, prompts_per_forward):
    """completion_logps of N prompts, a few at a time, without gradient -> (N, G, L), (N, L)"""
    logps = []
    entropy = []
    for part in slices(len(prompts), prompts_per_forward):
        scored = completion_logps(
            model, prompts[part], completions[part], prompt_mask=prompt_mask[part])
        logps.append(scored[0])
        entropy.append(scored[1])
    return torch.cat(logps), torch.cat(entropy)

def train_rl(policy, tokenizer, examples, held_out, checkpoint, cfg, out):
    """IGPO: roll out, rescue the groups that are all wrong, and update.

    policy       the model to train, after SFT if there was one
    examples     Examples to train on; their targets are the traces that hints are cut from
    held_out     Examples to measure the accuracy on
    checkpoint, cfg, out   as in train_sft
    """
    end_ids = policy.config.eos_token_id
    steps = cfg.max_steps or max(cfg.epochs * len(examples) // cfg.prompts_per_step, 1)
    print0(f"RL: {steps} steps of {cfg.prompts_per_step} prompts")

    # The KL is measured from the policy as RL begins. So its weights are copied now, before
    # begin_stage may load those of a later step from a checkpoint.
    initial = copy_weights(policy) if cfg.beta else None
    optimizer, first_step = begin_stage(policy, "rl", steps, checkpoint)
    # With dropout the first ratio would not be 1, and the clipping would act on noise.
    remove_dropout(policy)

    for step in range(first_step, steps):
        # 1. Roll out: elastic_rollout, where draw is sample_groups and is_correct is grade. Each
        #    prompt has a random stream of its own, so that the number of processes does not change
        #    what is drawn.
        started = time.time()
        policy.eval()
        indices = batch_indices(len(examples), cfg.prompts_per_step, step, cfg.seed)
        mine = range(rank(), len(indices), world())
        batch = [examples[indices[place]] for place in mine]
        generators = [prompt_stream(cfg.seed, step, indices, place) for place in mine]
        with whole_weights(policy):
            prompts, prompt_mask, groups = roll_out_examples(
                policy, tokenizer, batch, generators, cfg)
        rollout_seconds = time.time() - started

        # 2. Rewards and advantages. A reward is reward_correct for a right answer, plus
        #    reward_format times the form, 0 to 0.75. In a group that is still all wrong, only the
        #    form can make a difference.
        rewards = reward_groups(tokenizer, groups.completions, groups.correct, end_ids, cfg)
        advantages = group_advantages(rewards).to(policy.device)  # (N, G)

        # 3. Score: log-probabilities before the first update, of the policy and the initial policy.
        inputs = (prompts, prompt_mask, groups.completions, cfg.prompts_per_forward)
        old_logps, entropy = score_groups(policy, *inputs)
        ref_logps = old_logps
        if cfg.beta:
            with weights_replaced(policy, initial):
                ref_logps, _ = score_groups(policy, *inputs)

        # 4. Choose the tokens to train on. What comes after the first end token is padding and does
        #    not count, even if a hint was given there.
        counted = counted_tokens(groups.completions, end_ids)  # (N, G, L)
        trained_on = counted & entropy_filter(entropy, groups.hinted & counted, cfg.tau)

        # 5. Update mu times on the same roll-out, each time on all of it, a few prompts at a time.
        policy.train()  # on a GPU this turns on gradient checkpointing
        totals = {}
        for inner in range(cfg.mu):
            for part in slices(len(batch), cfg.prompts_per_forward):
                logps, _ = completion_logps(
                    policy,
                    prompts[part],
                    groups.completions[part],
                    prompt_mask=prompt_mask[part],
                )
                loss, values = policy_loss(
                    logps,
                    old_logps[part],
                    ref_logps[part],
                    advantages[part],
                    trained_on[part],
                    epsilon=cfg.epsilon,
                    beta=cfg.beta,
                    ratio=cfg.ratio,
                )
                share = len(logps) / len(batch)
                (loss * share).backward()
                add_values(totals, values | {"loss": loss.item()}, share)
                # For the log alone: the ratios of hint tokens and of generated ones apart.
                add_values(totals, describe_ratios(
                    logps.detach() - old_logps[part],
                    advantages[part],
                    trained_on[part],
                    groups.hinted[part],
                    cfg.epsilon,
                ))
            lr = cfg.lr * schedule(step * cfg.mu + inner, steps * cfg.mu, cfg.warmup_steps)
            add_values(totals, optimizer_step(policy, optimizer, lr, cfg.max_grad_norm))

        # 6. Report. The reward that is logged is that of the policy's own draw.
        own_rewards = reward_groups(tokenizer, groups.own, groups.own_correct, end_ids, cfg)
        add_values(totals, {"reward": own_rewards})
        add_values(totals, describe_rollout(groups, entropy, trained_on, policy.config))
        add_values(totals, {"seconds_rollout": rollout_seconds, "seconds": time.time() - started})
        report_step(out, step + 1, steps, mean_across_ranks(totals), cfg)
        if cfg.save_rollouts and rank() == 0:
            append_rollouts(out, step + 1, tokenizer, batch, groups, policy.config)
        if step % 10 == 0 and groups.hinted.any():
            print0(show_rescued(tokenizer, batch, groups, trained_on))

        # 7. Evaluate and save.
        is_last = step + 1 == steps
        if is_last or (cfg.save_every and (step + 1) % cfg.save_every == 0):
            name = "accuracy_final" if is_last else "eval_accuracy"
            evaluate(name, policy, tokenizer, held_out, cfg, out, step + 1)
            save_checkpoint(out, "rl", step + 1, policy, optimizer)

# #################################################################################################
#
#   From here on, what makes it run: rewards, models, data, rewriting, processes and checkpoints,
#   settings and the command line.
#
# #################################################################################################

import csv
import ctypes
import errno
import fcntl
import gzip
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Literal

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed import barrier
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
    Qwen2Tokenizer)

FILE_ERRORS = (OSError, UnicodeError, json.JSONDecodeError, SafetensorError,
               dcp.CheckpointException)

@contextmanager
def user_errors(place, *kinds):
    """Turn errors of these kinds into one line that names the place: a file, a folder or a flag.

    By default they are the errors of reading and writing files. Any other exception is a fault of
    this program and keeps its traceback.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds or FILE_ERRORS as error:
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or str(cause).strip().split("\n")[-1] or "empty"
        raise UsageError(f"{place}: {reason[:200]} ({type(cause).__name__})") from error

# =================================================================================================
# Rewards. A completion must commit to an answer. A few rules of notation are applied to it and
#    to the reference. Then math-verify, in a process of its own, decides whether they are equal.

LONGEST_ANSWER = 300  # characters; regexes and sympy are slow on long ones
GRADE_TIMEOUTS = 0    # answers so far that the judge could not decide for lack of time or memory
NUMBER = r"[-+]?(\d+/0*[1-9]\d*|\d*\.?\d+)"  # which Fraction reads
# Plain words: three letters in a row outside of a \command, and no digit or operator.
WORDS = r"^[^\d+*/=^<>-]*(?<![\\a-zA-Z])[a-zA-Z]{3,}[^\d+*/=^<>-]*$"

# The rules: what math-verify does not read, or reads as something else. A pattern and its
# replacement each, applied in this order to the answer and to the reference alike.
#  1  \$18, 60\%, 18. and \boxed{}101 are the numbers 18, 60, 18 and 101; -1./3 is -1/3.
#  2  5\,cm and 72^\circ F have a space before the unit. (But \\ begins a new row of a matrix.)
#  3  \mathrm{ cm}, \mbox{cm} and \textbf{cm} are \text{cm}; 10:30\text{ AM} is 10:30 AM.
#  4  arctan(2) is \arctan(2), not a r c t a n(2).
#  5  √16 and sqrt(16) are \sqrt{16}, not \sqrt{1}6.
#  6  1 4/5 is 1+4/5, and 1\frac{1}{2}x is not half of x.
#  7  43,500 and 58{,}500 and 385 000 are numbers; (100,200) and 3,1234 are not.
#  8  2(5) is a product, not 2+5 as a mixed number; 5 30 and 4{10} get an open (, and are refused.
#  9  4.5e33 is 4.5 \cdot 10^{33}, not 4.5 times Euler's number times 33.
# 10  E_1, which math-verify does not read, and \gamma, its name of a constant, are symbols.
# 11  \text{Not even.} is noteven. math-verify would misread words, and 2516_8, FAD_{16}, y' and
#     10:30. A # is put in, so that it refuses them: they are equal as text or not at all.
REWRITES = [
    (r"\\?[$%]|[€£]|\*\*|\s*\\!\s*|(?<=\d)\.(?!\d)|\\boxed\s*\{\s*\}", ""), ("[–−]", "-"),
    (r"(?:(?<!\\)\\[,:; ]|~|\\q?quad|\^\{?\\circ\}?|°|\\degree|\s)+", " "),
    (r" ?\\(?:text|math|mbox)(?:rm|bf|it|normal)?\s*\{ ?", r"\\text{"),
    (r"(?<=:\d\d)\\text\{([^{}]*)\}", r" \1"),
    (r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|ln|exp|pi)(?![a-zA-Z])", r"\\\1"),
    (r"(?:√|\\?sqrt) ?(?:(\d+|[a-z])|[({]([^(){}]*)[)}])", r"\\sqrt{\1\2}"),
    (r"(?<![\w.^])(\d+)(?: ?\\.?frac\{| (?=\d+/))(\d+)[}{/]+(\d+)\}?", r"(\1+\\frac{\2}{\3})"),
    (r"(?<![\d.,(\[])(?<!\\\{)[1-9]\d{0,2}(?:(?:,|\{,\}| )\d{3})+(?!,?\d)",
     lambda number: re.sub(r"\D", "", number[0])),
    (r"(?<![_^\d])(?<!frac)(?<!frac )(\d+|\)) ?[ {(](?=\d)", r"\1\\cdot("),
    (r"(?<=\d)[eE]([-+]?\d+)", r"\\cdot 10^{\1}"),
    (r"\\([gG])amma|(E)(?=_)", r"\\tilde{\1\2}"),
    (WORDS, lambda words: re.sub(r"\\text|[\W_]", "", words[0])),
    (r"^[A-Z][a-z]{2,}$", lambda word: word[0].lower()),  # but ABC is not abc
    (r"_\{(\d+)\}$", r"_\1"), (rf"{WORDS}|\d_|^\w+_\d+$|'|\d:\d\d", r"#\g<0>")]
# A unit is known by its place, not by its spelling: 5 m/s^2, 5\text{cm}, 240 sheets per month.
# But 3 million is not 3, 5 or more is not 5, and 5 x is a product.
UNIT = (r"((?<=[\d})]) |(?<=[\w})])\\text\{)"
        r"(?!.*\b(\w*illion|thousand|hundred|dozen|half|and|or|not)\b|[a-ceiknp-ru-z]\b)"
        r"[a-zA-Z]+( [a-zA-Z]{2,}| ?/ ?[a-zA-Z]+|\^\{?-?\d\}?|[.}])*$")

def committed_answer(completion):
    r"""The last well-formed \boxed{...} of a completion, else its last <answer>, else None. Empty
    ones and placeholders do not count. The time is linear in the length.

        "\boxed{17}, no, \boxed{\frac{1}{2}}, or \boxed{...} or \boxed{"   ->   \frac{1}{2}
    """
    opened, boxes = [], []
    for token in re.finditer(r"(\\boxed\s*\{)|\\.|([{}])", completion, re.S):
        if token[1] or token[2] == "{":
            opened.append(token.end() if token[1] else 0)
        elif token[2] and opened and (start := opened.pop()):  # 0 for braces of another kind
            boxes.append((start, token.start()))
    blocks = re.finditer(r"<answer>((?:(?!<answer>).)*?)</answer>", completion, re.S)
    for start, end in sorted(boxes)[::-1] + [block.span(1) for block in blocks][::-1]:
        answer = completion[start:end].strip()
        if len(answer) > LONGEST_ANSWER or re.sub(r"\\boxed|\\text|\\[cl]?dots|[\W_]", "", answer):
            return answer
    return None

def grade(completion, reference):
    r"""Whether a completion commits to an answer that equals the reference, a string or number.
    For 18, "so \boxed{18 \text{ dollars}}" is right, and "Hence 18 dollars." is not: no box."""
    answer, reference = committed_answer(completion), str(reference)
    if answer is None or max(len(answer), len(reference)) > LONGEST_ANSWER:
        return False
    said, gold = rewrite(answer), rewrite(reference)
    # Units are dropped only if the reference has no variables, which are letters outside of
    # commands and \text{}.
    if not re.search("[a-zA-Z]", re.sub(r"\\text\{[^{}]*\}|\\[a-zA-Z]+", "", gold)):
        said, gold = re.sub(UNIT, "", said), re.sub(UNIT, "", gold)
    gold = gold if "_" in said else re.sub(r"^#(\d+)_\d+$", r"\1", gold)  # for 204_5, 204 will do
    if re.fullmatch(NUMBER, said) and re.fullmatch(NUMBER, gold):
        return Fraction(said) == Fraction(gold)
    if said == gold:
        return True
    # The judge takes a process for each question. It need not be asked about braces that do not
    # pair, nor whether a number equals a product with letters, such as 3x.
    if re.fullmatch(NUMBER, gold) and re.fullmatch(r"\w*[a-zA-Z]\w*", said):
        return False
    return said.count("{") == said.count("}") and ask_judge(said, gold)

def is_mathematics(reference):
    r"""Whether answers can equal the reference by value; otherwise they must match it as text.

        \frac{1}{2}  ->  True        \text{even}, 2516_8, np.arcsin(10/13)  ->  False
    """
    if len(str(reference)) > LONGEST_ANSWER:
        return False
    text = rewrite(str(reference))
    return bool(re.fullmatch(NUMBER, text)) or ask_judge(text, text)

def rewrite(text):
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.strip()

# sympy can compute for ever, and nothing inside a Python process stops its big integers. So the
# judge is a process of its own. It forks for each question, and the kernel ends the fork after a
# second of CPU time. It is a program in a string because a worker of multiprocessing would import
# this file and with it torch, and a fork of the trainer would inherit its threads and its CUDA.
JUDGE = r"""
import json, os, re, resource, sympy, sys
from latex2sympy2_extended import latex2sympy2 as latex
from math_verify import grader
grader.sympy_numeric_eq = grader.sympy_compare_symbols = lambda x, y, *_: x.doit().equals(y.doit())
latex._Latex2Sympy.parse_number = lambda self, digits: sympy.Rational(digits.replace(",", ""))
INFINITE = sympy.oo, -sympy.oo, sympy.zoo, sympy.nan
def is_infinite(x):  # other than as the end of an interval; a matrix has elements, not args
    return not isinstance(x, sympy.Interval) and (
        x.doit() in INFINITE or any(map(is_infinite, getattr(x, "args", x))))
def read(text):
    value = latex.latex2sympy(text, None, True, False, latex.NormalizationConfig(
        malformed_operators=True), latex.ConversionConfig(lowercase_symbols=False))
    assert not is_infinite(value)
    either = re.search(r"\bor\b", text) and value.args[0].is_Relational  # x<2 or x>3
    return sympy.Union(*[part.as_set() for part in value.args]) if either else value
def same(said, gold):
    return grader.sympy_expr_eq(read(gold), read(said), 0, 0, allow_set_relation_comp=True)
same(r"\sqrt{2}\pi", r"\frac{3}{2}+i"), same("(3,4]", r"1 \le x")  # fills sympy's caches, once
print("ready", flush=True)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))                 # seconds
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))  # bytes
        try:
            os._exit(10 + bool(same(*json.loads(line))))
        except MemoryError:
            os.abort()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # 1: an exception, unreadable
    print({1: "different", 10: "different", 11: "equal"}.get(status), flush=True)
"""
judge = None  # the process, started when needed: sympy imports slowly

def ask_judge(answer, reference):
    """Whether math-verify finds the two equal. Not for several threads at once."""
    global judge, GRADE_TIMEOUTS
    if judge is None or judge.poll() is not None:
        judge = Popen([sys.executable, "-c", JUDGE], text=True, start_new_session=True, stdin=PIPE,
                      stdout=PIPE, stderr=DEVNULL,
                      env=os.environ | {"PYTHONHASHSEED": "0"})  # sympy orders by hash
        if judge.stdout.readline() != "ready\n":
            raise UsageError("the judge of answers does not start: is math-verify installed?")
    verdict = ""
    try:
        print(json.dumps([answer, reference]), file=judge.stdin, flush=True)
        if select.select([judge.stdout], [], [], 10)[0]:
            verdict = judge.stdout.readline()
    finally:
        if not verdict:  # stuck or dead, or interrupted: it must not answer later
            judge.kill()
            judge.wait()
    GRADE_TIMEOUTS += verdict not in ("equal\n", "different\n")
    return verdict == "equal\n"

def format_score(completion):
    r"""The released code's reward for the form: 0.125 each for exactly one "<reasoning>\n", one
    "</reasoning>", one "<answer>\n" and one "</answer>", 0.25 for a "\boxed{". At most 0.75."""
    tags = "<reasoning>\n", "</reasoning>", "<answer>\n", "</answer>"
    found = sum(completion.count(tag) == 1 for tag in tags)
    return 0.125 * found + 0.25 * ("\\boxed{" in completion)

# =================================================================================================
# Models. The masked diffusion LLMs that load here are ordinary decoders without the causal mask:
# LLaDA is such a Llama, Dream such a Qwen2. transformers' own classes compute exactly the same when
# their config says is_causal=False, so none of a checkpoint's code is ever run.

# model_type in a checkpoint's config.json -> the model_type in transformers that computes the same.
TWINS = {
    "llada": "llama",       # LLaDA, LLaDA-1.5
    "illada": "llama",      # iLLaDA
    "Dream": "qwen2",
    "a2d-llama": "llama",   # dllm's small models
    "a2d-qwen2": "qwen2",
    "a2d-qwen3": "qwen3",
    "llama": "llama",       # bidirectional models in transformers' own format, such as the toy's
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

# In config.json LLaDA has names of its own. Fields that are not here are called as in Llama's.
LLADA_FIELDS = {
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",  # null means as many as n_heads, as it does for Llama
    "embedding_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}

# Its parameters have names of their own, too. transformers applies these rules one after the other
# as it loads the weights, and takes the renaming back as it saves them.
LLADA_NAMES = {
    "model.transformer.ff_out": "lm_head",
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.blocks": "model.layers",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "([qkv]_proj)": r"self_attn.\1",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}

def twin_config(raw, place):
    """Translate a checkpoint's config.json into the config of its bidirectional twin.

    raw      the parsed config.json
    place    the model's name, for messages
    returns  a config of transformers. Its logit_shift is 1 for Dream, whose output at i - 1
             predicts position i, and 0 for all others
    """
    kind = raw.get("model_type")
    if raw.get("num_experts"):  # LLaDA-MoE has the model_type of LLaDA
        kind = f"{kind} with experts"
    if kind not in TWINS:
        raise UsageError(f"{place}: model_type {kind!r} is not supported. Those that are: "
                         f"{', '.join(TWINS)}; no mixtures of experts, no block-causal models")
    for option in ("alibi", "input_emb_norm", "scale_logits"):
        if raw.get(option):
            raise UsageError(f"{place}: config.json sets {option}, which is not supported")
    if kind == TWINS[kind] and raw.get("mask_token_id") is None:
        raise UsageError(f"{place}: config.json has no mask_token_id, so this {kind} is an "
                         "autoregressive model, not a diffusion model")

    # Attention looks at all positions, and has no dropout: the first importance ratio must be 1.
    settings = raw | {"model_type": TWINS[kind], "is_causal": False, "attention_dropout": 0.0}
    settings["logit_shift"] = int(kind == "Dream")
    settings.pop("auto_map", None)  # it names the checkpoint's own code
    with user_errors(place, KeyError, TypeError, ValueError, StrictDataclassError):
        if kind == "llada":
            for theirs, ours in LLADA_FIELDS.items():
                settings[ours] = raw[theirs]
        return AutoConfig.for_model(**settings)

def load_tokenizer(folder):
    # AutoTokenizer would stop to ask whether to run the checkpoint's code. These two do not.
    if (folder / "tokenizer.json").is_file():
        loader = PreTrainedTokenizerFast
    elif (folder / "vocab.json").is_file():  # Dream
        loader = Qwen2Tokenizer
    else:
        raise UsageError(f"{folder} has no tokenizer.json or vocab.json")
    with user_errors(folder, Exception):  # for a bad file the tokenizers library raises just that
        return loader.from_pretrained(folder)

def set_token_ids(config, tokenizer, place):
    """Complete and check the config's mask_token_id, eos_token_id (then a list), pad_token_id."""
    words = tokenizer.get_vocab()
    # iLLaDA and dllm's models name the mask in the tokenizer alone, iLLaDA as an ordinary word.
    masks = [getattr(config, "mask_token_id", None), tokenizer.mask_token_id,
             words.get("<[MASK]>"), words.get("<|mask|>")]
    mask = next((token for token in masks if token is not None), None)
    # The config's end token ends a document. In a chat another token ends the turn, and it has to
    # be the first: it is the one that SFT teaches the model to stop with.
    turn_ends = [words[end] for end in ("<|eot_id|>", "<|im_end|>") if end in words]
    ends = config.eos_token_id
    if not isinstance(ends, list):
        ends = [ends]
    ends = list(dict.fromkeys(turn_ends + ends)) or [None]
    pad = ends[0] if config.pad_token_id is None else config.pad_token_id

    checked = {"mask_token_id": [mask], "eos_token_id": ends, "pad_token_id": [pad],
               "the tokenizer's last token": [max(words.values())]}
    for name, tokens in checked.items():
        for token in tokens:
            if token not in range(config.vocab_size):
                raise UsageError(f"{place}: {name} is {token}, which is not one of the "
                                 f"{config.vocab_size} tokens of the model")
    if mask in (pad, *ends):
        raise UsageError(f"{place}: the mask token {mask} is the pad or end token, too")
    config.mask_token_id = mask
    config.eos_token_id = ends
    config.pad_token_id = pad

def load_model(name_or_path, *, dtype=None, device="cpu"):
    """Load a masked diffusion LLM and its tokenizer; none of the checkpoint's code is run.

        model, tokenizer = load_model("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16)

    name_or_path  a folder or a hub name; TWINS lists the kinds that load
    dtype         of the parameters; float32 by default
    device        "meta" gives parameters with shapes and without values
    returns       the model in eval mode, and the tokenizer. model.config has mask_token_id,
                  pad_token_id and a list eos_token_id, whose first token ends a turn
    """
    folder = Path(name_or_path)
    on_hub = not folder.is_dir()
    if on_hub and (folder.is_absolute() or len(folder.parts) != 2):  # a hub name is owner/name
        raise UsageError(f"no model folder at {name_or_path}")
    with user_errors(name_or_path, OSError, ValueError):
        config_path = folder / "config.json"
        if on_hub:
            config_path = hf_hub_download(str(name_or_path), "config.json")
        raw = json.loads(Path(config_path).read_text())
    config = twin_config(raw, name_or_path)  # refuses a model before its weights are fetched
    if on_hub:
        with user_errors(name_or_path, OSError):
            folder = Path(snapshot_download(  # without the same weights in older formats
                str(name_or_path), ignore_patterns=["*.bin", "*.pth"]))
    tokenizer = load_tokenizer(folder)
    set_token_ids(config, tokenizer, name_or_path)

    tied = config.tie_word_embeddings  # transformers unties the config itself if the weights differ
    dtype = dtype or torch.float32
    if str(device) == "meta":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        with user_errors(name_or_path):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True,
                key_mapping=LLADA_NAMES if raw["model_type"] == "llada" else None,
                ignore_mismatched_sizes=True, output_loading_info=True)
        for problem, names in report.items():  # missing_keys, unexpected_keys, mismatched_keys
            if names:
                raise UsageError(f"{name_or_path}: the weights do not fit config.json, {problem} "
                                 f"{min(names)}")
        if tied and model.lm_head.weight is not model.get_input_embeddings().weight:
            raise UsageError(
                f"{name_or_path}: config.json ties head and embedding, yet the weights hold two "
                "that differ. If the head was trained by itself, untie them in config.json")
    # torch gives the padding token's embedding no gradient. Here it is an end token, and learns.
    model.get_input_embeddings().padding_idx = None
    # save_model writes these along, so that the family's own code reads what was trained.
    sources = [folder / "config.json", *folder.glob("*.py")]
    model.source_files = {source.name: source.read_text() for source in sources}
    return model.to(device).eval(), tokenizer

def save_model(model, tokenizer, folder):
    """Write a folder that load_model and the family's own code read. All processes call this.

    The checkpoint's own config.json, and so its model_type, is written back, and a LLaDA gets
    LLaDA's parameter names again. LoRA adapters are merged into the weights, and are also saved
    alone in folder/adapter, in peft's format and with Llama's or Qwen's names.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathers FSDP's shards
    weights = get_model_state_dict(model, options=options)
    if dist.is_initialized() and rank() > 0:
        return
    folder = Path(folder)
    has_adapter = model._hf_peft_config_loaded
    if has_adapter:
        save_adapter(model, weights, folder / "adapter")
        weights = merge_adapter(weights, model.peft_config["default"])
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    model._hf_peft_config_loaded = False  # or save_pretrained would write the adapters alone
    model.save_pretrained(folder, state_dict=weights)
    model._hf_peft_config_loaded = has_adapter
    tokenizer.save_pretrained(folder)
    for name, text in getattr(model, "source_files", {}).items():
        (folder / name).write_text(text)

def save_adapter(model, weights, folder):
    """Write the adapters among the weights, a whole state dict, in peft's own format."""
    from peft import get_peft_model_state_dict
    adapter = get_peft_model_state_dict(model, weights, save_embedding_layers=False)
    model.peft_config["default"].save_pretrained(folder)
    # The prefix stands for peft's wrapper of the model, which is not used here.
    save_file({f"base_model.model.{name}": weight for name, weight in adapter.items()},
              folder / "adapter_model.safetensors")

def merge_adapter(weights, lora):
    """The state dict of a model with adapters -> that of a plain one, with W + alpha / r * B A.

    In float32: in bfloat16 a small B A would be rounded away. lora: the LoraConfig.
    """
    merged = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        weight = weight.float()
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            A = weights[f"{layer}lora_A.default.weight"].float()
            B = weights[f"{layer}lora_B.default.weight"].float()
            weight = weight + lora.lora_alpha / lora.r * B @ A
        merged[name.replace(".base_layer.", ".")] = weight
    return merged

def load_adapter_weights(model, folder):
    """Give the adapters of model (after model.add_adapter) the values that save_model wrote.

    folder: the one given to save_model, or any other with peft's files in folder/adapter.
    """
    from peft import set_peft_model_state_dict
    if model.device.type == "meta":  # a process that gets its shard of the values from rank 0
        return
    with user_errors(folder):
        adapter = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
    with user_errors(folder, RuntimeError):  # sizes that differ
        loaded = set_peft_model_state_dict(model, adapter)
    if loaded.unexpected_keys:
        raise UsageError(f"{folder}: the adapter does not fit the model, unexpected "
                         f"{min(loaded.unexpected_keys)}")

# =================================================================================================
# Data. Problems are read from files as people have them: those of MetaMathQA, GSM8K, MATH,
# DeepScaleR, OpenR1-Math and verl work as they are.

# Where a row has its question, answer and solution. Of several columns the first with text counts;
# "reward_model.ground_truth" is the field ground_truth of the column reward_model.
QUESTION_COLUMNS = ["query", "problem", "question", "prompt"]
ANSWER_COLUMNS = ["answer", "ground_truth_answer", "reward_model.ground_truth"]
SOLUTION_COLUMNS = ["solution", "response", "extra_info.answer", "answer"]  # GSM8K has it in answer
# The released runs use these two types of MetaMathQA's rows, and one row for each query.
METAMATH_TYPES = ["GSM_AnsAug", "MATH_AnsAug"]
# A lone surrogate, half of a character, as JSON may hold it ("\ud800"). No tokenizer takes it.
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")

class Problem(NamedTuple):
    question: str
    answer: str | None  # what grade compares with; None in an SFT example
    trace: str | None   # the reasoning before the answer, None without; in SFT the whole completion

def read_rows(source, *, split="train"):
    """Read a file, or a data set on the hub, as a sequence of dicts {column: value}.

    source   a .jsonl, .json, .csv or .parquet file (the first three also with .gz), or a hub name
             with an optional subset: "openai/gsm8k:main"
    split    which part of a hub data set; a file is read whole
    """
    path = Path(source)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("jsonl", "json", "csv", "parquet"):
        rows = read_file(path, kind)
    elif path.exists():
        raise UsageError(f"{source}: only .jsonl, .json, .csv and .parquet files are read")
    else:
        import datasets  # it is slow to import, and needed here alone
        name, _, subset = str(source).partition(":")
        hub_errors = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
        with user_errors(source, *hub_errors):
            rows = datasets.load_dataset(name, subset or None, split=split)
    if not len(rows):
        raise UsageError(f"{source} holds no rows")
    return rows

def read_file(path, kind):
    # JSON is read as it stands. A table, as the datasets library makes of it, has one type for a
    # column, and fails where a value has another.
    with user_errors(path, OSError, ValueError, EOFError, zlib.error, csv.Error):
        if kind == "parquet":
            import pyarrow.parquet  # it comes with datasets
            return pyarrow.parquet.read_table(path).to_pylist()
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == "csv":
                return list(csv.DictReader(file, restkey=""))
            text = file.read()
    return parse_json(text, path)

def parse_json(text, place):
    """The rows in JSON lines, in an array or in pretty-printed objects."""
    # The decoder reads one value at a time, wherever it ends; then white space may follow.
    blank = re.compile(r"\s*")
    decoder = json.JSONDecoder()
    rows = []
    at = blank.match(text).end()
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as error:
            line = text.count("\n", 0, at) + 1
            raise UsageError(f"{place}: what begins on line {line} is no JSON: {error}") from error
        rows += value if isinstance(value, list) else [value]
        at = blank.match(text, end).end()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{place}, row {number}: {row!r:.40} has no columns")
    return rows

def find_text(row, columns, place):
    """The text in the first of these columns that has any, else "".

    Of chat messages it is the last that the user wrote. A number becomes text, 27.0 becomes "27";
    a float so large that it was rounded is an error, which names the place.
    """
    for column in columns:
        value = row
        for key in column.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, list):  # chat messages
            turns = [turn.get("content") for turn in value
                     if isinstance(turn, dict) and turn.get("role") == "user"]
            value = turns[-1] if turns else None
        if isinstance(value, float) and abs(value) >= 2**53:
            raise UsageError(f"{place}: {value} may have lost digits, write it as text")
        # An empty cell of a table of numbers is nan, the one number that does not equal itself.
        if isinstance(value, (int, float)) and value == value:
            value = str(value).removesuffix(".0")
        if isinstance(value, str) and value.strip():
            return value
    return ""

def check_text_columns(rows, columns, source):
    """Refuse rows unless all of them have text, be it empty, or a number in each column."""
    for number, row in enumerate(rows, 1):
        for column in columns:
            if not isinstance(row.get(column), (str, int, float)):
                raise UsageError(f"{source}, row {number}: {row.get(column)!r:.40} in column "
                                 f"{column!r} is no text; its columns are {', '.join(row)}")

def find_final_answer(text):
    r"""What a text states at its end, as GSM8K ("#### 72") or MetaMathQA ("The answer is: 72"),
    else in its last \boxed{}, else ""."""
    parts = re.split(r"####|The answer is:", text)
    ending = parts[-1].strip()
    if len(parts) > 1 and "\n" not in ending:  # #### with lines below it is only a heading
        return ending
    return committed_answer(text) or ""

def read_problems(source, *, split="train", left_out=None):
    """Read problems with their answers and traces from any of the known forms.

        read_problems("openai/gsm8k:main")[0]  ->  Problem("Natalia sold clips ...", "72",
            "<reasoning>\nNatalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 =")

    source, split  as in read_rows
    left_out       a Counter, to which the rows that are no problems are added by reason
    returns        a list of at least one Problem; trace is None where no hint can be made
    """
    left_out = Counter() if left_out is None else left_out
    rows = read_rows(source, split=split)
    problems = []
    queries = set()
    for number, row in enumerate(rows, 1):
        place = f"{source}, row {number}"
        question = find_text(row, QUESTION_COLUMNS, place)
        stated = find_text(row, ANSWER_COLUMNS, place)
        solution = find_text(row, SOLUTION_COLUMNS, place)
        # A column for the answer is more reliable than the end of a solution. GSM8K has a whole
        # solution in that column, and some have a boxed answer.
        answer = find_final_answer(stated) or stated.strip() or find_final_answer(solution)
        is_metamath = {"type", "query", "response"} <= row.keys()
        if is_metamath and row["type"] not in METAMATH_TYPES:
            left_out["a type that is not " + " or ".join(METAMATH_TYPES)] += 1
        elif not question:
            left_out["no question"] += 1
        elif not answer:
            left_out["no answer"] += 1
        elif HALF_CHARACTER.search(question + answer + solution):
            left_out["text that is not valid"] += 1
        elif is_metamath and question in queries:
            left_out["a query that was there before"] += 1
        elif not grade(rf"\boxed{{{answer}}}", answer):
            left_out["an answer that does not grade equal to itself"] += 1
        else:
            queries.add(question)
            reasoning = re.sub(r"<<[^<>]*>>", "", solution)  # GSM8K's 24+8 = <<24+8=32>>32
            trace = cut_trace(reasoning, answer, question)
            # The prompt asks the model to begin with this tag. With the tag in front, the trace
            # stands at the positions where the model itself would write it. The tag takes the
            # first hint positions, and can be shown like the rest.
            trace = trace and f"<reasoning>\n{trace}"
            problems.append(Problem(question, answer, trace))
    expected = (f"one of {', '.join(QUESTION_COLUMNS)}; and one of "
                f"{', '.join(ANSWER_COLUMNS + SOLUTION_COLUMNS[:2])}")
    check_some_left(problems, left_out, source, rows, expected)
    return problems

def read_examples(source):
    """Read an SFT file with the columns prompt and completion.

    returns  a list of Problems (prompt, None, completion), and a Counter of the rows that were
             left out, by reason
    """
    rows = read_rows(source)
    examples = []
    left_out = Counter()
    for number, row in enumerate(rows, 1):
        prompt = find_text(row, ["prompt"], f"{source}, row {number}")
        completion = find_text(row, ["completion"], f"{source}, row {number}")
        if not prompt or not completion:
            left_out["no prompt or no completion"] += 1
        elif HALF_CHARACTER.search(prompt + completion):
            left_out["text that is not valid"] += 1
        else:
            examples.append(Problem(prompt, None, completion))
    check_some_left(examples, left_out, source, rows, "prompt; and completion")
    return examples, left_out

def check_some_left(problems, left_out, source, rows, expected):
    if not problems:
        raise UsageError(f"{describe_problems(problems, left_out, source)}. Its columns are "
                         f"{', '.join(rows[0])}. Expected are {expected}")

def describe_problems(problems, left_out, source):
    """What a run says at its start about its problems, or its SFT examples."""
    text = f"{source}: {len(problems)} usable rows"
    for reason, count in left_out.items():
        text += f", {count} left out with {reason}"
    untraced = sum(problem.trace is None for problem in problems)
    if untraced:
        text += f"; {untraced} of the usable rows have no trace to make hints from"
    if 2 * untraced > len(problems):
        text += "\nwarning: most problems have no trace, and so they train as plain GRPO"
    return text

NUMBER_IN_TEXT = r"(?<![\d.])\d(?:\d|,|\{,\})*(?:\.\d+)?"  # 7, 1,234 or 0.50, not the 5 of 7.5

def cut_trace(solution, answer, question=""):
    """The reasoning of a reference solution up to its answer, or None if there is none.

    A hint that holds the answer would invite copying. So the solution is cut at the answer's first
    occurrence; if the question already contains that number, at its last. A solution in which the
    answer does not occur has no trace, since nobody knows where it gives the answer away.

        cut_trace("3 + 4 = 7, so Lyn has 7 apples.", "7")  ->  "3 + 4 ="
        cut_trace("5 + 3 - 3 = 5", "5", "Lyn has 5 apples")  ->  "5 + 3 - 3 ="
    """
    body = re.split(r"The answer is|####", solution)[0]  # after them the answer is only repeated
    places = find_answer(body, answer)
    if not places:
        return None
    place = places[-1] if find_answer(question, answer) else places[0]
    # Go on back to a space or "=" that is in no braces, so that the trace does not end within a
    # word or a LaTeX command: "It is $\frac{a b}{c + " becomes "It is".
    trace = body[:place]
    while trace and (trace[-1] not in " \n=" or trace.count("{") != trace.count("}")):
        trace = trace[:-1]
    return trace.rstrip() or None

def find_answer(text, answer):
    """The places at which an answer begins in a text. A number is found in any notation: 1,234.00
    is 1234; anything else only as it is written, and not within a word."""
    answer = answer.strip().strip("$").lstrip("-")
    if not answer:
        return []
    if not re.fullmatch(NUMBER_IN_TEXT, answer):
        written = re.sub(r"\\\\[dt]?frac", r"\\\\[dt]?frac", re.escape(answer))
        as_written = rf"(?<![\\\w]){written}(?!\w)"
        return [match.start() for match in re.finditer(as_written, text)]

    def value(number):
        return float(re.sub("[{,}]", "", number))

    return [match.start() for match in re.finditer(NUMBER_IN_TEXT, text)
            if value(match[0]) == value(answer)]

class Example(NamedTuple):
    """A problem in token ids."""
    problem: Problem
    prompt: list  # token ids of the question, in the model's chat template
    target: list  # token ids of the trace: hints are cut from it; in SFT it is the completion

FORM = """in exactly this form:
<reasoning>
(the steps)
</reasoning>
<answer>
\\boxed{(the final answer)}
</answer>"""
INSTRUCTION = f"Solve the problem step by step. Write {FORM}\n\nProblem: "

def encode_prompts(tokenizer, questions):
    """Token ids of the questions. With a chat template they also ask for the form of the answer."""
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": INSTRUCTION + question}] for question in questions]
        with user_errors("the tokenizer's chat template", TemplateError, ValueError, TypeError):
            questions = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(questions, add_special_tokens=False).input_ids

def encode_problems(model, tokenizer, problems, completion_length, max_prompt_length):
    """Problems -> Examples, without those whose prompt is empty or too long."""
    if not problems:
        return []
    prompts = encode_prompts(tokenizer, [p.question for p in problems])
    targets = tokenizer([p.trace or "" for p in problems], add_special_tokens=False).input_ids
    examples = [Example(*parts) for parts in zip(problems, prompts, targets)]
    examples = [e for e in examples if 1 <= len(e.prompt) <= max_prompt_length]
    if not examples:
        raise UsageError(f"all prompts are empty or exceed --max_prompt_length {max_prompt_length}")
    check_length(model, max(len(e.prompt) for e in examples), completion_length)
    return examples

def check_length(model, prompt_length, completion_length):
    """Beyond the positions it was trained for, a model writes nonsense without an error."""
    positions = model.config.max_position_embeddings
    if prompt_length + completion_length > positions:
        raise UsageError(f"a prompt of {prompt_length} and a completion of {completion_length} "
                         f"tokens do not fit the model's {positions} positions")

def pad_prompts(prompts, model):
    """Lists of token ids -> (N, P) ids padded on the left and (N, P) mask, on the model's device.

        [5 6 7], [8]   ->   ids [5 6 7], [pad pad 8]   mask [1 1 1], [0 0 1]
    """
    P = max(map(len, prompts), default=0)
    ids = [[model.config.pad_token_id] * (P - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (P - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)

def decode(tokenizer, completion, end_ids):
    """The text of an (L,) completion, up to its first end token."""
    written = completion[counted_tokens(completion, end_ids)]
    return tokenizer.decode(written, skip_special_tokens=True)

def batch_indices(size, batch_size, step, seed):
    """Which of `size` examples a step takes. Each comes once an epoch, in a new random order."""
    indices = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(place, size)
        if not indices or i == 0:
            order = torch.randperm(size, generator=seeded(seed, "epoch", epoch)).tolist()
        indices.append(order[i])
    return indices

def prompt_stream(seed, step, indices, place):
    """The random stream of the prompt at a place of a step's batch."""
    key = (seed, "rollout", step, indices[place])
    if indices[place] in indices[:place]:  # twice in a step, where an epoch ends
        key += (place,)
    return seeded(*key)

def seeded(*key):
    """The random stream that belongs to a key such as (seed, "rollout", step, prompt).

    The key is hashed to 32 bits, which is all that torch's CPU generator keeps of a seed.
    """
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

# ---- The toy world is a cipher: each letter stands for a digit. A problem is a word, "cafb=". The
#      trace spells its digits, ".3.1.4.0", and the answer reverses them, "0413". The traces of SFT
#      are always right about easy letters, and seldom about hard ones. So a word with three hard
#      letters is nearly always an all-wrong group, until a hint gives one of them away.

EASY = "abcdef"
MEDIUM = "ghijk"
HARD = "lmnop"
CODE = dict(zip(EASY + MEDIUM + HARD, random.Random("code").choices(range(10), k=16)))
TOY_WORDS = [*"0123456789", *EASY, *MEDIUM, *HARD, ".", "=", "}", "\\boxed{", "<reasoning>\n",
             "</reasoning>", "<answer>\n", "</answer>", "<unknown>", "<end>", "<mask>"]

def spell_problem(letters, digits):
    """The problem of a word whose trace takes its letters for these digits."""
    digits = [str(digit) for digit in digits]
    trace = "<reasoning>\n" + "".join("." + digit for digit in digits)
    return Problem("".join(letters) + "=", "".join(reversed(digits)), trace)

def toy_problem(rng):
    """For RL: an easy letter with three easy, medium or hard ones, and a right trace."""
    kind = rng.choices([EASY, MEDIUM, HARD], weights=[30, 35, 35])[0]
    letters = rng.choices(kind, k=3) + rng.choices(EASY)
    rng.shuffle(letters)
    return spell_problem(letters, [CODE[letter] for letter in letters])

def toy_example(rng):
    """For SFT: any four letters; what the completion takes them for is often wrong."""
    letters = rng.choices(EASY + MEDIUM + HARD, k=4)
    digits = []
    for letter in letters:
        right = 1.0 if letter in EASY else 0.45 if letter in MEDIUM else 0.07
        error = 0
        if rng.random() >= right:  # the next digit; for a hard letter half of the time any other
            any_digit = letter in HARD and rng.random() < 0.5
            error = rng.randrange(1, 10) if any_digit else 1
        digits.append((CODE[letter] + error) % 10)
    question, answer, trace = spell_problem(letters, digits)
    return Problem(question, answer, f"{trace}</reasoning><answer>\n\\boxed{{{answer}}}</answer>")

def toy_data(draw, count, seed):
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]

def toy_model(seed):
    """A small random bidirectional Llama, and a tokenizer of letters and tags."""
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

# =================================================================================================
# Rewriting. The stage before SFT: an instruction model makes solutions concise. Those that are in
# form and still right go to traces.jsonl, which SFT reads.

REWRITE = f"""Rewrite the solution of the problem so that it is concise, structured and rigorous:
only the steps that lead to the answer, each stated once, without doubts, detours or repetition,
{FORM}"""

def rewrite_traces(cfg, device):
    """Rewrite the rows of --rewrite_data. Process r writes rewritten.r.jsonl line by line, and a
    resumed run leaves out the rows that are there."""
    out, newest = look_at_run(cfg)
    rows = read_rows(cfg.rewrite_data)
    check_text_columns(rows, ["problem", "answer", "solution"], cfg.rewrite_data)
    with user_errors(cfg.rewriter, *FILE_ERRORS, ValueError):
        writer = transformers.pipeline("text-generation", cfg.rewriter, device=device,
                                       dtype=compute_dtype(device))
    tokenizer = writer.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    open_run(cfg, out, newest)

    done = read_rewritten(out)
    mine = [i for i in range(rank(), len(rows), world()) if i not in done]
    barrier()  # every process has read the files before one writes to them
    file = out / f"rewritten.{rank()}.jsonl"
    cut_unfinished_line(file)
    for places in tqdm(slices(len(mine), cfg.rows_per_call), "rewriting", disable=rank() > 0):
        part = mine[places]
        requests = [f"{REWRITE}\n\nProblem:\n{rows[i]['problem']}\n\nSolution:\n"
                    f"{rows[i]['solution']}" for i in part]
        if tokenizer.chat_template is not None:
            requests = [[{"role": "user", "content": request}] for request in requests]
        # What is longer than max_new_tokens ends out of form, and is not kept.
        answers = writer(requests, batch_size=len(part), do_sample=False, return_full_text=False,
                         max_new_tokens=cfg.sft_length)
        for i, answer in zip(part, answers):
            text = answer[0]["generated_text"].strip()
            append_line(file, {
                "row": i, "prompt": rows[i]["problem"], "completion": text,
                "kept": format_score(text) == 0.75 and grade(text, rows[i]["answer"])})

    barrier()
    if rank() == 0:
        kept = [line for _, line in sorted(read_rewritten(out).items()) if line["kept"]]
        write_file(out / "traces.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        print(f"{out / 'traces.jsonl'}: {len(kept)} of {len(rows)} rewritten traces")

def read_rewritten(out):
    """{row: line} of what all processes have written so far"""
    return {line["row"]: line for path in out.glob("rewritten.*.jsonl")
            for line in read_lines(path)}

# =================================================================================================
# Processes. torchrun starts one for each GPU, and each has a rank. FSDP2 keeps a share of the
# weights on each of them. Without torchrun there is one process, which takes the same path.

def setup(hours=2):
    """Join the processes that torchrun started, or be a group of one -> this process's device.

    hours: after how long a process that waits for another gives up.
    """
    device = torch.device("cpu")
    group = {}
    if torch.cuda.is_available():  # torch warns here itself if the driver is too old for it
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        group["device_id"] = device
        # cuDNN's attention returns nan gradients for some masks in torch 2.13 (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" not in os.environ:
        group |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif sys.platform == "linux":
        # PR_SET_PDEATHSIG: end with torchrun, even if it is killed and cannot end this process.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=hours), **group)
    if rank() > 0:
        transformers.utils.logging.disable_progress_bar()  # rank 0 shows those of the downloads
    return device

def announce(model_name, device):
    """Say what will run where, before anything that takes long."""
    where = "the CPU"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print0(f"{model_name}: {world()} process(es) on {where}")

def compute_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32

def print0(*args):
    if rank() == 0:
        print(*args, flush=True)

def gather_objects(value):
    """The values of all processes, in the order of their ranks. It waits for all of them."""
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values

def add_values(totals, values, weight=1.0):
    """Add numbers, or tensors of them, to {name: [sum, count]}, for their means in the log."""
    for name, value in values.items():
        value = torch.as_tensor(value, dtype=torch.float64)
        total, count = totals.get(name, (0.0, 0.0))
        totals[name] = [total + weight * value.sum().item(), count + weight * value.numel()]

def mean_across_ranks(totals):
    """{name: [sum, count]} of each process -> {name: mean}, None where there was no value."""
    everyones = gather_objects(totals)
    means = {}
    for name in totals:
        total = sum(part[name][0] for part in everyones)
        count = sum(part[name][1] for part in everyones)
        means[name] = total / count if count else None
    return means

def draw_together(draw, model, prompts, prompt_mask, generators, hints):
    """Draw for the prompts of all processes together, and return the (S, G, L) of this one's.

    The second draw would make the others wait for the process with the most all-wrong groups. So
    all processes put their prompts into one list, each draws every world-th of it, and the results
    go back. A prompt takes its random stream along: up to rounding, the tokens are those that one
    process draws.
    """
    jobs = []
    for prompt, real, generator, hint in zip(prompts, prompt_mask, generators, hints):
        jobs.append((prompt[real].tolist(), generator.get_state(), hint))
    everyones = gather_objects(jobs)
    all_jobs = sum(everyones, [])
    mine = all_jobs[rank() :: world()]

    drawn = []
    if mine:
        ids, states, given = zip(*mine)
        streams = [torch.Generator() for _ in mine]
        for stream, state in zip(streams, states):
            stream.set_state(state)
        drawn = list(draw(*pad_prompts(ids, model), streams, torch.stack(given)).cpu())

    results = [None] * len(all_jobs)
    for r, part in enumerate(gather_objects(drawn)):
        results[r :: world()] = part
    start = sum(map(len, everyones[: rank()]))
    ours = results[start : start + len(jobs)]
    return torch.stack(ours).to(prompts) if ours else prompts.new_empty(hints.shape)

def load_policy(cfg, device, sft_folder=None):
    """The model to train and its tokenizer, shared out over the processes.

    sft_folder: a finished SFT to go on from, in place of cfg.model. With LoRA the base stays as it
    is, and float32 adapters are trained: new ones, or those of the SFT.
    """
    source = cfg.model if sft_folder is None or cfg.lora_rank else sft_folder
    if source == "toy":
        model, tokenizer = toy_model(cfg.seed)
        transformers.utils.logging.disable_progress_bar()  # it is saved in no time
    else:  # rank 0 reads the weights and deals them out, so that the host holds one copy
        model, tokenizer = load_model(source, device="cpu" if rank() == 0 else "meta",
                                      dtype=compute_dtype(device) if cfg.lora_rank else None)
    if device.type == "cuda":  # compute activations again in the backward pass, to save memory
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.lora_rank:
        with user_errors("--lora_rank needs pip install peft", ImportError):
            from peft import LoraConfig
        torch.manual_seed(cfg.seed)  # new adapters are random
        model.add_adapter(LoraConfig(
            r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout,
            target_modules="all-linear"))
        for parameter in trainable_parameters(model):
            parameter.data = parameter.data.float()
        if sft_folder is not None:
            load_adapter_weights(model, sft_folder)
    shard(model, device)
    if cfg.compile:
        compile_layers(model)
    return model, tokenizer

def shard(model, device):
    """FSDP2: every process keeps a share of rank 0's weights, and computes in bfloat16 on a GPU."""
    weights = model.state_dict() if rank() == 0 else {}
    precision = MixedPrecisionPolicy(compute_dtype(device), reduce_dtype=torch.float32)
    model.to("meta").tie_weights()
    mesh = dist.init_device_mesh(device.type, (world(),))
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    model.to_empty(device=device)
    # The rotary frequencies are in no file: they are computed again.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    set_model_state_dict(model, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))

def compile_layers(model):
    """Compile the layers' forward pass: some eight times, for scoring, training and sampling."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would go on uncompiled
    for layer in model.model.layers:
        layer.forward = compile_forward(layer.forward)

def compile_forward(forward):
    compiled = torch.compile(forward, dynamic=True)

    def choose(*args, past_key_values=None, **kwargs):
        # A cache looks up each layer by its number, so that every layer would be compiled apart.
        if past_key_values is None:
            return compiled(*args, **kwargs)
        return forward(*args, past_key_values=past_key_values, **kwargs)

    return choose

def optimizer_step(model, optimizer, lr, max_grad_norm):
    """Clip the gradients, take a step, and clear them -> numbers for the log."""
    norm = torch.nn.utils.clip_grad_norm_(trainable_parameters(model), max_grad_norm)
    norm = norm.full_tensor().item()  # over the shards of all processes
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):  # otherwise the step is left out, and counted as skipped
        optimizer.step()
    optimizer.zero_grad()
    return {"grad_norm": norm, "skipped": float(not math.isfinite(norm)), "lr": lr}

def trainable_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

def remove_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

@contextmanager
def whole_weights(model):
    """Hold all weights on every process within the block. One process alone always does.

    FSDP gathers them for each forward pass, and all processes take part in that. In a roll-out they
    run different numbers of passes: the one with the most would wait for the others for ever.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if world() == 1:
        shards = []
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

def copy_weights(model):
    return [parameter.detach().clone() for parameter in trainable_parameters(model)]

@contextmanager
def weights_replaced(model, weights):
    """Within the block the model computes with these weights, then with its own again."""
    exchange_weights(model, weights)
    try:
        yield
    finally:
        exchange_weights(model, weights)

@torch.no_grad()
def exchange_weights(model, weights):
    for parameter, other in zip(trainable_parameters(model), weights, strict=True):
        value = parameter.clone()
        parameter.copy_(other)
        other.copy_(value)

# =================================================================================================
# Files and checkpoints. A run can be killed at any time: a file or folder gets its name when it is
# complete, and lines are only ever appended. What is random follows from (seed, step, ...), so that
# weights and optimizer are all the state there is.

def write_file(path, text):
    """Replace a file at once: a kill leaves the old one or the new one."""
    unfinished = path.with_name(f".{path.name}")
    with user_errors(path):
        unfinished.write_text(text)
        unfinished.replace(path)

@contextmanager
def write_folder(folder):
    """Let all processes write to another folder, which gets this one's name when it is complete."""
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    with user_errors(folder):
        try:
            yield unfinished
        except BaseException:
            if rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    barrier()

def append_line(path, record):
    with user_errors(path), open(path, "a") as file:
        file.write(json.dumps(record) + "\n")

def read_lines(path):
    """The objects of a .jsonl file of ours. A last line that a kill cut off is left out."""
    with user_errors(path):
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        with user_errors(f"{path}, line {number}", ValueError, TypeError):
            records.append(dict(json.loads(line)))
    return records

def cut_unfinished_line(path):
    """Remove a last line that a kill cut off, so that the next one starts on a line of its own."""
    with user_errors(path):
        text = path.read_bytes() if path.exists() else b""
        end = text.rfind(b"\n") + 1
        if end < len(text):
            os.truncate(path, end)

def lock_folder(folder):
    """Make a folder, and lock it for as long as this process lives: only one may write to it."""
    with user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)  # never closed
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UsageError(f"another process is still writing to {folder}") from error
        print(f"{folder} cannot be locked ({error.strerror}): see to it that only one run uses it",
              file=sys.stderr)

class Checkpoint(NamedTuple):
    stage: str           # "start", "sft" or "rl"
    step: int            # steps of this stage that were taken
    folder: Path | None  # None at the start

def find_checkpoints(out):
    """All checkpoints in a run folder, the newest last."""
    found = [Checkpoint("start", 0, None)]
    for path in out.glob("checkpoint-*"):
        name = re.fullmatch(r"checkpoint-(sft|rl)-(\d+)", path.name)
        if name:
            found.append(Checkpoint(name[1], int(name[2]), path))
    return sorted(found, key=lambda c: (["start", "sft", "rl"].index(c.stage), c.step))

# What a checkpoint holds: the weights that are trained, not the base under a LoRA.
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
LOGS = "metrics.jsonl", "rollouts.jsonl"

def training_state(model, optimizer):
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    return {"model_state_dict": weights, "optim_state_dict": moments}

def save_checkpoint(out, stage, step, model, optimizer):
    """Write out/checkpoint-STAGE-STEP with a copy of the logs, and remove those before it."""
    with write_folder(out / f"checkpoint-{stage}-{step}") as folder:
        dcp.save(training_state(model, optimizer), checkpoint_id=folder)
        if rank() == 0:
            for name in LOGS:
                shutil.copy(out / name, folder)
    if rank() == 0:
        for older in find_checkpoints(out)[1:-1]:
            shutil.rmtree(older.folder, ignore_errors=True)

def begin_stage(model, stage, steps, checkpoint):
    """AdamW and the first step to take. If the checkpoint is of this stage, the model, the
    optimizer and the step are loaded from it."""
    optimizer = torch.optim.AdamW(trainable_parameters(model), betas=(0.9, 0.99), weight_decay=0.1)
    if checkpoint.stage != stage:
        return optimizer, 0
    if checkpoint.step > steps:
        raise UsageError(f"{checkpoint.folder} is beyond the {steps} steps of this run")
    state = training_state(model, optimizer)
    with user_errors(checkpoint.folder):
        dcp.load(state, checkpoint_id=checkpoint.folder)
    set_state_dict(model, optimizer, **state, options=TRAINED_ONLY)
    return optimizer, checkpoint.step

def look_at_run(cfg):
    """The folder of a new run, or of one to resume with the same settings; its last checkpoint."""
    if cfg.resume and not cfg.out_dir:
        raise UsageError("--resume needs --out_dir, the folder of the run to go on with")
    out = Path(cfg.out_dir or f"runs/{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    with user_errors(out):
        newest = find_checkpoints(out)[-1]
        if not cfg.resume and any(out.glob("[!.]*")):
            raise UsageError(f"{out} is not empty: --resume continues a run there")
    if cfg.resume:
        finished = (out / "sft").exists() or (out / "final").exists()
        if newest.stage == "start" and finished:
            raise UsageError(f"--resume: {out} has no checkpoint any more")
        with user_errors(out / "config.json", *FILE_ERRORS, KeyError):
            before = json.loads((out / "config.json").read_text())
            for name, value in asdict(cfg).items():
                if before[name] != value and name not in FREE_ON_RESUME:
                    raise UsageError(f"--resume: --{name} is {value}, but the run was started "
                                     f"with {before[name]}")
    found = [out, newest]
    dist.broadcast_object_list(found)  # clocks and views of a file system may differ
    return found

def open_run(cfg, out, newest):
    """Begin to write. Lines after the checkpoint are dropped, as their steps are taken again."""
    barrier()  # every process has looked at the folder
    if rank() == 0:
        lock_folder(out)
        write_file(out / "config.json", json.dumps(asdict(cfg), indent=2))
        for left in out.glob("unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)
        for name in LOGS:
            with user_errors(newest.folder):
                log = (newest.folder / name).read_text() if newest.folder else ""
            write_file(out / name, log)
        if cfg.wandb:
            open_wandb(cfg, out)
    barrier()

def open_wandb(cfg, out):
    """Start a run at Weights & Biases, or go on with the one whose id is in the run folder."""
    with user_errors("--wandb needs pip install wandb", ImportError):
        import wandb
    known = out / "wandb_id"
    if not known.exists():
        write_file(known, f"{out.name}-{time.time():.0f}")
    wandb.init(project=cfg.wandb, config=asdict(cfg), name=out.name, id=known.read_text(),
               resume="allow")

# =================================================================================================
# Reports.

def log_metrics(out, stage, step, metrics):
    """Append a step to metrics.jsonl. End the run if no gradient of the step was finite."""
    if rank() == 0:
        line = {"stage": stage, "step": step} | metrics
        append_line(out / "metrics.jsonl", line)
        wandb = sys.modules.get("wandb")
        if wandb and wandb.run:
            wandb.log({f"{stage}/{name}": value for name, value in line.items()})
    if metrics.get("skipped", 0) > 0.999:
        raise UsageError(
            f"no gradient of {stage} step {step} was finite. Look at loss, grad_norm, ratio and kl "
            f"of the steps before it in {out / 'metrics.jsonl'}. --resume takes this step again "
            "with the same examples, so give it a lower --lr or --sft_lr")

def describe_ratios(log_ratio, advantages, trained_on, hinted, epsilon):
    """Ratio and clipping of hint tokens and of generated ones, each an (n,) tensor for the log.

    It is each token's own ratio, whatever ratio the loss uses. log_ratio, trained_on, hinted
    (N, G, L), advantages (N, G)
    """
    rho = log_ratio.exp()
    A = advantages[..., None]
    clipped = rho.clamp(1 - epsilon, 1 + epsilon) * A < rho * A
    hint = trained_on & hinted
    generated = trained_on & ~hinted
    return {"ratio_hint": rho[hint], "clip_fraction_hint": clipped[hint],
            "ratio_generated": rho[generated], "clip_fraction_generated": clipped[generated]}

def describe_rollout(groups, entropy, trained_on, config):
    """Values of which the log takes the means. Where there is no value, null is logged."""
    own = counted_tokens(groups.own, config.eos_token_id)
    second = counted_tokens(groups.second, config.eos_token_id)
    hinted = groups.hinted & counted_tokens(groups.completions, config.eos_token_id)
    return {
        "accuracy": groups.own_correct,
        "accuracy_after": groups.correct,
        "all_right": groups.own_correct.all(dim=1),
        "all_wrong": ~groups.own_correct.any(dim=1),
        "all_wrong_after": ~groups.correct.any(dim=1),
        "second_right": groups.second_correct,
        "eta": groups.etas,
        "empty_hints": (groups.hints == config.mask_token_id).all(dim=-1),
        "hint_tokens": hinted.sum(dim=-1),
        "hint_tokens_kept": (hinted & trained_on).sum(dim=-1),
        "completion_length": own.sum(dim=-1),
        "entropy": torch.where(own, entropy[:, None], 0.0).sum(dim=-1) / own.sum(dim=-1),
        "responses": groups.own_correct.numel() + groups.second_correct.numel(),
        "tokens": own.sum() + second.sum(),
    }

def report_step(out, step, steps, means, cfg):
    """Print the line of an RL step, and log it."""
    m = means | {"cache": cfg.cache, "threshold": cfg.threshold}
    m["responses"] *= world()
    m["rescued"] = 1 - m["all_wrong_after"] / m["all_wrong"] if m["all_wrong"] else None
    m["tokens_per_second"] = world() * m.pop("tokens") / m["seconds_rollout"]
    m["seconds_update"] = m["seconds"] - m["seconds_rollout"]
    print0(f"RL {step}/{steps}  accuracy {m['accuracy']:.2f} -> {m['accuracy_after']:.2f}  "
           f"all wrong {m['all_wrong']:.2f} -> {m['all_wrong_after']:.2f}  kl {m['kl']:.4f}  "
           f"grad_norm {m['grad_norm']:.2f}  length {m['completion_length']:.0f}  "
           f"{m['seconds']:.1f} s"
           + (f"  skipped {m['skipped']:.2f}: gradients not finite" if m["skipped"] else ""))
    log_metrics(out, "rl", step, m)

def append_rollouts(out, step, tokenizer, batch, groups, config):
    """Write this process's first group, and its first rescued one, to rollouts.jsonl as text."""
    def to_texts(group):
        return [decode(tokenizer, completion, config.eos_token_id) for completion in group]

    mask = tokenizer.decode(config.mask_token_id)
    rescued = [n for n in range(len(batch)) if groups.hinted[n].any()]
    for n in sorted({0, *rescued[:1]}):
        record = {"step": step, "question": batch[n].problem.question,
                  "answer": batch[n].problem.answer, "completions": to_texts(groups.own[n]),
                  "correct": groups.own_correct[n].tolist()}
        if n in groups.stuck:
            s = groups.stuck.index(n)
            hints = tokenizer.batch_decode(groups.hints[s])
            record["hints"] = [hint.replace(mask, "_") for hint in hints]
            record["second"] = to_texts(groups.second[s])
            record["second_correct"] = groups.second_correct[s].tolist()
        append_line(out / "rollouts.jsonl", record)

def show_rescued(tokenizer, batch, groups, trained_on):
    """The first rescued response as text: what was wrong, and what was inpainted around [hints].
    Those hint tokens that are trained on have a ^."""
    n, g = groups.hinted.any(dim=-1).nonzero()[0].tolist()
    text = ""
    for token, given, is_trained_on in zip(
            groups.completions[n, g], groups.hinted[n, g], trained_on[n, g]):
        word = tokenizer.decode(token)
        text += f"[{word}{'^' if is_trained_on else ''}]" if given else word
    problem = batch[n].problem
    return (f"  question   {problem.question!r}, answer {problem.answer!r}\n"
            f"  wrong      {tokenizer.decode(groups.own[n, g])!r}\n"
            f"  inpainted  {text!r}   (hints in brackets)")

def write_summary(out, seconds):
    """summary.json: the accuracies, means over the RL steps, and what it took."""
    lines = read_lines(out / "metrics.jsonl")
    summary = {}
    for line in lines:
        if line["stage"] == "eval":
            summary |= {name: line[name] for name in line if name.startswith("accuracy_")}
    rl = [line for line in lines if line["stage"] == "rl"]
    for name in "all_wrong", "all_wrong_after":
        summary[name] = sum(line[name] for line in rl) / max(len(rl), 1)
    summary |= {"steps": len(rl), "seconds": seconds, "grade_timeouts": GRADE_TIMEOUTS}
    write_file(out / "summary.json", json.dumps(summary, indent=2))
    print("\n" + "\n".join(f"{name:18} {value:8.3f}" for name, value in summary.items()))

# =================================================================================================
# The recipe: what the two loops call, settings, and the command line.

def sampler_settings(cfg):
    return {"gen_length": cfg.gen_length, "block_length": cfg.block_length,
            "steps": cfg.diffusion_steps, "cache": cfg.cache, "threshold": cfg.threshold}

def roll_out_examples(policy, tokenizer, batch, generators, cfg):
    """elastic_rollout of Examples with the settings of a run -> prompts, prompt_mask, Groups"""
    prompts, prompt_mask = pad_prompts([example.prompt for example in batch], policy)

    def draw(prompts, prompt_mask, generators, hints):
        return sample_groups(policy, prompts, prompt_mask, generators, hints, stop_early=True,
                             group_size=cfg.group_size, rows_per_call=cfg.rows_per_call,
                             temperature=cfg.temperature, **sampler_settings(cfg))

    def draw_or_share(prompts, prompt_mask, generators, hints):
        if hints is None:
            return draw(prompts, prompt_mask, generators, None)
        return draw_together(draw, policy, prompts, prompt_mask, generators, hints)

    def is_correct(completion, answer):
        return grade(decode(tokenizer, completion, policy.config.eos_token_id), answer)

    groups = elastic_rollout(
        draw_or_share, is_correct, prompts, prompt_mask, [e.problem.answer for e in batch],
        [e.target or None for e in batch], generators, mask_id=policy.config.mask_token_id,
        algo=cfg.algo, lam=cfg.lam, eta_range=(cfg.eta_low, cfg.eta_high), min_chunk=cfg.min_chunk,
        max_chunk=cfg.max_chunk, room=cfg.room)
    return prompts, prompt_mask, groups

def reward_groups(tokenizer, completions, correct, end_ids, cfg):
    """(N, G, L) completions and (N, G) verdicts -> (N, G) rewards: correctness and form."""
    form = [[format_score(decode(tokenizer, completion, end_ids)) for completion in group]
            for group in completions.cpu()]
    return cfg.reward_correct * correct + cfg.reward_format * torch.tensor(form)

def evaluate(name, policy, tokenizer, examples, cfg, out, step=0):
    """Log the accuracy on held-out problems: one greedy response to each."""
    if not examples:
        return
    greedy = replace(cfg, algo="grpo", group_size=1, temperature=0.0)
    # A process without problems of its own evaluates all; the accuracy below stays the same.
    mine = examples[rank() :: world()] or examples
    right = 0
    policy.eval()
    with whole_weights(policy):
        for part in tqdm(slices(len(mine), cfg.rows_per_call), name, delay=5, leave=False,
                         disable=rank() > 0):
            streams = [None] * len(mine[part])  # greedy: nothing is drawn at random
            _, _, groups = roll_out_examples(policy, tokenizer, mine[part], streams, greedy)
            right += groups.own_correct.sum().item()
    accuracy = mean_across_ranks({name: [right, len(mine)]})[name]
    log_metrics(out, "eval", step, {name: accuracy})
    print0(f"{name}: {accuracy:.3f} on {len(examples)} held-out problems")

def flag(default, help, bounds=None):
    """A field of Config, which is also a flag of the command line.

    bounds: the range of a number, shown by --help and enforced by parse_flags. By default an
    integer is a count, from 1 on, and a float is a share, from 0 to 1.
    """
    bounds = bounds or {int: "1..1e9", float: "0..1"}.get(type(default))
    metadata = {"help": help} | ({"metavar": bounds} if bounds else {})
    return field(default=default, metadata=metadata)

@dataclass
class Config:
    """Every setting, and each is a flag. The defaults are the preset `llada`."""
    preset: Literal["llada", "toy"] = flag("llada", "defaults for all other flags")
    stage: Literal["rewrite", "sft", "rl", "all"] = flag("all", "all: SFT if it has data, then RL")
    algo: Literal["igpo", "grpo", "resample"] = flag("igpo", "resample: second draw, no hints")
    model: str = flag("GSAI-ML/LLaDA-8B-Instruct", "folder or hub name; toy: made on the spot")
    train_data: str = flag("meta-math/MetaMathQA", "RL problems: a file, hub name, or toy")
    sft_data: str | None = flag(None, "rows with prompt and completion: the same, or toy")
    out_dir: str | None = flag(None, "run folder; default: runs/PRESET-DATE-TIME")
    seed: int = flag(3, "seed of everything random", "0..1e9")
    resume: bool = flag(False, "go on in out_dir, with the same flags")
    # sampler
    gen_length: int = flag(256, "completion length L, tokens")
    diffusion_steps: int = flag(128, "denoising steps for a completion")
    block_length: int = flag(32, "tokens in a block")
    temperature: float = flag(1.2, "temperature of the roll-outs", "0..1e9")
    cache: Literal["block"] | None = flag(None, "faster, approximate: see sample")
    threshold: float | None = flag(None, "faster, approximate: see sample; try 0.9", "0..1")
    rows_per_call: int = flag(16, "responses sampled at once, in whole groups")
    max_prompt_length: int = flag(512, "longer prompts are left out, tokens")
    compile: bool = flag(False, "compile the model's layers")
    # groups and hints
    prompts_per_step: int = flag(64, "prompts in an update, over all processes")
    group_size: int = flag(8, "G, responses to a prompt", "2..1e9")
    eta_low: float = flag(0.2, "least share of the chunks that a hint shows")
    eta_high: float = flag(0.6, "largest share of the chunks that a hint shows")
    min_chunk: int = flag(5, "shortest chunk, tokens")
    max_chunk: int = flag(10, "longest chunk, tokens")
    room: int = flag(30, "last positions of a completion, which no hint takes", "0..1e9")
    lam: float = flag(0.5, "lambda, the share of a group that may be replaced")
    reward_correct: float = flag(3.0, "reward of a correct answer", "0..1e9")
    reward_format: float = flag(1.0, "weight of the reward for the form, which is 0 to 0.75")
    # RL
    tau: float = flag(0.2, "share of a response's hint tokens that are trained on")
    mu: int = flag(4, "updates for each roll-out")
    epsilon: float = flag(0.2, "clip range of the ratio")
    beta: float = flag(0.01, "weight of the KL divergence to the initial policy")
    ratio: Literal["sequence", "token"] = flag("sequence", "one ratio a response, or one a token")
    epochs: int = flag(10, "passes over the RL problems")
    max_steps: int | None = flag(None, "RL steps, in place of epochs", "1..1e9")
    lr: float = flag(5e-7, "learning rate; after the warm-up linear to 0", "1e-12..1")
    warmup_steps: int = flag(50, "updates of linear warm-up, also in SFT", "0..1e9")
    max_grad_norm: float = flag(0.2, "longer gradients are scaled to this length", "1e-9..1e9")
    prompts_per_forward: int = flag(8, "prompts in one pass of an update, at most")
    lora_rank: int = flag(0, "train LoRA adapters (pip install peft); 0: all weights", "0..1e9")
    lora_alpha: float = flag(128.0, "LoRA's scale is alpha / rank", "1e-9..1e9")
    lora_dropout: float = flag(0.0, "LoRA's dropout in SFT; RL has none")
    # SFT
    sft_steps: int = flag(2000, "SFT updates")
    sft_batch: int = flag(64, "examples in an SFT update, over all processes")
    sft_rows_per_forward: int = flag(1, "examples in one pass, at most")
    sft_length: int = flag(1024, "longer completions are left out, tokens")
    sft_lr: float = flag(1e-5, "SFT's learning rate, with the same schedule", "1e-12..1")
    rewrite_data: str = flag("open-r1/OpenR1-Math-220k", "solutions for --stage rewrite")
    rewriter: str = flag("Qwen/Qwen2.5-14B-Instruct", "instruction model for --stage rewrite")
    # reports and checkpoints
    eval_size: int = flag(256, "held-out problems")
    save_every: int = flag(50, "RL steps between checkpoints; 0: at the end alone", "0..1e9")
    sft_save_every: int = flag(0, "SFT steps between checkpoints; 0: at the end alone", "0..1e9")
    save_rollouts: bool = flag(True, "write two groups a step to rollouts.jsonl")
    wandb: str | None = flag(None, "project to send metrics to (pip install wandb)")

PRESETS = {"llada": {}, "toy": dict(
    model="toy", train_data="toy", sft_data="toy", gen_length=20, diffusion_steps=4,
    block_length=10, rows_per_call=512, prompts_per_step=16, prompts_per_forward=16, min_chunk=1,
    max_chunk=2, room=10, reward_correct=1.0, reward_format=0.0, max_steps=200, lr=2e-4,
    warmup_steps=20, sft_steps=500, sft_batch=128, sft_length=20, sft_rows_per_forward=128,
    sft_lr=3e-3, eval_size=512)}

# A resumed run may have other values of these.
FREE_ON_RESUME = {"out_dir", "resume", "save_every", "sft_save_every", "save_rollouts", "wandb",
                  "lr", "sft_lr", "compile"}

def parse_flags(config_class, argv=None, presets=None):
    """The settings: a preset's defaults, overridden by flags, all within their bounds."""
    def refuse(message):
        raise UsageError(f"{message}; --help lists the flags")

    parser = transformers.HfArgumentParser(config_class, allow_abbrev=False)
    parser.error = refuse  # argparse's own prints the usage of all flags first
    if presets:
        known, _ = parser.parse_known_args(argv)
        parser.set_defaults(**presets[known.preset])
    cfg = config_class(**vars(parser.parse_args(argv)))
    for setting in fields(cfg):
        value = getattr(cfg, setting.name)
        bounds = setting.metadata.get("metavar")
        if bounds and value is not None:
            least, most = map(float, bounds.split(".."))
            if not least <= value <= most:  # nan is not within them either
                raise UsageError(f"--{setting.name} must be within {bounds}, not {value}")
    return cfg

def check_settings(cfg):
    count_blocks(cfg.gen_length, cfg.block_length, cfg.diffusion_steps)
    if cfg.eta_low > cfg.eta_high or cfg.min_chunk > cfg.max_chunk:
        raise UsageError("--eta_low is above --eta_high, or --min_chunk above --max_chunk")
    if cfg.prompts_per_step % world() or cfg.sft_batch % world():
        raise UsageError(f"--prompts_per_step {cfg.prompts_per_step} or --sft_batch "
                         f"{cfg.sft_batch} is no multiple of {world()} processes")
    if cfg.stage == "sft" and not cfg.sft_data:
        raise UsageError("--stage sft needs --sft_data")
    if not (torch.cuda.is_available() or cfg.model == "toy" or Path(cfg.model).is_dir()):
        raise UsageError(f"{cfg.model} is no folder, and torch finds no GPU to train it on (8 x 80 "
                         "GB for the defaults); on a CPU try: python igpo.py --preset toy")

def load_data(cfg):
    """RL problems, held-out problems and SFT problems, as far as the stage needs them."""
    problems = []
    sft_problems = []
    if cfg.stage != "sft" and cfg.train_data == "toy":
        problems = toy_data(toy_problem, cfg.eval_size, f"rl held out {cfg.seed}")
        problems += toy_data(toy_problem, 4000, f"rl {cfg.seed}")
    elif cfg.stage != "sft":
        left_out = Counter()
        problems = read_problems(cfg.train_data, left_out=left_out)
        print0(describe_problems(problems, left_out, cfg.train_data))
        if len(problems) <= cfg.eval_size:
            raise UsageError(f"{cfg.train_data}: {len(problems)} problems are too few, since "
                             f"--eval_size {cfg.eval_size} of them are held out")
    if cfg.stage != "rl" and cfg.sft_data == "toy":
        sft_problems = toy_data(toy_example, 8000, f"sft {cfg.seed}")
    elif cfg.stage != "rl" and cfg.sft_data:
        sft_problems, left_out = read_examples(cfg.sft_data)
        print0(describe_problems(sft_problems, left_out, cfg.sft_data))
    return problems[cfg.eval_size :], problems[: cfg.eval_size], sft_problems

def train(cfg, device):
    """SFT and RL with everything around them."""
    started = time.time()
    out, newest = look_at_run(cfg)
    problems, held_out, sft_problems = load_data(cfg)
    # If RL had begun, the model is first the one that SFT wrote; train_rl loads the checkpoint.
    sft_folder = out / "sft" if newest.stage == "rl" and sft_problems else None
    model, tokenizer = load_policy(cfg, device, sft_folder)

    def encode(problems, completion_length):
        return encode_problems(model, tokenizer, problems, completion_length,
                               cfg.max_prompt_length)

    rl_examples = encode(problems, cfg.gen_length)
    held_out = encode(held_out, cfg.gen_length)
    sft_examples = []
    if sft_problems and sft_folder is None:
        # A completion that fits has room for its end token.
        sft_examples = [example for example in encode(sft_problems, cfg.sft_length)
                        if len(example.target) < cfg.sft_length]
        if not sft_examples:
            raise UsageError(f"{cfg.sft_data}: all completions exceed --sft_length "
                             f"{cfg.sft_length}")

    open_run(cfg, out, newest)
    print0(f"{model.num_parameters() / 1e6:.2f}M parameters, run folder {out}\n"
           f"short enough: {len(sft_examples)} of {len(sft_problems)} SFT examples, "
           f"{len(rl_examples)} of {len(problems)} RL problems")
    if newest.stage == "start":
        evaluate("accuracy_start", model, tokenizer, held_out, cfg, out)
    if sft_examples:
        train_sft(model, sft_examples, newest, cfg, out)
        with write_folder(out / "sft") as folder:
            save_model(model, tokenizer, folder)
        evaluate("accuracy_sft", model, tokenizer, held_out, cfg, out)
    if rl_examples:
        train_rl(model, tokenizer, rl_examples, held_out, newest, cfg, out)
        with write_folder(out / "final") as folder:
            save_model(model, tokenizer, folder)
    if rank() == 0:
        write_summary(out, time.time() - started)
    barrier()  # one that ends early would break collectives that others are still in

def main(argv=None):
    cfg = parse_flags(Config, argv, PRESETS)
    # In rewriting, one process can have far more to do than another.
    device = setup(hours=12 if cfg.stage == "rewrite" else 2)
    check_settings(cfg)
    if cfg.stage == "rewrite":
        announce(cfg.rewriter, device)
        rewrite_traces(cfg, device)
    else:
        announce(cfg.model, device)
        train(cfg, device)

def run_main(main, name):
    """Run a command line, also eval.py's. An error of the user is one line and status 2."""
    try:
        main()
    except UsageError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 mostly says the same, and torchrun then ends this process
        sys.stdout.flush()
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # at once: other processes may be waiting in a collective
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    run_main(main, "igpo.py")
