r"""Accuracy of a masked diffusion LM on GSM8K, MATH500, AMC and Minerva, by the sampler, prompt and grader of igpo.py.

    python eval.py --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k,math500,amc,minerva
    torchrun --nproc_per_node=8 eval.py --model runs/RUN/final            the same results, on eight GPUs
    python eval.py --model FOLDER --tasks math500 --data math500=math500.jsonl --limit 20      offline, a quick look
    python eval.py --rescore runs/eval-NAME/samples.jsonl                 grade again what is stored, without a model
    python eval.py --speed --model FOLDER                                 what the sampler's variants cost on this machine
    python eval.py --speed --train --model random-8b                      what two RL steps with LoRA cost, without a download
    python eval.py --proof runs/proof                                     IGPO against GRPO and others in the toy world

The protocol is the paper's: one greedy answer a problem, for AMC the mean over 16 answers at temperature 0.1 (avg@16).

--out_dir (default runs/eval-MODEL; all processes must see it) then holds

    samples.jsonl    one line a sample: task, problem, sample, prompt, completion, extracted (the answer it commits to),
                     reference, verdict, timed_out (the grader gave up: wrong), length (tokens). Written as it goes.
    results.json     the results, every setting, the versions and the hardware
    settings.json    the settings alone, from the start on

A killed evaluation, started again with the same command, continues where it stopped. Neither that nor the number of
processes changes a sample (on one kind of hardware): its random numbers depend on (seed, task, problem, sample) alone,
and which samples share a batch, on the settings alone. Whole batches are shared out over the processes.
"""

import collections
import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import igpo
from igpo import Example, Parser, UsageError, answer_examples, barrier, committed_answer, encode_prompt, flag, grade
from igpo import load_model, mean_across_ranks, print0, rank, read_rows, setup, world

TASKS = {  # where the problems are on the hub, the alternatives in order
    "gsm8k": ["openai/gsm8k"],
    "math500": ["HuggingFaceH4/MATH-500"],
    "amc": ["AI-MO/aimo-validation-amc", "math-ai/amc23"],
    "minerva": ["math-ai/minervamath"],
}
SUBSET_AND_SPLIT = {"openai/gsm8k": ("main", "test"), "AI-MO/aimo-validation-amc": (None, "train")}  # else None, "test"


@dataclass
class Config:
    """Every setting, every one a flag."""
    model: str | None = flag(None, "model folder or hub name")
    tasks: str = flag("gsm8k,math500,amc,minerva", "what to measure, separated by commas")
    data: str = flag("", "other sources of problems, as gsm8k=FILE.jsonl,math500=FILE.jsonl; default: the hub")
    limit: int | None = flag(None, "use the first problems of each task only")
    out_dir: str | None = flag(None, "folder for the results; default: runs/eval-MODEL")
    overwrite: bool = flag(False, "forget the samples in out_dir instead of continuing")
    rescore: str | None = flag(None, "a samples.jsonl to grade again; no other flag matters then")
    seed: int = flag(0, "seed of everything random")
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "weights; auto: bfloat16 on a GPU, else float32")
    # sampler
    gen_length: int = flag(256, "completion length, tokens")
    diffusion_steps: int = flag(128, "denoising steps for a completion")
    block_length: int = flag(32, "tokens in a semi-autoregressive block")
    batch_size: int = flag(16, "samples in one batch")
    temperature: float = flag(0.0, "of gsm8k, math500 and minerva; 0 is greedy")
    samples: int = flag(1, "answers to a problem of gsm8k, math500 and minerva")
    amc_temperature: float = flag(0.1, "of amc")
    amc_samples: int = flag(16, "answers to a problem of amc")
    cache: Literal["none", "block"] = flag("none", "block: the approximate sampler that caches what is outside the block")
    threshold: float | None = flag(None, "approximate: fill in at once what is more confident than this, e.g. 0.9")
    # other work
    speed: bool = flag(False, "time the sampler; --model is a folder, a hub name, random (small) or random-8b (LLaDA's shape)")
    prompt_length: int = flag(64, "prompt tokens of --speed")
    train: bool = flag(False, "with --speed: time two RL steps with LoRA of rank 128 (needs pip install peft) instead")
    proof: str | None = flag(None, "folder in which to compare the algorithms in the toy world")
    seeds: int = flag(3, "seeds of --proof")
    variants: str = flag("igpo,grpo,resample", "algorithms of --proof: also full_hints, no_filter, noisy_traces, no_sft")


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def reference_answer(row):
    r"""The final answer of a row: what follows GSM8K's ####, else the last \boxed{}, else column answer as it is."""
    answer = row.get("answer")
    text = answer if answer not in (None, "") else row.get("solution")
    if isinstance(text, float) and text.is_integer():  # AMC's answers are numbers
        text = int(text)
    text = str(text)
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = committed_answer(text) if "\\boxed" in text else None
    return boxed or (text.strip() if answer not in (None, "") else "")


def read_problems(source, limit=None):
    """(question, reference answer) pairs of a local file or a hub data set. Its columns are problem or question, and
    answer or solution."""
    subset, split = SUBSET_AND_SPLIT.get(source, (None, "test"))
    rows = read_rows(source, ("problem|question", "answer|solution"), split, subset)[:limit]
    problems = [(str(row["problem"] if "problem" in row else row["question"]), reference_answer(row)) for row in rows]
    for number, (_, reference) in enumerate(problems, 1):
        if not reference:
            raise UsageError(f"{source}, row {number}: no answer, and no #### or \\boxed{{}} in the solution")
    return problems


def task_problems(task, source=None, limit=None):
    """The problems of a task, from the given source or the first of its hub data sets that can be had."""
    if source:
        return source, read_problems(source, limit)
    for source in TASKS[task]:
        try:
            return source, read_problems(source, limit)
        except UsageError as error:
            problem = error
    raise UsageError(f"{problem} (--data {task}=FILE)")


def parse_names(text, known, kind):
    """"gsm8k,amc" -> ["gsm8k", "amc"], each one of the known tasks or variants, whichever kind says"""
    names = list(dict.fromkeys(re.findall(r"[^,\s]+", text)))
    for name in names or [""]:
        if name not in known:
            raise UsageError(f"no {kind} {name!r}; there are {', '.join(known)}")
    return names


def parse_data(text):
    """"gsm8k=a.jsonl,math500=b.jsonl" -> {"gsm8k": "a.jsonl", "math500": "b.jsonl"}"""
    sources = dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())
    for task, source in sources.items():
        if task not in TASKS or not source:
            raise UsageError(f"--data takes TASK=FILE, TASK being one of {', '.join(TASKS)}, not {task!r}={source!r}")
    return sources


# ---------------------------------------------------------------------------------------------------------------------
# The output folder. Rank 0 writes samples.jsonl, rank r its own samples.rank_r.jsonl, until they are merged.

COLUMNS = {"task", "problem", "sample", "completion", "reference", "verdict", "length"}  # what --rescore needs


def read_samples(path):
    """The samples in a file. A last line that a kill left half-written is no sample yet."""
    samples, lines = [], Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            sample = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                break
            raise UsageError(f"{path}, line {number}: not JSON") from error
        if sample is not None:
            have = sample if isinstance(sample, dict) else {}
            if absent := sorted(COLUMNS - have.keys()):
                raise UsageError(f"{path}, line {number}: no column {absent[0]!r} (it has {', '.join(have) or 'none'})")
            samples.append(sample)
    return samples


def key(sample):
    return sample["task"], sample["problem"], sample["sample"]


def merge_samples(out, tasks):
    """All samples in the folder, sorted, moved to samples.jsonl. Being killed in the middle of it loses nothing."""
    parts = sorted(out.glob("samples*.jsonl"))
    samples = {key(sample): sample for path in parts for sample in read_samples(path)}
    samples = sorted(samples.values(), key=lambda s: (tasks.index(s["task"]), s["problem"], s["sample"]))
    replace(out / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    for path in parts:
        if path.name != "samples.jsonl":
            path.unlink()
    return samples


def replace(path, text):
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


@contextlib.contextmanager
def locked(out):
    """One evaluation at a time writes to a folder: the processes of a killed torchrun may live on for a while."""
    if rank() > 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise UsageError(f"cannot write to {out} ({error.strerror})") from error
    with lock:  # the lock ends with the process, however that ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another evaluation is writing to {out}; end it, or wait for it") from error
        except OSError:
            pass  # a file system without locks
        yield


def claim(out, settings):
    """Write settings.json, or compare it with what the samples in the folder were made with."""
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    before = json.loads(path.read_text()) if path.is_file() else {}
    differ = [f"{name} was {before.get(name)}, now it is {value}" for name, value in settings.items()
              if name not in before or before[name] != value]
    if differ and any(part.stat().st_size for part in out.glob("samples*.jsonl")):
        raise UsageError(f"{out} has samples made with other settings: {'; '.join(differ)}. "
                         "Give another --out_dir, or --overwrite to forget the samples")
    barrier()  # every rank reads before one writes
    if rank() == 0:
        replace(path, json.dumps(before | settings, indent=2))


def checksum(model):
    """Of the weights, so that a checkpoint that was trained further is not taken for the one before."""
    integers = {2: torch.int16, 4: torch.int32}  # whose sum, unlike that of floats, is the same in any order
    return sum(p.detach().view(integers[p.element_size()]).sum().item() for p in model.parameters()) % 2**32


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def batches_of(prompts, samples, batch_size, seed):
    """Lists of (problem index, sample index), together all samples of a task.

    Prompts of like length share a batch, for little padding. The order of the batches is random, so that from the
    start they are typical, and with them the running accuracy and the estimate of the time left."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    jobs = [(i, s) for i in by_length for s in range(samples)]
    batches = [jobs[at: at + batch_size] for at in range(0, len(jobs), batch_size)]
    random.Random(seed).shuffle(batches)
    return batches


def graded(completion, reference):
    """The fields of a sample that the grader is responsible for."""
    timeouts = igpo.GRADE_TIMEOUTS
    verdict = grade(completion, reference)
    return {"extracted": committed_answer(completion), "reference": reference, "verdict": verdict,
            "timed_out": igpo.GRADE_TIMEOUTS > timeouts}


def sample_batches(model, tokenizer, examples, batches, done, path, *, seed, sampling):
    """Answer and grade this process's share of the batches, appending to `path`. -> {task: (tokens, seconds)}

    examples, sampling: task -> its Examples, and the settings for sample(). batches: (task, [(problem, sample), ...])
    pairs. done: the samples that are stored; a batch that lacks some of its samples is done again as a whole."""
    finished, verdicts = {key(sample) for sample in done}, {task: [] for task in examples}
    for sample in done:
        verdicts[sample["task"]].append(sample["verdict"])
    left = [(task, jobs) for task, jobs in batches if any((task, *job) not in finished for job in jobs)]
    batches, speed = left[rank():: world()], dict.fromkeys(examples, (0, 0.0))
    with open(path, "a") as file, tqdm(total=sum(len(jobs) for _, jobs in batches), unit=" samples", mininterval=1,
                                       smoothing=0, dynamic_ncols=True, disable=rank() > 0) as bar:
        for task, jobs in batches:
            began = time.time()
            answers = list(answer_examples(model, tokenizer, examples[task], jobs=jobs, batch_size=len(jobs),
                                           seed=(seed, task), **sampling[task]))
            tokens, seconds = speed[task]
            speed[task] = tokens + sum(length for *_, length in answers), seconds + time.time() - began
            for i, s, completion, length in answers:
                sample = {"task": task, "problem": i, "sample": s, "prompt": tokenizer.decode(examples[task][i].prompt),
                          "completion": completion, **graded(completion, examples[task][i].answer), "length": length}
                if key(sample) not in finished:
                    file.write(json.dumps(sample) + "\n")
                    verdicts[task].append(sample["verdict"])
            file.flush()
            bar.set_description(f"{task}, accuracy {statistics.mean(verdicts[task]):.3f}", refresh=False)
            bar.update(len(jobs))
    return speed


# ---------------------------------------------------------------------------------------------------------------------
# Results


def summarise(samples):
    """Samples of one task -> its results. The standard error is over problems: with several samples of each, that of
    the mean of the problems' means, since samples of one problem are not independent."""
    by_problem = collections.defaultdict(list)
    for sample in samples:
        by_problem[sample["problem"]].append(sample["verdict"])
    means = [statistics.mean(map(float, verdicts)) for verdicts in by_problem.values()]
    return {
        "accuracy": statistics.mean(means),
        "standard_error": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "n": len(means), "samples": len(samples),
        "completion_length": statistics.mean(sample["length"] for sample in samples),
        "no_answer": statistics.mean(sample["extracted"] is None for sample in samples),
        "grade_timeouts": sum(sample["timed_out"] for sample in samples),
    }


def table(results):
    lines = ["task       accuracy %   std. error       n  samples  no answer %   length  tokens/s"]
    for task, r in results.items():
        error = "-" if r["standard_error"] is None else f"{100 * r['standard_error']:.2f}"
        speed = "-" if r.get("tokens_per_second") is None else f"{r['tokens_per_second']:.0f}"
        lines.append(f"{task:10} {100 * r['accuracy']:10.2f} {error:>12} {r['n']:7} {r['samples']:8} "
                     f"{100 * r['no_answer']:12.1f} {r['completion_length']:8.1f} {speed:>9}")
    if timeouts := sum(r["grade_timeouts"] for r in results.values()):
        lines.append(f"{timeouts} answers could not be graded in time and count as wrong (timed_out in samples.jsonl)")
    return "\n".join(lines)


def environment():
    """Versions and hardware, for results.json."""
    installed = {name: next((found.version for found in importlib.metadata.distributions(name=name)), None)
                 for name in ("torch", "transformers", "datasets", "math-verify")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"versions": {"python": platform.python_version(), **installed},
            "hardware": {"processes": world(), "gpu": gpu, "cpu": platform.machine(), "cores": os.cpu_count()}}


def rescore(path):
    """Grade the completions of a samples file again, and print the results and which verdicts changed."""
    if not Path(path).is_file():
        raise UsageError(f"no samples file at {path}")
    samples, changed = read_samples(path), []
    if not samples:
        raise UsageError(f"{path} holds no samples")
    for sample in tqdm(samples, desc="grading", mininterval=1, dynamic_ncols=True):
        before = sample["verdict"]
        sample |= graded(sample["completion"], sample["reference"])
        if sample["verdict"] != before:
            changed.append(f"  {sample['task']} problem {sample['problem']} sample {sample['sample']}: "
                           f"{'right -> wrong' if before else 'wrong -> right'}, "
                           f"{sample['extracted']!r} for {sample['reference']!r}")
    tasks = dict.fromkeys(sample["task"] for sample in samples)
    print(table({task: summarise([s for s in samples if s["task"] == task]) for task in tasks}))
    print("\n".join([f"{len(changed)} of {len(samples)} verdicts changed", *changed]))


# ---------------------------------------------------------------------------------------------------------------------
# --speed: what the sampler costs on this machine, beside the bare forward passes that it contains.

SMALL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, vocab_size=8192)
LLADA_8B = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=32, vocab_size=126464,
                max_position_embeddings=4096)


def random_model(shape, device, dtype):
    """A model of a given shape with random weights, made on the device itself: nothing is downloaded or copied."""
    config = LlamaConfig(**shape, is_causal=False, mask_token_id=shape["vocab_size"] - 1, bos_token_id=None,
                         eos_token_id=[shape["vocab_size"] - 2], pad_token_id=shape["vocab_size"] - 2)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def matrix_peak(device, size=8192):
    """FLOP/s that this GPU reaches on one large bf16 matrix product: the practical ceiling of everything else."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for repeats in (3, 20):  # the first time to warm up
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            a @ a
        torch.cuda.synchronize()
    return repeats * 2 * size ** 3 / (time.perf_counter() - began)


@torch.no_grad()
def speed_table(model, *, rows=8, prompt_length=64, gen_length=256, block_length=32, steps=128, temperature=0.0,
                threshold=0.9, repeats=1, prompts=None):
    """Time the sampler's variants on the model's device -> a list of dicts, one a variant, the bare forwards first.

    seconds: the fastest of `repeats` runs, taken in turns after a warm-up. tokens_per_second: completion tokens, all
    gen_length of each row. ratio: seconds over those of the bare forwards, `steps` of them with the head at one block.
    flops: achieved FLOP/s. equal: share of tokens equal to the exact sampler's; on random weights it says little."""
    device, config = next(model.parameters()).device, model.config
    if prompts is None:
        prompts = torch.randint(0, min(config.vocab_size, config.mask_token_id), (rows, prompt_length),
                                generator=torch.Generator().manual_seed(0)).to(device)
    (B, P), L, K = prompts.shape, gen_length, block_length
    canvas = F.pad(prompts, (0, L), value=config.mask_token_id)

    def bare():
        for step in range(steps):
            start = P + step * (L // K) // steps * K
            igpo.logits_at(model, canvas, None, torch.arange(start, start + K, device=device))

    def sampler(**options):
        return lambda: igpo.sample(model, prompts, gen_length=L, block_length=K, steps=steps, temperature=temperature,
                                   generator=igpo.seeded("speed"), **options)

    variants = {"bare forwards": bare, "exact": sampler(), "cache": sampler(cache="block"),
                "threshold": sampler(threshold=threshold), "cache + threshold": sampler(cache="block", threshold=threshold)}
    work = []  # one number a forward pass, its FLOPs
    hook = model.register_forward_pre_hook(with_kwargs=True, hook=lambda model, args, kwargs: work.append(
        igpo.flops(config, B, P + L, K, queries=kwargs["input_ids"].shape[1])))
    table, outputs = {}, {}
    try:
        for function in (variants["cache"], variants["exact"]):  # warm up
            function()
        for _ in range(repeats):
            for name, function in variants.items():
                work.clear()
                wait(device)
                began = time.perf_counter()
                outputs[name] = function()
                wait(device)
                seconds = min(time.perf_counter() - began, table.get(name, {}).get("seconds", float("inf")))
                table[name] = dict(variant=name, seconds=seconds, tokens_per_second=B * L / seconds, forwards=len(work),
                                   flops=sum(work) / seconds)
    finally:
        hook.remove()
    for name, row in table.items():
        row["ratio"] = row["seconds"] / table["bare forwards"]["seconds"]
        row["equal"] = None if name == "bare forwards" else (outputs[name] == outputs["exact"]).float().mean().item()
    return list(table.values())


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_speed(model, **settings):
    """speed_table as Markdown, with the device's name: what the README shows."""
    device = next(model.parameters()).device
    table = speed_table(model, **settings)
    name, peak = f"CPU, {torch.get_num_threads()} thread(s)", None
    if device.type == "cuda":
        name, peak, measured = torch.cuda.get_device_name(device), None, matrix_peak(device)
        peak = igpo.peak_flops(name)
        name += f", {measured / 1e12:.0f} TFLOP/s measured on a bf16 matrix product" + (f", {peak / 1e12:.0f} by data sheet" if peak else "")
    print(f"{name}\n\n| | seconds | tokens/s | forwards | x bare | TFLOP/s |{' of measured peak |' if peak else ''} equal tokens |")
    print("|---|" + "---|" * (7 if peak else 6))
    for r in table:
        equal = "" if r["equal"] is None else f"{r['equal']:.1%}"
        share = f" {r['flops'] / measured:.0%} |" if peak else ""
        print(f"| {r['variant']} | {r['seconds']:.2f} | {r['tokens_per_second']:.1f} | {r['forwards']} | {r['ratio']:.2f} | "
              f"{r['flops'] / 1e12:.3g} |{share} {equal} |")


def speed_training(model, *, lora_rank=128, steps=2, prompt_length=128, **flags):
    """Time RL steps of a model with LoRA on random prompts, all of whose groups are stuck: two roll-outs each and mu
    updates, the costliest case. -> the last step's metrics, with peak memory in GiB where the device is a GPU."""
    device, config, generator = next(model.parameters()).device, model.config, igpo.seeded("speed")
    def ids(length):
        return torch.randint(0, config.vocab_size - 2, (length,), generator=generator)
    igpo.add_lora(model, lora_rank)
    igpo.recompute_activations(model)
    settings = {"max_steps": steps, "lora_rank": lora_rank, "prompts_per_step": 8, "show_every": 0, "save_every": 0} | flags
    cfg = igpo.parse([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    examples = [Example(ids(prompt_length).tolist(), "none", ids(cfg.gen_length // 2)) for _ in range(cfg.prompts_per_step)]
    with tempfile.TemporaryDirectory() as out:
        igpo.train_rl(model, None, igpo.toy_model(0)[1], examples, [], cfg, device, Path(out))
        metrics = igpo.read_log(Path(out))[-1]
    if device.type == "cuda":
        metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


def speed(cfg):
    device, random_shapes = setup(), {"random": SMALL, "random-8b": LLADA_8B}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if cfg.model in random_shapes:
        model = random_model(random_shapes[cfg.model], device, dtype)
    else:
        model, _ = load_model(cfg.model, dtype=dtype, device=device)
    if cfg.train:
        metrics = speed_training(model)
        shown = ("memory_gib", "seconds_rollout", "seconds_update", "forwards", "tokens_per_second", "flops_rollout",
                 "flops_update", "peak_share_rollout", "peak_share_update")
        print("\n".join(f"{name:20} {metrics[name]:.4g}" for name in shown if name in metrics))
        return
    print_speed(model, rows=cfg.batch_size, prompt_length=cfg.prompt_length, gen_length=cfg.gen_length,
                block_length=cfg.block_length, steps=cfg.diffusion_steps, temperature=cfg.temperature,
                threshold=cfg.threshold or 0.9)


# ---------------------------------------------------------------------------------------------------------------------
# The proof in miniature: the toy world under several algorithms, from the same SFT checkpoint of each seed.

VARIANTS = {
    "igpo": [], "grpo": ["--algo", "grpo"], "resample": ["--algo", "resample"],
    "full_hints": ["--eta_low", "1", "--eta_high", "1"], "no_filter": ["--tau", "1"], "noisy_traces": ["--trace_noise", "0.3"],
    "no_sft": [],  # from the random start
}


def run_variants(out, seeds, variants):
    """Train each variant with each seed in the toy world; a finished run is not run again. -> {variant: [log, ...]}"""
    logs = {variant: [] for variant in variants}
    for seed in range(seeds):
        common = ["--preset", "toy", "--seed", str(seed), "--show_every", "0", "--save_every", "0", "--overwrite"]
        sft = out / f"sft-{seed}"
        if not (sft / "summary.json").exists():
            igpo.main([*common, "--stage", "sft", "--out_dir", str(sft)])
        for variant in variants:
            folder, model = out / f"{variant}-{seed}", sft / ("start" if variant == "no_sft" else "sft")
            if not (folder / "summary.json").exists():
                print(f"\n{variant}, seed {seed}")
                igpo.main([*common, "--stage", "rl", "--model", str(model), "--eval_every", "10", *VARIANTS[variant],
                           "--out_dir", str(folder)])
            logs[variant].append(igpo.read_log(folder))
    return logs


def mean_and_error(values):
    """Mean and standard error over seeds."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return mean, (spread / len(values)) ** 0.5


def accuracy_curve(log):
    """Held-out accuracy at step 0, 10, 20, ... of one run."""
    ends = {line["stage"]: line for line in log}["eval"]["accuracy_final"]
    return [log[0]["accuracy_start"], *(line["eval_accuracy"] for line in log if "eval_accuracy" in line), ends]


def all_wrong_curve(log, every=10):
    """Share of groups that are all wrong before hints, means over ten steps each."""
    values = [line["all_wrong"] for line in log if line["stage"] == "rl"]
    return [sum(values[at: at + every]) / every for at in range(0, len(values), every)]


def proof(out, seeds, variants):
    """Run the comparison and write out/proof.md: a table, and curves in a form that GitHub draws."""
    out.mkdir(parents=True, exist_ok=True)
    logs = run_variants(out, seeds, variants)
    lines = ["| variant | accuracy before RL | final accuracy | all wrong before hints | after hints | all wrong, last 20 steps |",
             "|---|---|---|---|---|---|"]
    for variant, runs in logs.items():
        rl = [[line for line in run if line["stage"] == "rl"] for run in runs]
        columns = [
            [accuracy_curve(run)[0] for run in runs], [accuracy_curve(run)[-1] for run in runs],
            [sum(line["all_wrong"] for line in r) / len(r) for r in rl],
            [sum(line["all_wrong_after"] for line in r) / len(r) for r in rl],
            [sum(line["all_wrong"] for line in r[-20:]) / 20 for r in rl]]
        lines.append(f"| {variant} | " + " | ".join("{:.3f} ± {:.3f}".format(*mean_and_error(c)) for c in columns) + " |")
    lines += ["", f"Means ± standard errors over {seeds} seeds."]
    for title, curve in ("held-out accuracy", accuracy_curve), ("groups that are all wrong, before hints", all_wrong_curve):
        curves = {variant: [curve(run) for run in logs[variant]] for variant in variants[:3]}
        steps = range(0, 10 * len(next(iter(curves.values()))[0]), 10)
        lines += ["", "```mermaid", "xychart-beta", f'    title "{title}: {", ".join(curves)}"',
                  f'    x-axis "RL step" [{", ".join(map(str, steps))}]', '    y-axis "share" 0 --> 1',
                  *("    line [" + ", ".join(f"{sum(v) / len(v):.3f}" for v in zip(*c)) + "]" for c in curves.values()), "```"]
    (out / "proof.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def check(cfg):
    """What can be known to be wrong before anything is loaded."""
    if cfg.model is None:
        raise UsageError("no model; give --model FOLDER_OR_HUB_NAME, or --rescore SAMPLES.jsonl")
    for name in ("limit", "gen_length", "diffusion_steps", "block_length", "batch_size", "samples", "amc_samples"):
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise UsageError(f"--{name} is at least 1, not {value}")
    for name in ("temperature", "amc_temperature"):
        if (value := getattr(cfg, name)) < 0:
            raise UsageError(f"--{name} is at least 0, not {value}")
    blocks, rest = divmod(cfg.gen_length, cfg.block_length)
    if rest:
        raise UsageError(f"--gen_length {cfg.gen_length} is not divisible by --block_length {cfg.block_length}")
    if cfg.diffusion_steps % blocks:
        raise UsageError(f"--diffusion_steps {cfg.diffusion_steps} is not divisible by the number of blocks, {blocks}")


def main(argv=None):
    cfg = Config(**vars(Parser(Config, allow_abbrev=False).parse_args(argv)))
    if cfg.rescore:
        return rescore(cfg.rescore)
    if cfg.proof:
        return proof(Path(cfg.proof), cfg.seeds, parse_names(cfg.variants, VARIANTS, "variant"))
    check(cfg)
    if cfg.speed:
        return speed(cfg)
    tasks, sources = parse_names(cfg.tasks, TASKS, "task"), parse_data(cfg.data)
    device = setup()
    found = {task: task_problems(task, sources.get(task), cfg.limit) for task in tasks}
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(cfg.dtype, cfg.dtype)
    settings = dataclasses.asdict(cfg) | {
        "tasks": tasks, "dtype": dtype, "data": {task: source for task, (source, _) in found.items()},
        "problems": {task: len(problems) for task, (_, problems) in found.items()},
        "problems_checksum": zlib.crc32(repr(found).encode())}
    for name in ("out_dir", "overwrite", "rescore", "speed", "prompt_length", "train", "proof", "seeds", "variants"):  # say nothing about the samples
        del settings[name]
    out = Path(cfg.out_dir or "runs/eval-" + re.sub(r"[^\w.-]+", "-", cfg.model).strip("-."))
    with locked(out):
        if cfg.overwrite and rank() == 0:
            for path in [*out.glob("samples*.jsonl"), *out.glob("results.json")]:
                path.unlink()
        evaluate(cfg, settings, {task: problems for task, (_, problems) in found.items()}, out, device)


def evaluate(cfg, settings, problems, out, device):
    """Sample what is not in the folder yet, then write and print the results. problems: task -> its problems."""
    barrier()
    everyone = None
    if world() > 1:  # the default group gives up after 10 minutes, but at the end some may wait much longer for others
        everyone = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    claim(out, settings)  # before the model is loaded, which takes a while

    # Each process has the whole model: there is no optimizer to make room for, and so nobody has to wait for anybody.
    model, tokenizer = load_model(cfg.model, dtype=getattr(torch, settings["dtype"]), device=device)
    examples = {task: [Example(encode_prompt(tokenizer, question), reference, None) for question, reference in pairs]
                for task, pairs in problems.items()}
    prompts = {task: [example.prompt for example in examples[task]] for task in examples}
    settings |= {"weights_checksum": checksum(model), "prompts_checksum": zlib.crc32(repr(prompts).encode())}
    claim(out, settings)
    if rank() == 0:
        merge_samples(out, list(problems))
    barrier()
    done = read_samples(out / "samples.jsonl")
    barrier()  # from here on rank 0 appends to that file

    protocol = {task: (cfg.amc_samples, cfg.amc_temperature) if task == "amc" else (cfg.samples, cfg.temperature)
                for task in problems}
    batches = [(task, jobs) for task, (samples, _) in protocol.items()
               for jobs in batches_of(prompts[task], samples, cfg.batch_size, cfg.seed)]
    total = sum(len(jobs) for _, jobs in batches)
    print0(f"{cfg.model} on {world()} x {device.type}, {len(done)} of {total} samples are in {out} already")
    speed = sample_batches(
        model, tokenizer, examples, batches, done,
        out / ("samples.jsonl" if rank() == 0 else f"samples.rank_{rank()}.jsonl"), seed=cfg.seed,
        sampling={task: dict(gen_length=cfg.gen_length, block_length=cfg.block_length, steps=cfg.diffusion_steps,
                             cache=None if cfg.cache == "none" else cfg.cache, threshold=cfg.threshold,
                             temperature=temperature) for task, (_, temperature) in protocol.items()})

    if everyone is not None:
        dist.barrier(everyone)
    speed = mean_across_ranks({(task, i): value for task in speed for i, value in enumerate(speed[task])}, device)
    if rank() == 0:
        stored = merge_samples(out, list(problems))
        if len(stored) != total:  # say so, rather than average over a part
            raise UsageError(f"{total - len(stored)} samples are missing in {out}; start the same command again")
        results, path = {}, out / "results.json"
        before = json.loads(path.read_text())["results"] if path.is_file() else {}
        for task in problems:
            tokens, seconds = speed[task, 0], speed[task, 1]  # of this run; where it had nothing to do, of the last one
            last = before.get(task, {}).get("tokens_per_second")
            results[task] = summarise([sample for sample in stored if sample["task"] == task])
            results[task]["tokens_per_second"] = world() * tokens / seconds if seconds else last
        replace(path, json.dumps({"results": results, "settings": settings, **environment()}, indent=2))
        print(f"{table(results)}\nsamples.jsonl and results.json are in {out}")


if __name__ == "__main__":
    igpo.run_main(main, "eval.py")
